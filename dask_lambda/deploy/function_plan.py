"""The calls about functions: their layers, their code and settings, their snapshots.  Pure.

May import: differences, snapshots, calls, resources, seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dask_lambda.deploy import snapshots
from dask_lambda.deploy.artifact import Archive
from dask_lambda.deploy.calls import Call, LayerArn, Push, Step
from dask_lambda.deploy.differences import (
    changed,
    missing_tags,
    plain,
    setting_differences,
    tags_differ,
    taken,
)
from dask_lambda.deploy.resources import Blueprint, FunctionSpec, LayerSpec
from dask_lambda.deploy.seen import Seen, is_ours

#: What a new account may be limited to (MB): larger functions are left out then.
SMALL_ACCOUNT = 3008

# -- layers ------------------------------------------------------------------------------------


def known_layers(wanted: Blueprint, seen: Seen) -> dict[str, str]:
    """Return the ARNs of versions that are there already: equal content is not uploaded again."""
    return {
        spec.name: found.arn
        for spec in wanted.layers
        for found in seen.layers
        if found.description == spec.description
        and spec.architecture in (found.architectures or (spec.architecture,))
    }


def layer_steps(wanted: Blueprint, arns: Mapping[str, str]) -> Iterator[Step]:
    """Publish the layers that are not there yet.

    Parameters
    ----------
    wanted : Blueprint
    arns : mapping
        What :func:`known_layers` has found.
    """
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


def function_steps(wanted: Blueprint, seen: Seen, arns: Mapping[str, str]) -> list[Step]:
    """Bring all functions up to date, and have them called as they are then.

    Parameters
    ----------
    wanted : Blueprint
    seen : Seen
    arns : mapping
        Of the layers that are there.

    Raises
    ------
    DeploymentError
        A name is taken by a function that this deployment has not made.
    """
    steps = [_function(wanted, each, seen, arns) for each in wanted.functions]
    named = [
        snapshots.named(spec, step, seen.functions.get(spec.name))
        for spec, step in zip(wanted.functions, steps, strict=True)
        if spec.alias
    ]
    code = wanted.package.code
    if code is not None and code.is_large and any(_needs(step) for step in steps):
        upload, gone = _through_s3(wanted, code, "function code")
        steps = [upload, *steps, gone]
    return [*steps, *named]  # the snapshots of all are taken at the same time


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
            [create, *snapshots.publish(spec)],
            "MemorySize" if spare else "",
        )
    if not is_ours(seen, wanted.options.name):
        raise taken("function", spec.name)
    why: list[str] = []
    calls: list[Call] = []
    name = {"FunctionName": spec.name}
    found = seen.configuration
    if anew := _must_be_made_anew(spec, found, around):
        why = [f"{anew}: it is made anew"]
        calls = [delete_function(spec.name), create, *snapshots.publish(spec)]
        return Step("change", "function", spec.name, why, calls)
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
        differences.append(f"Layers: {plain(has)}, to be {plain([str(each) for each in layers])}")
    if failed or differences:
        why += differences
        update = {**name, **spec.settings}
        if spec.image is None:
            update["Layers"] = layers
        calls.append(Call("lambda", "UpdateFunctionConfiguration", update, "function"))
    if missing := missing_tags(spec.tags, seen.tags):
        why.append(tags_differ(missing))
        arn = wanted.names.function_arn(spec.name)
        calls.append(Call("lambda", "TagResource", {"Resource": arn, "Tags": missing}))
    different, more = snapshots.bring_up(spec, seen, layers)
    return changed("function", spec.name, [*why, *different], [*calls, *more])


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


def _needs(step: Step) -> bool:
    return any(c.operation in ("CreateFunction", "UpdateFunctionCode") for c in step.calls)


def delete_function(name: str) -> Call:
    """Return the call that deletes a function."""
    gone = ("ResourceNotFoundException",)
    return Call("lambda", "DeleteFunction", {"FunctionName": name}, "no function", done=gone)


def delete_layer(name: str, version: int) -> Call:
    """Return the call that deletes a version of a layer."""
    return Call("lambda", "DeleteLayerVersion", {"LayerName": name, "VersionNumber": version})
