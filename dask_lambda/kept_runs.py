"""The local records of runs whose objects outlive them: ``resume``, ``keep``, and ``save``.

May import: errors, the standard library.

A record says under which run id the objects of a name are, and holds the secret under which they
are sealed.  S3 never holds a secret, so who has lost the record cannot use the objects any more;
and who has it needs the user's AWS credentials as well.  One process uses a name at a time.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dask_lambda.errors import ConfigurationError

Status = Literal["new", "running", "failed", "done"]
#: What a name is for: ``resume`` and ``keep``, or ``save``.
Kind = Literal["computed", "saved"]

#: Of names: they are file names, too.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: Version of the records' format.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where objects are: the same bucket name means something else at another endpoint."""

    bucket: str
    prefix: str
    region: str | None = None
    endpoint_url: str | None = None

    def __str__(self) -> str:
        where = self.endpoint_url or self.region or "the default region"
        return f"bucket {self.bucket!r} (prefix {self.prefix!r}, {where})"


@dataclass(frozen=True, slots=True)
class Saved:
    """Where the description of a saved collection is; the rest is for people.

    Attributes
    ----------
    label : str
        Of the object.
    size : int
        Its bytes.
    identity : str
        The same for what is the same collection; empty if that cannot be told.
    what : str
        The collection in a few words.
    """

    label: str
    size: int
    identity: str
    what: str


@dataclass(frozen=True, slots=True)
class Spent:
    """What the computations of a name have taken so far, as their reports counted it.

    Attributes
    ----------
    since : float
        Seconds since 1970: what was computed before is not in it.
    computations : int
        Runs, those that failed or broke off among them; of a program that was killed nothing is
        known.
    invocations : int
    gb_seconds, cost_usd : float
    """

    since: float
    computations: int = 0
    invocations: int = 0
    gb_seconds: float = 0.0
    cost_usd: float = 0.0

    def plus(self, invocations: int, gb_seconds: float, cost_usd: float) -> Spent:
        """Return the sum with one more computation."""
        return Spent(
            self.since,
            self.computations + 1,
            self.invocations + invocations,
            self.gb_seconds + gb_seconds,
            self.cost_usd + cost_usd,
        )


@dataclass(slots=True)
class KeptRun:
    """The record of one name.

    Attributes
    ----------
    name : str
    run : str
        The id in the names of its objects.
    secret : bytes
        Under which they are sealed.
    place : Place
    function : str
        That ran its tasks last.
    created, used : float
        Seconds since 1970.
    status : {"new", "running", "failed", "done"}
        Of the last computation; "running" may also mean that its process was killed.
    tasks : int
        Of the last computation.
    results : list of str
        Labels of the objects that are results of its computations, or blocks of what is saved.
    kind : {"computed", "saved"}
    saved : Saved, optional
        What can be loaded: a collection of which all is there.
    renamed : dict
        Fingerprint to label, where they differ: of results that take the place of others which
        stay until all is complete.
    spent : Spent, optional
        None if it was written by a version that did not count.
    """

    name: str
    run: str
    secret: bytes = field(repr=False)
    place: Place
    function: str
    created: float
    used: float
    status: Status = "new"
    tasks: int = 0
    results: list[str] = field(default_factory=list)
    kind: Kind = "computed"
    saved: Saved | None = None
    renamed: dict[str, str] = field(default_factory=dict)
    spent: Spent | None = None

    @classmethod
    def new(cls, name: str, place: Place, function: str) -> KeptRun:
        """Begin a record, with a run id and a secret that nobody can guess."""
        now = time.time()
        run, secret = secrets.token_hex(16), secrets.token_bytes(32)
        return cls(name, run, secret, place, function, now, now, spent=Spent(now))

    def to_json(self) -> dict[str, Any]:
        """Describe the record in its file."""
        record = asdict(self)
        record["secret"] = base64.b64encode(self.secret).decode("ascii")
        return {"format": FORMAT, **record}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> KeptRun:
        """Inverse of :meth:`to_json`."""
        if record.get("format") != FORMAT:
            raise ValueError(f"format {record.get('format')}")
        known = {each.name: record[each.name] for each in fields(cls) if each.name in record}
        known["secret"] = base64.b64decode(record["secret"])
        known["place"] = Place(**record["place"])
        if known.get("saved") is not None:
            known["saved"] = Saved(**known["saved"])
        if known.get("spent") is not None:
            known["spent"] = Spent(**known["spent"])
        return cls(**known)


