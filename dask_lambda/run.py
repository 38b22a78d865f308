"""One graph being computed, and what its caller hears of it.

May import: encode, events, kept_folder, plan, graph, report, the ground.  The record is made by
:class:`dask_lambda.dispatch.Engine` and changed in its thread only.  The caller reads
:attr:`Run.events` in its own thread, and after the last of them the results.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, NamedTuple

from dask_lambda.encode import MIN_THREAD_BYTES, Encoder
from dask_lambda.events import PATIENCE, Failure
from dask_lambda.graph import Graph
from dask_lambda.kept_folder import Folder
from dask_lambda.plan import Group, Plan
from dask_lambda.report import RunCounts
from lambda_worker import codec
from lambda_worker.errors import IntegrityError
from lambda_worker.protocol import Key, Reference, Value
from lambda_worker.store import Store


class Sealed(NamedTuple):
    """A fetched value, with what it takes to open it."""

    data: Any
    secret: bytes
    name: str
    verified: bool = False

    def __repr__(self) -> str:  # which error reports may show
        return f"Sealed({self.name!r})"

    def load(self) -> Any:
        """Verify, if that was not done, and unpickle."""
        if not self.verified:
            codec.verify(self.data, self.secret, self.name)
        return codec.deserialize(codec.frames_of(self.data, self.name))


async def fetch_sealed(store: Store, value: Value | Reference, secret: bytes) -> Sealed:
    """Fetch an object and verify it; what was damaged on the way is fetched once more.

    Raises
    ------
    IntegrityError
        If it is not what was written under this name.
    """
    try:
        return await _fetch(store, value, secret)
    except IntegrityError:
        return await _fetch(store, value, secret)


async def _fetch(store: Store, value: Value | Reference, secret: bytes) -> Sealed:
    data = await store.get_async(value.name, value.size)
    if value.size < MIN_THREAD_BYTES:
        codec.verify(data, secret, value.name)
    else:
        await asyncio.to_thread(codec.verify, data, secret, value.name)
    return Sealed(data, secret, value.name, verified=True)


@dataclass(frozen=True, slots=True)
class TaskStarted:
    """A task was sent to Lambda."""

    key: Key


@dataclass(frozen=True, slots=True)
class TaskFinished:
    """A task is done; its value, still sealed, if the caller asked for values."""

    key: Key
    value: Sealed | None = None


@dataclass(frozen=True, slots=True)
class RunSucceeded:
    """All is done and the results are at hand."""


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The run failed."""

    exception: BaseException


class Result(NamedTuple):
    """What a worker says of a group that is done."""

    told: list[tuple[Key, Value]]  #: where its outputs are
    measured: Mapping[str, Sequence[float]]  #: see :data:`Learn`
    sealed: Sealed | None = None  #: the value of its one task, if the caller asked for values
    types: Sequence[str] = ()  #: of its outputs
    cold: bool = False  #: whether its invocation met a new environment
    peak_memory: float = 0.0  #: bytes that this environment has taken so far


#: Called for each group that is done, with what the worker measured: key prefix to the number of
#: tasks, their seconds, and the bytes of their results.
Learn = Callable[[Group, Mapping[str, Sequence[float]]], None]


