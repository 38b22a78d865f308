"""The packages of the worker: what was deployed, whether it is the client's, what is loaded early.

May import: nothing of the package.

A package that was built by :mod:`dask_lambda.deploy` holds a small file with the versions of all
that is in it.  A request says which packages the client has imported, and their versions.  What
travels between the two as pickles names classes and functions of these packages: where versions
differ in a way that may change what a pickle means, the request is refused before anything is
unpickled.  A worker without such a file has not been built from anybody's environment (the
embedded AWS's workers run in the client's own), and compares nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: In the directory of the packages.
FILE = "lambda_worker_environment.json"
#: Environment variable of the function: modules to import before the first call, by commas.
PREIMPORT = "DASK_LAMBDA_PREIMPORT"

_RELEASE = re.compile(r"v?(?:\d+!)?(\d+(?:\.\d+)*)")


@dataclass(frozen=True, slots=True)
class Deployed:
    """What a package for workers consists of.

    Attributes
    ----------
    digest : str
        Of everything that went in.
    packages : dict
        Name (as in PEP 503) to version, of everything that is there.
    listed : frozenset of str
        Those of them that were asked for, not only needed by others: what tasks use.
    """

    digest: str
    packages: Mapping[str, str]
    listed: frozenset[str]

    def to_json(self) -> str:
        """Build the content of :data:`FILE`."""
        record = {
            "hash": self.digest,
            "packages": dict(sorted(self.packages.items())),
            "listed": sorted(self.listed),
        }
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Deployed:
        """Inverse of :meth:`to_json`."""
        record = json.loads(text)
        return cls(record["hash"], record["packages"], frozenset(record["listed"]))


@dataclass(frozen=True, slots=True)
class Differences:
    """Packages of which client and worker have different versions: name to (worker's, client's)."""

    refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    warned: dict[str, tuple[str, str]] = field(default_factory=dict)


def compare(deployed: Deployed, client: Mapping[str, Any]) -> Differences:
    """Compare the packages of a worker with those that a client has imported.

    A package that was listed is refused if the first two numbers of its versions differ, and
    is worth a warning if the rest does.  Of a package that only others need, the first two numbers
    are worth a warning.  What the worker has not got is not compared: the task that needs it says
    so.
    """
    differences = Differences()
    for name, theirs in client.items():
        ours = deployed.packages.get(name)
        if ours is None or ours == theirs or not isinstance(theirs, str):
            continue
        series = _series(ours) != _series(theirs)
        if name in deployed.listed:
            (differences.refused if series else differences.warned)[name] = ours, theirs
        elif series:
            differences.warned[name] = ours, theirs
    return differences


def _series(version: str) -> tuple[int, ...] | str:
    release = _RELEASE.match(version)
    if release is None:
        return version
    numbers = [*map(int, release[1].split(".")), 0]
    return tuple(numbers[:2])


def normal_name(name: str) -> str:
    """Return the name of a package as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


# ---------------------------------------------------------------------------------------------
# the worker
# ---------------------------------------------------------------------------------------------


def find_deployed(path: Iterable[str] | None = None) -> Deployed | None:
    """Read the file that was deployed with the packages; nothing if there is none."""
    for directory in sys.path if path is None else path:
        try:
            with open(os.path.join(directory, FILE), encoding="utf-8") as file:
                return Deployed.from_json(file.read())
        except OSError:  # most directories, and what is no directory
            continue
    return None


class Packages:
    """What a worker has, and the clients that it has compared it with."""

    def __init__(self, deployed: Deployed | None):
        self.deployed = deployed
        self._last: tuple[Any, Differences] = ({}, Differences())

    def differences(self, client: Any) -> Differences:
        """Compare with a client; as good as nothing if it is the client of the call before."""
        if self.deployed is None or not isinstance(client, dict):
            return Differences()
        if client != self._last[0]:
            self._last = client, compare(self.deployed, client)
        return self._last[1]


def preimport(modules: str) -> dict[str, str]:
    """Import modules before the first call, while Lambda gives the function a whole core.

    Parameters
    ----------
    modules : str
        Names, by commas.

    Returns
    -------
    dict
        What could not be imported, and why: no error, since no task may need it.
    """
    failed = {}
    for name in filter(None, map(str.strip, modules.split(","))):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  whatever a module raises
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


# ---------------------------------------------------------------------------------------------
# the client
# ---------------------------------------------------------------------------------------------

#: Packages that are not called like the module they bring.
_OTHER_NAMES = {
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "dateutil": "python-dateutil",
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
_known: dict[str, tuple[str, str] | None] = {}
_imported: tuple[int, dict[str, str]] = (0, {})


def imported() -> dict[str, str]:
    """Return the packages that this process has imported, and their versions.

    It is asked for each request, so it looks only if something was imported since.
    """
    global _imported
    count = len(sys.modules)
    if count != _imported[0]:
        found = {}
        for module in list(sys.modules):
            if module not in _known:
                _known[module] = _version(module)
            if (package := _known[module]) is not None:
                found[package[0]] = package[1]
        _imported = count, found
    return _imported[1]


def _version(module: str) -> tuple[str, str] | None:
    # Late, since it takes a worker 20 ms that never asks.
    from importlib.metadata import PackageNotFoundError, version

    if "." in module or module.startswith("_") or module in sys.stdlib_module_names:
        return None
    name = _OTHER_NAMES.get(module, module)
    try:
        return normal_name(name), version(name)
    except (PackageNotFoundError, ValueError):
        return None
