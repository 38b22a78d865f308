"""The executor: functions and lists on Lambda, for those who need not know Dask.

May import: mapping, chains, calling, futures, scheduler, session, report, errors, the ground.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import islice
from typing import Any

from dask.sizeof import sizeof

from dask_lambda.calling import Calling, Limits, name_of
from dask_lambda.chains import ChainFuture
from dask_lambda.config import Settings
from dask_lambda.cost import Prices
from dask_lambda.errors import ConfigurationError
from dask_lambda.futures import LambdaFuture
from dask_lambda.mapping import LOOK_AHEAD, Results
from dask_lambda.plan import Where
from dask_lambda.report import RunCounts, RunReport
from dask_lambda.scheduler import LambdaScheduler
from lambda_worker.calls import run_chunk
from lambda_worker.store import Counts

#: An argument of a chain from this size on is stored once, and not sent with each step.
MIN_SCATTER_BYTES = 64 * 1024
#: Results that a node of a reduction puts together.
SPLIT_EVERY = 8
#: Steps of a chain that are submitted before the one before is done.
AHEAD = 2


class _Handle:
    """What the views of an executor have in common, and nobody else holds."""

    def __init__(self, calling: Calling):
        weakref.finalize(self, calling.let_go).atexit = False


class LambdaExecutor(Executor):
    """A ``concurrent.futures`` executor whose calls run on AWS Lambda.

    >>> with LambdaExecutor() as executor:                                    # doctest: +SKIP
    ...     future = executor.submit(pow, 2, 10)
    ...     squares = list(executor.map(lambda x: x * x, range(100)))

    Futures may be arguments of further calls, which start when they are done; the values go from
    one to the other through S3, and never through this process.  It connects at the first call.

    Parameters
    ----------
    max_workers : int, optional
        Calls in flight at the most: another name of the setting ``concurrency``.
    **settings
        As for :class:`~dask_lambda.LambdaScheduler`.

    Raises
    ------
    ConfigurationError
        For a keyword that is not a setting.

    Notes
    -----
    :meth:`shutdown`, or the end of the ``with`` block, waits for all calls.  Results that somebody
    still holds the futures of can be loaded afterwards; what there is in S3 goes with the last of
    them.  An executor that is still open when the interpreter ends gives up its calls, and deletes
    all that it has in S3.
    """

    def __init__(self, max_workers: int | None = None, **settings: Any):
        if max_workers is not None:
            if "concurrency" in settings:
                raise ConfigurationError("max_workers and concurrency are the same: give one")
            settings["concurrency"] = max_workers
        self._scheduler = LambdaScheduler(**settings)
        Settings.resolve(**settings)
        self._calling = Calling(self._scheduler)
        self._handle = _Handle(self._calling)
        self._limits = Limits()

    def __repr__(self) -> str:
        state = "shut down" if self._calling.closed else "open"
        return f"<{type(self).__name__} {state}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> LambdaExecutor:
        return self  # whoever copies Dask's configuration wants the same executor

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "a LambdaExecutor cannot be pickled, and so not be used inside a call: make the calls "
            "from here, with futures as their arguments"
        )

    def __exit__(self, exc_type: type[BaseException] | None, *others: Any) -> None:
        if exc_type is not None and not issubclass(exc_type, Exception):  # Ctrl-C, SystemExit
            self._calling.abandon()
            return
        self.shutdown(wait=True)

    def options(self, **options: Any) -> LambdaExecutor:
        """Return the same executor with other defaults for its calls.

        It shares everything else: shutting one of them down is shutting down all.

        Parameters
        ----------
        retries : int, optional
            How often to run a call again that raises, times out or runs out of memory.
        memory : int or str, optional
            What a call needs, in bytes, or as "2 GB".
        timeout : float, optional
            Seconds after which a call is interrupted.
        where : {"lambda", "local"}, optional
            Where it runs, if that is not left to what it needs.

        Raises
        ------
        ConfigurationError
            For a value that makes no sense.
        """
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._limits = self._limits.given(**options)
        return view

    # -- calls -----------------------------------------------------------------------------------

    def submit(  # type: ignore[override]
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        retries: int | None = None,
        memory: int | str | None = None,
        timeout: float | None = None,
        where: Where | None = None,
        **kwargs: Any,
    ) -> LambdaFuture:
        """Call a function on Lambda.

        Parameters
        ----------
        fn : callable
        *args, **kwargs
            For the function.  Futures of this executor in them (also in lists, tuples, sets, dicts
            and dataclasses) become what they are futures of; the call starts when all of them are
            done, and fails as the first of them that fails.
        retries, memory, timeout, where
            As for :meth:`options`, for this call.  To a function that has arguments of these names,
            give them with ``functools.partial``.

        Returns
        -------
        LambdaFuture
            The call is made also if nobody keeps it.  An argument that cannot be pickled is an
            UnserializableError of the future.

        Raises
        ------
        RuntimeError
            After :meth:`shutdown`.
        TypeError
            If the function cannot be called, or for futures that are not this executor's.
        ConfigurationError, OutOfMemoryError, FunctionTimeoutError
            For more memory or time than there is anywhere: nothing is sent.
        """
        limits = self._limits
        if any(each is not None for each in (retries, memory, timeout, where)):
            limits = limits.given(retries=retries, memory=memory, timeout=timeout, where=where)
        return self._calling.submit(fn, args, kwargs, limits)

    def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Results:
        """Call a function with each of the arguments; iterate over the results in their order.

        Some calls are made at once, and more as results are read, so that the iterables may be
        endless.  If the iterator is closed, dropped, or ends with an exception, the calls that were
        not sent yet are given up.

        Parameters
        ----------
        fn : callable
        *iterables
            Its arguments, as for the builtin ``map``.
        timeout : float, optional
            Seconds from now on, after which reading a result raises TimeoutError.  (The time that
            each call may take: ``executor.options(timeout=...).map(...)``.)
        chunksize : int
            So many calls of the function are one task; small ones share an invocation in any case.
        buffersize : int, optional
            Tasks that are made ahead of the results that were read: by default 4,096, or as many as
            have arguments of 1 GB in all.

        Returns
        -------
        iterator
            With a method ``close()``.
        """
        return self._map(fn, zip(*iterables, strict=False), timeout, chunksize, buffersize)

    def starmap(
        self,
        fn: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        *,
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Results:
        """Do the same with tuples of arguments: ``fn(*each)`` for each in the iterable."""
        calls = (tuple(each) for each in iterable)
        return self._map(fn, calls, timeout, chunksize, buffersize)

    def _map(
        self,
        function: Callable[..., Any],
        calls: Iterator[tuple[Any, ...]],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
    ) -> Results:
        if not callable(function):
            raise TypeError(f"{function!r} is not callable")
        for what, value in (("chunksize", chunksize), ("buffersize", buffersize)):
            if value is not None and not _whole(value, 1):
                raise ValueError(f"{what} is {value!r}; it must be 1 or more")
        limits, name = self._limits, name_of(function)

        def one(arguments: tuple[Any, ...]) -> LambdaFuture:  # and keep the executor open
            return self._calling.submit(function, arguments, {}, limits, name)

        def chunk(arguments: tuple[Any, ...]) -> LambdaFuture:
            named: dict[str, Any] = {}
            return self._calling.submit(
                run_chunk, (function, arguments), named, limits, f"{name}-chunk"
            )

        chunks = iter(lambda: tuple(islice(calls, chunksize)), ())
        return Results(
            one if chunksize == 1 else chunk,
            calls if chunksize == 1 else chunks,
            chunked=chunksize > 1,
            look_ahead=buffersize or LOOK_AHEAD,
            timeout=timeout,
        )

    def scatter(self, value: Any) -> LambdaFuture:
        """Store a value once, for many calls to read.

        Returns
        -------
        LambdaFuture
            Which is done: give it to calls in place of the value.

        Raises
        ------
        UnserializableError
        RuntimeError
            After :meth:`shutdown`.
        """
        return self._calling.put(value)

    # -- PyWren's vocabulary ---------------------------------------------------------------------

    def reduce(
        self,
        fn: Callable[[list[Any]], Any],
        futures: Iterable[Any],
        *,
        split_every: int | None = SPLIT_EVERY,
    ) -> LambdaFuture:
        """Put results together on Lambda: ``fn`` takes a list of results and returns one.

        That is done in a tree, each node of which starts when its inputs are done.  Their order is
        kept, so ``fn`` has to be associative, and need not be commutative.

        Parameters
        ----------
        fn : callable
            ``fn([a, b, ...])``, of results and of what it has returned itself.
        futures : iterable
            Of futures, or values.
        split_every : int, optional
            The longest list that it gets; None: it is called once, with all.

        Returns
        -------
        LambdaFuture
        """
        if split_every is not None and not _whole(split_every, 2):
            raise ValueError(f"split_every is {split_every!r}; it must be 2 or more, or None")
        level = list(futures)
        width = split_every or max(2, len(level))
        while len(level) > width:
            places = range(0, len(level), width)
            level = [self._put_together(fn, level[i : i + width]) for i in places]
        return self._calling.submit(fn, (level,), {}, self._limits)

    def _put_together(self, function: Callable[[list[Any]], Any], nodes: list[Any]) -> Any:
        if len(nodes) == 1:
            return nodes[0]
        return self._calling.submit(function, (nodes,), {}, self._limits)

    def map_reduce(
        self,
        map_function: Callable[[Any], Any],
        iterable: Iterable[Any],
        reduce_function: Callable[[list[Any]], Any],
        *,
        split_every: int | None = SPLIT_EVERY,
    ) -> LambdaFuture:
        """Call a function on each element, and :meth:`reduce` the results."""
        futures = [self._calling.submit(map_function, (x,), {}, self._limits) for x in iterable]
        return self.reduce(reduce_function, futures, split_every=split_every)

    def iterate(
        self,
        step: Callable[[int, Any, Any], Any],
        iterations: int,
        args: Iterable[Any],
        *,
        history: bool = False,
    ) -> list[ChainFuture]:
        """Iterate on Lambda: x_{k+1} = ``step(k, x_k, arg)``, for each of some arguments.

        Each chain of steps goes on without waiting for the others, and its state from step to step
        stays in S3.  A step that raises ends its own chain only.

        Parameters
        ----------
        step : callable
            Called with k = 0, 1, ..., iterations - 1; x_0 is None.
        iterations : int
        args : iterable
            One chain for each; futures are possible.
        history : bool
            Keep the results of all steps (``ChainFuture.history``), not just of the last one.

        Returns
        -------
        list of ChainFuture
            Of the last state of each chain; their ``k`` tells how many steps are done.
        """
        if not _whole(iterations, 1):
            raise ValueError(f"iterations is {iterations!r}; it must be 1 or more")
        if not callable(step):
            raise TypeError(f"{step!r} is not callable")
        self._calling.session()  # or say that it was shut down
        scattered: dict[int, tuple[Any, LambdaFuture]] = {}
        chains = []
        for arg in args:
            argument = arg
            if not isinstance(arg, LambdaFuture) and sizeof(arg) >= MIN_SCATTER_BYTES:
                if id(arg) not in scattered:
                    scattered[id(arg)] = arg, self.scatter(arg)
                argument = scattered[id(arg)][1]
            chains.append(
                ChainFuture(
                    self._calling,
                    step,
                    iterations,
                    argument,
                    self._limits,
                    history=history,
                    ahead=AHEAD,
                )
            )
        for chain in chains:
            chain.begin()
        return chains

    # -- Dask ------------------------------------------------------------------------------------

    def get(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        """Compute keys of a graph, as :meth:`LambdaScheduler.get`: for Dask."""
        return self._for_graphs().get(dsk, keys, **self._with_retries(kwargs))

    def __call__(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        """Same as :meth:`get`: ``x.compute(scheduler=executor)``."""
        return self.get(dsk, keys, **kwargs)

    def persist(self, collections: Sequence[Any], **kwargs: Any) -> list[Any]:
        """Leave the blocks of collections in S3, as :meth:`LambdaScheduler.persist`."""
        return self._for_graphs().persist(collections, **self._with_retries(kwargs))

    def _for_graphs(self) -> LambdaScheduler:
        if self._calling.closed:
            raise RuntimeError("cannot compute after shutdown")
        return self._scheduler

    def _with_retries(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        retries = self._limits.retries
        return kwargs if retries is None else {"retries": retries, **kwargs}

    # -- the end ---------------------------------------------------------------------------------

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end when the last one has.

        Parameters
        ----------
        wait : bool
            Until then.
        cancel_futures : bool
            Give up the calls that were not sent yet.
        """
        delivery = self._calling.close(cancel=cancel_futures)
        if wait and delivery is not None:
            delivery.join()

    @property
    def report(self) -> RunReport:
        """What the calls have done so far; not what was computed with ``get``."""
        report = self._calling.report()
        if report is None:
            report = RunCounts().report(Counts(), 0.0, failed=False, prices=Prices())
        return report


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
