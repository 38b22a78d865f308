"""Removing exactly what ``deploy`` has made.

May import: aws, apply, calls, differences, look, plan, policies, record, resources' names, seen,
cleaning, kept_runs, errors.

What is ours is known by its tag, a bucket that was never tagged by the record.  A bucket of the
user's own stays, and so does every object in it that is not below our prefix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from dask_lambda import kept_runs, lifecycle
from dask_lambda.cleaning import BATCH
from dask_lambda.deploy import record as records
from dask_lambda.deploy.apply import Applier
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.calls import Call, Step
from dask_lambda.deploy.differences import lifecycle_call
from dask_lambda.deploy.function_plan import delete_function, delete_layer
from dask_lambda.deploy.look import look
from dask_lambda.deploy.plan import (
    delete_log_group,
    delete_repository,
    logs_are_ours,
)
from dask_lambda.deploy.policies import normal
from dask_lambda.deploy.record import Record
from dask_lambda.deploy.resources import ROLE_POLICY
from dask_lambda.deploy.seen import Seen, SeenRole, is_ours
from dask_lambda.errors import ConfigurationError, DeploymentError
from dask_lambda.kept_folder import kept_prefix
from lambda_worker import protocol


@dataclass(slots=True)
class Contents:
    """What is in the bucket.

    Attributes
    ----------
    objects : list of dict
        Of runs: ``Key`` and perhaps ``VersionId``.
    kept : list of dict
        Of kept runs.
    runs : set of str
        Ids of the kept runs.
    others : int
        Objects that are not ours; all are listed if the bucket is to go.
    uploads : list of dict
        Unfinished ones below our prefix.
    """

    objects: list[dict[str, str]] = field(default_factory=list)
    kept: list[dict[str, str]] = field(default_factory=list)
    runs: set[str] = field(default_factory=set)
    others: int = 0
    uploads: list[dict[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class Removal:
    """What would be removed.

    Attributes
    ----------
    account : Account
    record : Record
    seen : Seen
    contents : Contents
    own_bucket : bool
        Whether the bucket itself goes.
    steps : list of Step
    """

    account: Account
    record: Record
    seen: Seen
    contents: Contents
    own_bucket: bool
    steps: list[Step]


def prepare_removal(account: Account, record: Record, *, kept: bool) -> Removal:
    """Look at what there is of a deployment, and plan its removal; nothing is changed.

    Parameters
    ----------
    account : Account
    record : Record
    kept : bool
        Whether the objects of kept runs go, too.

    Raises
    ------
    DeploymentError
        Kept runs are in a bucket that goes, and ``kept`` is false; or it is a CloudFormation
        stack's.
    """
    seen = look(account, record.name, record.bucket, foreign=True)
    if stack := seen.stack_of(record.name):
        raise DeploymentError(
            f"{record.name!r} was made by the CloudFormation stack {stack!r}, and goes with that: "
            f"aws cloudformation delete-stack --region {account.region} --stack-name {stack}"
        )
    here = seen.bucket is not None and seen.bucket.region == account.region
    recorded = record.path.exists()
    own = here and (is_ours(seen.bucket, record.name) or (record.own_bucket and recorded))
    # Without a record the bucket is a guess, or what somebody says: then only one that is tagged is
    # looked into, or that the deployment's role may use.
    ours = own or (here and not record.own_bucket and (recorded or _may_use(seen.role, record)))
    contents = Contents()
    if ours:
        contents = _contents(account, record, whole=own, all_versions=_versioned(seen))
    if own and contents.runs and not kept:
        raise DeploymentError(
            f"the bucket {record.bucket} holds {len(contents.runs)} kept runs: add --kept to "
            "delete them, too (`dask-lambda runs list` shows them)"
        )
    removal = Removal(account, record, seen, contents, own, [])
    removal.steps = list(_steps(removal, ours=ours, kept=kept))
    return removal


def destroy(
    removal: Removal,
    tell: Callable[[Step], object] = lambda step: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Remove what was planned to be removed, then what this machine knows of it.

    Returns
    -------
    list of str
        What stays, and why.

    Raises
    ------
    DeploymentError
        Something could not be removed; the same command goes on.
    """
    record = removal.record
    if record.path.exists():
        record.removing = True
        record.write()
    Applier(removal.account, tell, sleep, clock).run(removal.steps)
    deleted = {step.kind for step in removal.steps if step.calls}
    if "kept runs" in deleted:
        _forget_kept(removal)
    records.unconfigure(record)
    record.remove()
    return [
        f"{step.kind} {step.name}: {'; '.join(step.why)}"
        for step in removal.steps
        if step.verb == "leave"
    ]


def _may_use(role: SeenRole | None, record: Record) -> bool:
    """Whether the role is the deployment's, and is for our prefix in this bucket."""
    if role is None or not is_ours(role, record.name):
        return False
    statements = normal(role.policies.get(ROLE_POLICY, {}))["Statement"]
    named = {arn for each in statements for arn in each.get("Resource", [])}
    return named >= set(record.names.object_arns)


