"""What travels between client and worker.  May import: errors, dask's top level.

One Invoke carries one *request* and brings back one *reply*; both are JSON, with pickled and
sealed bytes in base64.  A request names several *groups*; each group has a body (its tasks), its
inputs, and the names under which its outputs are committed, and each fails or succeeds by
itself.  A value is always described in the same way, by a :class:`Value`: the object's name and
size, and its sealed bytes where it travels inline.  The same sealed bytes are what S3 holds, so
a value may move from one to the other without being looked at.
"""

from __future__ import annotations

import base64
import hashlib
import math
import platform
import secrets
import threading
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import dask

from lambda_worker.errors import RequestError

#: Version of this format; client and worker must agree.
PROTOCOL = 2

#: AWS: synchronous Invoke, request and response payload (Lambda quotas, "Invocation payload").
MAX_PAYLOAD_BYTES = 6_291_456

#: Inline bytes (before base64) that one request or reply may hold, so that four thirds of them
#: and the JSON around them stay below :data:`MAX_PAYLOAD_BYTES`.
MAX_INLINE_TOTAL_BYTES = 4_400_000

#: Nobody writes larger objects: S3 takes 10,000 parts, and they are of 16 MB (store.Parts).
MAX_OBJECT_BYTES = 10_000 * 16 * 2**20

#: Leading hex digits of an object name that spread the objects of a run over S3 partitions
#: (3,500 PUT and 5,500 GET a second for each partitioned prefix).
SHARD_DIGITS = 1

#: ``PYTHONHASHSEED`` wherever tasks run: those that partition strings by ``hash()`` must agree
#: (distributed's workers have the same one).
HASH_SEED = "6640"

Compression = Literal["none", "zstd"]
Key = Hashable  # Dask: str, bytes, int, float or a tuple of them


@dataclass(slots=True)
class Value:
    """A sealed value: where it is, how large, and its bytes if it travels inline.

    Attributes
    ----------
    name : str
        Object name; the tag of the sealed bytes is bound to it.
    size : int
        Sealed bytes.
    data : bytes-like, optional
        The sealed bytes, when they are at hand.
    shared : bool
        More than one group reads it: worth keeping in a worker's cache.
    """

    name: str
    size: int
    data: bytes | bytearray | None = None
    shared: bool = False

    def to_json(self) -> dict[str, Any]:
        """Describe the value in a request or reply."""
        record: dict[str, Any] = {"name": self.name, "size": self.size}
        if self.data is not None:
            record["data"] = base64.b64encode(self.data).decode("ascii")
        if self.shared:
            record["shared"] = True
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Value:
        """Inverse of :meth:`to_json`.

        Raises
        ------
        RequestError
        """
        with _understood("a value"):
            name, size, data = record["name"], record["size"], record.get("data")
            if type(name) is not str or type(size) is not int or not 0 <= size <= MAX_OBJECT_BYTES:
                raise ValueError("its name or size")
            return cls(
                name,
                size,
                None if data is None else base64.b64decode(data),
                bool(record.get("shared", False)),
            )


