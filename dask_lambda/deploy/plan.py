"""Which API calls lead from what there is to what is to exist.  Pure.

May import: function_plan, differences, calls, naming, policies, resources, seen, errors.

A plan is made anew each time from what is there, so whatever broke off half-way goes on where it
broke off, and a second ``deploy`` has nothing to do.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dask_lambda.deploy import policies
from dask_lambda.deploy.calls import Call, Push, Step
from dask_lambda.deploy.differences import (
    bucket_differences,
    changed,
    log_group_differences,
    missing_tags,
    other_policies,
    put_policy,
    put_retention,
    role_differences,
    tag_list,
    tags_differ,
    taken,
)
from dask_lambda.deploy.function_plan import (
    delete_function,
    delete_layer,
    function_steps,
    known_layers,
    layer_steps,
)
from dask_lambda.deploy.naming import LOGS, size_of
from dask_lambda.deploy.resources import (
    Blueprint,
    BucketSpec,
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
from dask_lambda.errors import BucketNotFoundError, ConfigurationError

#: S3's only region that CreateBucket must not be told (its API: CreateBucket).
US_EAST_1 = "us-east-1"
#: That ECR deletes with one call (its API: BatchDeleteImage).
MAX_IMAGES = 100


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
    arns = known_layers(wanted, seen)
    return [
        # First, since it is what takes longest, and what docker may fail at.
        *_repository(wanted.repository, seen.repository, wanted),
        *_bucket(wanted, seen.bucket, begun),
        _role(wanted.role, seen.role, wanted.options.name),
        *(_log_group(wanted, each, seen) for each in wanted.log_groups),
        *layer_steps(wanted, arns),
        *function_steps(wanted, seen, arns),
        *_surplus(wanted, seen, arns),
    ]


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
            "tags": tag_list(spec.tags),
        }
        calls = [Call("ecr", "CreateRepository", create), policy]
        yield Step("create", "repository", spec.name, (), calls)
    elif not is_ours(seen, wanted.options.name):
        raise taken("repository", spec.name)
    else:
        why: list[str] = []
        calls = []
        if not policies.contains(seen.policy, spec.policy):
            why.append("Lambda may not fetch images from it")
            both = json.dumps(policies.joined(seen.policy, spec.policy))
            calls.append(Call("ecr", "SetRepositoryPolicy", {**name, "policyText": both}))
        if missing := missing_tags(spec.tags, seen.tags):
            why.append(tags_differ(missing))
            arn = wanted.names.repository_arn
            tags = {"resourceArn": arn, "tags": tag_list(missing)}
            calls.append(Call("ecr", "TagResource", tags))
        yield changed("repository", spec.name, why, calls)
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
        raise taken("bucket", spec.name, "give it as --bucket to use it as your own")
    found = list(bucket_differences(spec, seen))
    yield changed("bucket", spec.name, [why for why, _ in found], [call for _, call in found])


def _create_bucket(spec: BucketSpec, region: str) -> list[Call]:
    place: dict[str, Any] = {}
    if region != US_EAST_1:
        place = {"CreateBucketConfiguration": {"LocationConstraint": region}}
    nothing = SeenBucket(spec.name, region, encrypted=False)
    return [
        Call("s3", "CreateBucket", {"Bucket": spec.name, **place}, "bucket"),
        *(call for _, call in bucket_differences(spec, nothing)),
    ]


def _users_bucket(spec: BucketSpec, seen: SeenBucket) -> Iterator[Step]:
    """Of a bucket of the user's own, only the rules for our prefix are ours to change."""
    found = list(bucket_differences(spec, seen))
    remarks = []
    if seen.versioning == "Enabled":
        remarks.append(
            "its versioning is on: what runs delete stays as old versions, and costs (not changed)"
        )
    if not seen.public_blocked:
        remarks.append("it does not block public access by itself (not changed)")
    whys = [*(why for why, _ in found), *remarks]
    yield changed("bucket", spec.name, whys, [call for _, call in found])


# -- the role ----------------------------------------------------------------------------------


def _role(spec: RoleSpec, seen: SeenRole | None, deployment: str) -> Step:
    name = {"RoleName": spec.name}
    if seen is None:
        boundary = {"PermissionsBoundary": spec.boundary} if spec.boundary else {}
        create = {
            **name,
            "AssumeRolePolicyDocument": json.dumps(spec.trust),
            "Description": "dask_lambda workers: their objects and their logs",
            "Tags": tag_list(spec.tags),
            **boundary,
        }
        calls = [Call("iam", "CreateRole", create, "role"), put_policy(spec)]
        return Step("create", "role", spec.name, (), calls)
    if not is_ours(seen, deployment):
        raise taken("role", spec.name)
    found = list(role_differences(spec, seen))
    why = [each for each, _ in found]
    if more := other_policies(seen):
        why.append(f"it has other policies as well, which stay: {', '.join(more)}")
    return changed("role", spec.name, why, [call for _, call in found])


# -- log groups --------------------------------------------------------------------------------


def _log_group(wanted: Blueprint, spec: LogGroupSpec, seen: Seen) -> Step:
    found = seen.log_groups.get(spec.name)
    name = {"logGroupName": spec.name}
    if found is None:
        create = Call("logs", "CreateLogGroup", {**name, "tags": dict(spec.tags)})
        return Step("create", "log group", spec.name, (), [create, put_retention(spec)])
    if not logs_are_ours(found, seen, wanted.options.name):
        raise taken("log group", spec.name)
    arn = wanted.names.log_group_arn(spec.name)
    differences = list(log_group_differences(spec, found, arn))
    whys, calls = [why for why, _ in differences], [call for _, call in differences]
    return changed("log group", spec.name, whys, calls)


def logs_are_ours(found: SeenLogGroup, seen: Seen, deployment: str) -> bool:
    """Whether a log group is a deployment's, by its tag or since the function is."""
    function = seen.functions.get(found.name.removeprefix(LOGS))
    return is_ours(found, deployment) or is_ours(function, deployment)


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


def delete_log_group(name: str) -> Call:
    """Return the call that deletes a log group."""
    gone = ("ResourceNotFoundException",)
    return Call("logs", "DeleteLogGroup", {"logGroupName": name}, done=gone)
