"""One graph on its way through the engine, in the thread of whoever computes it.

May import: dispatch, opening, planner, resume, reuse, callbacks, annotations, run, plan, graph,
report, prices, config, kept_runs, errors, the ground; late: local_shared.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from dask_lambda.annotations import Annotations
from dask_lambda.callbacks import Callbacks
from dask_lambda.config import Settings
from dask_lambda.cost import Prices
from dask_lambda.dispatch import Engine
from dask_lambda.errors import IntegrityError, LostDataError
from dask_lambda.graph import Graph
from dask_lambda.kept_runs import Place
from dask_lambda.opening import terms_of
from dask_lambda.plan import Group
from dask_lambda.planner import Planner
from dask_lambda.prices import prices_for
from dask_lambda.report import RunCounts, RunReport
from dask_lambda.resume import Resumption
from dask_lambda.reuse import all_kept, apart
from dask_lambda.run import Run, RunFailed, RunSucceeded, TaskFinished, TaskStarted
from lambda_worker.protocol import Key, Reference
from lambda_worker.store import Counts

#: How long Ctrl-C waits for the objects of the run to be deleted, in seconds.
CANCEL_SECONDS = 0.8


@dataclass(frozen=True)
class Computation:
    """What is asked for, and who hears of it.

    Parameters
    ----------
    settings : Settings
    annotations : Annotations
    callbacks : Callbacks
    persist : bool
        Whether the results stay in S3, and references take their places.
    connect : callable
        Returns the engine for settings; not called if nothing has to be sent.
    note : callable
        Told the report.
    started : float
        On the clock of ``time.perf_counter``.
    """

    settings: Settings
    annotations: Annotations
    callbacks: Callbacks
    persist: bool
    connect: Callable[[Settings], Engine]
    note: Callable[[RunReport], None]
    started: float

    def run_named(self, graph: Graph, make: Callable[..., Resumption]) -> dict[Key, Any]:
        """Run what earlier computations of the same name have not done yet.

        Parameters
        ----------
        graph : Graph
        make : callable
            Called as :class:`~dask_lambda.resume.Resumption`.

        Returns
        -------
        dict
            As :meth:`run`.
        """
        settings, callbacks = self.settings, self.callbacks
        engine = self.connect(settings)
        if callbacks.wants_values:
            settings = replace(settings, plan="none")
        resumption = make(
            settings.resume,
            engine.place,
            engine.backend.function,
            engine.access,
            keep=settings.keep,
            ended=has_ended if settings.is_local else _never_ends,
            lasting=engine.backend.lasting,
        )
        with resumption:
            resumption.prepare(graph)
            planner = Planner.of(graph, replace(settings, inline_bytes=0), self.annotations, engine)
            resumption.identify(
                graph, planner.cut(finalise=not self.persist), references=self.persist
            )
            while True:
                # Who wants to see the values of tasks would miss those of tasks that do not run.
                left = resumption.begin(anew=callbacks.wants_values)
                if callbacks:
                    for key in left.skipped:
                        if key in graph.source:
                            callbacks.task_started(key)
                            callbacks.task_finished(key, None)
                try:
                    values = self.run(left.graph, resumption, len(left.skipped))
                except (LostDataError, IntegrityError) as error:
                    if not resumption.drop(error):
                        raise
                else:
                    resumption.succeed(values)
                    return values

    def run(
        self, graph: Graph, resumption: Resumption | None = None, reused: int = 0
    ) -> dict[Key, Any]:
        """Run a graph.

        Parameters
        ----------
        graph : Graph
        resumption : Resumption, optional
            The name under which it is computed.
        reused : int
            Tasks that need not run, since their results are there.

        Returns
        -------
        dict
            The values of the graph's outputs, or references to them, by their resolved keys.
        """
        settings, callbacks, persist = self.settings, self.callbacks, self.persist
        named = resumption is not None
        engine = self.connect(settings) if graph.tasks else None
        if engine is None or callbacks.wants_values:  # which only single tasks can show
            settings = replace(settings, plan="none")
        planned = replace(settings, inline_bytes=0) if named else settings
        planner = Planner.of(graph, planned, self.annotations, engine)
        plan = planner.plan(finalise=not persist, cut=not named)
        planner.tell()
        if resumption is not None:
            groups: Iterable[Group] = plan.groups
            if settings.keep:
                groups = [all_kept(each, plan.repeated) for each in groups]
            groups = apart(plan.graph, plan.repeated, groups)
            plan = replace(plan, groups=tuple(groups))
        values = {key: graph.literals[key] for key in plan.fetch if key in graph.literals}
        if persist:
            for key in plan.fetch & graph.stored.keys():
                values[key] = graph.stored[key]
        if len(values) < len(plan.fetch) or named:
            engine = engine or self.connect(settings)
            run = engine.start(
                plan,
                keep_results=persist,
                watch=bool(callbacks),
                watch_values=callbacks.wants_values,
                learn=planner.learn if plan.mode == "auto" else None,
                folder=resumption.folder(plan) if resumption is not None else None,
                **terms_of(settings),
            )
            run.counts.reused = reused
            failed = True
            try:
                self._follow(run)
                failed = False
            except BaseException:  # Ctrl-C among them
                engine.cancel(run, CANCEL_SECONDS)
                raise
            finally:
                report = self._report(run.counts, run.store.counts, failed, engine.prices)
                if resumption is not None:
                    resumption.spent(report)
            for key in plan.fetch - values.keys():
                if persist:
                    values[key] = _reference(engine, run, key)
                else:
                    values[key] = run.load(key)
        else:  # all that is asked for is at hand
            prices = prices_for(settings.region, settings.prices)
            self._report(RunCounts(), Counts(), False, prices)
        for key in plan.client:
            if callbacks:
                callbacks.task_started(key)
            task = graph.tasks[key]
            values[key] = task({d: values[graph.resolve(d)] for d in task.dependencies})
            if callbacks:
                callbacks.task_finished(key, values[key])
        return values

    def _follow(self, run: Run) -> None:
        """Listen to a run until it is over."""
        callbacks = self.callbacks
        while True:
            match run.events.get():
                case TaskStarted(key):
                    callbacks.task_started(key)
                case TaskFinished(key, sealed):
                    value = None
                    if sealed is not None and callbacks.wants_values:
                        value = sealed.load()
                    callbacks.task_finished(key, value)
                case RunSucceeded():
                    return
                case RunFailed(exception):
                    raise exception

    def _report(self, counts: RunCounts, client: Counts, failed: bool, prices: Prices) -> RunReport:
        seconds = time.perf_counter() - self.started
        report = counts.report(client, seconds, failed=failed, prices=prices)
        self.note(report)
        return report


def has_ended(place: Place) -> bool:
    """Whether a place was that of an embedded AWS which is not the one that is kept running."""
    from dask_lambda.local_shared import shared_status

    shared = shared_status()
    return shared is None or shared.endpoint_url != place.endpoint_url


def _never_ends(place: Place) -> bool:
    return False


def _reference(engine: Engine, run: Run, key: Key) -> Reference:
    value = run.kept[key]
    reference = Reference(value.name, value.size)
    if run.folder is not None:  # it stays
        return reference
    weakref.finalize(reference, engine.access.forget, value.name).atexit = False
    return reference
