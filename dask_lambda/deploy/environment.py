"""What goes into the worker's environment: the client's own versions, and what they need.

May import: platforms, errors, the ground.

Tasks are pickled here and unpickled there, so each package is taken in the version that this
interpreter has.  What is needed is followed through the installed packages' own requirements, with
the environment markers of the platform where they will run, not of the one where this runs.  What
is not installed here (a package for Linux only, or for workers only) is left to the installer.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from dask_lambda.deploy.platforms import Platform
from dask_lambda.errors import PackagingError
from lambda_worker.environment import normal_name

#: What ``lambda_worker`` imports, and what tasks of Dask's collections need.
WORKER = ("dask", "distributed", "cloudpickle", "numpy", "scipy", "obstore")
#: Those of them that the worker itself imports.
INDISPENSABLE = frozenset(("dask", "cloudpickle", "obstore"))
#: What a client has and a worker needs not, if "everything that is installed" is asked for.
#: Lambda's runtimes have boto3 and botocore; they come along only if something else needs them.
CLIENT_ONLY = frozenset(
    ("dask-lambda", "ministack", "boto3", "botocore", "pip", "setuptools", "wheel", "uv")
)


@dataclass(frozen=True, slots=True)
class Installed:
    """A package of this interpreter.

    Attributes
    ----------
    name : str
        Canonical (PEP 503).
    version : str
    requires : tuple of str
        Its requirements, as its metadata has them.
    asked : bool
        Somebody installed it by its name, not since another one needs it.
    local : str
        Where it was installed from, if not from an index.
    editable : bool
        It is there still: its modules travel with the tasks that use them.
    """

    name: str
    version: str
    requires: tuple[str, ...] = ()
    asked: bool = False
    local: str = ""
    editable: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    """What goes into an environment.

    Attributes
    ----------
    packages : dict
        Canonical name to version.
    listed : frozenset of str
        Those that were asked for.
    missing : tuple of str
        Requirements that nothing installed here fulfils.
    needed_by : dict
        Canonical name to those of the packages that require it.
    """

    packages: Mapping[str, str]
    listed: frozenset[str]
    missing: tuple[str, ...] = field(default=())
    needed_by: Mapping[str, frozenset[str]] = field(default_factory=dict)


def resolve(
    requirements: Iterable[str],
    platform: Platform,
    installed: Callable[[str], Installed | None],
) -> Resolved:
    """Find the versions of what is asked for, and of all that it needs.

    Parameters
    ----------
    requirements : iterable of str
        As in PEP 508: "pandas", "dask[dataframe]", "zarr>=3".
    platform : Platform
    installed : callable
        Canonical name to what this interpreter has.

    Raises
    ------
    PackagingError
        If a requirement cannot be read, or excludes the version that this interpreter has.
    """
    packages: dict[str, str] = {}
    listed: set[str] = set()
    missing: dict[str, None] = {}
    needed_by: dict[str, set[str]] = {}
    waiting: list[Requirement] = []
    for asked in map(_parsed, requirements):
        if _holds(asked, platform):
            name = normal_name(asked.name)
            listed.add(name)
            _check(asked, installed(name))
            waiting.append(asked)
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = normal_name(requirement.name)
        package = installed(name)
        if package is None:
            missing[f"{requirement.name}{_extras(requirement)}{requirement.specifier}"] = None
            continue
        if package.local:
            raise PackagingError(_why_not(package))
        packages[name] = package.version
        extras: frozenset[str] = frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for each in _readable(package):
            if _holds(each, platform, extras):
                needed_by.setdefault(normal_name(each.name), set()).add(name)
                waiting.append(each)
    return Resolved(
        dict(sorted(packages.items())),
        frozenset(listed),
        tuple(sorted(missing)),
        {name: frozenset(others) for name, others in needed_by.items()},
    )


def digest(packages: Mapping[str, str], platform: Platform, version: int) -> str:
    """Return what names an environment: equal for equal packages, platform and trimming.

    Parameters
    ----------
    packages : mapping of str to str
    platform : Platform
    version : int
        Of what is done to them.
    """
    content = [sorted(packages.items()), str(platform), version]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def name_of(requirement: str) -> str:
    """Return the name of the package that a requirement asks for.

    Raises
    ------
    PackagingError
        If it cannot be read.
    """
    return normal_name(_parsed(requirement).name)


def _parsed(text: str) -> Requirement:
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise PackagingError(
            f"{text!r} is not a requirement such as 'pandas' or 'zarr>=3': "
            + str(error).partition("\n")[0]
        ) from None
    if requirement.url:
        raise PackagingError(
            f"{text!r} names an address: only packages of an index can be built for Lambda"
        )
    return requirement


def _why_not(package: Installed) -> str:
    if package.editable:
        return (
            f"{package.name} is an editable installation of {package.local}: its modules travel "
            "with the tasks that use them, so leave it out here"
        )
    return (
        f"{package.name} is installed from {package.local}, which no index has, so that it cannot "
        "be built for Lambda: install it in editable mode ('pip install -e'), and its modules "
        "travel with the tasks that use them; or publish it"
    )


def _readable(package: Installed) -> list[Requirement]:
    """Return what a package requires; some old ones have what no installer can read either."""
    found = []
    for text in package.requires:
        with suppress(InvalidRequirement):
            found.append(Requirement(text))
    return found


def _holds(requirement: Requirement, platform: Platform, extras: Iterable[str] = ()) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({**platform.markers, "extra": extra}) for extra in ("", *extras)
    )


def _check(requirement: Requirement, package: Installed | None) -> None:
    if package is not None and not requirement.specifier.contains(
        package.version, prereleases=True
    ):
        raise PackagingError(
            f"{requirement.name}{requirement.specifier} is asked for, but this Python has "
            f"{package.version}, and workers must have what the client has: install that version "
            f"here ('python -m pip install \"{requirement.name}{requirement.specifier}\"'), or "
            "change the requirement"
        )


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


# ---------------------------------------------------------------------------------------------
# where requirements come from
# ---------------------------------------------------------------------------------------------

_COMMENT = re.compile(r"(^|\s)#.*$")
_HASH = re.compile(r"\s--hash[= ]\S+")


def read_requirements(path: Path) -> list[str]:
    """Read a requirements file: requirements, comments, ``-r`` of other files.

    Raises
    ------
    PackagingError
        If it cannot be read, or asks for something that no index has.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise PackagingError(f"the requirements {str(path)!r} cannot be read: {why}") from error
    found = []
    start, so_far = 1, ""
    for number, line in enumerate(text.splitlines(), 1):
        start = start if so_far else number
        so_far += _COMMENT.sub("", line)
        if so_far.endswith("\\"):
            so_far = so_far[:-1]
            continue
        entry, so_far = _HASH.sub("", so_far).strip(), ""
        if not entry:
            continue
        option, _, rest = entry.replace("=", " ", 1).partition(" ")
        if option in ("-r", "--requirement"):
            found += read_requirements(path.parent / rest.strip())
        elif entry.startswith("-"):
            raise PackagingError(
                f"{path}, line {start}: {entry!r} is an option, which cannot be followed here: "
                "list packages and versions; the index is that of pip's own configuration"
            )
        else:
            try:
                _parsed(entry)
            except PackagingError as error:
                raise PackagingError(f"{path}, line {start}: {error}") from None
            found.append(entry)
    return found


