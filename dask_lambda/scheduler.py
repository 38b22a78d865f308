"""The scheduler that Dask calls: ``x.compute(scheduler=lambda_get)``.

May import: all of the engine.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, Literal

import dask.config
from dask._task_spec import DataNode
from dask.base import get_scheduler, named_schedulers, persist
from dask.callbacks import local_callbacks
from dask.local import nested_get

from dask_lambda import graph as graphs
from dask_lambda import signals
from dask_lambda.access import Access
from dask_lambda.annotations import Annotations
from dask_lambda.backend import open_backend, usual_window
from dask_lambda.callbacks import Callbacks
from dask_lambda.computation import Computation, has_ended
from dask_lambda.config import Settings, check_names
from dask_lambda.dispatch import Engine
from dask_lambda.errors import ConfigurationError, IntegrityError, LostDataError
from dask_lambda.estimation import estimate_run
from dask_lambda.forecast import Estimate
from dask_lambda.graph import short
from dask_lambda.kept_runs import KeptRun
from dask_lambda.loop_thread import claim_process
from dask_lambda.plan import Plan
from dask_lambda.planner import Planner
from dask_lambda.prices import prices_for
from dask_lambda.report import RunReport
from dask_lambda.resume import Resumption
from dask_lambda.session import Session
from dask_lambda.stored import stored_block, tell_whose
from dask_lambda.warming import WarmReport
from lambda_worker.protocol import Key, Reference

#: Settings that may be given for one computation: ``x.compute(scheduler=lambda_get, retries=3)``.
CALL_SETTINGS = frozenset(
    {
        *("retries", "inline_bytes", "compression", "plan", "default_task_seconds"),
        *("speculate", "patience", "max_cost_usd", "max_seconds"),
        *("resume", "keep", "modules"),
    }
)

#: Keywords that resemble a setting so much (difflib's ratio) are taken for slips of the pen.
SIMILAR = 0.75

logger = logging.getLogger("dask_lambda")

_last_report: RunReport | None = None


def last_report() -> RunReport | None:
    """Return the report of the run that ended last in this process, or None."""
    return _last_report


def note_report(report: RunReport) -> None:
    """Take note of the report of a run that has ended."""
    global _last_report
    _last_report = report


def estimate(*collections: Any, scheduler: Any = None, **kwargs: Any) -> Estimate:
    """Estimate what a computation does and costs, without sending anything.

    >>> print(dask_lambda.estimate(x))                                    # doctest: +SKIP

    Parameters
    ----------
    *collections : dask collections
        What would be computed together; also in lists, tuples and dicts.
    scheduler : LambdaScheduler, optional
        Default: the one in Dask's configuration, or the one behind ``lambda_get``.
    **kwargs
        As for :meth:`LambdaScheduler.estimate`: ``on``, ``persist``, ``optimize_graph``, and
        settings as for ``compute``.

    Returns
    -------
    Estimate

    Raises
    ------
    TypeError
        If there is no collection to compute.
    ConfigurationError
        If a setting, or an annotation of a task, is no good.
    """
    return chosen(scheduler, "estimates are made by").estimate(*collections, **kwargs)


def chosen(scheduler: Any, what: str) -> LambdaScheduler:
    """Return the scheduler that is meant.

    Parameters
    ----------
    scheduler : object
        Anything that Dask takes for a scheduler; None: the one in Dask's configuration.
    what : str
        The beginning of a sentence that ends with the name of our class, for the error.

    Raises
    ------
    TypeError
        If it is none of ours.
    """
    found = get_scheduler(scheduler=scheduler)
    found = getattr(found, "__self__", found)
    if isinstance(found, LambdaScheduler):
        return found
    if scheduler is not None:
        raise TypeError(f"{what} a LambdaScheduler, not by {scheduler!r}")
    default = getattr(named_schedulers["lambda"], "__self__", None)
    assert isinstance(default, LambdaScheduler)
    return default


class LambdaScheduler:
    """Runs Dask graphs on AWS Lambda.

    Pass it to ``compute`` as ``scheduler=s`` or ``scheduler=s.get``, or use it as a context
    manager, which makes it Dask's default scheduler inside.  It connects at the first run, and
    may be used by several threads at once: they share one pool of connections and one window of
    concurrent invocations.

    Parameters
    ----------
    **settings
        Any of the settings in ``dask_lambda.yaml``, as keywords: ``backend``, ``function``,
        ``bucket``, ``prefix``, ``region``, ``endpoint_url``, ``concurrency``, ``inline_bytes``,
        ``compression``, ``plan``, ``memory``, ``timeout``, ``retries``, ``speculate``,
        ``patience``, ``max_cost_usd``, ``max_seconds``, ``larger_functions``,
        ``default_task_seconds``, ``local_executor``, ``modules``, ``resume``, ``keep``,
        ``prices``, ``architecture``.  They have precedence over Dask's configuration, which is read
        anew at each run.

    Raises
    ------
    ConfigurationError
        For a keyword that is not a setting.
    """

    def __init__(self, **settings: Any):
        check_names(settings)
        self._overrides = settings
        self._engines: dict[tuple[Any, ...], Engine] = {}
        self._lock = threading.Lock()
        self._contexts: list[Any] = []
        self.last_report: RunReport | None = None

    def __call__(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        """Same as :meth:`get`."""
        return self.get(dsk, keys, **kwargs)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._overrides.items())
        return f"LambdaScheduler({settings})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._overrides,)

    def __deepcopy__(self, memo: dict[int, Any]) -> LambdaScheduler:
        return self  # whoever copies Dask's configuration wants the same scheduler

    def __enter__(self) -> LambdaScheduler:
        context = dask.config.set(scheduler=self)
        context.__enter__()
        self._contexts.append(context)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._contexts.pop().__exit__(*exc_info)
        self.close()

    # -- what Dask calls -------------------------------------------------------------------------

    def get(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        """Compute keys of a graph: the function that Dask calls a scheduler.

        Parameters
        ----------
        dsk : Expr, HighLevelGraph or mapping
        keys : key or (nested) list of keys
        retries : int, optional
            How often to run a task again that raises, times out or runs out of memory; an
            annotation ``retries`` of the task has precedence.
        resume : str, optional
            A name under which results stay in S3.  What an earlier computation of that name has
            left there, also one that was killed, is not computed again.
        keep : bool, optional
            Whether intermediate results stay as well.
        inline_bytes, compression, plan, modules, speculate, patience : optional
            The settings of these names, for this call.
        max_cost_usd, max_seconds : optional
            The same.
        callbacks : optional
            Dask callbacks for this call.
        **kwargs
            Keywords that mean something to other schedulers (``num_workers=4``) are ignored.

        Returns
        -------
        The value of the key, or (nested) tuples of values.

        Raises
        ------
        The task's own exception, with the remote traceback as a note, or an error of
        :mod:`dask_lambda.errors`.
        """
        return self._compute(dsk, keys, kwargs, persist=False)

    def persist(
        self, collections: Sequence[Any], optimize_graph: bool = True, **kwargs: Any
    ) -> list[Any]:
        """Compute collections and leave their blocks in S3: what ``dask.persist`` calls.

        The returned collections load the blocks inside later computations, on Lambda where they
        can.  The objects live as long as a collection refers to them, at the longest until
        :meth:`close` or the end of the interpreter; with ``resume`` or ``keep`` until
        ``dask-lambda runs delete``.
        """

        def references(dsk: Any, keys: Any, **kwargs: Any) -> Any:
            return self._compute(dsk, keys, kwargs, persist=True)

        return list(
            persist(
                *collections,
                traverse=False,
                optimize_graph=optimize_graph,
                scheduler=references,
                **kwargs,
            )
        )

    def persist_under(
        self, dsk: Any, keys: Any, resumption: Callable[..., Resumption], **kwargs: Any
    ) -> None:
        """Compute keys of a graph and leave their values in S3, under a name.

        For :mod:`dask_lambda.saved`.

        Parameters
        ----------
        dsk, keys, **kwargs
            As for :meth:`get`.
        resumption : callable
            Called as :class:`~dask_lambda.resume.Resumption`: it decides under which name, and
            what becomes of the references.
        """
        self._compute(dsk, keys, kwargs, persist=True, resumption=resumption)

    def open_kept(self, record: KeptRun) -> Access:
        """Connect to where the objects of a kept run are, so that they can be loaded.

        Raises
        ------
        ConfigurationError
            If other settings are needed for that.
        LostDataError
            If they were in an embedded AWS that has ended.
        """
        settings = self._settings({})
        engine = self._engine(settings)
        if record.place != engine.place:
            if settings.is_local and has_ended(record.place):
                raise LostDataError(
                    f"nothing is left of {record.name!r}: the embedded AWS that had its objects "
                    "has ended ('dask-lambda local start' keeps one running)"
                )
            raise ConfigurationError(
                f"the objects of {record.name!r} are in {record.place}, not in {engine.place}, "
                "which is configured now: use a LambdaScheduler, or settings, for that bucket"
            )
        engine.access.adopt(record)
        return engine.access

    def explain(self, *collections: Any, optimize_graph: bool = True) -> Plan:
        """Plan a computation without running it.

        ``print(scheduler.explain(x))`` says what would run together, and why or why not.

        Parameters
        ----------
        *collections : dask collections
            What would be computed together.
        optimize_graph : bool
            As ``dask.compute``'s.

        Returns
        -------
        Plan
        """
        settings = self._settings({})
        prices = prices_for(settings.region, settings.prices)
        window = usual_window(settings)
        planner = Planner.of_collections(collections, optimize_graph, settings, window, prices)
        return planner.plan(finalise=True)

    def estimate(
        self,
        *collections: Any,
        optimize_graph: bool = True,
        persist: bool = False,
        on: Literal["aws", "local"] | None = None,
        **kwargs: Any,
    ) -> Estimate:
        """Estimate what a computation does and costs, without sending anything.

        The figures are ranges: how wide depends on what is known of the tasks, which is said
        (``print(scheduler.estimate(x))``).  What an earlier computation has kept under a name
        (``resume``) is not subtracted, failures and retries are not added.

        Parameters
        ----------
        *collections : dask collections
            What would be computed together.
        optimize_graph : bool
            As ``dask.compute``'s.
        persist : bool
            Whether the results would stay in S3, as with ``dask.persist``.
        on : {"aws", "local"}, optional
            Where; default: where it would run.  "aws" needs no account.
        **kwargs
            As for ``compute``: ``plan``, ``inline_bytes``, ``default_task_seconds``, ...

        Returns
        -------
        Estimate

        Raises
        ------
        ConfigurationError
            If a setting, or an annotation of a task, is no good.
        """
        settings = self._settings(kwargs)
        engine = self._engines.get(_connection(settings))
        same = on is None or (on == "local") == settings.is_local
        if engine is not None and same:  # which may know the function better
            usual = engine.backend.invokers[0]
            settings = replace(
                settings,
                memory=usual.memory_mb or settings.memory,
                architecture=settings.architecture or usual.architecture,
            )
        return estimate_run(collections, settings, optimize_graph, persist=persist, on=on)

    def warm(self, count: int) -> WarmReport:
        """Start execution environments before they are needed.

        So many requests are sent at the same time that do nothing but wait until all are there, so
        that each meets an environment of its own.  Lambda keeps an idle one for some minutes.

        Parameters
        ----------
        count : int
            Up to ``concurrency``.

        Returns
        -------
        WarmReport
            How many environments had to be started, and what it cost.

        Raises
        ------
        ConfigurationError
            If the count is no number from 1 to the window.
        DaskLambdaError
            If the function cannot be invoked, or refuses.
        """
        settings = self._settings({})
        return self._engine(settings).warm(count, settings.memory)

    def session(self, shown: Callable[[Key], str] = short) -> Session:
        """Open a run to which calls are added one by one: what futures stand on.

        Parameters
        ----------
        shown : callable, optional
            How users know a key, for errors.
        """
        settings = self._settings({})
        return Session(self._engine(settings), settings, shown)

    def connect(self) -> None:
        """Connect now, as otherwise the first computation does.

        Raises
        ------
        DaskLambdaError
            If the settings are wrong, or function or bucket cannot be used.
        """
        self._engine(self._settings({}))

    def close(self) -> None:
        """Cancel what runs, delete what was persisted, close all connections.  Idempotent.

        The scheduler may be used again afterwards; it connects anew.
        """
        with self._lock:
            engines, self._engines = self._engines, {}
        for engine in engines.values():
            engine.close()
            atexit.unregister(engine.close_at_exit)
            signals.release()

    # -- one run ---------------------------------------------------------------------------------

    def _compute(
        self,
        dsk: Any,
        keys: Any,
        kwargs: dict[str, Any],
        *,
        persist: bool,
        resumption: Callable[..., Resumption] | None = None,
    ) -> Any:
        started = time.perf_counter()
        own_callbacks = kwargs.pop("callbacks", None)
        settings = self._settings(kwargs)
        nodes = graphs.materialise(dsk)
        with local_callbacks(own_callbacks) as active:
            callbacks = Callbacks(active, nodes)
            failed = True
            try:
                callbacks.start()
                if callbacks:  # which may have put plain values in
                    nodes = graphs.materialise(nodes)
                graph = graphs.normalise(nodes, keys)
                if callbacks:
                    callbacks.begin(graph)
                annotations = Annotations(dsk)
                if resumption is None and (settings.resume is not None or settings.keep):
                    resumption = Resumption
                computation = Computation(
                    settings, annotations, callbacks, persist, self._engine, self._note, started
                )
                if resumption is None:
                    values = computation.run(graph)
                else:
                    values = computation.run_named(graph, resumption)
                failed = False
            except (LostDataError, IntegrityError) as error:
                tell_whose(error)
                raise
            finally:
                callbacks.finish(failed)
        results = {key: values[graph.resolve(key)] for key in graph.outputs}
        if persist:
            results = {key: _node(key, value) for key, value in results.items()}
        return nested_get(keys, results)

    def _settings(self, kwargs: dict[str, Any]) -> Settings:
        overrides = dict(self._overrides)
        for name, value in kwargs.items():
            if name in CALL_SETTINGS:
                overrides[name] = value
            elif name in Settings.names():
                raise ConfigurationError(
                    f"{name!r} cannot be set for one computation: give it to LambdaScheduler(...), "
                    f"or set dask-lambda.{name.replace('_', '-')} in Dask's configuration"
                )
            else:  # Dask hands any keyword on, and its own schedulers ignore what they do not know
                meant = get_close_matches(name, CALL_SETTINGS, n=1, cutoff=SIMILAR)
                level = logging.WARNING if meant else logging.DEBUG
                also = f": is {meant[0]} meant?" if meant else ""
                logger.log(level, "the keyword %r means nothing to this scheduler%s", name, also)
        return Settings.resolve(**overrides)

    def _note(self, report: RunReport) -> None:
        self.last_report = report
        note_report(report)

    # -- the engine ------------------------------------------------------------------------------

    def _engine(self, settings: Settings) -> Engine:
        """Return the engine for the connection that the settings describe."""
        connection = _connection(settings)
        claim_process()
        with self._lock:
            engine = self._engines.get(connection)
            if engine is not None and not engine.closed and engine.backend.is_alive():
                return engine
            if engine is not None:  # of an embedded AWS that has ended
                signals.release()
                atexit.unregister(engine.close_at_exit)
                threading.Thread(target=engine.close, name="close", daemon=True).start()
            backend = open_backend(settings)
            prices = prices_for(backend.region, settings.prices)
            engine = Engine(backend, prices, settings.architecture)
            try:
                engine.open()
            except BaseException:  # Ctrl-C among them: its thread must not live on
                engine.close()
                raise
            self._engines[connection] = engine
            # Before the embedded AWS, which registered earlier.
            atexit.register(engine.close_at_exit)
            signals.hold()
            return engine


def _connection(settings: Settings) -> tuple[Any, ...]:
    """Return the settings for which there is one engine."""
    return (
        settings.is_local,
        settings.function,
        settings.bucket,
        settings.prefix,
        settings.region,
        settings.endpoint_url,
        settings.concurrency,
        settings.memory,
        settings.timeout,
        tuple(sorted(settings.larger_functions.items())),
        tuple(sorted(settings.prices.items())),
        settings.architecture,
        executor if isinstance(executor := settings.local_executor, str) else id(executor),
    )


def _node(key: Key, value: Any) -> Any:
    """Return what stands for a result in the graph of a persisted collection."""
    if isinstance(value, Reference):
        return stored_block(key, value)
    if isinstance(value, str | bytes | int | float | list | tuple | set | frozenset | dict):
        return DataNode(key, value)  # which Dask might take for a key or a task
    return value


def _rebuild(overrides: dict[str, Any]) -> LambdaScheduler:
    return LambdaScheduler(**overrides)
