"""Where distributed's tests come from, and what the installed distributed lacks for them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
FOLDER = "distributed/tests/"


def fetch(name: str) -> Path:
    """Return a file of distributed's tests from the pinned release, downloaded if necessary."""
    unpacked = _folder()
    if not unpacked.exists():
        unpacked.parent.mkdir(exist_ok=True)
        # Renamed when it is whole: an interrupted download is begun again.
        with tempfile.TemporaryDirectory(dir=unpacked.parent) as folder:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
            options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder]
            subprocess.run([*pip, *options, "--requirement", str(REQUIREMENTS)], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                tests = [entry for entry in archive.namelist() if entry.startswith(FOLDER)]
                archive.extractall(folder, tests)
            (Path(folder) / FOLDER).rename(unpacked)
    return unpacked / name


def is_fetched(path: Path) -> bool:
    """Whether a file is of the pinned release, not somebody's own copy."""
    return path.absolute().parent == _folder()


def _folder() -> Path:
    pin = REQUIREMENTS.read_text("utf-8").split("==")[1].split()[0]
    return Path(sys.prefix).absolute() / "distributed-tests" / pin


class Gone:
    """In the place of something that dask or distributed no longer has: any use fails."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *arguments: Any, **named: Any) -> NoReturn:
        raise NotImplementedError(f"{self._name} is not in this release")

    def __getattr__(self, attribute: str) -> NoReturn:
        self()


def provide_missing_imports(path: Path) -> list[str]:
    """Make a file importable whose imports are older or newer than what is installed.

    Returns
    -------
    list of str
        What is gone: the tests that use it fail.
    """
    gone = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        module = importlib.import_module(node.module)
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if hasattr(module, alias.name):
                continue
            if hasattr(module, "__path__") and find_spec(name):
                continue  # a submodule
            setattr(module, alias.name, Gone(name))
            gone.append(name)
    return gone