@dataclass(slots=True)
class Modules:
    """The user's own modules that tasks import (:mod:`lambda_worker.modules`).

    Attributes
    ----------
    digest : str
        Of the archive (:func:`archive_digest`): an environment that has it does not fetch it.
    archive : Value
        A sealed zip file, the names in which begin with those of top-level modules.
    """

    digest: str
    archive: Value

    def to_json(self) -> dict[str, Any]:
        """Describe the modules in a request."""
        return {"digest": self.digest, "archive": self.archive.to_json()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Modules:
        """Inverse of :meth:`to_json`.

        Raises
        ------
        RequestError
        """
        with _understood("the modules"):
            digest = record["digest"]
            if type(digest) is not str:
                raise ValueError("the digest")
            return cls(digest, Value.from_json(record["archive"]))


def archive_digest(data: Any) -> str:
    """Return by what the archives of modules are told apart."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(slots=True)
class GroupRequest:
    """One group of a request.

    Attributes
    ----------
    body : Value
        Sealed pickle of the fields of a :class:`Body`.
    frames : list of (int, Value)
        Buffers of the body that travel as objects of their own, and their places among its
        frames: chunks of ``from_array`` and other large literals.
    inputs : list of Value
        In the order of ``Body.inputs``.
    outputs : list of str
        Object names, in the order of ``Body.outputs``.
    entangled : bool
        Readers must see the outputs of one attempt: they are committed under names of the
        attempt's own (:func:`attempt_name`), and count once the reply is there.
    timeout : float, optional
        Seconds after which its tasks are interrupted.
    """

    body: Value
    inputs: list[Value]
    outputs: list[str]
    frames: list[tuple[int, Value]] = field(default_factory=list)
    entangled: bool = False
    timeout: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Describe the group in a request."""
        return {
            "body": self.body.to_json(),
            "frames": [[place, value.to_json()] for place, value in self.frames],
            "inputs": [value.to_json() for value in self.inputs],
            "outputs": self.outputs,
            **({"entangled": True} if self.entangled else {}),
            **({"timeout": self.timeout} if self.timeout is not None else {}),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> GroupRequest:
        """Inverse of :meth:`to_json`.

        Raises
        ------
        RequestError
        """
        with _understood("a group"):
            return cls(
                body=Value.from_json(record["body"]),
                frames=[(int(place), Value.from_json(v)) for place, v in record["frames"]],
                inputs=[Value.from_json(v) for v in record["inputs"]],
                outputs=_names(record["outputs"]),
                entangled=bool(record.get("entangled", False)),
                timeout=_timeout(record.get("timeout")),
            )


@dataclass(slots=True)
class Body:
    """What a group runs: its :meth:`fields` are pickled once, by the client.

    Attributes
    ----------
    tasks : list of dask GraphNode
        In the order of execution.
    inputs : list of key
        Under which name the tasks know each input; one input may have several names.
    sources : list of int
        For each of these, its place among ``GroupRequest.inputs``.
    outputs : list of key
        Results to commit.
    """

    tasks: list[Any]
    inputs: list[Key]
    sources: list[int]
    outputs: list[Key]

    def fields(self) -> tuple[Any, ...]:
        """Return what is pickled: a plain tuple takes a third less time than an object."""
        return self.tasks, self.inputs, self.sources, self.outputs


@dataclass(slots=True)
class Request:
    """One invocation."""

    run: str
    secrets: dict[str, bytes] = field(
        repr=False
    )  #: for the run itself and for each run whose objects it reads
    bucket: str
    inline_bytes: int  #: outputs up to this size come back in the reply
    groups: list[GroupRequest] | Value  #: a value: their sealed JSON, where it is too long
    compression: Compression = "none"  #: of the outputs that go to S3
    lease: str = ""  #: name of the object whose end ends the run (:mod:`lambda_worker.lease`)
    leased: bool = False  #: whether it was written already
    modules: Modules | None = None
    packages: Mapping[str, str] = field(default_factory=dict)  #: that the client has imported

    def to_json(self) -> dict[str, Any]:
        """Build the event of the Invoke."""
        groups = self.groups
        return {
            "protocol": PROTOCOL,
            "client": versions(),
            "packages": self.packages,
            "run": self.run,
            "secrets": {run: base64.b64encode(s).decode() for run, s in self.secrets.items()},
            "bucket": self.bucket,
            "inline_bytes": self.inline_bytes,
            "compression": self.compression,
            "lease": [self.lease, self.leased],
            **({"modules": self.modules.to_json()} if self.modules else {}),
            "groups": (
                groups.to_json() if isinstance(groups, Value) else [g.to_json() for g in groups]
            ),
        }

    @classmethod
    def from_json(cls, event: dict[str, Any]) -> Request:
        """Read the event of the Invoke; its versions were checked before.

        Raises
        ------
        RequestError
        """
        with _understood("the request"):
            groups, modules = event["groups"], event.get("modules")
            run, bucket, (lease, leased) = event["run"], event["bucket"], event["lease"]
            if not all(type(text) is str for text in (run, bucket, lease)):
                raise ValueError("the names of run, bucket or lease")
            if event["compression"] not in get_args(Compression):
                raise ValueError("the compression")
            request = cls(
                run=run,
                secrets={run: base64.b64decode(s) for run, s in event["secrets"].items()},
                bucket=bucket,
                inline_bytes=int(event["inline_bytes"]),
                compression=event["compression"],
                lease=lease,
                leased=bool(leased),
                modules=None if modules is None else Modules.from_json(modules),
                packages=event["packages"],
                groups=(
                    Value.from_json(groups)
                    if isinstance(groups, dict)
                    else [GroupRequest.from_json(g) for g in groups]
                ),
            )
            if not isinstance(request.packages, dict):
                raise ValueError("the packages of the client")
            if run not in request.secrets:
                raise ValueError("there is no secret of the run")
            return request


#: The longest that a request to warm up keeps an environment busy, in seconds.
MAX_HOLD_SECONDS = 10.0


def warming_request(seconds: float) -> dict[str, Any]:
    """Build the event of an Invoke that does nothing but keep an environment busy."""
    return {"protocol": PROTOCOL, "client": versions(), "hold": seconds}


def held_seconds(event: dict[str, Any]) -> float | None:
    """Return for how long an event asks to do nothing; None if it asks for something else."""
    hold = event.get("hold")
    if isinstance(hold, bool) or not isinstance(hold, int | float):
        return None
    return min(max(0.0, float(hold)), MAX_HOLD_SECONDS)


@contextmanager
def _understood(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, AttributeError, TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{what} cannot be read: {type(error).__name__}: {error}") from None


def _timeout(found: Any) -> float | None:
    if found is None:
        return None
    if not 0 < (seconds := float(found)) < math.inf:
        raise ValueError("the time-out")
    return seconds


def _names(found: Any) -> list[str]:
    if not (isinstance(found, list) and found and all(type(name) is str for name in found)):
        raise ValueError("the names of the outputs")
    return found


# ---------------------------------------------------------------------------------------------
# versions
# ---------------------------------------------------------------------------------------------

_versions: dict[str, str] | None = None


def versions() -> dict[str, str]:
    """Return the versions that must agree for pickled tasks to mean the same on both sides."""
    global _versions
    if _versions is None:
        _versions = {
            "python": ".".join(platform.python_version_tuple()[:2]),
            "dask": dask.__version__,  # type: ignore[attr-defined]
        }
    return _versions


# ---------------------------------------------------------------------------------------------
# object names
# ---------------------------------------------------------------------------------------------


def object_name(prefix: str, run: str, label: str) -> str:
    """Return ``<shard>/<prefix>/<run>/<label>``, the S3 key of one object of a run."""
    shard = zlib.crc32(label.encode()) % 16**SHARD_DIGITS
    return f"{shard:0{SHARD_DIGITS}x}/{prefix}/{run}/{label}"


def shards() -> list[str]:
    """Return every shard that :func:`object_name` may choose, for listing a run's objects."""
    return [f"{i:0{SHARD_DIGITS}x}" for i in range(16**SHARD_DIGITS)]


def run_of(name: str) -> str:
    """Return the run to which an object belongs; nothing for what is no object of a run."""
    parts = output_of(name).rsplit("/", 2)
    return parts[1] if len(parts) == 3 else ""


def key_label(key: Key) -> str:
    """Return the label of a Dask key's object: a hash, since keys may be of any length."""
    return hashlib.blake2b(
        repr(key).encode("utf-8", "backslashreplace"), digest_size=16
    ).hexdigest()


def new_attempt() -> str:
    """Return what tells one attempt at a group from all others."""
    return secrets.token_hex(8)


def attempt_name(output: str, attempt: str = "") -> str:
    """Return a name of its own for one attempt to write an output: a new one by default.

    S3 cannot write an object in parts and refuse it if it exists.  So a large output is written
    under such a name, and then committed by a small object under the output's own name, which
    points to it.  The outputs of an entangled group are written under such names whatever their
    size, and nothing points to them: the client goes by the first reply that it hears.  All
    attempts are in one folder, where what a lost one has left can be found.
    """
    return f"{attempts_folder(output)}/{attempt or new_attempt()}"


def attempts_folder(output: str) -> str:
    """Return the folder of all attempts at an output."""
    return output + "~"


def output_of(name: str) -> str:
    """Return the output of which an object is a version: itself, or what it is an attempt at."""
    return objects_of(name)[-1]


def pointer_name(output: str) -> str:
    """Return the name to which the tag of a pointer to a large output is bound."""
    return output + "#pointer"


def objects_of(name: str) -> list[str]:
    """Return the objects that a value consists of: itself, and the pointer to it."""
    folder = name.rpartition("/")[0]
    return [name, folder[:-1]] if folder.endswith("~") else [name]


def error_name(output: str) -> str:
    """Return the name to which the tag of a group's pickled exception is bound."""
    return output + "#error"


# ---------------------------------------------------------------------------------------------
# references to stored results
# ---------------------------------------------------------------------------------------------

#: How to load an object of a run: run id -> function of a reference.  The client fills it from the
#: runs whose results are kept.
resolvers: dict[str, Callable[[Reference], Any]] = {}
#: The same for the runs that are being served.  There may be several requests of one run at a time
#: in one process: in threads of a client that runs tasks itself.
serving: dict[str, list[Callable[[Reference], Any]]] = {}
_serving_lock = threading.Lock()

_pickled = threading.local()


class Reference:
    """A result that stays in S3: what a persisted collection holds in place of its blocks.

    It carries no secret.  While a task that holds references is being pickled, they are
    collected (:func:`collect_references`), so that the request names the secrets they need.
    """

    __slots__ = ("__weakref__", "name", "size")

    def __init__(self, name: str, size: int):
        self.name = name
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        found = getattr(_pickled, "found", None)
        if found is not None:
            found.append(self)
        return Reference, (self.name, self.size)

    def __repr__(self) -> str:
        return f"Reference({self.name!r}, {self.size})"


class collect_references:
    """Context in which the references pickled by this thread are gathered in a list."""

    def __enter__(self) -> list[Reference]:
        self._outer = getattr(_pickled, "found", None)
        found: list[Reference] = []
        _pickled.found = found
        return found

    def __exit__(self, *exc_info: object) -> None:
        _pickled.found = self._outer


def begin_serving(runs: Iterable[str], resolve: Callable[[Reference], Any]) -> None:
    """Have references to objects of some runs loaded by a function."""
    with _serving_lock:
        for run in runs:
            serving.setdefault(run, []).append(resolve)


def end_serving(runs: Iterable[str], resolve: Callable[[Reference], Any]) -> None:
    """Undo one :func:`begin_serving`."""
    with _serving_lock:
        for run in runs:
            serving[run].remove(resolve)
            if not serving[run]:
                del serving[run]


def _resolver(run: str) -> Callable[[Reference], Any]:
    with _serving_lock:
        found = serving.get(run)
        return found[-1] if found else resolvers[run]


class sealing:
    """Context in which whatever this thread pickles goes into an object or a payload."""

    def __enter__(self) -> None:
        _pickled.sealing = getattr(_pickled, "sealing", 0) + 1

    def __exit__(self, *exc_info: object) -> None:
        _pickled.sealing -= 1


def is_sealing() -> bool:
    """Whether what this thread pickles goes into an object or a payload: no place for secrets."""
    return bool(getattr(_pickled, "sealing", 0))


def is_collecting() -> bool:
    """Whether this thread pickles a task, which may hold references (:class:`Reference`)."""
    return getattr(_pickled, "found", None) is not None


def load_reference(reference: Reference) -> Any:
    """Load a stored result: the function of the tasks of a persisted collection.

    Raises
    ------
    LookupError
        If this process has not the run's secret: references mean something only to the
        scheduler that made them, and to the workers that it calls.
    """
    try:
        resolve = _resolver(run_of(reference.name))
    except KeyError:
        raise LookupError(
            f"the stored result {reference.name!r} cannot be loaded here: it belongs to a "
            "dask_lambda scheduler that was closed or lives in another process; compute with "
            "that scheduler, or persist again"
        ) from None
    return resolve(reference)
