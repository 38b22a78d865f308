"""The worker of a ``distributed`` cluster that has its tasks run on Lambda.

May import: proxy_scheduler, unsupported, scheduler, session, session_run, run, annotations, graph,
report, the ground, dask, distributed.

A :class:`ProxyWorker` is a real worker to its scheduler, with a state machine, heartbeats and data,
but it runs nothing itself: each task becomes a call of a :class:`~dask_lambda.session.Session`, and
what it holds as results are :class:`~dask_lambda.session_run.Stored`, which know where a value is.
A key that is released drops its Stored, and that deletes the object in S3.  Values are loaded when
a client gathers them, and at no other time.

distributed makes an asyncio task of each task that it runs.  Here a call is submitted at once, and
the ends of all calls that have come since the event loop looked are told to the state machine in
one go, so that thousands in a second are no trouble.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
import math
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any

import distributed
from dask._task_spec import Alias, DataNode
from dask.sizeof import sizeof
from dask.utils import key_split
from distributed import Reschedule
from distributed.core import Status, error_message
from distributed.metrics import time
from distributed.protocol import to_serialize
from distributed.utils_comm import gather_from_workers
from distributed.worker import WORKER_ANY_RUNNING
from distributed.worker_state_machine import (
    ExecuteFailureEvent,
    ExecuteSuccessEvent,
    FreeKeysEvent,
    GatherDepSuccessEvent,
    RescheduleEvent,
    StateMachineEvent,
    TaskFinishedMsg,
    TaskState,
    UnpauseEvent,
    UpdateDataEvent,
    WorkerState,
)

from dask_lambda.annotations import task_memory, task_seconds, task_timeout
from dask_lambda.graph import short, under
from dask_lambda.proxy_scheduler import AHEAD
from dask_lambda.report import CallReport
from dask_lambda.run import Sealed
from dask_lambda.scheduler import LambdaScheduler
from dask_lambda.session import Session
from dask_lambda.session_run import Stored
from dask_lambda.unsupported import adapted, explained, refusal
from lambda_worker.protocol import Key

#: Values above this size are packed and unpacked in another thread.
MIN_THREAD_BYTES = 1_000_000

logger = logging.getLogger("distributed.worker")


@sizeof.register(Stored)  # type: ignore[untyped-decorator]
def _sizeof_stored(stored: Stored) -> int:
    return stored.nbytes


class _State(WorkerState):
    """The state machine of a worker, which tells the types of values that it does not have."""

    def _get_task_finished_msg(
        self, ts: TaskState, run_id: int, stimulus_id: str
    ) -> TaskFinishedMsg:
        stored = self.data[ts.key]
        assert isinstance(stored, Stored)
        known = find_type(stored.kind)
        ts.type = known or object
        message = super()._get_task_finished_msg(ts, run_id, stimulus_id)
        if known is None:
            message.typename = stored.kind
        return message


class _Call:
    """One execution of a task; hears of it in the engine's thread."""

    __slots__ = ("key", "name", "run_id", "sent", "span_id", "stored", "worker")

    def __init__(self, worker: ProxyWorker, ts: TaskState, name: Key):
        self.worker = worker
        self.key = ts.key
        self.name = name  # in the session
        self.run_id = ts.run_id
        self.span_id = ts.span_id
        self.sent = 0.0
        self.stored: Stored | None = None

    def started(self) -> None:
        self.sent = time()

    def finished(self, report: CallReport) -> None:
        self.worker.tell(self, report)

    def failed(self, exception: BaseException, log: str) -> None:
        self.worker.tell(self, exception)