def _steps(removal: Removal, *, ours: bool, kept: bool) -> Iterator[Step]:
    record, seen = removal.record, removal.seen
    deployment = record.name
    for name, function in seen.functions.items():
        if is_ours(function, deployment):
            yield Step("delete", "function", name, (), [delete_function(name)])
        else:
            yield Step("leave", "function", name, ("it was not made by this deployment",))
    for name, group in seen.log_groups.items():
        if logs_are_ours(group, seen, deployment):
            yield Step("delete", "log group", name, (), [delete_log_group(name)])
        else:
            yield Step("leave", "log group", name, ("it was not made by this deployment",))
    for layer in seen.layers:
        call = delete_layer(layer.name, layer.version)
        yield Step("delete", "layer", f"{layer.name}:{layer.version}", (), [call])
    if seen.repository is not None:
        name = seen.repository.name
        if is_ours(seen.repository, deployment):
            why = (f"{len(seen.repository.images):,} images",)
            yield Step("delete", "repository", name, why, [delete_repository(name)])
        else:
            yield Step("leave", "repository", name, ("it was not made by this deployment",))
    if seen.role is not None:
        if is_ours(seen.role, deployment):
            yield Step("delete", "role", seen.role.name, (), list(_without_role(seen.role)))
        else:
            yield Step("leave", "role", seen.role.name, ("it was not made by this deployment",))
    if ours:
        yield from _bucket_steps(removal, kept=kept)
    elif seen.bucket is not None:
        yield Step("leave", "bucket", record.bucket, ("it was not made by this deployment",))
    elif seen.refused:
        unknown = "it is somebody else's, or you may not list it (s3:ListBucket)"
        yield Step("leave", "bucket", record.bucket, (unknown,))


def _without_role(role: SeenRole) -> Iterator[Call]:
    gone = ("NoSuchEntity",)
    name = {"RoleName": role.name}
    for policy in role.policies:
        yield Call("iam", "DeleteRolePolicy", {**name, "PolicyName": policy}, done=gone)
    for arn in role.attached:
        yield Call("iam", "DetachRolePolicy", {**name, "PolicyArn": arn}, done=gone)
    yield Call("iam", "DeleteRole", name, done=gone)


def _bucket_steps(removal: Removal, *, kept: bool) -> Iterator[Step]:
    record, contents = removal.record, removal.contents
    assert removal.seen.bucket is not None
    bucket = {"Bucket": record.bucket}
    if contents.uploads:
        aborts = [
            Call("s3", "AbortMultipartUpload", {**bucket, **upload}, done=("NoSuchUpload",))
            for upload in contents.uploads
        ]
        yield Step("delete", "unfinished uploads", record.bucket, (f"{len(aborts):,}",), aborts)
    if contents.objects:
        yield _emptying("objects of runs", record.bucket, contents.objects)
    if contents.kept and kept:
        yield _emptying("kept runs", record.bucket, contents.kept)
    elif contents.kept:
        why = (f"{len(contents.runs)} runs; --kept deletes them, too",)
        yield Step("leave", "kept runs", record.bucket, why)
    if not removal.own_bucket:
        before = removal.seen.bucket.lifecycle
        rules = lifecycle.without(before.get("Rules", []), record.prefix)
        if len(rules) != len(before.get("Rules", [])):
            call = lifecycle_call(record.bucket, rules, before)
            yield Step("delete", "lifecycle rules", record.bucket, ("ours only",), [call])
        yield Step("leave", "bucket", record.bucket, ("it is your own",))
    elif contents.others:
        why = (f"it holds {contents.others:,} objects or more that are not ours",)
        yield Step("leave", "bucket", record.bucket, why)
    else:
        call = Call("s3", "DeleteBucket", bucket, done=("NoSuchBucket",))
        yield Step("delete", "bucket", record.bucket, (), [call])


def _emptying(kind: str, bucket: str, objects: list[dict[str, str]]) -> Step:
    calls = [
        Call(
            "s3",
            "DeleteObjects",
            {"Bucket": bucket, "Delete": {"Objects": objects[n : n + BATCH], "Quiet": True}},
        )
        for n in range(0, len(objects), BATCH)
    ]
    return Step("delete", kind, bucket, (f"{len(objects):,} objects",), calls)


def _versioned(seen: Seen) -> bool:
    return seen.bucket is not None and bool(seen.bucket.versioning)


def _contents(account: Account, record: Record, *, whole: bool, all_versions: bool) -> Contents:
    """List a bucket: the whole of one that goes, what is below our prefix of the user's own."""
    contents = Contents()
    bucket = record.bucket
    runs, kept = (
        tuple(f"{shard}/{prefix}/" for shard in protocol.shards())
        for prefix in (record.prefix, kept_prefix(record.prefix))
    )
    for prefix in ("",) if whole else (*runs, *kept):
        for each in _listed(account, bucket, prefix, all_versions):
            if each["Key"].startswith(runs):
                contents.objects.append(each)
            elif each["Key"].startswith(kept):
                contents.kept.append(each)
                contents.runs.add(each["Key"].split("/")[1 + record.prefix.count("/") + 1])
            else:
                contents.others += 1
        for upload in account.pages(
            "s3", "ListMultipartUploads", "Uploads", Bucket=bucket, Prefix=prefix
        ):
            if upload["Key"].startswith((*runs, *kept)):
                named = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                contents.uploads.append(named)
    return contents


def _listed(
    account: Account, bucket: str, prefix: str, all_versions: bool
) -> Iterator[dict[str, str]]:
    where = {"Bucket": bucket, "Prefix": prefix}
    if not all_versions:
        for each in account.pages("s3", "ListObjectsV2", "Contents", **where):
            yield {"Key": each["Key"]}
        return
    for result in ("Versions", "DeleteMarkers"):
        for each in account.pages("s3", "ListObjectVersions", result, **where):
            yield {"Key": each["Key"], "VersionId": each["VersionId"]}


def _forget_kept(removal: Removal) -> None:
    """Remove the records of kept runs whose objects are gone."""
    for name in kept_runs.names():
        with suppress(ConfigurationError):  # a broken record, or one that is in use
            kept = kept_runs.read(name)
            ours = kept is not None and kept.place.bucket == removal.record.bucket
            if kept is not None and ours and kept.run in removal.contents.runs:
                with kept_runs.locked(name):
                    kept_runs.remove(name)
