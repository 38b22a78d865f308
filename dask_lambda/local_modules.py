"""The user's own modules, which travel with the tasks that need them.

May import: libraries, errors, the ground.

A function that can be imported is pickled by its name, so the worker has to import it as well.
What is installed here is expected to be installed there.  All else, the modules and packages of a
project, editable installs among them, exists on this machine only: as tasks are pickled, the names
that they mention are noted (:meth:`LocalModules.note`), imports in the sources of what they name
are followed, and everything that was found is one archive, of which each request tells.

A top-level package travels as a whole, with its data files: which of its modules and files it will
want cannot be known.
"""

from __future__ import annotations

import ast
import io
import os
import re
import stat
import sys
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import blake2b
from typing import Any

from dask_lambda.errors import ConfigurationError, LocalModulesError
from dask_lambda.libraries import OWN, missing_module, of_library, requirement, spec_of
from lambda_worker.protocol import archive_digest

#: All local modules of a run, unpacked: each environment fetches and keeps them.
MAX_BYTES = 64 * 2**20
MAX_FILES = 20_000
#: What the worker is made of: it has its own, however it is installed here.
WORKERS = OWN | {"dask", "distributed", "cloudpickle", "obstore"}
#: Directories in which nothing belongs to a package; besides hidden ones and environments.
_PASSED_OVER = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages"})
_COMPILED = (".so", ".pyd", ".dll", ".dylib")
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that zip files know
_NAMED = 5  # of the largest files, in an error

#: The archive that was made last is kept, up to this size: the next run has the same files, mostly.
MAX_KEPT_BYTES = 8 * 2**20

_Names = frozenset[str]
_mentions: dict[bytes, _Names] = {}  # digest of a source -> what it may import
_imports: dict[bytes, _Names] = {}  # the same -> what it does import
_kept: dict[bytes, Archive] = {}  # digest of files -> their archive


@dataclass(frozen=True, slots=True)
class Archive:
    """Modules on their way.

    Attributes
    ----------
    digest : str
    data : bytes
        A zip file; equal files give equal bytes.
    """

    digest: str
    data: bytes


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    name: str  #: in the archive
    nbytes: int


