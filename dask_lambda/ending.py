"""How runs end: what the caller hears, and that nothing of them is left in the bucket.

May import: objects, run, failures, plan, graph, events, cost, errors, the ground.  To be used in
the engine's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from dask_lambda import errors, failures
from dask_lambda.cost import Prices
from dask_lambda.events import Event, Failure, FailureKind, RunCancelled
from dask_lambda.graph import short
from dask_lambda.objects import Objects
from dask_lambda.plan import Group
from dask_lambda.run import Run, RunFailed, RunSucceeded
from lambda_worker.errors import StoreError


class Endings:
    """Ends the runs of one engine.

    Parameters
    ----------
    runs : dict
        Those that are not forgotten, by name.
    objects : Objects
    prices : Prices
    handle : callable
        Tells the state machine something.
    spawn : callable
        Starts a coroutine in the background.
    """

    def __init__(
        self,
        runs: dict[str, Run],
        objects: Objects,
        prices: Prices,
        handle: Callable[[Event], None],
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
    ):
        self._runs = runs
        self._objects = objects
        self._prices = prices
        self._handle = handle
        self._spawn = spawn

    def ended(self, run: Run, failure: Failure | None, group: Group | None) -> None:
        """Take note that the state machine has ended a run."""
        run.over = True
        self._spawn(self._finish(run, failure, group))

    def give_up(self, run: Run) -> None:
        """End a run whose result cannot be had, without waiting for the rest."""
        run.over = True
        self._handle(RunCancelled(run.name))
        self._spawn(self._finish(run, None, None))  # which raises what its fetches say

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
        usd = run.counts.usd(run.store.counts, self._prices)
        return failures.from_budget(usd, time.monotonic() - run.started, said, run.if_spent())

    async def cancel(self, run: Run) -> None:
        """Stop a run for which the caller does not wait any more."""
        run.abandoned = True
        for fetch in run.fetches:
            fetch.cancel()
        if run.over:  # all has been computed, or it has failed
            await run.ended.wait()
            return
        run.over = True
        self._handle(RunCancelled(run.name))
        await self._objects.sweep(run)
        run.ended.set()
        self._spawn(self._bury(run))

    async def _bury(self, run: Run) -> None:
        """Delete what the last invocations in flight have written, and forget the run."""
        await run.drained.wait()
        await self._objects.sweep(run)
        self._runs.pop(run.name, None)