class ProxyWorker(distributed.Worker):
    """Has the tasks of a scheduler run on Lambda.

    Parameters
    ----------
    scheduler_address : str
    engine : LambdaScheduler
        Where it opens its session.
    retries : int
        Of a task about which nothing is said.
    unmoved : dict
        Of the scheduler: see there.
    **options
        Of :class:`distributed.Worker`.

    Attributes
    ----------
    window : int
        How many invocations may be in flight.
    """

    def __init__(
        self,
        scheduler_address: str,
        *,
        engine: LambdaScheduler,
        retries: int,
        unmoved: dict[Key, BaseException],
        **options: Any,
    ):
        super().__init__(
            scheduler_address,
            WorkerStateClass=_State,
            memory_limit=0,  # nothing of what it stands for is in this process
            **options,
        )
        for name in ("profile", "profile-cycle"):  # no thread here runs tasks
            self.periodic_callbacks.pop(name, None)
        self._engine = engine
        self._retries = retries
        self._unmoved = unmoved
        self._session: Session | None = None
        self._calls: dict[Key, _Call] = {}
        self._attempts = itertools.count()
        self._told: deque[tuple[_Call, CallReport | BaseException]] = deque()
        self._awake = False
        self._lanes: list[tuple[float, int]] = []  # when each was free last
        self.window = 0

    @property
    def session(self) -> Session:
        """Where the tasks are run."""
        assert self._session is not None, "the worker is not running"
        return self._session

    async def start_unsafe(self) -> Any:
        """Open the session, then register with the scheduler."""
        self._session = await asyncio.to_thread(self._engine.session, _shown)
        self.state.nthreads = self.window = self._session.window
        started = await super().start_unsafe()
        self.state.nthreads = self.window * AHEAD  # of which the scheduler knows nothing
        return started

    async def close(self, *arguments: Any, **options: Any) -> Any:
        """Close the worker; give up what runs, and delete all results."""
        done = await super().close(*arguments, **options)
        if self._session is not None:
            await beside(self._session.close)
            self._session = None  # distributed never lets go of a worker
        self._calls.clear()
        self.data.clear()
        return done

    def affordable(self, window: int) -> int:
        """Return how many of so many invocations may be in flight; warn if they are fewer."""
        return self.session.engine.backend.affordable(window)

    def resize(self, window: int) -> int:
        """Change how many invocations may be in flight; return how many that will be."""
        self.window = self.session.resize(window)
        self.state.nthreads = self.window * AHEAD
        if self.status == Status.running:  # there may be room for tasks that are ready
            self.handle_stimulus(UnpauseEvent(stimulus_id=f"window-{time()}"))
        return self.window

    # -- running tasks ---------------------------------------------------------------------------

    def _start_async_instruction(
        self,
        task_name: str,
        func: Callable[..., Any],
        /,
        *args: Any,
        span_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Carry out an instruction of the state machine: of a task to execute, at once."""
        if func == self.execute and self.status in WORKER_ANY_RUNNING:
            ts = self.state.tasks[args[0]]
            if not isinstance(ts.run_spec, DataNode | Alias):
                self._launch(ts)
                return
        super()._start_async_instruction(task_name, func, *args, span_id=span_id, **kwargs)

    def _launch(self, ts: TaskState) -> None:
        """Submit a task to the session."""
        ts.start_time = time()
        name = (ts.key, next(self._attempts))
        call = self._calls[ts.key] = _Call(self, ts, name)
        try:
            refused = refusal(ts.key, ts.run_spec, actor=ts.key in self.state.actors)
            if refused is not None:
                raise refused
            names = {each.key: self.data[each.key].key for each in ts.dependencies}
            said = ts.annotations or {}
            call.stored = self.session.submit(
                under(name, adapted(ts.run_spec).substitute(names, key=name)),
                call,
                inputs=names.values(),
                kind=key_split(ts.key),
                priority=ts.priority,
                retries=0 if "retries" in said else self._retries,
                memory=task_memory(ts.key, said.get("memory")),
                timeout=task_timeout(ts.key, said.get("timeout")),
                seconds=task_seconds(ts.key, said.get("seconds")),
                where=said.get("where"),
            )
        except Exception as error:  # noqa: BLE001  told as if the task had raised it
            self.tell(call, error)

    async def execute(self, key: Key, *, stimulus_id: str) -> StateMachineEvent:
        """Do what there is to do for a node of a graph that is no task."""
        ts = self.state.tasks[key]
        run_id, node = ts.run_id, ts.run_spec
        if self.status not in WORKER_ANY_RUNNING:
            return RescheduleEvent(key=key, stimulus_id=f"worker-closing-{time()}")
        start = time()
        try:
            if isinstance(node, Alias):
                stored = self.data[node.target]
            else:
                stored = await self._put(key, node.value)
        except Exception as error:  # noqa: BLE001  told as if the task had raised it
            return ExecuteFailureEvent.from_exception(
                error, key=key, run_id=run_id, stimulus_id=f"task-erred-{time()}"
            )
        stop = time()
        return ExecuteSuccessEvent(
            key=key,
            run_id=run_id,
            value=stored,
            start=start,
            stop=stop,
            nbytes=stored.nbytes,
            type=object,
            stimulus_id=f"task-finished-{stop}",
        )

    def handle_stimulus(self, *stims: StateMachineEvent) -> None:
        """Tell the state machine something; give up the calls that nobody wants any more."""
        super().handle_stimulus(*stims)
        for event in stims:
            if isinstance(event, FreeKeysEvent):
                self._give_up(event.keys)

    def _give_up(self, keys: Iterable[Key]) -> None:
        unwanted = []
        for key in keys:
            call, ts = self._calls.get(key), self.state.tasks.get(key)
            if call is not None and ts is not None and ts.state == "cancelled":
                unwanted.append(call.name)
        if unwanted:
            self.session.cancel(unwanted, in_flight=True)

    # -- the ends of calls -----------------------------------------------------------------------

    def tell(self, call: _Call, outcome: CallReport | BaseException) -> None:
        """Take note of the end of a call; in any thread, and at once."""
        self._told.append((call, outcome))
        if not self._awake:
            self._awake = True
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self.loop.asyncio_loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        """Tell the state machine of all calls that have ended."""
        self._awake = False
        events: list[StateMachineEvent] = []
        done: list[tuple[_Call, CallReport]] = []
        while self._told:
            call, outcome = self._told.popleft()
            if self._calls.get(call.key) is not call:
                continue
            del self._calls[call.key]
            if isinstance(outcome, CallReport):
                done.append((call, outcome))
            else:
                events.append(self._failure(call, outcome))
        for _, together in itertools.groupby(done, lambda each: each[1].invocation):
            events.extend(self._successes(list(together)))
        if self.status in WORKER_ANY_RUNNING:
            self.handle_stimulus(*events)

    def _successes(self, done: list[tuple[_Call, CallReport]]) -> list[StateMachineEvent]:
        """Return what to tell of the calls that one invocation has run, one after the other."""
        ended = done[-1][1].finished
        first = done[0][0]
        begun = ended - sum(report.seconds for _, report in done)
        if first.sent and first.sent < begun:  # on the way, or waiting for its environment
            way = {"action": "transfer", "start": first.sent, "stop": begun}
            self.state.tasks[first.key].startstops.append(way)
        lane = self._lane(min(first.sent or begun, begun), ended)
        events: list[StateMachineEvent] = []
        for call, report in done:
            stored = call.stored
            assert stored is not None
            self.threads[call.key] = lane
            spent = ("execute", call.span_id, key_split(call.key), "lambda", "seconds")
            self.digest_metric(spent, report.seconds)
            start, begun = begun, begun + report.seconds
            events.append(
                ExecuteSuccessEvent(
                    key=call.key,
                    run_id=call.run_id,
                    value=stored,
                    start=start,
                    stop=begun,
                    nbytes=stored.nbytes,
                    type=object,  # the state machine tells the real one
                    stimulus_id=f"task-finished-{ended}",
                )
            )
        return events

    def _failure(self, call: _Call, error: BaseException) -> StateMachineEvent:
        stop, key = time(), call.key
        if isinstance(error, CancelledError | Reschedule):
            return RescheduleEvent(key=key, stimulus_id=f"reschedule-{stop}")
        error = explained(key, error)
        self.threads[key] = self._lane(call.sent or stop, stop)
        message = error_message(error)
        if not self.session.engine.closed:  # at the end of a program that has not closed it
            text = message["exception_text"]
            logger.error("Compute Failed\nKey:       %s\nException: %s", key, text)
        return ExecuteFailureEvent.from_exception(
            message,
            key=key,
            run_id=call.run_id,
            start=call.sent or stop,
            stop=stop,
            stimulus_id=f"task-erred-{stop}",
        )

    def _lane(self, start: float, stop: float) -> int:
        """Return a number that no other invocation had in that time: where it is drawn."""
        lanes = self._lanes  # of those that were free by then, the one that is free for less time
        place = bisect.bisect_right(lanes, (start, math.inf)) - 1
        lane = lanes.pop(place)[1] if place >= 0 else len(lanes)
        bisect.insort(lanes, (stop, lane))
        return lane

    # -- data ------------------------------------------------------------------------------------

    async def _put(self, key: Key, value: Any) -> Stored:
        """Store a value that this process has."""
        name = (key, next(self._attempts))
        put = partial(self.session.put, name, value)
        large = sizeof(value) > MIN_THREAD_BYTES
        future = await asyncio.to_thread(put) if large else put()
        return await asyncio.wrap_future(future)

    async def update_data(
        self, data: dict[Key, object], stimulus_id: str | None = None
    ) -> dict[str, Any]:
        """Take what was scattered: it is stored once, for all tasks to read."""
        puts = [self._put(key, value) for key, value in data.items()]
        stored = {}
        for key, put in zip(data, await asyncio.gather(*puts, return_exceptions=True), strict=True):
            if isinstance(put, BaseException):
                self._unmoved[key] = put
                raise put
            stored[key] = put
        stimulus_id = stimulus_id or f"update-data-{time()}"
        self.handle_stimulus(UpdateDataEvent(data=stored, stimulus_id=stimulus_id))
        return {"nbytes": {key: each.nbytes for key, each in stored.items()}, "status": "OK"}

    async def gather(self, who_has: dict[Key, list[str]]) -> dict[str, object]:
        """Take copies of what other workers have."""
        wanted = {key: workers for key, workers in who_has.items() if key not in self.data}
        data, missing, failed, _ = await gather_from_workers(
            who_has=wanted, rpc=self.rpc, who=self.address
        )
        await self.update_data(data)
        if missing or failed:
            return {"status": "partial-fail", "keys": [*missing, *failed]}
        return {"status": "OK"}

    async def gather_dep(self, *arguments: Any, **options: Any) -> StateMachineEvent:
        """Fetch results from other workers, which the scheduler may have besides this one."""
        event = await super().gather_dep(*arguments, **options)
        if isinstance(event, GatherDepSuccessEvent):
            event.data = {key: await self._put(key, value) for key, value in event.data.items()}
        return event

    async def get_data(
        self,
        comm: Any,
        keys: Collection[Key],
        who: str | None = None,
        serializers: list[str] | None = None,
    ) -> Any:
        """Send values to a client, or to another worker."""
        there = {key: self.data[key] for key in keys if key in self.data}
        nbytes = sum(stored.nbytes for stored in there.values())
        data = {key: to_serialize(value) for key, value in (await self._load(there)).items()}
        self.transfer_outgoing_count += 1
        self.transfer_outgoing_count_total += 1
        self.transfer_outgoing_bytes += nbytes
        self.transfer_outgoing_bytes_total += nbytes
        try:
            await comm.write({"status": "OK", "data": data}, serializers=serializers)
            response = await comm.read(deserializers=serializers)
            assert response == "OK", response
        except OSError:
            comm.abort()
            raise
        finally:
            self.transfer_outgoing_bytes -= nbytes
            self.transfer_outgoing_count -= 1
        return Status.dont_reply

    async def _load(self, wanted: dict[Key, Stored]) -> dict[Key, Any]:
        """Fetch and unpickle values, at the same time."""

        async def large(stored: Stored, future: Future[Sealed]) -> Any:
            sealed = await asyncio.wrap_future(future)
            if stored.nbytes < MIN_THREAD_BYTES:
                return sealed.load()
            return await asyncio.to_thread(sealed.load)

        values: dict[Key, Any] = {}
        failed: dict[Key, BaseException] = {}
        waiting = {}
        for key, stored in wanted.items():
            try:
                future = self.session.fetch(stored)
                if future.done():
                    values[key] = future.result().load()
                else:
                    waiting[key] = asyncio.ensure_future(large(stored, future))
            except Exception as error:  # noqa: BLE001  whatever a user's class raises
                failed[key] = error
        for key, task in waiting.items():
            try:
                values[key] = await task
            except Exception as error:  # noqa: BLE001  the same
                failed[key] = error
        if failed:
            self._unmoved.update(failed)
            raise next(iter(failed.values()))
        return values


async def beside(function: Callable[[], None]) -> None:
    """Call a function that may take some time in another thread, if there are still any.

    When the interpreter is about to end there are none, and nobody whom it would keep waiting.
    """
    if threading.main_thread().is_alive():
        await asyncio.to_thread(function)
    else:
        function()


def find_type(kind: str) -> type | None:
    """Return a type by its name, as ``module.name``, if its module is imported."""
    parts = kind.split(".")
    for place in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:place]))
        for name in parts[place:]:
            found = getattr(found, name, None)
        if isinstance(found, type):
            return found
    return None


def _shown(name: Key) -> str:
    """Return how users know the name of an attempt at a task."""
    assert isinstance(name, tuple)
    return short(name[0])
