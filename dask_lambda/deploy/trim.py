"""What is left out of packages, since nothing that a worker runs needs it.  May import: elf.

Each rule says what goes; :func:`plan` says which files these are, :func:`apply` deletes them.  What
is kept can still be imported: tests whose modules are imported by others stay, and the packaged
environment is imported before it is used (:mod:`dask_lambda.deploy.package`).

Bytecode is not left out, on the contrary: what is unpacked on Lambda cannot be written to, and
compiling at each cold start would take seconds.  It is made here (:func:`compile_all`), marked as
never to be compared with its source, so that no file's date has a part in it.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dask_lambda.deploy import elf

#: To be raised with each change of the rules: environments that were trimmed otherwise are others.
VERSION = 1

#: Why -> what.
SOURCES = frozenset(
    (".c", ".cc", ".cpp", ".cu", ".f", ".f90", ".h", ".hpp", ".pxd", ".pxi", ".pyx", ".a", ".lib")
)
METADATA = frozenset(("RECORD", "INSTALLER", "REQUESTED", "WHEEL", "direct_url.json"))
#: Of what is beside the packages.
OUTSIDE = frozenset(("bin", "include", "share/man", "share/doc", ".lock"))
#: Packages whose shared libraries are loaded before those of another one are.
LOADED_BEFORE = {"scipy.libs": "numpy.libs"}

_TEST_FILE = re.compile(r"(test_.*|.*_test|tests?|conftest)\.py")
_MENTIONS_TESTS = re.compile(rb"^[ \t]*(?:from|import)[ \t(].*\b(?:tests?|conftest)\b", re.M)


@dataclass(frozen=True, slots=True)
class Cut:
    """A file that is left out."""

    path: PurePosixPath  #: relative to the directory of the packages
    nbytes: int
    why: str


def plan(root: Path) -> list[Cut]:
    """Say which files of unpacked packages can be left out."""
    files = {path: (root / path).stat().st_size for path in sorted(_files(root))}
    why = {path: reason for path in files if (reason := _reason(path, files, root))}
    for path in _needed_tests(files, why, root):
        del why[path]
    return [Cut(path, files[path], reason) for path, reason in why.items()]


def apply(root: Path, cuts: Iterable[Cut]) -> None:
    """Delete what is left out, and the directories that are empty then."""
    folders: set[PurePosixPath] = set()
    for cut in cuts:
        (root / cut.path).unlink()
        folders.update(cut.path.parents[:-1])
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        if not any((root / folder).iterdir()):
            (root / folder).rmdir()


def strip_all(root: Path) -> int:
    """Cut the symbols of debuggers out of all shared libraries; return how many bytes they were."""
    saved = 0
    for path in sorted(_files(root)):
        if ".so" in path.suffixes:
            before = (root / path).read_bytes()
            after = elf.strip(before)
            if len(after) < len(before):
                (root / path).write_bytes(after)
                saved += len(before) - len(after)
    return saved


def compile_all(root: Path, where: str, processes: int = 0) -> None:
    """Compile all modules for this interpreter.

    Parameters
    ----------
    root : Path
    where : str
        The directory in which they will be, for tracebacks.
    processes : int
        0: as many as there are cores.  With one, the same sources give the same bytes.
    """
    for cache in list(root.rglob("__pycache__")):
        shutil.rmtree(cache)
    options = ["-q", "-q", "-j", str(processes), "--invalidation-mode", "unchecked-hash"]
    paths = ["-s", str(root), "-p", where]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    # A file for another version of Python, which nobody imports, fails: that is no error.
    subprocess.run(
        [sys.executable, "-P", "-s", "-m", "compileall", *options, *paths, str(root)],
        env={**inherited, "PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


# ---------------------------------------------------------------------------------------------
# the rules
# ---------------------------------------------------------------------------------------------


def _files(root: Path) -> Iterator[PurePosixPath]:
    for folder, _, names in os.walk(root):
        for name in names:
            yield PurePosixPath(Path(folder, name).relative_to(root).as_posix())


def _reason(path: PurePosixPath, files: Mapping[PurePosixPath, int], root: Path) -> str | None:
    if path.suffix in (".pyc", ".pyo"):
        return "bytecode"
    if path.parts[0] in OUTSIDE or "/".join(path.parts[:2]) in OUTSIDE:
        return "scripts"
    if path.parts[0].endswith(".dist-info"):
        unneeded = path.name in METADATA or "sboms" in path.parts
        return "metadata" if unneeded else None
    if path.suffix == ".pyi":
        return None if _is_read(path, root) else "stubs"
    if path.suffix in SOURCES:
        return "sources"
    if _in_tests(path, files):
        return "tests"
    if path.suffix != ".py" and {"doc", "docs"} & set(path.parts[:-1]):
        return "docs"
    keeper = LOADED_BEFORE.get(path.parts[0])
    if keeper is not None and _same(root / path, root / keeper / path.name):
        return "duplicates"
    return None


def _in_tests(path: PurePosixPath, files: Mapping[PurePosixPath, int]) -> bool:
    """Whether a file is in a directory of tests, or says how they are run."""
    if path.name == "conftest.py":
        return True
    for n, part in enumerate(path.parts[:-1]):
        if part in ("tests", "test"):
            folder = PurePosixPath(*path.parts[: n + 1])
            # A package may call something else so; `tests` at the top may be anything.
            if part == "tests" and n > 0:
                return True
            return any(
                _TEST_FILE.fullmatch(other.name) and other.is_relative_to(folder) for other in files
            )
    return False


def _is_read(stub: PurePosixPath, root: Path) -> bool:
    """Whether a package reads its stub to know what to load (``lazy_loader.attach_stub``)."""
    module = root / stub.with_suffix(".py")
    return module.exists() and b"attach_stub" in module.read_bytes()


def _same(one: Path, other: Path) -> bool:
    if not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    return one.read_bytes() == other.read_bytes()


def _needed_tests(
    files: Mapping[PurePosixPath, int], why: Mapping[PurePosixPath, str], root: Path
) -> set[PurePosixPath]:
    """Find what would be cut as tests and is imported by what stays."""
    needed: set[PurePosixPath] = set()
    waiting = [path for path in files if path.suffix == ".py" and path not in why]
    while waiting:
        path = waiting.pop()
        source = (root / path).read_bytes()
        # What is in a directory of tests may name its neighbours in other ways.
        if path not in needed and not _MENTIONS_TESTS.search(source):
            continue
        for module in _imported(path, source):
            for found in _files_of(module):
                if why.get(found) == "tests" and found not in needed:
                    needed.add(found)
                    waiting.append(found)
    return needed


def _imported(path: PurePosixPath, source: bytes) -> Iterator[tuple[str, ...]]:
    """Give the modules, or what may be modules, that a file imports."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            start = path.parts[: len(path.parts) - node.level] if node.level else ()
            module = (*start, *(node.module.split(".") if node.module else ()))
            yield module
            for alias in node.names:
                yield (*module, alias.name)


def _files_of(module: tuple[str, ...]) -> Iterator[PurePosixPath]:
    """Give the files that are read when a module is imported: itself and its packages."""
    for length in range(1, len(module) + 1):
        yield PurePosixPath(*module[:length], "__init__.py")
    yield PurePosixPath(*module).with_suffix(".py") if module else PurePosixPath()
