"""A run that stays open: calls are added one by one, and each has an end of its own.

May import: session_run, dispatch, opening, run, placement, pickling, plan, graph, report, config,
failures, events, errors, the ground.

A :class:`Session` is what the futures of an executor and the worker of a ``distributed`` cluster
stand on.  Its calls go through the same state machine, payloads, workers and objects as the tasks
of a graph; what is different is that nobody knows them all beforehand, that one may fail without
the others, and that results live as long as somebody holds them
(:class:`~dask_lambda.session_run.Stored`).

All methods may be called in any thread.  What is asked for is put into a queue that the engine's
thread empties, many calls at a time.
"""

from __future__ import annotations

import secrets as tokens
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from dask._task_spec import GraphNode
from dask.utils import key_split

from dask_lambda import errors, failures
from dask_lambda.config import MAX_TIMEOUT, Settings
from dask_lambda.dispatch import Engine
from dask_lambda.events import Failure, FailureKind, GroupsCancelled, KeysReleased, WindowChanged
from dask_lambda.graph import short
from dask_lambda.kept_runs import Place
from dask_lambda.opening import terms_of
from dask_lambda.pickling import FunctionCache
from dask_lambda.placement import Declared, Offer, Placement, place
from dask_lambda.plan import Group, Priority, Where
from dask_lambda.report import RunReport
from dask_lambda.run import RunFailed, Sealed
from dask_lambda.session_run import Call, SessionRun, Stored
from lambda_worker import codec
from lambda_worker.protocol import Key, Reference, Value

#: How long closing waits for the session's objects to be deleted, in seconds.
CLOSE_SECONDS = 5.0
CLOSED = "the session was closed: its calls were given up, and its results deleted"


@dataclass(frozen=True, slots=True)
class _Submitted:
    """A call on its way to the engine."""

    group: Group
    task: GraphNode
    stored: Stored
    call: Call
    failure: BaseException | None = None  #: why it cannot be run anywhere


