"""What differs between what there is and what is to be, in words and in calls.  Pure.

May import: calls, policies, errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dask_lambda.deploy import policies
from dask_lambda.deploy.calls import Call, Push, Step, Verb
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
