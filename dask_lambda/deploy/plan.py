"""Which API calls lead from what there is to what is to exist.  Pure.

May import: calls, naming, policies, resources, seen, lifecycle, errors.

A plan is made anew each time from what is there, so whatever broke off half-way goes on where it
broke off, and a second ``deploy`` has nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dask_lambda import lifecycle
from dask_lambda.deploy import policies
from dask_lambda.deploy.artifact import Archive
from dask_lambda.deploy.calls import Call, LayerArn, Push, Step, Verb
from dask_lambda.deploy.naming import LOGS, size_of
from dask_lambda.deploy.resources import (
    ROLE_POLICY,
    Blueprint,
    BucketSpec,
    FunctionSpec,
    LayerSpec,
    LogGroupSpec,
    RepositorySpec,
    RoleSpec,
)
from dask_lambda.deploy.seen import (
    Seen,
    SeenBucket,
    SeenLogGroup,
    SeenRepository,
    SeenRole,
    is_ours,
)
from dask_lambda.errors import BucketNotFoundError, ConfigurationError, DeploymentError

#: What a new account may be limited to (MB): larger functions are left out then.
SMALL_ACCOUNT = 3008
#: S3's only region that CreateBucket must not be told (its API: CreateBucket).
US_EAST_1 = "us-east-1"
#: That ECR deletes with one call (its API: BatchDeleteImage).
MAX_IMAGES = 100

BLOCK_PUBLIC_ACCESS = {
    "BlockPublicAcls": True,
    "IgnorePublicAcls": True,
    "BlockPublicPolicy": True,
    "RestrictPublicBuckets": True,
}
ENCRYPTION = {
    "Rules": [
        {
            "ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"},
            "BucketKeyEnabled": False,
        }
    ]
}


def plan(wanted: Blueprint, seen: Seen, *, begun: Collection[str] = ()) -> list[Step]:
    """Return the steps, in the order in which they are to be taken.

    Parameters
    ----------
    wanted : Blueprint
    seen : Seen
    begun : collection of str
        Buckets that an earlier attempt was about to make: they are tagged by a second call, so one
        without a tag may be ours all the same.

    Returns
    -------
    list of Step
        With ``keep`` for what needs nothing.

    Raises
    ------
    DeploymentError
        A name is taken by something that this deployment has not made.
    BucketNotFoundError, ConfigurationError
        The user's own bucket does not exist, or is in another region.
    """
    arns = _known_layers(wanted, seen)
    steps = [
        # First, since it is what takes longest, and what docker may fail at.
        *_repository(wanted.repository, seen.repository, wanted),
        *_bucket(wanted, seen.bucket, begun),
        _role(wanted.role, seen.role, wanted.options.name),
        *(_log_group(wanted, each, seen) for each in wanted.log_groups),
        *_layers(wanted, arns),
    ]
    functions = [_function(wanted, each, seen, arns) for each in wanted.functions]
    code = wanted.package.code
    if code is not None and code.is_large and any(_needs(step) for step in functions):
        upload, gone = _through_s3(wanted, code, "function code")
        functions = [upload, *functions, gone]
    return [*steps, *functions, *_surplus(wanted, seen, arns)]


def changes(steps: list[Step]) -> list[Step]:
    """Return the steps that do something."""
    return [step for step in steps if step.calls]


# -- the image ---------------------------------------------------------------------------------


def _repository(
    spec: RepositorySpec | None, seen: SeenRepository | None, wanted: Blueprint
) -> Iterator[Step]:
    if spec is None:
        return
    name = {"repositoryName": spec.name}
    policy = Call("ecr", "SetRepositoryPolicy", {**name, "policyText": json.dumps(spec.policy)})
    if seen is None:
        create = {
            **name,
            "imageTagMutability": "IMMUTABLE",  # a tag names the content
            "tags": _tag_list(spec.tags),
        }
        calls = [Call("ecr", "CreateRepository", create), policy]
        yield Step("create", "repository", spec.name, (), calls)
    elif not is_ours(seen, wanted.options.name):
        raise _taken("repository", spec.name)
    else:
        why: list[str] = []
        calls = []
        if not policies.contains(seen.policy, spec.policy):
            why.append("Lambda may not fetch images from it")
            both = json.dumps(policies.joined(seen.policy, spec.policy))
            calls.append(Call("ecr", "SetRepositoryPolicy", {**name, "policyText": both}))
        if missing := _missing_tags(spec.tags, seen.tags):
            why.append(_tags_differ(missing))
            arn = wanted.names.repository_arn
            tags = {"resourceArn": arn, "tags": _tag_list(missing)}
            calls.append(Call("ecr", "TagResource", tags))
        yield _step("repository", spec.name, why, calls)
    if seen is not None and spec.recipe.tag in seen.images:
        yield Step("keep", "image", spec.uri)
    else:
        why = [spec.recipe.because] if spec.recipe.because else []
        yield Step("create", "image", spec.uri, why, [Push(spec.recipe, spec.uri)])


def _surplus_images(wanted: Blueprint, seen: SeenRepository | None) -> Iterator[Step]:
    if seen is None or not is_ours(seen, wanted.options.name):
        return
    used = wanted.package.image or ""
    if wanted.repository is None:
        if not used.startswith(f"{wanted.names.where.registry}/{seen.name}"):
            why = ("workers are no image of it any more",)
            yield Step("delete", "repository", seen.name, why, [delete_repository(seen.name)])
        return
    old = [tag for tag in seen.images if tag != wanted.repository.recipe.tag]
    if old:
        ids = [{"imageTag": tag} for tag in old[:MAX_IMAGES]]
        call = Call("ecr", "BatchDeleteImage", {"repositoryName": seen.name, "imageIds": ids})
        why = ("environments that are not used any more",)
        yield Step("delete", "images", seen.name, why, [call])


def delete_repository(name: str) -> Call:
    """Return the call that deletes a repository with all of its images."""
    gone = ("RepositoryNotFoundException",)
    return Call("ecr", "DeleteRepository", {"repositoryName": name, "force": True}, done=gone)


# -- the bucket --------------------------------------------------------------------------------


def _bucket(wanted: Blueprint, seen: SeenBucket | None, begun: Collection[str]) -> Iterator[Step]:
    spec = wanted.bucket
    region = wanted.names.where.region
    if seen is None:
        if not spec.is_ours:
            raise BucketNotFoundError(
                f"the bucket {spec.name!r} does not exist: make it, or leave out --bucket to have "
                "one made"
            )
        yield Step("create", "bucket", spec.name, (f"in {region}",), _create_bucket(spec, region))
        return
    if seen.region != region:
        raise ConfigurationError(
            f"the bucket {spec.name!r} is in {seen.region}, and the functions would be in "
            f"{region}: all data would cross regions, which is slow and costs; use "
            f"--region {seen.region}, or another bucket"
        )
    if not spec.is_ours:
        yield from _users_bucket(spec, seen)
        return
    if not is_ours(seen, wanted.options.name) and spec.name not in begun:
        raise _taken("bucket", spec.name, "give it as --bucket to use it as your own")
    found = list(_bucket_differences(spec, seen))
    yield _step("bucket", spec.name, [why for why, _ in found], [call for _, call in found])


def _create_bucket(spec: BucketSpec, region: str) -> list[Call]:
    place: dict[str, Any] = {}
    if region != US_EAST_1:
        place = {"CreateBucketConfiguration": {"LocationConstraint": region}}
    nothing = SeenBucket(spec.name, region, encrypted=False)
    return [
        Call("s3", "CreateBucket", {"Bucket": spec.name, **place}, "bucket"),
        *(call for _, call in _bucket_differences(spec, nothing)),
    ]


def _bucket_differences(spec: BucketSpec, seen: SeenBucket) -> Iterator[tuple[str, Call]]:
    where = {"Bucket": spec.name}
    if missing := _missing_tags(spec.tags, seen.tags):
        tags = {**seen.tags, **spec.tags}  # the call replaces all tags
        yield (
            _tags_differ(missing),
            Call("s3", "PutBucketTagging", {**where, "Tagging": {"TagSet": _tag_list(tags)}}),
        )
    if not seen.public_blocked:
        block = {"PublicAccessBlockConfiguration": BLOCK_PUBLIC_ACCESS}
        yield "public access is not blocked", Call("s3", "PutPublicAccessBlock", {**where, **block})
    if not seen.encrypted:
        rule = {"ServerSideEncryptionConfiguration": ENCRYPTION}
        yield "no encryption is set", Call("s3", "PutBucketEncryption", {**where, **rule})
    if seen.versioning == "Enabled":
        off = {"VersioningConfiguration": {"Status": "Suspended"}}
        yield "versioning is on", Call("s3", "PutBucketVersioning", {**where, **off})
    if spec.policy is not None and not policies.contains(seen.policy, spec.policy):
        policy = {"Policy": json.dumps(policies.joined(seen.policy, spec.policy))}
        why = "requests without TLS are not refused"
        yield why, Call("s3", "PutBucketPolicy", {**where, **policy})
    yield from _lifecycle_differences(spec, seen)


def _lifecycle_differences(spec: BucketSpec, seen: SeenBucket) -> Iterator[tuple[str, Call]]:
    rules = seen.lifecycle.get("Rules", [])
    days = lifecycle.days_of(rules, spec.prefix)
    if days != spec.expire_days:
        was = "never" if days is None else f"after {days} days"
        yield (
            f"what is left behind is deleted {was}, to be after {spec.expire_days} days",
            lifecycle_call(
                spec.name, lifecycle.merged(rules, spec.prefix, spec.expire_days), seen.lifecycle
            ),
        )


def lifecycle_call(bucket: str, rules: list[lifecycle.Rule], before: Mapping[str, Any]) -> Call:
    """Return the call that replaces all rules of a bucket."""
    return Call("s3", *lifecycle.replacement(bucket, rules, before))


def _users_bucket(spec: BucketSpec, seen: SeenBucket) -> Iterator[Step]:
    """Of a bucket of the user's own, only the rules for our prefix are ours to change."""
    found = list(_lifecycle_differences(spec, seen))
    remarks = []
    if seen.versioning == "Enabled":
        remarks.append(
            "its versioning is on: what runs delete stays as old versions, and costs (not changed)"
        )
    if not seen.public_blocked:
        remarks.append("it does not block public access by itself (not changed)")
    whys = [*(why for why, _ in found), *remarks]
    yield _step("bucket", spec.name, whys, [call for _, call in found])