class LocalModules:
    """The local modules that the tasks of one run need.

    Each file is read once: what is added later in the run fits to what was sent before.

    Parameters
    ----------
    include : iterable of str
        Modules that travel in any case.
    exclude : iterable of str
        What does not travel: modules (``"package"``, ``"package.module"``), or patterns of files
        (``"package/data/*"``).
    remembered : set of str, optional
        Modules that earlier runs needed, to which those of this run are added.

    Raises
    ------
    ConfigurationError
        If a module to include is not local.
    """

    def __init__(
        self,
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        remembered: set[str] | None = None,
    ):
        self._excluded = tuple(exclude)
        self._remembered = set[str]() if remembered is None else remembered
        self._seen: set[str] = set()  # names of modules, looked at
        self._since: dict[str, int] = {}  # top-level module -> how many there were before
        self._local: dict[str, bool] = {}  # whether a top-level module is, and not excluded
        self._read: dict[str, dict[str, bytes]] = {}  # files of a top-level module
        self._lock = threading.Lock()
        for name in include:
            self._add(self._included(name))

    @property
    def roots(self) -> frozenset[str]:
        """The top-level modules that are needed, without what they import themselves."""
        return frozenset(self._since)

    def note(self, module: str) -> None:
        """Take note of a module that a task mentions, whether it is local or not."""
        if module not in self._seen:
            self._seen.add(module)
            top = module.partition(".")[0]
            if self._travels(top):
                self._add(top)

    def recall(self) -> None:
        """Take note of what earlier runs needed: this one reads what they have stored."""
        for top in sorted(self._remembered):
            if self._travels(top):
                self._add(top)

    def supply(self, module: str, known: int) -> bool:
        """Take note of a module that a worker missed; tell whether another try will have it.

        Parameters
        ----------
        module : str
        known : int
            How many roots there were when the request was made.
        """
        top = module.partition(".")[0]
        if top in self._since:
            return self._since[top] >= known
        if not self._travels(top):
            return False
        self._add(top)
        return True

    def _add(self, top: str) -> None:
        self._since.setdefault(top, len(self._since))
        self._remembered.add(top)

    def _travels(self, top: str) -> bool:
        if top not in self._local:
            self._local[top] = top not in self._excluded and bool(locate(top))
        return self._local[top]

    def _included(self, name: str) -> str:
        top = name.partition(".")[0]
        if top in self._excluded:
            raise ConfigurationError(
                f"dask-lambda.modules: {top!r} is to be included and to be excluded"
            )
        if locate(top):
            return top
        said = f"dask-lambda.modules.include: {name!r}"
        if top in sys.stdlib_module_names or top in WORKERS:
            raise ConfigurationError(f"{said} is on every worker: it need not travel")
        spec = spec_of(top)
        if spec is None:
            raise ConfigurationError(
                f"{said} is not found here: is its directory on sys.path, and does it have a file?"
            )
        raise ConfigurationError(
            f"{said} is installed ({spec.origin or top}): only what is not travels. "
            f"Install {requirement(top)} where the function is, or here in editable mode"
        )

    # -- the archive -----------------------------------------------------------------------------

    def archive(self, roots: Iterable[str]) -> Archive:
        """Read modules, and what they import, into an archive.

        Raises
        ------
        LocalModulesError
            If they are too large, or cannot be read.
        """
        with self._lock:
            files: dict[str, bytes] = {}
            waiting, found = list(roots), set(roots)
            while waiting:
                top = waiting.pop()
                if top not in self._read:
                    if not self._travels(top):
                        continue
                    self._read[top] = self._load(top, files)
                files.update(self._read[top])
                fresh = self._imported(self._read[top]) - found
                found |= fresh
                waiting += fresh
        return _pack(files)

    def _imported(self, files: dict[str, bytes]) -> set[str]:
        """Return the local modules that some files import.

        Parsing takes longest by far, and few sources import a local module: so it is left to
        those that seem to.
        """
        found: set[str] = set()
        for name, source in files.items():
            if name.endswith(".py"):
                fresh = set(filter(self._travels, mentions_of(source) - found))
                if fresh:
                    found |= fresh & imports_of(source)
        return found

    def _load(self, top: str, others: dict[str, bytes]) -> dict[str, bytes]:
        listed: list[_File] = []
        contents = {}
        try:
            for file in _files(top):
                if not any(_matches(file.name, pattern) for pattern in self._excluded):
                    listed.append(file)
                    if len(listed) > MAX_FILES:
                        break
            self._check_size(top, listed, others)
            for file in listed:
                with open(file.path, "rb") as source:
                    contents[file.name] = source.read()
        except OSError as error:
            raise LocalModulesError(
                f"The local module {top!r} cannot be read, so that it cannot travel with the "
                f"tasks that need it ({error}). {_advice_on(top)}"
            ) from error
        return contents

    @staticmethod
    def _check_size(top: str, listed: list[_File], others: dict[str, bytes]) -> None:
        total = sum(file.nbytes for file in listed) + sum(map(len, others.values()))
        if total <= MAX_BYTES and len(listed) <= MAX_FILES:
            return
        sizes = [(file.nbytes, file.name) for file in listed]
        sizes += [(len(data), name) for name, data in others.items()]
        largest = ", ".join(
            f"{name} ({nbytes / 2**20:,.1f} MB)"
            for nbytes, name in sorted(sizes, key=lambda each: (-each[0], each[1]))[:_NAMED]
        )
        what = f"{total / 2**20:,.0f} MB" if total > MAX_BYTES else f"more than {MAX_FILES:,} files"
        raise LocalModulesError(
            f"The local modules that the tasks need, with {top!r}, are {what}; up to "
            f"{MAX_BYTES // 2**20} MB and {MAX_FILES:,} files travel with them. The largest: "
            f"{largest}. {_advice_on(top)}"
        )

    # -- what is missing -------------------------------------------------------------------------

    def advice(self, module: str) -> str:
        """Say what to do about a module that a worker could not import."""
        top = module.partition(".")[0]
        if top in self._excluded:
            return (
                f"The module {module!r} is not on the worker, and dask-lambda.modules.exclude "
                "keeps it from travelling with the tasks: exclude it no longer, or install it "
                "where the function is."
            )
        if top in self._read:
            return (
                f"{top!r} is local and travelled with the tasks, but without {module!r}: what is "
                "excluded, hidden or outside of its directory does not travel, nor what was "
                "compiled for another system."
            )
        if locate(top):
            return (
                f"{top!r} is local, and no task mentions it in a way that can be seen: "
                f"dask_lambda.config.modules.include({top!r}) has it travel with them."
            )
        return missing_module(module)


def _advice_on(top: str) -> str:
    return (
        f"dask_lambda.config.modules.exclude({top!r}), or a pattern such as "
        f"{top + '/data/*'!r}, keeps what tasks do not need from travelling; large data is better "
        "read from S3, or given to tasks as arguments."
    )


# ---------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------


def locate(top: str) -> tuple[str, ...]:
    """Return the local file or directories of a top-level module; none if it is not local.

    Parameters
    ----------
    top : str
        It need not be loaded.
    """
    if not top.isidentifier() or top in sys.stdlib_module_names or top in WORKERS:
        return ()
    if top in ("__main__", "__mp_main__") or (spec := spec_of(top)) is None:
        return ()
    file = os.path.abspath(spec.origin) if spec.origin and spec.has_location else None
    if file is not None and not os.path.isfile(file):
        return ()
    if spec.submodule_search_locations is None:
        return () if file is None or of_library(file) else (file,)
    # Of a package without a file some directories may be installed, and some local.
    folders = tuple(filter(_is_own, map(os.path.abspath, spec.submodule_search_locations)))
    return folders if file is None or _is_own(os.path.dirname(file)) else ()


