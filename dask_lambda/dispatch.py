"""Carrying out the state machine's instructions: the only place where the engine meets the world.

May import: loop_thread, sending, warming, objects, stored, run, kept_folder, kept_runs, reuse,
state, plan, graph, encode, local_modules, failures, the ground.

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
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from dask_lambda import errors, failures
from dask_lambda.config import MAX_MEMORY
from dask_lambda.cost import Architecture, Prices
from dask_lambda.encode import Encoder
from dask_lambda.events import (
    PATIENCE,
    Accept,
    Budget,
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
    RunCancelled,
    RunDrained,
    RunEnded,
    Stalled,
    TimePassed,
    Wake,
)
from dask_lambda.graph import Graph, short
from dask_lambda.kept_folder import Folder, Inventory, survey, write_manifest
from dask_lambda.kept_runs import KeptRun, Place
from dask_lambda.local_modules import LocalModules
from dask_lambda.loop_thread import CLOSED, LoopThread, claim_process
from dask_lambda.objects import Objects
from dask_lambda.plan import Group, Plan
from dask_lambda.reuse import apart
from dask_lambda.run import (
    Learn,
    Result,
    Run,
    RunFailed,
    RunSucceeded,
    Sealed,
    fetch_sealed,
)
from dask_lambda.sending import Backend, Sender
from dask_lambda.splitting import split
from dask_lambda.state import State
from dask_lambda.stored import tell_whose
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


@contextmanager
def _translated() -> Iterator[None]:
    """Make errors of ours of what S3 says."""
    try:
        yield
    except StoreError as error:
        raise failures.to_exception(failures.from_store_error(error), "", {}) from error


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
        self._modules: set[str] = set()  # local ones that runs have needed
        self._fetching = asyncio.Semaphore(FETCHES)
        self._store = Store(backend.bucket)
        self._sender = Sender(backend, self.prices, architecture)
        self._objects = Objects(self._store, self.place, self._spawn, self.load, backend.refresh)

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
        self._ask(self._open())

    def start(
        self,
        plan: Plan,
        *,
        inline_bytes: int,
        compression: protocol.Compression = "none",
        keep_results: bool = False,
        watch: bool = False,
        watch_values: bool = False,
        learn: Learn | None = None,
        speculate: bool = False,
        patience: float = PATIENCE,
        max_cost_usd: float | None = None,
        max_seconds: float | None = None,
        memory_mb: int = MAX_MEMORY,
        folder: Folder | None = None,
        modules: Mapping[str, Sequence[str]] | None = None,
    ) -> Run:
        """Start a run.

        Parameters
        ----------
        plan : Plan
        inline_bytes : int
            Results up to this size travel in the reply.
        compression : {"none", "zstd"}
            Of larger ones, and of large data that tasks read.
        keep_results : bool
            Leave the results in S3, in place of fetching them.
        watch : bool
            Tell of each task in ``Run.events``; with ``watch_values``, which needs a plan of single
            tasks, with its value.
        learn : callable, optional
            Told what the workers measured.
        speculate : bool
            Send an invocation once more that takes conspicuously long.
        patience : float
            Seconds for which a group is tried while the network or AWS fails.
        max_cost_usd, max_seconds : float, optional
            The run is stopped before it exceeds them.
        memory_mb : int
            Of the usual function, as far as is known before it says so itself: for its price.
        folder : Folder, optional
            Where the run's objects are, if they outlive it.  Then all results go there, and
            ``inline_bytes`` is for the graph's own data.
        modules : dict, optional
            What of the user's own modules travels with the tasks: names and patterns for
            ``"include"`` and ``"exclude"`` (:class:`~dask_lambda.local_modules.LocalModules`).

        Raises
        ------
        ConfigurationError
            If a module to include is not local.
        InvocationError
            If the engine is closed.
        """
        readers = Counter(key for group in plan.groups for key in group.inputs)
        objects: dict[str, Any] = {}
        if folder is not None:
            objects = {
                "secret": folder.record.secret,
                "prefix": folder.prefix,
                "run": folder.record.run,
                "label": folder.label,
                "once": folder.once,
                "present": folder.data,
                "inline_literals": inline_bytes,
            }
            inline_bytes = 0
        run = Run(
            **self._equipment(plan, compression, modules, **objects),
            inline_bytes=inline_bytes,
            keep_results=keep_results,
            watch=watch,
            watch_values=watch_values,
            shared=frozenset(key for key, count in readers.items() if count > 1),
            learn=learn,
            speculate=speculate,
            patience=patience,
            max_cost_usd=max_cost_usd,
            max_seconds=max_seconds,
            memory_mb=memory_mb,
            folder=folder,
        )
        self.post(self._start, run)
        return run

    def open_run(
        self,
        kind: type[R],
        *,
        inline_bytes: int,
        compression: protocol.Compression = "none",
        speculate: bool = False,
        patience: float = PATIENCE,
        max_cost_usd: float | None = None,
        max_seconds: float | None = None,
        memory_mb: int = MAX_MEMORY,
        modules: Mapping[str, Sequence[str]] | None = None,
        shown: Callable[[Key], str] = short,
        **fields: Any,
    ) -> R:
        """Start a run to which tasks are added while it goes on, each with an end of its own.

        Parameters
        ----------
        kind : type
            Of the run, whose further ``fields`` are given.
        inline_bytes, compression, speculate, patience, max_cost_usd, max_seconds, memory_mb
            As for :meth:`start`.
        modules : dict, optional
            The same.
        shown : callable
            How users know a key.
        """
        graph = Graph({}, {}, {}, {}, frozenset(), {})
        plan = Plan((), frozenset(), (), frozenset(), graph)
        run = kind(
            **self._equipment(plan, compression, modules, forgetful=True, shown=shown),
            inline_bytes=inline_bytes,
            keep_results=False,
            watch=True,
            watch_values=False,
            shared=frozenset(),
            speculate=speculate,
            patience=patience,
            max_cost_usd=max_cost_usd,
            max_seconds=max_seconds,
            memory_mb=memory_mb,
            **fields,
        )
        self.post(self._open_run, run)
        return run

    def _equipment(
        self,
        plan: Plan,
        compression: protocol.Compression,
        modules: Mapping[str, Sequence[str]] | None,
        **objects: Any,
    ) -> dict[str, Any]:
        """Return what every run needs: its name and secret, a store, an encoder."""
        name, secret = tokens.token_hex(16), objects.pop("secret", None) or tokens.token_bytes(32)
        store = Store(self.backend.bucket)
        encoder = Encoder(
            plan.graph,
            store,
            bucket=self.backend.bucket_name,
            secret=secret,
            secret_of=self._secret_of,
            compression=compression,
            modules=LocalModules(**(modules or {}), remembered=self._modules),
            **{"prefix": self.backend.prefix, "run": name, **objects},
        )
        return {
            "graph": plan.graph,
            "plan": plan,
            "store": store,
            "encoder": encoder,
            "name": name,
            "secret": secret,
        }

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
        report: WarmReport = self._ask(
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
        with _translated():
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
            done = self._call(self._cancel(run))
        with suppress(TimeoutError, CancelledError):
            done.result(patience)

    def load(self, reference: Reference) -> Any:
        """Load a stored result, in any other thread than the engine's.

        Raises
        ------
        DaskLambdaError
            LostDataError, IntegrityError, or what else S3 says.
        """
        claim_process()
        secret = self._objects.secret_of(reference)
        work = partial(fetch_sealed, self._store, reference, secret)
        try:
            with _translated():
                sealed: Sealed = self._ask(self._objects.patiently(PATIENCE, work))
        except (errors.LostDataError, errors.IntegrityError) as error:
            tell_whose(error)
            raise
        return sealed.load()

    def adopt(self, record: KeptRun) -> None:
        """Take note of a kept run, so that references to its objects can be loaded."""
        self._objects.adopt(record.run, record.secret)

    def write(self, name: str, data: bytes | bytearray) -> None:
        """Write an object of a kept run, at whose name there is nothing yet.

        Raises
        ------
        DaskLambdaError
        """
        with _translated():
            self._ask(self._objects.patiently(PATIENCE, partial(self._store.put_async, name, data)))

    def survey(self, record: KeptRun) -> Inventory:
        """See what a kept run has in the bucket; what means nothing any more is deleted.

        Raises
        ------
        DaskLambdaError
            If the bucket cannot be read.
        """
        found: Inventory = self._ask(self._survey(record))
        return found

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects of kept runs now."""
        self._ask(self._objects.delete(self._store, list(names)))

    def forget(self, name: str) -> None:
        """Delete a stored result that nobody refers to any more."""
        self.wake(partial(self._objects.forget, name))

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

    async def _survey(self, record: KeptRun) -> Inventory:
        self._objects.adopt(record.run, record.secret)
        with _translated():
            found = await survey(self._store, record)
            await write_manifest(self._store, record)
        await self._objects.delete(self._store, sorted(found.rubbish))
        return found

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
                budget=self._budget(run),
            )
        )

    def _budget(self, run: Run) -> Budget | None:
        if run.max_cost_usd is None and run.max_seconds is None:
            return None
        return Budget(
            math.inf if run.max_cost_usd is None else run.max_cost_usd,
            math.inf if run.max_seconds is None else run.started + run.max_seconds,
            tuple(self._sender.usd_second(i, run.memory_mb) for i in self.backend.invokers),
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
                budget=self._budget(run),
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
                    run = self._runs[name]
                    run.over = True
                    self._spawn(self._finish(run, failure, group))
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
            run.over = True
            self.handle(RunCancelled(run.name))
            self._spawn(self._finish(run, None, None))  # which raises it

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

    async def _finish(self, run: Run, failure: Failure | None, group: Group | None) -> None:
        """Tell the caller the outcome, when nothing of the run is left in the bucket."""
        outcome: RunSucceeded | RunFailed = RunSucceeded()
        if failure is None:
            try:
                await asyncio.gather(*run.fetches)
                if run.keep_results and not run.abandoned:
                    await self._objects.keep(run)
                if run.abandoned:  # nobody will refer to them
                    for value in run.kept.values():
                        self._objects.forget(value.name)
                if run.folder is not None:
                    run.folder.succeeded = not run.abandoned
            except asyncio.CancelledError:  # of the fetches, or of all of this
                if not run.abandoned:
                    raise
                failure = Failure(FailureKind.FATAL, errors.InvocationError("it was cancelled"))
            except StoreError as error:
                failure = failures.from_store_error(error)
            except Exception as error:  # noqa: BLE001  the caller raises it
                failure = Failure(FailureKind.FATAL, error)
        if failure is not None:
            for fetch in run.fetches:
                fetch.cancel()
            if failure.kind is FailureKind.BUDGET:
                failure = self._over_budget(run)
            key = short(group.outputs[-1]) if group else ""
            exception = failures.to_exception(failure, key, {run.encoder.run: run.secret})
            outcome = RunFailed(exception)
        await self._objects.sweep(run)
        run.ended.set()
        run.events.put(outcome)
        await self._bury(run)

    def _over_budget(self, run: Run) -> Failure:
        limits = {"max_cost_usd": run.max_cost_usd, "max_seconds": run.max_seconds}
        said = " and ".join(f"{name}={value:g}" for name, value in limits.items() if value)
        usd = run.counts.usd(run.store.counts, self.prices)
        again = "" if run.folder is None else run.folder.again
        return failures.from_budget(usd, time.monotonic() - run.started, said, again)

    async def _cancel(self, run: Run) -> None:
        run.abandoned = True
        for fetch in run.fetches:
            fetch.cancel()
        if run.over:  # all has been computed, or it has failed
            await run.ended.wait()
            return
        run.over = True
        self.handle(RunCancelled(run.name))
        await self._objects.sweep(run)
        run.ended.set()
        self._spawn(self._bury(run))

    async def _bury(self, run: Run) -> None:
        """Delete what the last invocations in flight have written, and forget the run."""
        await run.drained.wait()
        await self._objects.sweep(run)
        self._runs.pop(run.name, None)

    async def _close(self) -> None:
        for run in list(self._runs.values()):
            if not run.over:
                await self._cancel(run)
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