# -- the role ----------------------------------------------------------------------------------


def _role(spec: RoleSpec, seen: SeenRole | None, deployment: str) -> Step:
    name = {"RoleName": spec.name}
    put = Call(
        "iam",
        "PutRolePolicy",
        {**name, "PolicyName": ROLE_POLICY, "PolicyDocument": json.dumps(spec.policy)},
    )
    trust = json.dumps(spec.trust)
    if seen is None:
        boundary = {"PermissionsBoundary": spec.boundary} if spec.boundary else {}
        create = {
            **name,
            "AssumeRolePolicyDocument": trust,
            "Description": "dask_lambda workers: their objects and their logs",
            "Tags": _tag_list(spec.tags),
            **boundary,
        }
        return Step(
            "create", "role", spec.name, (), [Call("iam", "CreateRole", create, "role"), put]
        )
    if not is_ours(seen, deployment):
        raise _taken("role", spec.name)
    why: list[str] = []
    calls: list[Call] = []
    if not _equal(seen.trust, spec.trust):
        why.append("others than Lambda may take it on, or Lambda may not")
        calls.append(Call("iam", "UpdateAssumeRolePolicy", {**name, "PolicyDocument": trust}))
    # Before its policy, which whoever deploys may change only of a role with the boundary.
    if seen.boundary != spec.boundary:
        why.append(f"its permissions boundary is {seen.boundary}, to be {spec.boundary}")
        if spec.boundary:
            more = {**name, "PermissionsBoundary": spec.boundary}
            calls.append(Call("iam", "PutRolePermissionsBoundary", more))
        else:
            calls.append(Call("iam", "DeleteRolePermissionsBoundary", name))
    if not _equal(seen.policies.get(ROLE_POLICY), spec.policy):
        why.append("its policy is another one")
        calls.append(put)
    if missing := _missing_tags(spec.tags, seen.tags):
        why.append(_tags_differ(missing))
        calls.append(Call("iam", "TagRole", {**name, "Tags": _tag_list(missing)}))
    more_policies = [*sorted(set(seen.policies) - {ROLE_POLICY}), *seen.attached]
    if more_policies:
        why.append(f"it has other policies as well, which stay: {', '.join(more_policies)}")
    return _step("role", spec.name, why, calls)


