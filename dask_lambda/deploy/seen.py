"""What there is in the account, of what a deployment is made of.  Pure.

May import: naming, lifecycle's types, policies' types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dask_lambda.deploy.naming import TAG
from dask_lambda.deploy.policies import Document

#: The tag by which CloudFormation knows what is a stack's.
STACK = "aws:cloudformation:stack-name"


@dataclass(frozen=True, slots=True)
class SeenBucket:
    """A bucket of this account."""

    name: str
    region: str
    tags: Mapping[str, str] = field(default_factory=dict)
    versioning: str = ""  #: "", "Enabled" or "Suspended"
    public_blocked: bool = False
    encrypted: bool = False
    policy: Document | None = None
    lifecycle: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SeenRole:
    """The execution role."""

    name: str
    trust: Document
    policies: Mapping[str, Document]  #: that are in the role
    attached: tuple[str, ...] = ()  #: ARNs of policies of their own
    boundary: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SeenLogGroup:
    """A log group with the name of a function of ours."""

    name: str
    days: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SeenLayer:
    """A version of a layer of ours."""

    name: str
    version: int
    arn: str
    description: str
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SeenRepository:
    """A repository in ECR."""

    name: str
    tags: Mapping[str, str] = field(default_factory=dict)
    policy: Document | None = None
    images: tuple[str, ...] = ()  #: the tags of its images


@dataclass(frozen=True, slots=True)
class SeenFunction:
    """A function with a name like ours, as GetFunction describes it."""

    name: str
    configuration: Mapping[str, Any]
    image: str | None = None  #: its URI, if it is one
    tags: Mapping[str, str] = field(default_factory=dict)
    versions: tuple[str, ...] = ()  #: numbers of those that were published for their snapshots
    live: Mapping[str, Any] | None = None  #: the one of them by which it is called


@dataclass(frozen=True, slots=True)
class Seen:
    """All of them."""

    bucket: SeenBucket | None = None
    role: SeenRole | None = None
    log_groups: Mapping[str, SeenLogGroup] = field(default_factory=dict)
    layers: tuple[SeenLayer, ...] = ()
    functions: Mapping[str, SeenFunction] = field(default_factory=dict)
    refused: bool = False  #: there is a bucket of the name, which S3 says nothing of
    repository: SeenRepository | None = None

    def has_any(self, deployment: str) -> bool:
        """Whether anything of the deployment's own is there."""
        return bool(self.layers) or bool(self._tagged(deployment))

    def stack_of(self, deployment: str) -> str | None:
        """Return the CloudFormation stack that has made what is there; None if none has."""
        found = (each.tags.get(STACK) for each in self._tagged(deployment))
        return next(filter(None, found), None)

    def _tagged(self, deployment: str) -> list[Any]:
        several: list[Any] = [*self.functions.values(), *self.log_groups.values()]
        known = (*several, self.bucket, self.role, self.repository)
        return [each for each in known if is_ours(each, deployment)]


def is_ours(
    found: SeenBucket | SeenRole | SeenLogGroup | SeenFunction | SeenRepository | None,
    deployment: str,
) -> bool:
    """Whether a deployment made it."""
    return found is not None and found.tags.get(TAG) == deployment
