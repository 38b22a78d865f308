"""What differs between what there is and what is to be, in words and in calls that mend it.  Pure.

May import: calls, policies, resources, seen, lifecycle, errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dask_lambda import lifecycle
from dask_lambda.deploy import policies
from dask_lambda.deploy.calls import Call, Push, Step, Verb
from dask_lambda.deploy.resources import (
    BLOCK_PUBLIC_ACCESS,
    ENCRYPTION,
    ROLE_POLICY,
    BucketSpec,
    LogGroupSpec,
    RoleSpec,
)
from dask_lambda.deploy.seen import SeenBucket, SeenLogGroup, SeenRole
from dask_lambda.errors import DeploymentError

#: How functions are where a setting is not named.
UNSET: dict[str, dict[str, Any]] = {
    "TracingConfig": {"Mode": "PassThrough"},
    "SnapStart": {"ApplyOn": "None"},
}


def changed(kind: str, name: str, why: Sequence[str], calls: Sequence[Call | Push]) -> Step:
    """Return the step about something that is there: it is changed, or kept."""
    verb: Verb = "change" if calls else "keep"
    return Step(verb, kind, name, why, calls)


def same_document(one: policies.Document | None, other: policies.Document | None) -> bool:
    """Whether two policies mean the same."""
    if one is None or other is None:
        return one is other
    return policies.normal(one) == policies.normal(other)


def missing_tags(wanted: Mapping[str, str], seen: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that are not there, or have other values."""
    return {name: value for name, value in wanted.items() if seen.get(name) != value}


def tags_differ(missing: Mapping[str, str]) -> str:
    """Say which tags."""
    return "tags are missing or differ: " + ", ".join(sorted(missing))


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Return tags as most of AWS's services take them."""
    return [{"Key": name, "Value": value} for name, value in tags.items()]


def plain(value: Any) -> str:
    """Return a value for people to read."""
    return value if isinstance(value, str) else json.dumps(value)


def taken(kind: str, name: str, otherwise: str = "") -> DeploymentError:
    """Return the error about a name that something has which is not ours."""
    more = f", or {otherwise}" if otherwise else ""
    return DeploymentError(
        f"there is a {kind} {name!r} already, which was not made by this deployment: choose "
        f"another name for the deployment (--name){more}"
    )


def setting_differences(settings: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Say in which settings a function differs from what it should be."""
    for name, value in settings.items():
        has = found.get(name)
        if name == "Environment":
            value, has = value.get("Variables", {}), (has or {}).get("Variables", {})
            for variable in sorted(value.keys() | has.keys()):
                if value.get(variable) != has.get(variable):
                    yield (
                        f"Environment {variable}: {plain(has.get(variable))}, "
                        f"to be {plain(value.get(variable))}"
                    )
        elif isinstance(value, dict):
            unset = UNSET.get(name, {})
            has = {each: (has or {}).get(each, unset.get(each)) for each in value}
            if has != value:
                yield f"{name}: {plain(has)}, to be {plain(value)}"
        elif has != value:
            yield f"{name}: {plain(has)}, to be {plain(value)}"


# -- resource by resource ----------------------------------------------------------------------

#: What differs, and the call that puts it right.
Differences = Iterator[tuple[str, Call]]


def bucket_differences(spec: BucketSpec, seen: SeenBucket) -> Differences:
    """Compare a bucket; of the user's own, only the rules for our prefix are ours."""
    if spec.is_ours:
        yield from _own_bucket_differences(spec, seen)
    rules = seen.lifecycle.get("Rules", [])
    days = lifecycle.days_of(rules, spec.prefix)
    if days != spec.expire_days:
        was = "never" if days is None else f"after {days} days"
        merged = lifecycle.merged(rules, spec.prefix, spec.expire_days)
        yield (
            f"what is left behind is deleted {was}, to be after {spec.expire_days} days",
            lifecycle_call(spec.name, merged, seen.lifecycle),
        )


def _own_bucket_differences(spec: BucketSpec, seen: SeenBucket) -> Differences:
    where = {"Bucket": spec.name}
    if missing := missing_tags(spec.tags, seen.tags):
        tags = {**seen.tags, **spec.tags}  # the call replaces all tags
        yield (
            tags_differ(missing),
            Call("s3", "PutBucketTagging", {**where, "Tagging": {"TagSet": tag_list(tags)}}),
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


def lifecycle_call(bucket: str, rules: list[lifecycle.Rule], before: Mapping[str, Any]) -> Call:
    """Return the call that replaces all rules of a bucket."""
    return Call("s3", *lifecycle.replacement(bucket, rules, before))


def role_differences(spec: RoleSpec, seen: SeenRole) -> Differences:
    """Compare the execution role, but for what others have put into it."""
    name = {"RoleName": spec.name}
    if not same_document(seen.trust, spec.trust):
        trust = {**name, "PolicyDocument": json.dumps(spec.trust)}
        why = "others than Lambda may take it on, or Lambda may not"
        yield why, Call("iam", "UpdateAssumeRolePolicy", trust)
    # Before its policy, which whoever deploys may change only of a role with the boundary.
    if seen.boundary != spec.boundary:
        why = f"its permissions boundary is {seen.boundary}, to be {spec.boundary}"
        if spec.boundary:
            more = {**name, "PermissionsBoundary": spec.boundary}
            yield why, Call("iam", "PutRolePermissionsBoundary", more)
        else:
            yield why, Call("iam", "DeleteRolePermissionsBoundary", name)
    if not same_document(seen.policies.get(ROLE_POLICY), spec.policy):
        yield "its policy is another one", put_policy(spec)
    if missing := missing_tags(spec.tags, seen.tags):
        yield tags_differ(missing), Call("iam", "TagRole", {**name, "Tags": tag_list(missing)})


def put_policy(spec: RoleSpec) -> Call:
    """Return the call that puts the role's policy into it."""
    policy = {"PolicyName": ROLE_POLICY, "PolicyDocument": json.dumps(spec.policy)}
    return Call("iam", "PutRolePolicy", {"RoleName": spec.name, **policy})


def other_policies(seen: SeenRole) -> list[str]:
    """Return the policies that somebody else has put into the role: names, then ARNs."""
    return [*sorted(set(seen.policies) - {ROLE_POLICY}), *seen.attached]


def log_group_differences(spec: LogGroupSpec, seen: SeenLogGroup, arn: str) -> Differences:
    """Compare a log group."""
    if seen.days != spec.days:
        was = "for ever" if seen.days is None else f"{seen.days} days"
        yield f"lines are kept {was}, to be {spec.days} days", put_retention(spec)
    if missing := missing_tags(spec.tags, seen.tags):
        tags = {"resourceArn": arn, "tags": missing}
        yield tags_differ(missing), Call("logs", "TagResource", tags)


def put_retention(spec: LogGroupSpec) -> Call:
    """Return the call that sets for how long lines are kept."""
    days = {"logGroupName": spec.name, "retentionInDays": spec.days}
    return Call("logs", "PutRetentionPolicy", days)