@dataclass(eq=False)
class Run:
    """One graph being computed.

    Attributes
    ----------
    events : SimpleQueue
        What the caller hears: :class:`TaskStarted` and :class:`TaskFinished` if ``watch`` is
        set, at last :class:`RunSucceeded` or :class:`RunFailed`.
    results : dict
        What was fetched for ``plan.fetch``, by key.
    kept : dict
        Where the results are that stay in S3, by key.
    values : dict
        Where each output is that is still needed.
    name : str
        Of the run in the engine.  Its objects are named after ``encoder.run``, which is the same
        unless they are kept.
    folder : Folder, optional
        Where its objects are, if they outlive it.
    """

    graph: Graph
    plan: Plan
    store: Store
    encoder: Encoder
    name: str
    secret: bytes = field(repr=False)
    inline_bytes: int
    keep_results: bool
    watch: bool
    watch_values: bool
    shared: frozenset[Key]  # outputs that several groups read
    learn: Learn | None = None
    folder: Folder | None = None
    speculate: bool = False
    patience: float = PATIENCE
    max_cost_usd: float | None = None
    max_seconds: float | None = None
    memory_mb: int = 0
    started: float = field(default_factory=time.monotonic)
    spent: float = 0.0  # US dollars that the state machine knows of
    unbilled: float = 0.0  # of them: for invocations of whose end nothing was heard
    counts: RunCounts = field(default_factory=RunCounts)
    events: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    results: dict[Key, Sealed] = field(default_factory=dict)
    kept: dict[Key, Value] = field(default_factory=dict)
    values: dict[Key, Value] = field(default_factory=dict)
    inline: dict[Key, int] = field(default_factory=dict)  # bytes of inline values
    held: int = 0  # their sum
    uncertain: set[str] = field(default_factory=set)  # may have been written, nobody said so
    lost: set[str] = field(default_factory=set)  # outputs of invocations that sent no reply
    trash: list[str] = field(default_factory=list)
    deleting: asyncio.Lock = field(default_factory=asyncio.Lock)
    delete_soon: bool = False
    fetches: set[asyncio.Task[None]] = field(default_factory=set)
    told: dict[Key, bool] = field(default_factory=dict)  # of which tasks: whether they are done
    over: bool = False  # the outcome is known: nothing more is sent
    abandoned: bool = False  # the caller does not wait for it any more
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # the caller may go on
    drained: asyncio.Event = field(default_factory=asyncio.Event)  # nobody writes any more

    def is_shared(self, key: Key) -> bool:
        """Whether an output is worth keeping in workers' caches."""
        return key in self.shared

    def is_wanted(self, group: Group) -> bool:
        """Whether the outcome of a group still means anything to anybody."""
        return True

    def object_name(self, key: Key) -> str:
        """Return the name under which a key's value is stored."""
        return self.encoder.object_name(self.encoder.label(key))

    def spares(self, name: str) -> bool:
        """Whether an object stays though the run needs it no more."""
        if self.folder is None:
            return False
        broke_off = self.over and not self.folder.succeeded
        return broke_off or self.folder.spares(name)

    def tell_started(self, group: Group) -> None:
        """Tell the caller of the tasks of a group that can start at once.

        The others follow when they are done: who listens expects a task to start after those
        that it reads are done.
        """
        inside = set(group.tasks)
        for key in group.tasks:
            if (
                key not in self.told
                and key in self.graph.source
                and inside.isdisjoint(self.graph.dependencies(key))
            ):
                self.told[key] = False
                self.events.put(TaskStarted(key))

    def tell_finished(self, group: Group, result: Result) -> None:
        """Tell the caller that the tasks of a group are done, each once."""
        for key in group.tasks:
            if key not in self.graph.source:  # the planner's own
                continue
            if key not in self.told:
                self.events.put(TaskStarted(key))
            if not self.told.get(key):
                self.told[key] = True
                self.events.put(TaskFinished(key, result.sealed))

    def tell_failed(self, group: Group, failure: Failure, origin: Group) -> None:
        """Tell that a group ends without result, and the run goes on: not in a run of one graph."""
        raise NotImplementedError

    def note_attempt(self, groups: Sequence[Group], usd: float, log: str) -> None:
        """Take note of an invocation, of what it cost, and of the end of its log in base64."""

    def if_spent(self) -> str:
        """Say how to go on when there is no budget left."""
        if self.folder is None:
            return (
                "None of it is kept: with resume='...' it would be. Raise the limit and compute "
                "again."
            )
        return f"What is done is kept: raise the limit and {self.folder.again}."

    def load(self, key: Key) -> Any:
        """Decode a result, giving up its sealed bytes."""
        return self.results.pop(key).load()