# -- log groups --------------------------------------------------------------------------------


def _log_group(wanted: Blueprint, spec: LogGroupSpec, seen: Seen) -> Step:
    found = seen.log_groups.get(spec.name)
    name = {"logGroupName": spec.name}
    retention = Call("logs", "PutRetentionPolicy", {**name, "retentionInDays": spec.days})
    if found is None:
        create = Call("logs", "CreateLogGroup", {**name, "tags": dict(spec.tags)})
        return Step("create", "log group", spec.name, (), [create, retention])
    if not logs_are_ours(found, seen, wanted.options.name):
        raise _taken("log group", spec.name)
    why: list[str] = []
    calls: list[Call] = []
    if found.days != spec.days:
        was = "for ever" if found.days is None else f"{found.days} days"
        why.append(f"lines are kept {was}, to be {spec.days} days")
        calls.append(retention)
    if missing := _missing_tags(spec.tags, found.tags):
        why.append(_tags_differ(missing))
        arn = wanted.names.log_group_arn(spec.name)
        calls.append(Call("logs", "TagResource", {"resourceArn": arn, "tags": missing}))
    return _step("log group", spec.name, why, calls)


def logs_are_ours(found: SeenLogGroup, seen: Seen, deployment: str) -> bool:
    """Whether a log group is a deployment's, by its tag or since the function is."""
    function = seen.functions.get(found.name.removeprefix(LOGS))
    return is_ours(found, deployment) or is_ours(function, deployment)


