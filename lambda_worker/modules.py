"""The user's own modules, where Python finds them, for as long as an invocation needs them.

May import: protocol, errors.

A request names an archive of modules that exist on the client only.  It is unpacked once for each
environment, into a directory that comes first on ``sys.path``: on the client these modules were
found before anything of the same name that is installed, and so they are here.  Nothing else is
hidden by that, since the directory holds nothing but them; and what this package itself had loaded
when the environment started is never replaced, whatever an archive holds.

An environment serves several runs in turn.  What one has loaded another must not see: a module may
have changed since, or not belong to it at all.  So for each archive there is a set of loaded
modules, which is put into ``sys.modules`` when a request names that archive, and taken out when the
next one names another or none.  Runs that alternate import nothing twice.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from lambda_worker.errors import RequestError
from lambda_worker.protocol import archive_digest

#: Lambda gives 512 MB of disk, of which tasks should have most.
MAX_DISK_BYTES = 160 * 2**20
#: Archives that stay unpacked; there are more than one where runs go on at the same time.
MAX_ARCHIVES = 4


@dataclass(slots=True)
class _Archive:
    """An archive that is unpacked."""

    folder: str
    tops: frozenset[str]  #: names of its top-level modules
    nbytes: int
    loaded: dict[str, ModuleType] = field(default_factory=dict)  #: while it is not in use
    hidden: dict[str, ModuleType] = field(default_factory=dict)  #: installed ones, while it is


class LocalModules:
    """The archives of one environment, of which one is in use.  To be used in one thread.

    To be made before any task runs.
    """

    def __init__(self) -> None:
        self._fixed = frozenset(map(_top_of, sys.modules))
        self._archives: OrderedDict[str, _Archive] = OrderedDict()  # by digest
        self._in_use: str | None = None

    def use(self, digest: str | None, fetch: Callable[[], Any]) -> None:
        """Have the modules of an archive found, and no others.

        Parameters
        ----------
        digest : str, optional
            Of the archive; None for no modules.
        fetch : callable
            Returns the archive, verified; called if it is not here.

        Raises
        ------
        RequestError
            If it is not an archive of modules.
        OSError
            If it cannot be unpacked.
        """
        if digest == self._in_use:
            return
        self._leave()
        if digest is None:
            return
        if digest not in self._archives:
            self._archives[digest] = self._unpack(digest, fetch())
        self._enter(digest)

    def _leave(self) -> None:
        if self._in_use is None:
            return
        archive, self._in_use = self._archives[self._in_use], None
        with suppress(ValueError):  # a task may have taken it out
            sys.path.remove(archive.folder)
        archive.loaded = self._take_loaded(archive.tops)
        sys.modules.update(archive.hidden)
        archive.hidden = {}

    def _enter(self, digest: str) -> None:
        archive = self._archives[digest]
        self._archives.move_to_end(digest)
        self._in_use = digest
        archive.hidden = self._take_loaded(archive.tops)
        sys.modules.update(archive.loaded)
        archive.loaded = {}
        sys.path.insert(0, archive.folder)
        importlib.invalidate_caches()

    def _take_loaded(self, tops: frozenset[str]) -> dict[str, ModuleType]:
        """Take modules out of ``sys.modules``, with all that is in them."""
        tops = tops - self._fixed
        return {name: sys.modules.pop(name) for name in list(sys.modules) if _top_of(name) in tops}

    def _unpack(self, digest: str, data: Any) -> _Archive:
        import io
        import shutil
        import tempfile
        import zipfile

        if archive_digest(data) != digest:
            raise RequestError("the archive of local modules is not the one that was announced")
        try:
            source = zipfile.ZipFile(io.BytesIO(data))
            entries = source.infolist()
        except (zipfile.BadZipFile, ValueError) as error:
            raise RequestError(f"the archive of local modules cannot be read: {error}") from None
        with source:
            for entry in entries:
                if not _is_safe(entry.orig_filename):
                    name = entry.orig_filename[:200]
                    raise RequestError(f"the archive of local modules holds {name!r}")
            nbytes = sum(entry.file_size for entry in entries)
            if nbytes > MAX_DISK_BYTES:
                raise RequestError(f"the local modules take {nbytes:,} bytes")
            self._make_room(nbytes)
            folder = tempfile.mkdtemp(prefix="lambda_worker-")
            try:
                source.extractall(folder)
            except BaseException as error:
                shutil.rmtree(folder, ignore_errors=True)
                if isinstance(error, zipfile.BadZipFile):
                    raise RequestError(f"the local modules cannot be read: {error}") from None
                raise
        tops = frozenset(_top_of(entry.filename.partition("/")[0]) for entry in entries)
        return _Archive(folder, tops, nbytes)

    def _make_room(self, nbytes: int) -> None:
        """Remove archives that were not used for longest."""
        import shutil

        removed = False
        while self._archives and (
            len(self._archives) >= MAX_ARCHIVES
            or nbytes + sum(each.nbytes for each in self._archives.values()) > MAX_DISK_BYTES
        ):
            _, archive = self._archives.popitem(last=False)
            shutil.rmtree(archive.folder, ignore_errors=True)
            sys.path_importer_cache.pop(archive.folder, None)
            removed = True
        if removed:  # modules refer to themselves
            gc.collect()

    def close(self) -> None:
        """Forget and remove all of them."""
        import shutil

        self._leave()
        for archive in self._archives.values():
            shutil.rmtree(archive.folder, ignore_errors=True)
            sys.path_importer_cache.pop(archive.folder, None)
        self._archives.clear()


def _top_of(name: str) -> str:
    return name.partition(".")[0]


def _is_safe(name: str) -> bool:
    """Whether a name in an archive stays below the directory into which it is unpacked."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not set(name) & set("\\:\0")
