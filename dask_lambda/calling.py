"""What an executor and all its views share: one session, one delivery thread, names for calls.

May import: arguments, futures, scheduler, session, loop_thread, plan, report, config, errors, the
ground.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, get_args

from dask._task_spec import Task
from dask.utils import parse_bytes

from dask_lambda.arguments import parse
from dask_lambda.config import MAX_TIMEOUT
from dask_lambda.errors import ConfigurationError
from dask_lambda.futures import Delivery, Heard, LambdaFuture, LateFuture
from dask_lambda.loop_thread import claim_process
from dask_lambda.plan import Where
from dask_lambda.report import RunReport
from dask_lambda.scheduler import LambdaScheduler, note_report
from dask_lambda.session import Session

#: Less than this is taken for megabytes by whoever wrote it.
MIN_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be said of a call; each is an option of ``submit`` and ``options``.

    Attributes
    ----------
    retries : int, optional
        Default: the setting.
    memory : int
        Bytes that it needs; 0 if nothing is said.
    timeout : float, optional
        Seconds after which it is interrupted.
    where : {"lambda", "local"}, optional
    """

    retries: int | None = None
    memory: int = 0
    timeout: float | None = None
    where: Where | None = None

    def given(self, **said: Any) -> Limits:
        """Return these limits with others in place of some; None leaves one as it is.

        Raises
        ------
        TypeError
            For a name that means nothing.
        ConfigurationError
            For a value that makes no sense.
        """
        names = {field.name for field in fields(self)}
        if unknown := said.keys() - names:
            options = ", ".join(sorted(names))
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}; options are {options}")
        values = {name: getattr(self, name) for name in names}
        for name, value in said.items():
            if value is not None:
                values[name] = _CHECKS[name](value)
        return Limits(**values)