# -- layers ------------------------------------------------------------------------------------


def _known_layers(wanted: Blueprint, seen: Seen) -> dict[str, str]:
    """Return the ARNs of versions that are there already: equal content is not uploaded again."""
    return {
        spec.name: found.arn
        for spec in wanted.layers
        for found in seen.layers
        if found.description == spec.description
        and spec.architecture in (found.architectures or (spec.architecture,))
    }


def _layers(wanted: Blueprint, arns: Mapping[str, str]) -> Iterator[Step]:
    for spec in wanted.layers:
        if spec.name in arns:
            yield Step("keep", "layer", spec.name, (arns[spec.name],))
            continue
        upload: list[Call | Push] = []
        gone: list[Call | Push] = []
        content: dict[str, Any] = {"ZipFile": spec.archive}
        if spec.archive.is_large:
            put, delete = _through_s3(wanted, spec.archive, "layer")
            upload, gone = list(put.calls), list(delete.calls)
            content = _in_s3(wanted, spec.archive)
        publish = Call("lambda", "PublishLayerVersion", {**_layer(spec), "Content": content})
        why = (f"{spec.archive.size / 2**20:,.1f} MiB",)
        yield Step("create", "layer", spec.name, why, [*upload, publish, *gone])


def _layer(spec: LayerSpec) -> dict[str, Any]:
    return {
        "LayerName": spec.name,
        "Description": spec.description,
        "CompatibleRuntimes": [spec.runtime],
        "CompatibleArchitectures": [spec.architecture],
    }


def _in_s3(wanted: Blueprint, archive: Archive) -> dict[str, str]:
    # Below our prefix, so that the rules and `destroy` remove it if we do not.
    key = f"0/{wanted.options.prefix}/deploy/{archive.sha256}.zip"
    return {"S3Bucket": wanted.bucket.name, "S3Key": key}


