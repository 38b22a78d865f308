"""Snapshots of functions: versions that are published, and the alias that means one.  Pure.

May import: differences, calls, resources, seen.

Lambda takes a snapshot of a version when that is published ("Improving startup performance with
Lambda SnapStart", AWS Lambda developer guide); a version never changes, and its snapshot costs as
long as it exists.  So a changed function is published anew, the alias then means the new version,
and the old one is deleted.  What this deployment has published is known by its description.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dask_lambda.deploy.calls import Call, LayerArn, NewVersion, Step, Verb
from dask_lambda.deploy.differences import setting_differences
from dask_lambda.deploy.naming import ALIAS
from dask_lambda.deploy.resources import FunctionSpec
from dask_lambda.deploy.seen import SeenFunction

#: How the descriptions of versions begin that a deployment has published.
DESCRIPTION = "dask_lambda snapshot"

_GONE = ("ResourceNotFoundException",)


def differences(settings: Mapping[str, Any], version: Mapping[str, Any]) -> list[str]:
    """Say in which settings a version differs; its description is one of its own."""
    rest = {name: value for name, value in settings.items() if name != "Description"}
    return list(setting_differences(rest, version))


def publish(spec: FunctionSpec) -> list[Call]:
    """Return the call that publishes a function as it is, if it has an alias."""
    if not spec.alias:
        return []
    environment = spec.settings["Description"].rpartition(" ")[2]
    description = f"{DESCRIPTION}, environment {environment}"[:256]
    parameters = {"FunctionName": spec.name, "Description": description}
    return [Call("lambda", "PublishVersion", parameters)]


def bring_up(
    spec: FunctionSpec, seen: SeenFunction, layers: Sequence[str | LayerArn]
) -> tuple[list[str], list[Call]]:
    """Return what differs, and the calls after which a function's snapshots are those wanted.

    Versions that nothing calls are deleted before one is published: they cost, and one of them may
    be as the function is.  Of that Lambda would not publish another one, though its snapshot may
    have failed.

    Parameters
    ----------
    spec : FunctionSpec
    seen : SeenFunction
    layers : sequence of str or LayerArn
        That the function is to have.
    """
    if not spec.alias:
        withdrawn = _withdraw(seen)
        return (["snapshots of it are not wanted any more"] if withdrawn else []), withdrawn
    why: list[str] = []
    unused = [_delete(spec.name, each) for each in seen.versions if each != called(seen)]
    if seen.live is not None and called(seen) is None:
        unused.insert(0, _delete_alias(spec.name))
    elif unused:
        why.append("it has versions that nothing calls")
    if different := _outdated(spec, seen, layers):
        return [*why, different], [*unused, *publish(spec)]
    return why, unused


def named(spec: FunctionSpec, step: Step, seen: SeenFunction | None) -> Step:
    """Return the step by which the alias means what a function's step has published.

    Parameters
    ----------
    spec : FunctionSpec
    step : Step
        The function's.
    seen : SeenFunction, optional
    """
    name = f"{spec.name}:{spec.alias}"
    operations = [call.operation for call in step.calls]
    if "PublishVersion" not in operations:
        return Step("keep", "snapshot", name)
    made_anew = "CreateFunction" in operations  # all that it had is gone then
    before = None if seen is None or made_anew else called(seen)
    meant = {
        "FunctionName": spec.name,
        "Name": spec.alias,
        "FunctionVersion": NewVersion(spec.name),
    }
    operation = "CreateAlias" if before is None else "UpdateAlias"
    calls = [Call("lambda", operation, meant, before="snapshot")]
    if before is not None and before in (seen.versions if seen else ()):
        calls.append(_delete(spec.name, before))
    why = ("Lambda takes it, which may take some minutes",)
    verb: Verb = "create" if before is None else "change"
    return Step(verb, "snapshot", name, why, calls, after=spec.name)


def called(seen: SeenFunction) -> str | None:
    """Return the number of the version that the alias means, if Lambda has a snapshot of it."""
    if seen.live is None or seen.live.get("State") == "Failed":
        return None
    return str(seen.live["Version"])


def _withdraw(seen: SeenFunction) -> list[Call]:
    """Return the calls that leave a function without snapshots."""
    calls = [_delete(seen.name, each) for each in seen.versions]
    return calls if seen.live is None else [_delete_alias(seen.name), *calls]


def _outdated(spec: FunctionSpec, seen: SeenFunction, layers: Sequence[str | LayerArn]) -> str:
    """Say why the version that is called is not what is wanted; nothing if it is."""
    live = seen.live
    if live is None:
        return "no snapshot of it is called"
    if live.get("State") == "Failed":
        return f"Lambda has no snapshot of it ({live.get('StateReason')})"
    if spec.code is not None:
        same = live.get("CodeSha256") == spec.code.code_sha256
    else:  # a version does not say which image it is
        is_latest = live.get("CodeSha256") == seen.configuration.get("CodeSha256")
        same = seen.image == spec.image and is_latest
    same = same and [each["Arn"] for each in live.get("Layers", [])] == list(layers)
    if same and not any(differences(spec.settings, live)):
        return ""
    return "its snapshot is one of another state"


def _delete_alias(name: str) -> Call:
    return Call("lambda", "DeleteAlias", {"FunctionName": name, "Name": ALIAS}, done=_GONE)


def _delete(name: str, version: str) -> Call:
    parameters = {"FunctionName": name, "Qualifier": version}
    # Lambda publishes nothing if the newest version is as the function is: then the alias means
    # the same version as before, and that cannot be deleted.
    return Call("lambda", "DeleteFunction", parameters, done=(*_GONE, "ResourceConflictException"))