def _retries(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError(f"retries is {value!r}; it must be 0 or more")
    return value


def _memory(value: Any) -> int:
    nbytes = -1
    if not isinstance(value, bool):
        with suppress(ValueError, TypeError, AttributeError):
            nbytes = int(parse_bytes(value))
    if nbytes < MIN_BYTES:
        raise ConfigurationError(
            f"memory is {value!r}; it must be a size like '2 GB', or a number of bytes (a million "
            "or more)"
        )
    return nbytes


def _timeout(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(f"timeout is {value!r}; it must be a number of seconds above 0")
    return float(value)


def _where(value: Any) -> Any:
    if value not in get_args(Where):
        raise ConfigurationError(f"where is {value!r}; it must be 'lambda' or 'local'")
    return value


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "where": _where,
    "retries": _retries,
    "memory": _memory,
    "timeout": _timeout,
}


class Calling:
    """Makes calls, for the views of one executor.

    Parameters
    ----------
    scheduler : LambdaScheduler
        Whose engine runs them.
    """

    def __init__(self, scheduler: LambdaScheduler):
        self.scheduler = scheduler
        self.closed = False
        self._session: Session | None = None
        self._delivery: Delivery | None = None
        self._lock = threading.RLock()  # a finalizer may interrupt who holds it
        self._numbers = itertools.count(1)

    # -- calls -----------------------------------------------------------------------------------

    def session(self) -> Session:
        """Return the session, which begins with the first call.

        Raises
        ------
        RuntimeError
            If the executor was shut down.
        DaskLambdaError
            If the backend cannot be reached, or this is a forked process.
        """
        with self._lock:
            if self.closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if self._session is None:
                self._session = self.scheduler.session(str)
                self._delivery = Delivery(self._all_told)
            elif self._session.engine.pid != os.getpid():
                claim_process()
            return self._session

    def new_key(self, name: str) -> str:
        """Return a key for a call of a function."""
        return f"{name}-{next(self._numbers)}"

    def submit(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        named: Mapping[str, Any],
        limits: Limits,
        name: str = "",
    ) -> LambdaFuture:
        """Begin a call."""
        if not callable(function):
            raise TypeError(f"{function!r} is not callable")
        session = self._session if self._is_open() else None
        if session is None:
            session = self.session()
        if limits.memory or limits.timeout or limits.where:
            check(name or name_of(function), limits, session)
        found: dict[str, LambdaFuture] = {}
        arguments = [parse(each, session, found) for each in arguments]
        if named:
            named = {word: parse(each, session, found) for word, each in named.items()}
        name = name or name_of(function)
        key = self.new_key(name)
        task = Task(key, function, *arguments, **named)
        unknown = [each for each in found.values() if not each._known]
        if unknown:
            late = LateFuture(key, session)

            def send() -> None:
                self.send(late, task, found, limits, name)
                late._became_known()

            self.expect(late)
            Deferred(unknown, send)
            return late
        future = LambdaFuture(key, session)
        self.expect(future)
        self.send(future, task, found, limits, name)
        return future

    def put(self, value: Any) -> LambdaFuture:
        """Store a value; return a future that is done."""
        session = self.session()
        future = LambdaFuture(self.new_key("scatter"), session)
        session.put(future.key, value, future._stored).result()
        future.set_result(None)
        return future

    def _is_open(self) -> bool:
        session = self._session
        return session is not None and not self.closed and session.engine.pid == os.getpid()

    def expect(self, future: LambdaFuture) -> None:
        """Take note of a future before its call is sent.

        Raises
        ------
        RuntimeError
            If the executor was shut down.
        """
        with self._lock:
            if self.closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            assert self._delivery is not None
            self._delivery.pending.add(future)

    def expect_more(self, future: LambdaFuture) -> None:
        """Take note of a future that belongs to one that is expected, also during the shutdown."""
        assert self._delivery is not None
        self._delivery.pending.add(future)

    def send(
        self,
        future: LambdaFuture,
        task: Task,
        inputs: Mapping[str, LambdaFuture],
        limits: Limits,
        name: str,
    ) -> None:
        """Hand a call to the session, also when the executor is being shut down.

        If the session has ended, the future tells it.
        """
        session, delivery = self._session, self._delivery
        assert session is not None
        assert delivery is not None
        retries = limits.retries
        heard = Heard(future, delivery)
        try:
            session.submit(
                task,
                heard,
                inputs=inputs,
                kind=name,
                retries=session.settings.retries if retries is None else retries,
                memory=limits.memory,
                timeout=limits.timeout,
                where=limits.where,
                stored=future._stored,
            )
        except Exception as error:  # noqa: BLE001  whatever has ended the session
            heard.failed(error, "")

    # -- the end ---------------------------------------------------------------------------------

    def close(self, *, cancel: bool = False) -> Delivery | None:
        """Take no more calls; return the delivery, which ends after the last one that there is."""
        with self._lock:
            self.closed = True
            delivery = self._delivery
            waiting = list(delivery.pending) if delivery is not None and cancel else ()
        for future in waiting:
            future.cancel()
        if delivery is not None:
            delivery.close()
        else:
            self.scheduler.close()
        return delivery

    def let_go(self) -> None:
        """Close when nobody holds the executor any more; in any thread, perhaps the engine's."""
        if self._delivery is not None:
            self.close()
        else:
            self.closed = True
            self._close_later()

    def abandon(self) -> None:
        """Give up all calls, and delete all results."""
        self.close()
        if self._session is not None:
            self._session.close()

    def report(self) -> RunReport | None:
        """Return what was done so far."""
        return None if self._session is None else self._session.report()

    def _all_told(self) -> None:
        """Close the session when nobody holds results that are in S3; in the delivery thread."""
        session = self._session
        assert session is not None
        note_report(session.report())
        if session.is_unused():
            self._close_scheduler()
        else:
            session.when_unused(self._close_later)

    def _close_later(self) -> None:
        threading.Thread(
            target=self._close_scheduler, name="dask-lambda-close", daemon=True
        ).start()

    def _close_scheduler(self) -> None:
        if self._session is not None:
            self._session.close()
        self.scheduler.close()


class Deferred:
    """Does something when the engine knows all of some futures."""

    def __init__(self, futures: Sequence[Any], act: Callable[[], None]):
        self._lock = threading.Lock()
        self._left = len(futures)
        self._act = act
        for each in futures:
            each._when_known(self._one_more)

    def _one_more(self) -> None:
        with self._lock:
            self._left -= 1
            ready = not self._left
        if ready:
            self._act()


def check(name: str, limits: Limits, session: Session) -> None:
    """Refuse what no function, and nothing else that there is, offers.

    Raises
    ------
    OutOfMemoryError, FunctionTimeoutError, ConfigurationError
    """
    timeout, offered = limits.timeout, session.settings.timeout
    if timeout is not None and offered < timeout <= MAX_TIMEOUT and limits.where != "local":
        raise ConfigurationError(
            f"timeout={timeout:g} is more than the function's {offered} seconds "
            f"(dask-lambda.timeout; Lambda allows {MAX_TIMEOUT}); nothing was sent"
        )
    failure = session.refusal(name, limits.where, limits.memory, timeout)
    if failure is not None:
        raise failure


def name_of(function: Any) -> str:
    """Return how users know a function."""
    while not (name := getattr(function, "__name__", "")) and hasattr(function, "func"):
        function = function.func  # of a partial
    return name or type(function).__name__