def _is_own(folder: str) -> bool:
    """Whether a directory is none of a library, or a link to one that is not, as flit makes them.

    Links to single files say nothing: some installers link all files to a cache of theirs.
    """
    if of_library(folder) and os.path.islink(folder):
        folder = os.path.realpath(folder)
    return os.path.isdir(folder) and not of_library(folder)


def _files(top: str) -> Iterator[_File]:
    """List the files of a local module as they will be in the archive."""
    for place in locate(top):
        if os.path.isdir(place):
            yield from _below(place, top)
        elif _fits_worker(place):
            suffix = "." + os.path.basename(place).partition(".")[2]
            yield _File(place, top + suffix, os.stat(place).st_size)


def _below(root: str, top: str) -> Iterator[_File]:
    met = set()  # links may lead back
    for here, folders, names in os.walk(root, onerror=_raise, followlinks=True):
        real = os.path.realpath(here)
        if real in met:
            folders.clear()
            continue
        met.add(real)
        folders[:] = sorted(each for each in folders if _is_part(here, each))
        within = os.path.relpath(here, root).replace(os.sep, "/")
        prefix = top if within == "." else f"{top}/{within}"
        for name in sorted(names):
            path = os.path.join(here, name)
            if name.startswith(".") or not _is_printable(name) or not _fits_worker(name):
                continue
            status = os.stat(path) if os.path.exists(path) else None
            if status is not None and stat.S_ISREG(status.st_mode):
                yield _File(path, f"{prefix}/{name}", status.st_size)


def _is_part(here: str, folder: str) -> bool:
    """Whether a directory in a package is one of it."""
    if folder.startswith(".") or folder in _PASSED_OVER or not _is_printable(folder):
        return False
    return not os.path.exists(os.path.join(here, folder, "pyvenv.cfg"))


def _is_printable(name: str) -> bool:
    """Whether a name can be one in an archive, on any system."""
    return name.isprintable() and not set(name) & set("\\:")


def _fits_worker(name: str) -> bool:
    return sys.platform == "linux" or not name.endswith(_COMPILED)


def _raise(error: OSError) -> None:
    raise error


def _matches(name: str, pattern: str) -> bool:
    """Whether an excluded module or pattern means a file of an archive."""
    if "/" in pattern or "*" in pattern:
        return fnmatchcase(name, pattern)
    path = pattern.replace(".", "/")
    return name.startswith((path + "/", path + "."))


def _pack(files: dict[str, bytes]) -> Archive:
    digest = blake2b(digest_size=16)
    for name in sorted(files):
        digest.update(b"%d %d " % (len(name.encode()), len(files[name])))
        digest.update(name.encode())
        digest.update(files[name])
    key = digest.digest()
    archive = _kept.get(key)
    if archive is None:
        data = _zip(files)
        archive = Archive(archive_digest(data), data)
        _kept.clear()
        if len(data) <= MAX_KEPT_BYTES:
            _kept[key] = archive
    return archive


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------
# imports
# ---------------------------------------------------------------------------------------------


_IMPORT = re.compile(
    r"\bfrom\s+(\w+)[\w.]*\s+import\b"
    r"|\bimport\s+(\w[^()#;\n]*)"
    r"|\b(?:import_module|__import__)\(\s*[\"'](\w+)"
)


def mentions_of(source: bytes) -> frozenset[str]:
    """Return the top-level modules that a source may import: all that it does, and some more."""

    def find(source: bytes) -> Iterator[str]:
        text = source.decode("utf-8", "replace").replace("\\\n", " ")
        for one, some, called in _IMPORT.findall(text):
            yield one or called
            for each in some.split(","):
                yield each.strip().partition(" ")[0].partition(".")[0]

    return _remembered(_mentions, source, find)


def imports_of(source: bytes) -> frozenset[str]:
    """Return the top-level modules that a source imports, wherever in it.

    Relative imports are not among them: they stay in the package.
    """
    return _remembered(_imports, source, _parse)


def _remembered(
    memory: dict[bytes, _Names], source: bytes, find: Callable[[bytes], Iterable[str]]
) -> _Names:
    digest = blake2b(source, digest_size=16).digest()
    if digest not in memory:
        if len(memory) > MAX_FILES:
            memory.clear()
        found = frozenset(filter(None, (name.partition(".")[0] for name in find(source))))
        memory[digest] = found
        return found
    return memory[digest]


def _parse(source: bytes) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # a template, or for another Python: whoever imports it will hear of it
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (each.name for each in names)
            case ast.ImportFrom(module=str(name), level=0):
                yield name
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if _called(function) in ("import_module", "__import__"):
                    yield name


def _called(function: Any) -> str:
    match function:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return str(name)
    return ""