def _through_s3(wanted: Blueprint, archive: Archive, kind: str) -> tuple[Step, Step]:
    place = _in_s3(wanted, archive)
    where = {"Bucket": place["S3Bucket"], "Key": place["S3Key"]}
    put = Call("s3", "PutObject", {**where, "Body": archive})
    why = (f"{archive.size / 2**20:,.1f} MiB, too large for the request itself",)
    return (
        Step("create", f"upload of {kind}", place["S3Key"], why, [put]),
        Step(
            "delete", f"upload of {kind}", place["S3Key"], (), [Call("s3", "DeleteObject", where)]
        ),
    )


# -- functions ---------------------------------------------------------------------------------


def _function(wanted: Blueprint, spec: FunctionSpec, around: Seen, arns: Mapping[str, str]) -> Step:
    layers = [arns.get(name) or LayerArn(name) for name in spec.layers]
    create = _create_function(wanted, spec, layers)
    seen = around.functions.get(spec.name)
    if seen is None:
        # The smallest one must be there; an account that is new may refuse the large ones.
        spare = spec.memory > SMALL_ACCOUNT and spec.memory > min(wanted.names.sizes)
        return Step(
            "create",
            "function",
            spec.name,
            (f"{spec.memory:,} MB",),
            [create],
            "MemorySize" if spare else "",
        )
    if not is_ours(seen, wanted.options.name):
        raise _taken("function", spec.name)
    why: list[str] = []
    calls: list[Call] = []
    name = {"FunctionName": spec.name}
    found = seen.configuration
    if anew := _must_be_made_anew(spec, found, around):
        why = [f"{anew}: it is made anew"]
        return Step("change", "function", spec.name, why, [delete_function(spec.name), create])
    failed = found.get("LastUpdateStatus") == "Failed"  # it is told as it should be, and is not so
    architectures = found.get("Architectures") or ["x86_64"]
    same = (
        seen.image == spec.image
        if spec.code is None
        else found.get("CodeSha256") == spec.code.code_sha256
    )
    if failed:
        why.append(f"its last update failed: {found.get('LastUpdateStatusReason')}")
    if failed or not same or architectures != [spec.architecture]:
        why += [] if failed else ["its code is another one"]
        update = {**name, **_code(wanted, spec), "Architectures": [spec.architecture]}
        calls.append(Call("lambda", "UpdateFunctionCode", update, "function"))
    differences = list(setting_differences(spec.settings, found))
    has = [each["Arn"] for each in found.get("Layers", [])]
    if has != layers:
        differences.append(f"Layers: {_plain(has)}, to be {_plain([str(each) for each in layers])}")
    if failed or differences:
        why += differences
        update = {**name, **spec.settings}
        if spec.image is None:
            update["Layers"] = layers
        calls.append(Call("lambda", "UpdateFunctionConfiguration", update, "function"))
    if missing := _missing_tags(spec.tags, seen.tags):
        why.append(_tags_differ(missing))
        arn = wanted.names.function_arn(spec.name)
        calls.append(Call("lambda", "TagResource", {"Resource": arn, "Tags": missing}))
    return _step("function", spec.name, why, calls)


def _must_be_made_anew(spec: FunctionSpec, found: Mapping[str, Any], around: Seen) -> str:
    """Say why a function cannot be brought up to date; nothing if it can."""
    if (spec.image is None) != (found.get("PackageType", "Zip") == "Zip"):
        return "zip files and images cannot take each other's place"
    if found.get("State") == "Failed":
        return f"Lambda could not set it up ({found.get('StateReason')})"
    if around.role is None:
        # Its variables are encrypted for the role that it was made with, and a new one of the same
        # name is another one to KMS: every call would fail (KMSAccessDeniedException).
        return "its role is gone, and variables are encrypted for that very role"
    return ""


def _create_function(
    wanted: Blueprint, spec: FunctionSpec, layers: Sequence[str | LayerArn]
) -> Call:
    parameters: dict[str, Any] = {
        "FunctionName": spec.name,
        **spec.settings,
        "Code": _code(wanted, spec),
        "PackageType": "Image" if spec.image else "Zip",
        "Architectures": [spec.architecture],
        "Tags": dict(spec.tags),
    }
    if spec.image is None:
        parameters["Layers"] = layers
    return Call("lambda", "CreateFunction", parameters, "function")