def everything(installed: Iterable[Installed], platform: Platform) -> list[str]:
    """List what this interpreter has for its own sake: nobody else needs it, or it was asked for.

    What only dask_lambda itself or the embedded AWS need is left out, and editable installations,
    whose modules travel with tasks.
    """
    every = {package.name: package for package in installed}
    needed: set[str] = set()
    for package in every.values():
        needed |= {normal_name(each.name) for each in _readable(package) if _holds(each, platform)}
    return sorted(
        name
        for name, package in every.items()
        if name not in CLIENT_ONLY
        and not package.editable
        and (package.asked or name not in needed)
    )


def find_installed(name: str) -> Installed | None:
    """Return what this interpreter has of a package."""
    try:
        return _read(importlib.metadata.distribution(name))
    except importlib.metadata.PackageNotFoundError:
        return None


def all_installed() -> list[Installed]:
    """Return all that this interpreter has."""
    found: dict[str, Installed] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.metadata["Name"]:  # what is left of a broken installation has none
            package = _read(distribution)
            found.setdefault(package.name, package)
    return list(found.values())


def _read(distribution: importlib.metadata.Distribution) -> Installed:
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    return Installed(
        normal_name(distribution.metadata["Name"]),
        distribution.version,
        tuple(distribution.requires or ()),
        asked=distribution.read_text("REQUESTED") is not None,
        local=direct.get("url", ""),
        editable=bool(direct.get("dir_info", {}).get("editable")),
    )