class Session:
    """An open run of an engine.

    Parameters
    ----------
    engine : Engine
    settings : Settings
    shown : callable, optional
        How users know a key, for errors.
    """

    def __init__(self, engine: Engine, settings: Settings, shown: Callable[[Key], str] = short):
        self.engine = engine
        self.settings = settings
        self.shown = shown
        self.started = time.perf_counter()
        self.closed = False
        self._submitted: deque[_Submitted] = deque()
        self._cancelled: deque[tuple[Key, bool]] = deque()
        self._released: deque[Key] = deque()
        self._awake = False
        self._notes: set[str] = set()
        self._then: Callable[[], None] | None = None  # to be called when nothing is in S3
        self._end: BaseException | None = None  # why nothing can be added any more
        memory_mb = engine.backend.invokers[0].memory_mb or settings.memory
        self._offer = Offer.of(settings, memory_mb)
        self._told = False  # that a call does not run on Lambda
        fields: dict[str, Any] = {"session": self, "events": _Inbox(self._hear)}
        self._run: SessionRun = engine.open_run(
            partial(SessionRun, **fields), shown, **terms_of(settings)
        )

    # -- in any thread ---------------------------------------------------------------------------

    def submit(
        self,
        task: GraphNode,
        call: Call,
        *,
        inputs: Iterable[Key] = (),
        kind: str = "",
        priority: Priority = 0,
        retries: int = 0,
        memory: int = 0,
        timeout: float | None = None,
        seconds: float = 0.0,
        where: Where | None = None,
        stored: Stored | None = None,
    ) -> Stored:
        """Have a task run, on Lambda if it can, as soon as its inputs are there.

        Parameters
        ----------
        task : GraphNode
            Its key must be new to the session, and its dependencies be those in ``inputs``.
        call : Call
        inputs : iterable of key
            Of results of the session, which somebody holds.
        kind : str
            Calls of one kind take about the same time; by default the prefix of the key.
        priority : int or tuple
            Smaller is sooner; of the same form in all calls of the session.
        retries : int
            After the task's own failures.
        memory : int
            Bytes that it is said to need.
        timeout : float, optional
            Seconds after which it is interrupted.  Who allows more than Lambda does, and leaves
            ``where`` open, has it run elsewhere.
        seconds : float
            That it is said to take; more than a function allows is treated as such memory is.
        where : {"lambda", "local"}, optional
            Default: on Lambda, unless the call declares more memory or time than Lambda has
            (:mod:`dask_lambda.placement`).  A call that fits nowhere fails.
        stored : Stored, optional
            For its result, if there is one already.

        Returns
        -------
        Stored
            To be held by whoever wants the result.

        Raises
        ------
        InvocationError
            If the session is closed, or has ended for any other reason, which is then raised.
        ConfigurationError
            If ``where`` is no place.
        """
        if self._end is not None:
            raise self._end
        key: Key = task.key
        placed, failure = self._place(key, where, memory, timeout, seconds)
        group = Group(
            (key,),
            tuple(inputs),
            (key,),
            priority,
            retries,
            kind or key_split(key),
            None,
            memory,
            timeout,
            placed,
        )
        stored = stored or Stored(self, key)
        self._submitted.append(_Submitted(group, task, stored, call, failure))
        self._wake()
        return stored

    def refusal(
        self, key: Key, where: Where | None, memory: int, timeout: float | None
    ) -> BaseException | None:
        """Return why a call could not run anywhere, before it is submitted.

        Parameters
        ----------
        key : key
            Under which the error names it.
        where, memory, timeout
            As for :meth:`submit`.
        """
        return self._place(key, where, memory, timeout)[1]

    def _place(
        self,
        key: Key,
        where: Where | None,
        memory: int,
        timeout: float | None,
        seconds: float = 0.0,
    ) -> tuple[Where, BaseException | None]:
        """Decide where a call runs, or why it cannot run at all."""
        if where is None and not (memory or timeout or seconds):  # nearly all calls
            return "lambda", None
        if where not in (None, *get_args(Where)):
            raise errors.ConfigurationError(f"where={where!r} must be 'lambda' or 'local'")
        # A limit below Lambda's own says how long it may take, and not how long it takes.
        if timeout and timeout > MAX_TIMEOUT and self._offer.local:
            seconds = max(seconds, timeout)
        name = self.shown(key)
        try:
            placed, why = place(name, Declared(where, memory, seconds), self._offer)
        except errors.DaskLambdaError as error:
            return "lambda", error
        if why and not self._told:
            self._told = True
            Placement(reasons={name: why}).tell({name})
        return placed, None

    def put(self, key: Key, value: Any, stored: Stored | None = None) -> Future[Stored]:
        """Begin to store a value for calls to read, as if it were the result of one.

        Raises
        ------
        UnserializableError
        InvocationError
            If the session is closed.
        """
        try:  # in this thread
            frames = codec.serialize(value, FunctionCache(self._run.encoder.modules.note).dumps)
        except Exception as error:
            raise errors.UnserializableError(
                f"the value {self.shown(key)}, a {type(value).__name__}, cannot be pickled, so "
                f"that it cannot be sent to Lambda ({type(error).__name__}: {error})"
            ) from error
        run = self._run
        name = run.object_name(key)
        sealed = codec.seal(frames, run.secret, name)
        stored = stored or Stored(self, key)
        stored.value = Value(name, len(sealed), sealed, shared=True)
        stored.nbytes = sum(frame.nbytes for frame in frames)
        stored.kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return self.engine.begin(self._put(stored))

    def cancel(self, keys: Iterable[Key], *, in_flight: bool = False) -> None:
        """Give up calls, and what waits for their results.

        Parameters
        ----------
        keys : iterable of key
        in_flight : bool
            Whether also those that are being run.  They cannot be called back; what they bring is
            deleted.
        """
        self._cancelled.extend((key, in_flight) for key in keys)
        self._wake()

    def let_go(self, key: Key) -> None:
        """Delete a result when no call needs it any more; for finalizers: takes no lock."""
        self._released.append(key)
        self._wake()

    def fetch(self, stored: Stored) -> Future[Sealed]:
        """Begin to fetch a result that is there.

        Raises
        ------
        InvocationError
            If the session is closed.
        """
        value = stored.value
        assert value is not None, "the call has not ended"
        if self.closed:
            raise errors.InvocationError(CLOSED)
        if (sealed := self.at_hand(stored)) is not None:
            done: Future[Sealed] = Future()
            done.set_result(sealed)
            return done
        return self.engine.fetch(self._run, value)

    def at_hand(self, stored: Stored) -> Sealed | None:
        """Return a result that is there and small, also when the session is closed."""
        value = stored.value
        assert value is not None, "the call has not ended"
        name = value.name  # before the data, which are given up before it changes
        data = value.data
        return None if data is None else Sealed(data, self._run.secret, name)

    def share(self, stored: Stored) -> Future[Reference]:
        """Move a result that is there to S3, if it is not, for others to read: :attr:`secret`."""
        return self.engine.begin(self._share(stored))

    def new_note(self) -> str:
        """Return a name for :meth:`write_note`."""
        return self._run.encoder.object_name("note-" + tokens.token_hex(16))

    def write_note(self, name: str, value: Any) -> Future[None]:
        """Begin to write a small object, once, for readers in other processes.

        It is there until :meth:`erase_notes`, or until the session is closed.

        Raises
        ------
        InvocationError
            If the session is closed.
        """
        sealed = codec.dumps(value, self._run.secret, name)
        return self.engine.begin(self._write_note(name, sealed))

    def erase_notes(self, names: Iterable[str]) -> None:
        """Delete notes, soon."""
        self.engine.wake(partial(self._erase_notes, tuple(names)))

    @property
    def place(self) -> Place:
        """Where the objects of the session are."""
        return self.engine.place

    @property
    def backend_keys(self) -> tuple[str, str] | None:
        """Access key of the embedded AWS, which no other process can find out; else None."""
        return self.engine.backend.keys

    @property
    def secret(self) -> bytes:
        """Under which the objects of the session are sealed."""
        return self._run.secret

    @property
    def window(self) -> int:
        """How many invocations may be in flight, of all runs of the engine."""
        return self.engine.state.window.size

    def resize(self, window: int) -> int:
        """Change how many invocations may be in flight, of all runs of the engine.

        Returns
        -------
        int
            How many it will be: a process and the embedded AWS have limits, of which a warning is
            logged.
        """
        window = self.engine.backend.affordable(window)
        self.engine.post(self.engine.handle, WindowChanged(window))
        return window

    def report(self) -> RunReport:
        """Return what was done so far."""
        run = self._run
        seconds = time.perf_counter() - self.started
        return run.counts.report(run.store.counts, seconds, failed=False, prices=self.engine.prices)

    def is_unused(self) -> bool:
        """Whether nobody holds anything in S3, or the session has ended; not in engine's thread."""
        if self.closed:
            return True
        try:
            unused: bool = self.engine.begin(self._is_unused()).result()
        except (errors.InvocationError, CancelledError):  # the engine is closed
            return True
        return unused

    def when_unused(self, then: Callable[[], None]) -> None:
        """Have a function called in the engine's thread once nobody holds anything in S3.

        That is for the time when nothing more is submitted.
        """
        self._then = then
        self._wake()

    def close(self) -> None:
        """Give up all calls and delete all results.  Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._end = self._end or errors.InvocationError(CLOSED)
        try:
            self.engine.post(self._over)
        except errors.InvocationError:  # the engine's thread has ended, or is about to tell
            return
        self.engine.cancel(self._run, CLOSE_SECONDS)

    # -- in the engine's thread ------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self.engine.wake(self._drain)

    def _drain(self) -> None:
        """Do what was asked for: first what is added, since only that may need anything.

        What is released is looked at before: who lets go of a result may have added a call that
        reads it just now, and no later.
        """
        self._awake = False
        run, engine = self._run, self.engine
        released = tuple(self._released.popleft() for _ in range(len(self._released)))
        groups, refused = [], []
        while self._submitted:
            each = self._submitted.popleft()
            if self._end is not None:
                each.call.failed(self._end, "")
                continue
            key = each.group.outputs[0]
            run.graph.tasks[key] = each.task
            run.calls[key] = each.stored, each.call
            groups.append(each.group)
            if each.failure is not None:
                refused.append((key, each.failure))
        if run.over:  # whose end is about to be told
            return
        if groups:
            engine.add(run, groups)
        for key, error in refused:  # before anything is sent, and with it what waits for it
            failure = Failure(FailureKind.FATAL, error)
            engine.handle(GroupsCancelled(run.name, (key,), in_flight=True, failure=failure))
        while self._cancelled:
            key, in_flight = self._cancelled.popleft()
            engine.handle(GroupsCancelled(run.name, (key,), in_flight))
        if released:
            engine.handle(KeysReleased(run.name, released))
        self._look_whether_unused()

    async def _is_unused(self) -> bool:
        self._drain()
        return self._unused()

    def _unused(self) -> bool:
        values = self._run.values.values()
        return not self._notes and all(value.data is not None for value in values)

    def _look_whether_unused(self) -> None:
        if self._then and self._unused():
            then, self._then = self._then, None
            then()

    async def _write_note(self, name: str, sealed: bytearray) -> None:
        run = self._run
        self._notes.add(name)
        try:
            with failures.translated():
                write = partial(run.store.put_async, name, sealed)
                await self.engine.patiently(run.patience, write)
        finally:
            run.encoder.written.add(name)  # with which it is deleted at the end
        if run.over:
            await run.store.delete_async([name])
            raise self._end or errors.InvocationError(CLOSED)

    def _erase_notes(self, names: tuple[str, ...]) -> None:
        self._notes.difference_update(names)
        self._run.encoder.written.difference_update(names)
        self.engine.discard(self._run, names)
        self._look_whether_unused()

    async def _put(self, stored: Stored) -> Stored:
        run, value = self._run, stored.value
        assert value is not None
        if value.size > run.inline_bytes:
            data, value.data = value.data, None
            run.uncertain.add(value.name)
            assert data is not None
            write = partial(run.store.put_async, value.name, data)
            with failures.translated():
                await self.engine.patiently(run.patience, write)
        else:
            run.inline[stored.key] = value.size
            run.held += value.size
        if run.over:
            raise self._end or errors.InvocationError(CLOSED)
        run.values[stored.key] = value
        self.engine.add(run, (), (stored.key,))
        return stored

    async def _share(self, stored: Stored) -> Reference:
        run, key = self._run, stored.key
        value = run.values.get(key)
        if value is None:
            raise errors.LostDataError(f"the result {key!r} does not exist any more")
        if value.data is not None:
            moved = copy(value)  # whoever reads it at this moment sees the old one, or the new one
            with failures.translated():
                await self.engine.patiently(run.patience, partial(run.encoder.spill, moved))
            if key in run.values:
                run.held -= run.inline.pop(key, 0)
                run.values[key] = stored.value = value = moved
        return Reference(value.name, value.size)

    def _hear(self, event: Any) -> None:
        """Hear of the end of the run; also when the engine's thread has ended."""
        if isinstance(event, RunFailed):
            self._end = self._end or event.exception
            self._over()

    def _over(self) -> None:
        """Tell all who wait that nothing more comes."""
        assert self._end is not None
        calls, self._run.calls = self._run.calls, {}
        for _, call in calls.values():
            call.failed(self._end, "")
        while self._submitted:
            self._submitted.popleft().call.failed(self._end, "")


class _Inbox:
    """Takes the place of the queue in which the caller of a run listens."""

    def __init__(self, hear: Callable[[Any], None]):
        self.put = hear