def _code(wanted: Blueprint, spec: FunctionSpec) -> dict[str, Any]:
    if spec.code is None:
        return {"ImageUri": spec.image}
    return _in_s3(wanted, spec.code) if spec.code.is_large else {"ZipFile": spec.code}


def setting_differences(settings: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Say in which settings a function differs from what it should be."""
    for name, value in settings.items():
        has = found.get(name)
        if name == "Environment":
            value, has = value.get("Variables", {}), (has or {}).get("Variables", {})
            for variable in sorted(value.keys() | has.keys()):
                if value.get(variable) != has.get(variable):
                    yield (
                        f"Environment {variable}: {_plain(has.get(variable))}, "
                        f"to be {_plain(value.get(variable))}"
                    )
        elif name == "TracingConfig":
            mode = (has or {}).get("Mode", "PassThrough")
            if mode != value["Mode"]:
                yield f"{name}: {mode}, to be {value['Mode']}"
        elif isinstance(value, dict):
            has = {each: (has or {}).get(each) for each in value}
            if has != value:
                yield f"{name}: {_plain(has)}, to be {_plain(value)}"
        elif has != value:
            yield f"{name}: {_plain(has)}, to be {_plain(value)}"


def _needs(step: Step) -> bool:
    return any(c.operation in ("CreateFunction", "UpdateFunctionCode") for c in step.calls)


# -- what is not wanted any more -------------------------------------------------------------------


def _surplus(wanted: Blueprint, seen: Seen, arns: Mapping[str, str]) -> Iterator[Step]:
    """Delete what an earlier deployment of this name had, and this one has not."""
    ours, sizes = wanted.options.name, wanted.names.sizes
    for name, function in seen.functions.items():
        if is_ours(function, ours) and size_of(ours, name) not in sizes:
            why = ("no memory size of that number is wanted any more",)
            yield Step("delete", "function", name, why, [delete_function(name)])
    for name, group in seen.log_groups.items():
        if name not in wanted.names.log_groups and logs_are_ours(group, seen, ours):
            yield Step("delete", "log group", name, (), [delete_log_group(name)])
    used = set(arns.values())
    for layer in seen.layers:
        if layer.arn not in used:
            why = ("an environment that is not used any more",)
            name = f"{layer.name}:{layer.version}"
            yield Step("delete", "layer", name, why, [delete_layer(layer.name, layer.version)])
    yield from _surplus_images(wanted, seen.repository)


def delete_function(name: str) -> Call:
    """Return the call that deletes a function."""
    gone = ("ResourceNotFoundException",)
    return Call("lambda", "DeleteFunction", {"FunctionName": name}, "no function", gone)


def delete_log_group(name: str) -> Call:
    """Return the call that deletes a log group."""
    gone = ("ResourceNotFoundException",)
    return Call("logs", "DeleteLogGroup", {"logGroupName": name}, done=gone)


def delete_layer(name: str, version: int) -> Call:
    """Return the call that deletes a version of a layer."""
    return Call("lambda", "DeleteLayerVersion", {"LayerName": name, "VersionNumber": version})


# -- small things ----------------------------------------------------------------------------------


def _step(kind: str, name: str, why: list[str], calls: list[Call]) -> Step:
    verb: Verb = "change" if calls else "keep"
    return Step(verb, kind, name, why, calls)


def _equal(one: policies.Document | None, other: policies.Document | None) -> bool:
    if one is None or other is None:
        return one is other
    return policies.normal(one) == policies.normal(other)


def _missing_tags(wanted: Mapping[str, str], seen: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if seen.get(name) != value}


def _tags_differ(missing: Mapping[str, str]) -> str:
    return "tags are missing or differ: " + ", ".join(sorted(missing))


def _tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": name, "Value": value} for name, value in tags.items()]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _taken(kind: str, name: str, otherwise: str = "") -> DeploymentError:
    more = f", or {otherwise}" if otherwise else ""
    return DeploymentError(
        f"there is a {kind} {name!r} already, which was not made by this deployment: choose "
        f"another name for the deployment (--name){more}"
    )
