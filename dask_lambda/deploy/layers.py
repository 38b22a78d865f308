"""Layers: zip files of packages, and what Lambda allows of them.  May import: errors.

What Lambda unpacks to ``/opt`` is the sum of a function's layers, and ``/opt/python`` is on the
import path.  Packages are shared out over several layers, so that each is small enough to be sent
with the request that publishes it; what is larger goes through S3.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dask_lambda.errors import PackagingError

#: Lambda quotas: "Function layers", "Deployment package (.zip file archive) size".
MAX_LAYERS = 5
MAX_UNZIPPED = 250 * 2**20
MAX_DIRECT = 50 * 2**20
#: "Container image code package size".
MAX_IMAGE = 10 * 2**30
#: Room for the function's own code, ``lambda_worker``.
OWN_CODE = 2 * 2**20
#: Where a layer's packages are, in its zip file and on Lambda.
FOLDER = "python"
PATH = "/opt/python"
#: Unzipped bytes of one layer, as far as packages can be shared out.  Binary packages become less
#: than half as large by zipping, so that this is below :data:`MAX_DIRECT`.
TARGET = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Size:
    """What takes the room: one package.

    Attributes
    ----------
    name : str
    version : str
    nbytes : int
        Unzipped, as it is deployed.
    """

    name: str
    version: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layer:
    """A zip file of packages.

    Attributes
    ----------
    file : str
        Its name in the directory of the environment.
    sha256 : str
        Of the file; two layers with equal content are equal files.
    nbytes, unzipped : int
    packages : tuple of str
    """

    file: str
    sha256: str
    nbytes: int
    unzipped: int
    packages: tuple[str, ...]

    @property
    def through_s3(self) -> bool:
        """Whether it is too large for the request that publishes it."""
        return self.nbytes > MAX_DIRECT


def share_out(sizes: Mapping[str, int], target: int = TARGET) -> list[list[str]]:
    """Share packages out over layers: the largest first, each into the last one with room.

    Parameters
    ----------
    sizes : mapping of str to int
        Name to unzipped bytes.
    target : int
        Unzipped bytes of one layer, unless a single package is larger or there would be more
        than :data:`MAX_LAYERS`.

    Returns
    -------
    list of list of str
        At least one layer; the same for the same sizes, in whatever order they are given.
    """
    layers: list[list[str]] = []
    filled: list[int] = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        fitting = [n for n, nbytes in enumerate(filled) if nbytes + sizes[name] <= target]
        if fitting:
            place = fitting[-1]  # so the small ones, which change most often, are together
        elif len(layers) < MAX_LAYERS:
            place = len(layers)
            layers.append([])
            filled.append(0)
        else:
            place = filled.index(min(filled))
        layers[place].append(name)
        filled[place] += sizes[name]
    return [sorted(layer) for layer in layers] or [[]]


def fits(nbytes: int) -> bool:
    """Whether packages of so many unzipped bytes can be layers."""
    return nbytes + OWN_CODE <= MAX_UNZIPPED


def check(sizes: Sequence[Size], limit: int, what: str, advice: str) -> None:
    """Refuse what is larger than Lambda allows.

    Raises
    ------
    PackagingError
        It says what takes the room.
    """
    total = sum(size.nbytes for size in sizes)
    if total <= limit:
        return
    largest = sorted(sizes, key=lambda size: -size.nbytes)[:8]
    raise PackagingError(
        f"the packages take {total / 1e6:,.0f} MB unzipped, and {what} may have "
        f"{limit / 1e6:,.0f} MB. The largest are "
        + ", ".join(f"{s.name} {s.version} ({s.nbytes / 1e6:,.0f} MB)" for s in largest)
        + f". {advice}"
    )


def write_zip(path: Path, root: Path, files: Iterable[str], folder: str = FOLDER) -> str:
    """Write files into a zip file; return its SHA-256.

    Equal files give equal bytes: no dates, owners or order of a directory's entries are in it.

    Parameters
    ----------
    path : Path
    root : Path
        Where the files are.
    files : iterable of str
        Relative to it, with slashes.
    folder : str
        In the zip file.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{folder}/{name}" if folder else name)
            entry.create_system = 3  # Unix, for the mode
            source = root / name
            executable = os.access(source, os.X_OK) and source.suffix != ".so"
            entry.external_attr = (0o100755 if executable else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            with open(source, "rb") as file:
                archive.writestr(entry, file.read(), zipfile.ZIP_DEFLATED, 6)
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    """Return the hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