def runs_directory() -> Path:
    """Return the directory of the records.

    ``runs`` in ``DASK_LAMBDA_STATE_DIR`` or, if that is not set, in ``dask-lambda`` in
    ``XDG_STATE_HOME`` (``~/.local/state``): not where a log-out or the next start of the machine
    would remove it.
    """
    if explicit := os.environ.get("DASK_LAMBDA_STATE_DIR"):
        return Path(explicit) / "runs"
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "dask-lambda" / "runs"


def check_name(name: str) -> None:
    """Refuse what cannot be a file name everywhere.

    Raises
    ------
    ConfigurationError
    """
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot be the name of a run: use up to 100 letters, digits, dots, dashes "
            "and underscores, beginning with a letter or a digit"
        )


def new_name() -> str:
    """Return a name for a run that was given none: when it began, and something random."""
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(3)


def read(name: str) -> KeptRun | None:
    """Return the record of a name, or None if there is none.

    Raises
    ------
    ConfigurationError
        If the name is not one, or its record cannot be read.
    """
    check_name(name)
    path = runs_directory() / f"{name}.json"
    try:
        return KeptRun.from_json(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the record {path} of the kept run {name!r} cannot be read ({error}): remove it to "
            "begin anew (what the run has left in S3 then goes with: dask-lambda clean --kept)"
        ) from error


def names() -> list[str]:
    """Return the names of all records, sorted."""
    found = (path.stem for path in runs_directory().glob("*.json"))
    return sorted(name for name in found if NAME.fullmatch(name))


def of_run(run: str) -> KeptRun | None:
    """Return the record that has a run id, or None: the objects' names tell the id only."""
    for record in records():
        if record.run == run:
            return record
    return None


def records() -> Iterator[KeptRun]:
    """Yield all records that can be read."""
    for name in names():
        with suppress(ConfigurationError):
            if (record := read(name)) is not None:
                yield record


def write(record: KeptRun) -> None:
    """Write a record, all of it or nothing, readable for its owner only."""
    directory = _directory()
    with tempfile.NamedTemporaryFile(  # created with mode 0600
        "w", dir=directory, prefix=".", delete=False, encoding="utf-8"
    ) as file:
        json.dump(record.to_json(), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, directory / f"{record.name}.json")


def remove(name: str) -> None:
    """Remove a record; its lock is to be held."""
    (runs_directory() / f"{name}.json").unlink(missing_ok=True)
    (runs_directory() / f"{name}.lock").unlink(missing_ok=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep a name to this thread: other processes and threads are refused meanwhile.

    To wait instead could be for ever: whoever holds the name may be waiting for us.

    Raises
    ------
    ConfigurationError
        If somebody else uses it; the message says who.
    """
    import fcntl  # not on Windows, where the rest of this package can be imported

    check_name(name)
    path = _directory() / f"{name}.lock"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 20).decode("ascii", "replace").strip()
            os.close(handle)
            raise _in_use(name, holder) from None
        if _is_current(handle, path):  # else it was removed with its record at this moment
            break
        os.close(handle)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.ftruncate(handle, 0)
        os.close(handle)  # which a killed process does, too


def _is_current(handle: int, path: Path) -> bool:
    try:
        ours, there = os.fstat(handle), os.stat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _in_use(name: str, holder: str) -> ConfigurationError:
    who = f"process {holder}" if holder else "another process"
    if holder == str(os.getpid()):
        who = "another thread of this process"
    return ConfigurationError(
        f"the kept run {name!r} is being used by {who}: wait until that is done, or choose another "
        "name (a name is one computation at a time)"
    )


def _directory() -> Path:
    directory = runs_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_mode & 0o077:
        directory.chmod(0o700)
    return directory
