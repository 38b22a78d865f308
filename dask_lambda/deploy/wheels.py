"""Getting packages for another platform: pip, or uv where there is no pip.

May import: platforms, errors, the ground.

Only wheels are taken, since nothing can be compiled here for a Lambda function.  Which index they
come from, and through which proxy, is the installer's own configuration.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from dask_lambda.deploy.platforms import IMAGE_GLIBC, RUNTIMES, Platform
from dask_lambda.errors import PackagingError
from lambda_worker.environment import normal_name

#: Of pip's and uv's messages.
_NO_WHEEL = (
    re.compile(r"No matching distribution found for ([^\s;(]+)"),
    re.compile(r"([\w.\-]+==[^\s,]+) has no (?:usable )?wheels"),
    re.compile(r"no version of ([\w.\-]+==\S+)"),
)
_NETWORK = re.compile(
    "NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError|ProxyError|"
    "SSLError|[Cc]onnection broken|error sending request|Could not fetch URL"
)
#: Minor versions of glibc 2 that uv knows.
_UV_GLIBC = (17, 28, *range(31, 41))


class NoWheelError(PackagingError):
    """A package has no wheel for the platform."""


def install(packages: Mapping[str, str], platform: Platform, target: Path) -> None:
    """Unpack the wheels of packages into a directory.

    Parameters
    ----------
    packages : mapping of str to str
        Name to version: all that is needed, since nothing is added.
    platform : Platform
    target : Path

    Raises
    ------
    NoWheelError
        If one of them has no wheel for the platform.
    PackagingError
        If there is no installer, or it fails for another reason.
    """
    pins = [f"{name}=={version}" for name, version in packages.items()]
    uv = _uv()
    if uv is None:
        options = [
            "--no-deps",
            "--no-compile",
            "--no-warn-script-location",
            "--target",
            str(target),
        ]
        command = [*_pip("install", platform), *options, *pins]
    else:
        target.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--target", str(target), "--link-mode", "copy"]
        command = [*_uv_command(uv, "install", platform), *options, *pins]
    _run(command, platform)


def complete(
    packages: Mapping[str, str], missing: Sequence[str], platform: Platform
) -> dict[str, str]:
    """Let the installer choose what is not installed here; what is given stays as it is.

    Parameters
    ----------
    packages : mapping of str to str
        What is decided.
    missing : sequence of str
        Requirements that are not.
    platform : Platform

    Returns
    -------
    dict
        Name to version of all.

    Raises
    ------
    NoWheelError, PackagingError
    """
    if not missing:
        return dict(packages)
    pins = [f"{name}=={version}" for name, version in packages.items()]
    with tempfile.TemporaryDirectory(prefix="dask-lambda-") as directory:
        constraints = Path(directory, "constraints.txt")
        constraints.write_text("\n".join(pins) + "\n", "utf-8")
        uv = _uv()
        if uv is None:
            report = Path(directory, "report.json")
            options = ["--dry-run", "--ignore-installed", "--report", str(report)]
            options += ["--target", directory, "--constraint", str(constraints)]
            _run([*_pip("install", platform), *options, *missing], platform)
            chosen = {
                normal_name(each["metadata"]["name"]): each["metadata"]["version"]
                for each in json.loads(report.read_text("utf-8"))["install"]
            }
        else:
            asked = Path(directory, "asked.in")
            asked.write_text("\n".join(missing) + "\n", "utf-8")
            options = ["--no-header", "--no-annotate", "--constraint", str(constraints), str(asked)]
            lines = _run([*_uv_command(uv, "compile", platform), *options], platform).splitlines()
            pairs = [line.split("==") for line in lines if "==" in line]
            chosen = {
                normal_name(name.partition("[")[0]): version.strip() for name, version in pairs
            }
    return dict(sorted({**chosen, **packages}.items()))


def _uv() -> str | None:
    """Return uv, where it is needed: pip is there in most environments, and the same for all."""
    if find_spec("pip") is not None:
        return None
    uv = shutil.which("uv")
    if uv is None:
        raise PackagingError(
            "packages for Lambda are installed with pip or uv, and this environment has neither: "
            f"'{sys.executable} -m ensurepip' installs pip"
        )
    return uv


def _pip(action: str, platform: Platform) -> list[str]:
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    tags = [word for tag in platform.tags for word in ("--platform", tag)]
    return [
        *(sys.executable, "-m", "pip", action, *options, "--only-binary", ":all:"),
        *("--implementation", "cp", "--python-version", platform.python, *tags),
    ]


def _uv_command(uv: str, action: str, platform: Platform) -> list[str]:
    minor = max(known for known in _UV_GLIBC if known <= platform.glibc[1])
    return [
        *(uv, "pip", action, "--quiet", "--only-binary", ":all:"),
        *("--python-version", platform.python),
        *("--python-platform", f"{platform.machine}-manylinux_2_{minor}"),
    ]


def _run(command: list[str], platform: Platform) -> str:
    # Settings of the user's that contradict --target.
    environment = {**os.environ, "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise understand(done.stderr, platform)
    return done.stdout


def understand(said: str, platform: Platform) -> PackagingError:
    """Build the error of an installer that failed.

    Parameters
    ----------
    said : str
        What it wrote.
    platform : Platform
    """
    end = "\n".join(line for line in said.splitlines() if line.strip())[-2000:]
    if _NETWORK.search(said):
        return PackagingError(
            "the package index could not be reached. Check the network connection, and pip's "
            f"configuration of index and proxy. The installer said:\n{end}"
        )
    if "No space left on device" in said:
        return PackagingError("the packages do not fit on this disk: no space is left on it")
    for pattern in _NO_WHEEL:
        if found := pattern.search(said):
            return _no_wheel(found[1].strip("`'\"."), platform)
    return PackagingError(f"the packages could not be installed. The installer said:\n{end}")


def _no_wheel(name: str, platform: Platform) -> NoWheelError:
    package = re.split(r"[=<>!~\[]", name)[0]
    advice = [
        f"install another version of {package} here, which has one",
        "leave it out, if no task needs it",
    ]
    if "==" not in name:  # not installed here
        advice = [f"check the name {package}, which is not installed here", advice[-1]]
    if platform.architecture == "arm64":
        advice.insert(0, "build for x86_64")
    if platform.glibc == RUNTIMES[platform.python] < max(RUNTIMES.values()):
        newer = next(
            python for python, glibc in RUNTIMES.items() if glibc == max(RUNTIMES.values())
        )
        advice = [
            f"use Python {newer} or newer, whose runtimes have a newer C library",
            f"build a container image, which has glibc {IMAGE_GLIBC[0]}.{IMAGE_GLIBC[1]}",
            *advice,
        ]
    return NoWheelError(
        f"there is no wheel of {name} for Lambda ({platform}), and nothing can be compiled for it "
        f"here: {'; or '.join(advice)}"
    )
