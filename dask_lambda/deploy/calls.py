"""API calls as data, so that they can be shown before they are made.  Pure.

May import: artifact, policies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dask_lambda.deploy import policies
from dask_lambda.deploy.artifact import Archive, Recipe

Verb = Literal["create", "change", "keep", "delete", "empty", "leave"]
#: What has to be waited for after a call, before the next one.
Settled = Literal["bucket", "role", "function", "no function", ""]


@dataclass(frozen=True, slots=True)
class LayerArn:
    """In the place of an ARN that is known once the layer's version is published."""

    name: str

    def __str__(self) -> str:
        return f"<ARN of the new version of {self.name}>"


@dataclass(frozen=True, slots=True)
class NewVersion:
    """In the place of the number of a function's version that is known once it is published."""

    function: str

    def __str__(self) -> str:
        return f"<number of the new version of {self.function}>"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an API.

    Attributes
    ----------
    service, operation : str
        As in botocore: ``"lambda"``, ``"CreateFunction"``.
    parameters : mapping
        Its parameters; an :class:`Archive` stands for its bytes, a :class:`LayerArn` for an ARN, a
        :class:`NewVersion` for a number.
    settled : str
        What to wait for afterwards.
    before : str
        What to wait for before: ``"snapshot"``, that of the version which it names.
    done : tuple of str
        Error codes that mean that there is nothing to do any more.
    """

    service: str
    operation: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    settled: Settled = ""
    before: Literal["snapshot", ""] = ""
    done: tuple[str, ...] = ()

    @property
    def action(self) -> str:
        """The permission that it needs."""
        return policies.action_of(self.service, self.operation)

    def to_json(self) -> dict[str, Any]:
        """Return it for people and programs to read: archives as their size and hash."""
        return {
            "service": self.service,
            "operation": self.operation,
            "parameters": _shown(self.parameters),
        }


@dataclass(frozen=True, slots=True)
class Push:
    """Building a container image, and pushing it: docker's work, which is shown among the calls.

    Attributes
    ----------
    recipe : Recipe
    uri : str
        Where in ECR it will be.
    """

    recipe: Recipe
    uri: str

    @property
    def service(self) -> str:
        """Who does it."""
        return "docker"

    @property
    def operation(self) -> str:
        """What is done."""
        return "push"

    @property
    def action(self) -> str:
        """The permission that it needs, among others."""
        return policies.action_of("ecr", "PutImage")

    def to_json(self) -> dict[str, Any]:
        """Return it for people and programs to read."""
        parameters = {
            "context": str(self.recipe.context),
            "platform": str(self.recipe.platform),
            "image": self.uri,
        }
        return {"service": self.service, "operation": self.operation, "parameters": parameters}


@dataclass(frozen=True, slots=True)
class Step:
    """What is done about one resource.

    Attributes
    ----------
    verb : str
    kind, name : str
        Of the resource: ``"function"``, ``"dask-lambda-1769"``.
    why : sequence of str
        What differs, or what there is to say.
    calls : sequence of Call or Push
    optional : str
        If the account refuses the first call for this reason, the resource is left out.
    after : str
        Name of another resource: if that is left out, this one is, too.
    """

    verb: Verb
    kind: str
    name: str
    why: Sequence[str] = ()
    calls: Sequence[Call | Push] = ()
    optional: str = ""
    after: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it for people and programs to read."""
        return {
            "action": self.verb,
            "kind": self.kind,
            "name": self.name,
            "why": list(self.why),
            "calls": [call.to_json() for call in self.calls],
        }

    def __str__(self) -> str:
        return f"{self.verb} {self.kind} {self.name}"


def _shown(value: Any) -> Any:
    if isinstance(value, Archive):
        return f"<{value.size:,} bytes, SHA-256 {value.sha256}>"
    if isinstance(value, LayerArn | NewVersion):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _shown(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(each) for each in value]
    return value
