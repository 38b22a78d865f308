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
    docker = shutil.which("docker")
    command = [
        *("docker", "build", "--platform", DOCKER_PLATFORMS[platform.architecture]),
        *("--provenance=false", "--tag", tag, str(context)),  # Lambda takes no attestations
    ]
    if docker is None:
        raise PackagingError(
            "docker is not installed, which builds container images. The recipe is in "
            f"{context}: build it where docker is, with '{' '.join(command)}'"
        )
    done = subprocess.run(
        [docker, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise PackagingError(
            f"docker could not build the image of {context} ('{' '.join(command)}'). It said:\n"
            + done.stderr.strip()[-2000:]
        )
