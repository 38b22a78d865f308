"""What is deployed: the function's code and its layers, as zip files; or a container image.

May import: layers (for a limit), platforms, local_start (for the installed worker), errors.
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

from dask_lambda import local_start
from dask_lambda.deploy import layers
from dask_lambda.deploy.platforms import Platform
from dask_lambda.errors import ConfigurationError

Architecture = Literal["x86_64", "arm64"]

#: Of images: ECR is the only registry that Lambda takes them from.
IMAGE = re.compile(
    r"\d{12}\.dkr\.ecr\.[a-z0-9-]+\.amazonaws\.com(\.cn)?/[a-z0-9._/-]+"
    r"(@sha256:[0-9a-f]{64}|:[\w.-]{1,128})"
)


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip file.

    Attributes
    ----------
    source : bytes or Path
    size : int
        Bytes.
    sha256 : str
        In hexadecimal digits.
    """

    source: bytes | Path = field(repr=False)
    size: int
    sha256: str

    @classmethod
    def of(cls, source: bytes | Path) -> Archive:
        """Measure a zip file that is in memory, or on disk."""
        if isinstance(source, bytes):
            return cls(source, len(source), hashlib.sha256(source).hexdigest())
        with open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(source, source.stat().st_size, digest)

    @property
    def code_sha256(self) -> str:
        """The hash as Lambda tells it (``CodeSha256``)."""
        return base64.b64encode(bytes.fromhex(self.sha256)).decode("ascii")

    @property
    def is_large(self) -> bool:
        """Whether Lambda takes it from S3 only."""
        return self.size > layers.MAX_DIRECT

    def read(self) -> bytes:
        """Return its bytes."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True, slots=True)
class Layer:
    """A zip file that Lambda unpacks into ``/opt``.

    Attributes
    ----------
    name : str
        Among the layers of the package.
    archive : Archive
    content : str
        Hash of what it holds: a layer of equal content is not uploaded again.
    """

    name: str
    archive: Archive
    content: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A container image that docker can build.

    Attributes
    ----------
    context : Path
        The directory with the ``Dockerfile``.
    platform : Platform
    tag : str
        Names the content: an image with this tag is not built again.
    because : str
        Why it is an image.
    """

    context: Path
    platform: Platform
    tag: str
    because: str = ""


@dataclass(frozen=True, slots=True)
class Package:
    """What runs in Lambda.

    Attributes
    ----------
    code : Archive, optional
        The function's own zip file; None for an image.
    layers : tuple of Layer
        In the order in which Lambda unpacks them: later ones overwrite.
    runtime : str
        ``"python3.12"``
    architecture : {"x86_64", "arm64"}
    handler : str
    environment : str
        Hash of all packages and their versions, that names this environment.
    variables : tuple of (str, str)
        Environment variables of the function that the package needs.
    image : str, optional
        URI of a container image in ECR, which holds all of it: then there are no zip files, and
        runtime and handler are the image's own.
    recipe : Recipe, optional
        By which the image is built and pushed there, if it is ours to do that.
    """

    code: Archive | None
    layers: tuple[Layer, ...] = ()
    runtime: str = f"python{sys.version_info.major}.{sys.version_info.minor}"
    architecture: Architecture = "x86_64"
    handler: str = local_start.HANDLER
    environment: str = ""
    variables: tuple[tuple[str, str], ...] = ()
    image: str | None = None
    recipe: Recipe | None = None


def from_image(
    uri: str,
    architecture: Architecture = "x86_64",
    variables: Sequence[tuple[str, str]] = (),
) -> Package:
    """Return a container image that is in ECR as what is deployed.

    Parameters
    ----------
    uri : str
        ``ACCOUNT.dkr.ecr.REGION.amazonaws.com/NAME@sha256:...``, or with a tag: then a newer image
        under the same tag is not seen.
    architecture : {"x86_64", "arm64"}
    variables : sequence of (str, str)
        Environment variables of the function that it needs.

    Raises
    ------
    ConfigurationError
        If it is not the URI of an image in ECR: Lambda takes no others.
    """
    if not IMAGE.fullmatch(uri):
        raise ConfigurationError(
            f"{uri!r} is not the URI of an image in ECR, as "
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com/dask-lambda@sha256:..."
        )
    environment = uri.rpartition("@")[2].removeprefix("sha256:")[:16]
    return Package(
        None,
        architecture=architecture,
        environment=environment,
        variables=tuple(variables),
        image=uri,
    )


def from_recipe(
    recipe: Recipe, uri: str, environment: str, variables: Sequence[tuple[str, str]] = ()
) -> Package:
    """Return a container image that is to be built, pushed and deployed.

    Parameters
    ----------
    recipe : Recipe
    uri : str
        Where in ECR it will be.
    environment : str
        Hash of what it holds.
    variables : sequence of (str, str)
        Environment variables of the function that it needs.
    """
    return Package(
        None,
        architecture=cast(Architecture, recipe.platform.architecture),
        environment=environment,
        variables=tuple(variables),
        image=uri,
        recipe=recipe,
    )


def worker_only(
    architecture: Architecture = "x86_64", variables: Sequence[tuple[str, str]] = ()
) -> Package:
    """Return ``lambda_worker`` alone, for functions that find all other packages where they run.

    That is so on emulators that run functions in this Python environment.
    """
    code = Archive.of(local_start.worker_code())
    return Package(
        code,
        architecture=architecture,
        environment=code.sha256[:16],
        variables=tuple(variables),
    )


class _Layer(Protocol):
    @property
    def file(self) -> str: ...
    @property
    def sha256(self) -> str: ...


class _Platform(Protocol):
    @property
    def python(self) -> str: ...
    @property
    def architecture(self) -> str: ...


class Environment(Protocol):
    """What is needed of an environment that was built: its layers are files in its directory."""

    @property
    def digest(self) -> str: ...  # noqa: D102
    @property
    def platform(self) -> _Platform: ...  # noqa: D102
    @property
    def layers(self) -> Sequence[_Layer]: ...  # noqa: D102
    @property
    def directory(self) -> Path: ...  # noqa: D102


def from_environment(
    built: Environment, code: bytes, variables: Sequence[tuple[str, str]] = ()
) -> Package:
    """Return an environment that was built, with the function's code, as what is deployed.

    Parameters
    ----------
    built : Environment
    code : bytes
        Zip file of ``lambda_worker``.
    variables : sequence of (str, str)
        Environment variables of the function that it needs.
    """
    archives = tuple(
        Layer(f"packages-{number}", Archive.of(built.directory / layer.file), layer.sha256)
        for number, layer in enumerate(built.layers, 1)
    )
    return Package(
        Archive.of(code),
        archives,
        f"python{built.platform.python}",
        cast(Architecture, built.platform.architecture),
        environment=built.digest,
        variables=tuple(variables),
    )
