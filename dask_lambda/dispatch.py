"""Carrying out the state machine's instructions: the only place where the engine meets the world.

May import: opening, ending, access, loop_thread, sending, warming, objects, run, kept_runs, reuse,
state, plan, graph, failures, the ground.

An :class:`Engine` is one loop in one background thread (:mod:`dask_lambda.loop_thread`).  All runs
of a scheduler share it, with its connection pool and its window.  The state machine and everything
about a :class:`Run` are touched in that thread only; a caller hands a run over with
:meth:`Engine.start` and then listens to :attr:`Run.events`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets as tokens
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, Unpack

from dask_lambda import errors, failures
from dask_lambda.access import Access
from dask_lambda.cost import Architecture, Prices
from dask_lambda.ending import Endings
from dask_lambda.events import (
    Accept,
    Discard,
    Done,
    Event,
    Failure,
    FailureKind,
    GroupFailed,
    GroupsAdded,
    InvocationEnded,
    Invoke,
    Release,
    RunDrained,
    RunEnded,
    Stalled,
    TimePassed,
    Wake,
)
from dask_lambda.graph import short
from dask_lambda.kept_runs import Place
from dask_lambda.loop_thread import CLOSED, LoopThread
from dask_lambda.objects import Objects
from dask_lambda.opening import GraphTerms, RunMaker, Terms
from dask_lambda.plan import Group, Plan
from dask_lambda.reuse import apart
from dask_lambda.run import Result, Run, RunFailed, Sealed, fetch_sealed
from dask_lambda.sending import Backend, Sender
from dask_lambda.splitting import split
from dask_lambda.state import State
from dask_lambda.warming import WarmReport, warm
from lambda_worker import protocol
from lambda_worker.errors import StoreError
from lambda_worker.protocol import Key, Reference, Value
from lambda_worker.store import Store

logger = logging.getLogger("dask_lambda")

R = TypeVar("R", bound=Run)
T = TypeVar("T")

#: Downloads of results at the same time.
FETCHES = 32
#: Values that travel inline are held by the client until their last reader is done.  Above this
#: many bytes in all, new results go through S3 whatever their size.
MAX_HELD_BYTES = 256 * 2**20
#: How long closing waits for invocations in flight, whose outputs are then deleted.
CLOSE_SECONDS = 0.5
#: What became of a group that was given up before it was sent.
UNWANTED = Failure(FailureKind.CANCELLED)
#: What the encoder says of a task for which there can be no payload.
UNSENDABLE = (errors.UnserializableError, errors.PayloadTooLargeError, errors.LostDataError)
#: How long obstore's threads get at the end of the interpreter, to hand over what is done.
REST_SECONDS = 0.05


def _smaller(run: Run, group: Group) -> list[Group]:
    """Split a group of a run; in what is kept, no part may be entangled."""
    parts = split(run.graph, run.plan.repeated, group)
    return parts if run.folder is None else apart(run.graph, run.plan.repeated, parts)


class Engine(LoopThread):
    """Runs graphs.

    Parameters
    ----------
    backend : Backend
    prices : Prices, optional
    architecture : {"x86_64", "arm64"}, optional
        Of the functions; default: what they say themselves.
    """

    def __init__(
        self,
        backend: Backend,
        prices: Prices | None = None,
        architecture: Architecture | None = None,
    ):
        super().__init__()
        self.backend = backend
        self.place = Place(
            backend.bucket_name, backend.prefix, backend.region, backend.endpoint_url
        )
        room = {}
        if (local := backend.local) is not None:
            room = {"slots": local.slots, "memory": (local.memory_mb or math.inf) * 2**20}
        rungs = len(backend.invokers)
        self.state = State(backend.window, seed=tokens.randbits(32), rungs=rungs, **room)
        self.prices = prices or Prices()
        self._architecture = architecture
        self._runs: dict[str, Run] = {}
        self._fetching = asyncio.Semaphore(FETCHES)
        self._store = Store(backend.bucket)
        self._sender = Sender(backend, self.prices, architecture)
        self._objects = Objects(self._store, self.place, self._spawn, self._load, backend.refresh)
        self._maker = RunMaker(backend, self._sender, self._secret_of)
        self._endings = Endings(self._runs, self._objects, self.prices, self.handle, self._spawn)
        self.access = Access(self, self._objects)

    @property
    def usual_prices(self) -> Prices:
        """Its prices where every GB-second is one of the usual function's processor."""
        return self.prices.on(self._sender.architecture(self.backend.invokers[0]))

    # -- called from any thread ------------------------------------------------------------------

    def open(self) -> None:
        """Open connections and check that function and bucket are there and may be used.

        Raises
        ------
        DaskLambdaError
            FunctionNotFoundError, BucketNotFoundError, AccessDeniedError or InvocationError.
        """
        self.ask(self._open())

    def start(self, plan: Plan, **terms: Unpack[GraphTerms]) -> Run:
        """Start the run of one graph.

        Parameters
        ----------
        plan : Plan
        **terms
            See :class:`~dask_lambda.opening.GraphTerms`.

        Raises
        ------
        ConfigurationError
            If a module to include is not local.
        InvocationError
            If the engine is closed.
        """
        run = self._maker.of_plan(plan, **terms)
        self.post(self._start, run)
        return run

    def open_run(
        self, kind: Callable[..., R], shown: Callable[[Key], str] = short, **terms: Unpack[Terms]
    ) -> R:
        """Start a run to which tasks are added while it goes on, each with an end of its own.

        For the parameters see :meth:`dask_lambda.opening.RunMaker.open_ended`; it raises what
        :meth:`start` does.
        """
        run = self._maker.open_ended(kind, shown, **terms)
        self.post(self._open_run, run)
        return run

    def warm(self, count: int, memory_mb: int) -> WarmReport:
        """Start environments of the usual function.

        Parameters
        ----------
        count : int
        memory_mb : int
            Of the function, as far as is known before it says so itself.

        Raises
        ------
        ConfigurationError
            If the count is no number from 1 to the window.
        DaskLambdaError
            If the function cannot be invoked.
        """
        window = self.backend.window
        if not 1 <= count <= window:
            raise errors.ConfigurationError(
                f"warm({count!r}): it must be a number from 1 to {window:,}, as many invocations "
                "as may be in flight (dask-lambda.concurrency)"
            )
        invoker = self.backend.invokers[0]
        report: WarmReport = self.ask(
            warm(invoker, count, memory_mb, self.prices, self._architecture)
        )
        return report

    def fetch(self, run: Run, value: Value) -> Future[Sealed]:
        """Begin to fetch an output of a run that goes on.

        Raises
        ------
        InvocationError
            If the engine is closed.
        """
        return self.begin(self._fetch_value(run, value))

    def discard(self, run: Run, names: Iterable[str]) -> None:
        """Delete objects of a run soon.  To be called in the engine's thread."""
        self._objects.discard(run, names)

    async def patiently(self, patience: float, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do something with S3, again and again for as long as patience lasts."""
        return await self._objects.patiently(patience, work)

    async def _fetch_value(self, run: Run, value: Value) -> Sealed:
        if value.data is not None:
            return Sealed(value.data, run.secret, value.name)
        work = partial(fetch_sealed, run.store, value, run.secret)
        with failures.translated():
            async with self._fetching:
                return await self._objects.patiently(run.patience, work)

    def cancel(self, run: Run, patience: float) -> None:
        """Stop a run: nothing more is sent, and what it has written is deleted.

        What is in flight cannot be called back: it stops when it finds the lease gone, and its
        outputs are deleted as it ends.  Returns after the first deletion, or after ``patience``
        seconds.
        """
        with self._lock:
            if self.closed:  # which ends every run
                return
            done = self._call(self._endings.cancel(run))
        with suppress(TimeoutError, CancelledError):
            done.result(patience)

    def close(self) -> None:
        """Cancel all runs, delete all that is stored, end the thread.  Idempotent."""
        with self._lock:
            if self.closed or self.pid != os.getpid():
                return
            self.closed = True
        try:
            self._call(self._close()).result(CLOSE_SECONDS + 10)
        except TimeoutError:
            logger.warning("closing the engine took too long; objects may be left in the bucket")
        self._stop()
        for run in list(self._runs.values()):  # whose callers would wait without end
            run.events.put(RunFailed(errors.InvocationError(CLOSED)))

    def close_at_exit(self) -> None:
        """Close before the interpreter ends, and let obstore's threads come to rest.

        A thread of obstore that hands over a result sends a byte to the loop, for which it lets the
        interpreter go; if it wants it back when the interpreter has ended, the process aborts.
        """
        self.close()
        time.sleep(REST_SECONDS)

    # -- in the engine's thread ------------------------------------------------------------------

    def _load(self, reference: Reference) -> Any:
        return self.access.load(reference)

    def _secret_of(self, reference: Reference) -> bytes:
        """Return the secret of a stored result, also of one of a run that goes on."""
        run = self._runs.get(protocol.run_of(reference.name))
        if run is not None and not run.over:
            return run.secret
        return self._objects.secret_of(reference)

    def _panic(self, error: BaseException) -> None:
        """End all runs after an error that nobody expected: better than to hang."""
        logger.error("the engine failed", exc_info=error)
        for run in self._runs.values():
            run.over = True
            run.ended.set()
            run.events.put(RunFailed(error))

    async def _open(self) -> None:
        invokers = self.backend.invokers
        failure = None
        for invoker in invokers:
            await invoker.open()
            failure = failure or await invoker.check()
        if failure is None:
            try:
                prefix = f"{protocol.shards()[0]}/{self.backend.prefix}/"
                async for _ in self._store.list_async(prefix):
                    break
            except StoreError as error:
                failure = failures.from_store_error(error)
        if failure is not None:
            for invoker in invokers:
                await invoker.close()
            raise failures.to_exception(failure, "", {})

    def _start(self, run: Run) -> None:
        self._runs[run.name] = run
        if not run.keep_results:
            for key in run.plan.fetch & run.graph.stored.keys():
                self._fetch(run, self._fetch_stored(run, key))
        plan, auto = run.plan, run.plan.mode != "none"
        smaller = partial(_smaller, run) if auto else None
        self.handle(
            GroupsAdded(
                run.name,
                plan.groups,
                plan.keep,
                split=smaller,
                batch=auto,
                speculate=run.speculate,
                patience=run.patience,
                budget=self._maker.budget(run),
            )
        )

    def _open_run(self, run: Run) -> None:
        self._runs[run.name] = run
        self.add(run, ())

    def add(self, run: Run, groups: Sequence[Group], given: tuple[Key, ...] = ()) -> None:
        """Add groups to an open run.  To be called in the engine's thread.

        Parameters
        ----------
        run : Run
            Which has their tasks in its graph.
        groups : sequence of Group
        given : tuple of key
            Values that are there, for them and later ones to read.
        """
        self.handle(
            GroupsAdded(
                run.name,
                groups,
                frozenset(key for group in groups for key in group.outputs),
                last=False,
                batch=True,
                speculate=run.speculate,
                patience=run.patience,
                budget=self._maker.budget(run),
                isolated=True,
                given=given,
            )
        )

    def handle(self, event: Event) -> None:
        """Tell the state machine something and do what it says, in the engine's thread."""
        for instruction in self.state.handle(event, time.monotonic()):
            match instruction:
                case Invoke():
                    run = self._runs[instruction.run]
                    if run.watch:
                        for group in instruction.groups:
                            run.tell_started(group)
                    self._spawn(self._invoke(run, instruction))
                case Accept(name, group, result):
                    self._accept(self._runs[name], group, result)
                case Discard(name, _, result):
                    self._objects.discard_outputs(self._runs[name], result.told)
                case GroupFailed(name, group, failure, origin):
                    run = self._runs[name]
                    run.tell_failed(group, failure, origin)
                    self._forget_task(run, group)
                case Stalled(name, failure, since, patience):
                    logger.warning(
                        "the run has not got on for %.0f s: %s. It is tried again for up to %.0f s",
                        time.monotonic() - since,
                        failures.describe(failure),
                        patience,
                    )
                case Release(name, keys):
                    self._objects.release(self._runs[name], keys)
                case RunEnded(name, failure, group):
                    self._endings.ended(self._runs[name], failure, group)
                case RunDrained(name):
                    self._runs[name].drained.set()
                case Wake(at):
                    delay = at - time.monotonic()
                    self._loop.call_later(delay, self._safely, self.handle, TimePassed(at))

    # -- one invocation --------------------------------------------------------------------------

    async def _invoke(self, run: Run, instruction: Invoke) -> None:
        groups = instruction.groups
        outcomes: Sequence[Done | Failure] | Failure
        wanted = tuple(filter(run.is_wanted, groups))
        try:
            if len(wanted) < len(groups):
                instruction = replace(instruction, groups=wanted)
            inline = run.inline_bytes if self._held() < MAX_HELD_BYTES else 0
            outcomes = UNWANTED
            if wanted:
                outcomes = await self._sender.send(run, instruction, inline)
        except StoreError as error:
            outcomes = failures.from_store_error(error)
        except errors.DaskLambdaError as error:
            if isinstance(error, errors.IntegrityError):  # of a reply, which is not believed
                run.lost.update(run.object_name(k) for g in groups for k in g.outputs)
            kind = FailureKind.FATAL
            if isinstance(error, UNSENDABLE):
                kind = FailureKind.UNSENDABLE
                for each in (error, error.__cause__):  # whose frames hold the task and its data
                    if each is not None:
                        each.__traceback__ = None
            outcomes = Failure(kind, error)
        except Exception as error:  # a bug of ours must end the run, not hang it
            if not all(map(run.is_wanted, wanted)):  # what was given up meanwhile was missing
                await self._invoke(run, replace(instruction, groups=groups))
                return
            logger.exception("dispatching task %s failed", short(groups[0].outputs[0]))
            outcomes = Failure(FailureKind.FATAL, error)
        if isinstance(outcomes, Failure) and outcomes.kind is FailureKind.EXPIRED:
            await asyncio.to_thread(self.backend.refresh)
        as_a_whole = isinstance(outcomes, Failure)
        if isinstance(outcomes, Failure):
            outcomes = [outcomes] * len(groups)
        elif len(wanted) < len(groups):
            left = iter(outcomes)
            outcomes = [next(left) if it in wanted else UNWANTED for it in groups]
        usd, run.spent = run.spent, run.unbilled + run.counts.usd(run.store.counts, self.prices)
        usd = run.spent - usd
        invoker = self._sender.invoker(instruction)
        known = invoker.memory_mb is not None and not instruction.local
        price = self._sender.usd_second(invoker, run.memory_mb) if known else None
        self.handle(
            InvocationEnded(instruction.invocation, tuple(outcomes), as_a_whole, usd, price)
        )

    def _accept(self, run: Run, group: Group, result: Result) -> None:
        """Note where a group's outputs are, and fetch those that the caller wants."""
        run.counts.tasks += len(group.tasks)
        if group.is_local:
            run.counts.local_tasks += len(group.tasks)
        elif run.learn is not None:  # of Lambda's processors
            run.learn(group, result.measured)
        for key, value in result.told:
            value.shared = run.is_shared(key)
            run.values[key] = value
            data = value.data
            if data is None and run.encoder.is_entangled(group):
                # Should it have been delivered twice, only a list tells what the other one wrote.
                run.lost.add(protocol.output_of(value.name))
            if data is not None:
                run.inline[key] = value.size
                run.held += value.size
            if key in run.plan.fetch and not run.keep_results:
                if data is None:
                    self._fetch(run, self._fetch_result(run, key, value))
                else:
                    run.results[key] = Sealed(data, run.secret, value.name)
        if run.watch:
            run.tell_finished(group, result)
        self._forget_task(run, group)

    def _forget_task(self, run: Run, group: Group) -> None:
        if names := run.encoder.forget(group.outputs[0]):
            self._objects.discard(run, names)

    def _held(self) -> int:
        return sum(run.held for run in self._runs.values())

    # -- results ---------------------------------------------------------------------------------

    def _fetch(self, run: Run, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        run.fetches.add(task)
        task.add_done_callback(lambda task: self._safely(self._fetched, run, task))

    def _fetched(self, run: Run, task: asyncio.Task[None]) -> None:
        """End a run whose result cannot be had, without waiting for the rest."""
        if not task.cancelled() and task.exception() is not None and not run.over:
            self._endings.give_up(run)

    async def _fetch_result(self, run: Run, key: Key, value: Value) -> None:
        async with self._fetching:
            work = partial(fetch_sealed, run.store, value, run.secret)
            run.results[key] = await self._objects.patiently(run.patience, work)

    async def _fetch_stored(self, run: Run, key: Key) -> None:
        """Fetch a result that another run has stored."""
        reference = run.graph.stored[key]
        secret = self._objects.secret_of(reference)
        async with self._fetching:
            work = partial(fetch_sealed, run.store, reference, secret)
            run.results[key] = await self._objects.patiently(run.patience, work)

    async def _close(self) -> None:
        for run in list(self._runs.values()):
            if not run.over:
                await self._endings.cancel(run)
                run.events.put(RunFailed(errors.InvocationError(CLOSED)))
        deadline = self._loop.time() + CLOSE_SECONDS
        while self._runs and self._loop.time() < deadline:
            await asyncio.sleep(0.02)
        for run in list(self._runs.values()):  # what is still in flight may yet write these
            run.lost.update(run.object_name(key) for key in self.state.expected(run.name))
            run.drained.set()
            await self._objects.sweep(run)
        await self._objects.close()
        for task in self._tasks:  # invocations in flight: nobody listens to them any more
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for invoker in self.backend.invokers:
            await invoker.close()
        if self.backend.local is not None:
            await self.backend.local.close()
