"""A container image, for what layers have no room for.  May import: platforms, errors.

The recipe is a ``Dockerfile`` beside the unpacked packages: a plain Python image, the packages, the
worker, and Lambda's runtime interface client (``awslambdaric``), which is one of the packages.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from dask_lambda.deploy.platforms import Platform
from dask_lambda.errors import PackagingError

#: Lambda's side of a container that is not one of its own images.
RUNTIME_CLIENT = "awslambdaric"
#: Folders of the context, and where they are in the image.
PACKAGES, WORKER = "packages", "worker"
ROOT = "/var/task"
DOCKER_PLATFORMS = {"x86_64": "linux/amd64", "arm64": "linux/arm64"}
#: An image has hundreds of megabytes, and a line may be slow; but nothing waits for ever.
DOCKER_SECONDS = 3600.0
#: To say that it is there.
ASKED_SECONDS = 60.0


def dockerfile(platform: Platform, handler: str) -> str:
    """Return the recipe.

    Parameters
    ----------
    platform : Platform
    handler : str
        "module.function"
    """
    return f"""\
# Built by dask_lambda for {platform}.
# The base may be another one with this Python and a C library at least as new.
ARG BASE=python:{platform.python}-slim-bookworm
FROM ${{BASE}}
# Packages first: they change less often than the worker.
COPY {PACKAGES}/ {ROOT}/
COPY {WORKER}/ {ROOT}/
ENV PYTHONPATH={ROOT} PYTHONUNBUFFERED=1
WORKDIR {ROOT}
ENTRYPOINT ["python", "-m", "{RUNTIME_CLIENT}"]
CMD ["{handler}"]
"""


def unavailable() -> str | None:
    """Say why docker cannot be used here; None if it can."""
    if shutil.which("docker") is None:
        return "docker, which builds container images, is not installed here"
    try:
        _docker(["version", "--format", "{{.Server.Version}}"], "does not answer", ASKED_SECONDS)
    except PackagingError as error:
        return str(error)
    return None


def build(context: Path, tag: str, platform: Platform) -> None:
    """Build the image, if docker is there.

    Parameters
    ----------
    context : Path
        The directory with the ``Dockerfile``.
    tag : str
        "name:tag"
    platform : Platform

    Raises
    ------
    PackagingError
        If docker is not there, or fails; the recipe stays where it is.
    """
    arguments = build_arguments(context, tag, platform)
    if shutil.which("docker") is None:
        raise PackagingError(
            "docker is not installed, which builds container images. The recipe is in "
            f"{context}: build it where docker is, with 'docker {' '.join(arguments)}'"
        )
    _docker(arguments, f"could not build the image of {context}")


def build_arguments(context: Path, tag: str, platform: Platform) -> list[str]:
    """Return what docker is told to build an image."""
    return [
        *("build", "--platform", DOCKER_PLATFORMS[platform.architecture]),
        *("--provenance=false", "--tag", tag, str(context)),  # Lambda takes no attestations
    ]


def push(uri: str, user: str, password: str) -> None:
    """Push an image that was built under this name.

    The password goes to docker's standard input, and docker forgets it again afterwards.

    Raises
    ------
    PackagingError
        If docker fails.
    """
    registry = uri.partition("/")[0]
    login = ["login", "--username", user, "--password-stdin", registry]
    _docker(login, f"could not log in to {registry}", given=password)
    try:
        _docker(["push", uri], f"could not push {uri}")
    finally:
        _docker(["logout", registry], f"could not log out of {registry}")


def _docker(
    arguments: list[str], what: str, seconds: float = DOCKER_SECONDS, given: str = ""
) -> None:
    """Run docker, with something on its standard input."""
    try:
        done = subprocess.run(
            ["docker", *arguments],
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PackagingError(
            f"docker {what} within {seconds:,.0f} s ('docker {' '.join(arguments)}')"
        ) from None
    except OSError as error:
        raise PackagingError(f"docker {what}: {error}") from error
    if done.returncode:
        raise PackagingError(
            f"docker {what} ('docker {' '.join(arguments)}'). It said:\n"
            + done.stderr.strip()[-2000:]
        )
