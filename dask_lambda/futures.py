"""The futures of an executor, and the thread in which they complete.

May import: session, session_run, distant, report, errors, the ground.

A :class:`LambdaFuture` is a ``concurrent.futures.Future`` whose value stays where it is, in S3 or
as the small bytes that came with the reply, until somebody asks for it.  The engine's thread tells
what becomes of a call, and must not wait for anybody: it only puts the news into the inbox of a
:class:`Delivery`, whose thread completes the future and runs its callbacks.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures._base import CANCELLED, FINISHED, PENDING, RUNNING
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from dask_lambda.distant import Answer, DistantFuture, Source, answer_name
from dask_lambda.errors import DaskLambdaError, RemoteError
from dask_lambda.report import CallReport
from dask_lambda.run import Sealed
from dask_lambda.session import Session
from dask_lambda.session_run import Stored
from lambda_worker import calls, protocol

logger = logging.getLogger("dask_lambda")

#: In place of a value that is not at hand.
MISSING: Any = object()


class _Here(threading.local):
    """The delivery whose thread this is, if it is one's; what this thread is to do next."""

    delivery: Delivery | None = None
    acts: deque[Callable[[], None]] | None = None


_here = _Here()


class LambdaFuture(Future):
    """The result of one call on Lambda, which may not be there yet.

    It is a ``concurrent.futures.Future``, with the same methods and states: RUNNING from the moment
    at which the call is sent; :meth:`cancel` gives up what was not sent yet.

    The result stays in S3, or in the few bytes that came with the reply, until :meth:`result` is
    called, which loads it in the thread of the caller.  A large one is not kept in memory
    afterwards, but the same object is returned for as long as somebody holds it (where its type
    allows to know: arrays and tables do; lists, dicts and texts do not, and are loaded anew).
    The object in S3 is deleted when the last reference to the future is gone.

    Pickling it
    -----------
    A future may be pickled and loaded in another process
    (:class:`~dask_lambda.distant.DistantFuture`), and works there as long as this one is held.
    The pickle of a large or pending one is a capability: it holds the secret of the executor's run,
    so handle it as you handle a password.  It is not part of tasks: futures among the arguments of
    a call are known as what they are, and one that is hidden in an object travels as a
    reference if its call has ended, and is refused if not.

    Attributes
    ----------
    key : str
        Name of the call, unique in its executor.
    report : CallReport or None
        What the call did, once it succeeded: seconds, memory, cold start, dollars.
    """

    _known = True  # whether the engine has heard of the call

    def __init__(self, key: str, session: Session):
        super().__init__()
        self.key = key
        self.report: CallReport | None = None
        self._session = session
        self._stored = Stored(session, key)
        self._log = ""
        self._value: Any = MISSING  # or a weak reference to it
        self._is_weak = False
        self._eager = False  # load the value before telling that it is there
        self._notes: list[str] = []  # objects that tell readers elsewhere what becomes of it

    def __repr__(self) -> str:
        with self._condition:
            state, exception = self._state, self._exception
        text = state.lower().replace("_and_notified", "")
        if exception is not None:
            text = f"raised {type(exception).__name__}"
        elif state == FINISHED and self.report is not None:
            text = f"finished {self.report.kind}"
        return f"<{type(self).__name__} {self.key} {text}>"

    def __copy__(self) -> LambdaFuture:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> LambdaFuture:
        return self

    # -- for users -------------------------------------------------------------------------------

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the call to end; return its result, or raise its exception.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for the end of the call; not for the download of the result.

        Raises
        ------
        TimeoutError
            If the call does not end in that time.
        CancelledError
            If it was cancelled.
        The call's own exception, or an error of :mod:`dask_lambda.errors`.
        """
        self._wait_here(timeout)
        super().result(timeout)
        return self._load()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the call to end; return its exception, or None.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait.

        Raises
        ------
        TimeoutError
            If the call does not end in that time.
        CancelledError
            If it was cancelled.
        """
        self._wait_here(timeout)
        return super().exception(timeout)

    def _wait_here(self, timeout: float | None) -> None:
        """In a callback, where nobody else would complete the future: have that done."""
        if _here.delivery is not None and not self.done():
            _here.delivery.deliver(self, timeout)

    def cancel(self) -> bool:
        """Give up the call, and those that wait for its result, if it was not sent yet.

        Returns
        -------
        bool
            Whether it is cancelled: then it never runs.
        """
        if not super().cancel():
            return False
        with self._condition:
            if self._state == CANCELLED:  # else another thread was here
                self.set_running_or_notify_cancel()
        self._give_up()
        return True

    def add_done_callback(self, fn: Callable[[Future], Any]) -> None:
        """Have a function called with this future when it is done.

        It is called in the executor's delivery thread, or at once if the future is done.  It may
        use the result, make calls, and wait for the ``result()`` of theirs.  Otherwise futures
        complete when it has returned, so it must not wait for them in any other way.
        """
        # An event loop that copies the outcome must neither wait for a download, nor meet an error
        # for which it is not prepared.
        if getattr(fn, "__module__", "").partition(".")[0] == "asyncio":
            with self._condition:
                self._eager = True
            if self.done():
                self._settle()
        super().add_done_callback(fn)

    def logs(self) -> str:
        """Return the end (at most 4 kB) of the log of the call's last invocation.

        What the function prints is in it, and the same of other calls that shared its invocation.
        Empty as long as the call has not ended.
        """
        text = base64.b64decode(self._log or (self.report.log if self.report else ""))
        return text.decode("utf-8", "replace")

    # -- the value -------------------------------------------------------------------------------

    def _load(self) -> Any:
        value = self._cached()
        if value is not MISSING:
            if self._eager and not self._is_weak:  # it was held for this reader
                self._remember(value, strongly=self._session.at_hand(self._stored) is not None)
            return value
        sealed = self._session.at_hand(self._stored)
        small = sealed is not None
        if sealed is None:
            sealed = self._session.fetch(self._stored).result()
        return self._remember(sealed.load(), small)

    def _cached(self) -> Any:
        value = self._value
        if self._is_weak:
            found = value()
            return MISSING if found is None else found
        return value

    def _remember(self, value: Any, strongly: bool) -> Any:
        """Keep a value, or the one that another thread has loaded meanwhile; return it."""
        with self._condition:
            cached = self._cached()
            value = value if cached is MISSING else cached
            if strongly:
                self._value, self._is_weak = value, False
                return value
            try:
                self._value, self._is_weak = weakref.ref(value), True
            except TypeError:  # a list, a text: it is loaded anew
                self._value, self._is_weak = MISSING, False
            return value

    def _settle(self) -> None:
        """Load the value of a finished call; if that fails, the call has failed."""
        if self._exception is not None or self.cancelled():
            return
        try:
            value = self._load()
        except BaseException as error:  # noqa: BLE001  whatever unpickling raises
            with self._condition:
                self._exception = error
        else:
            with self._condition:
                self._value, self._is_weak = value, False

    def _get_snapshot(self) -> tuple[bool, bool, Any, BaseException | None]:
        """Return done, cancelled, result, exception: what asyncio asks for from Python 3.14 on."""
        if not self.done():
            return False, False, None, None
        if self.cancelled():
            return True, True, None, None
        self._settle()
        if self._exception is not None:
            return True, False, None, self._exception
        return True, False, self._load(), None

    def _invoke_callbacks(self) -> None:
        super()._invoke_callbacks()  # type: ignore[misc]
        self._done_callbacks: list[Any] = []  # which may hold what they have read

    # -- what the engine tells -------------------------------------------------------------------

    def _start(self) -> bool:
        """Take note that the call is about to be sent; False if it was cancelled."""
        with self._condition:
            if self._state == PENDING:
                self._state = RUNNING
            return self._state == RUNNING

    def _succeed(self, report: CallReport) -> None:
        self.report = report
        self._complete(None)

    def _fail(self, exception: BaseException, log: str) -> None:
        self._log = log
        if isinstance(exception, CancelledError) and super().cancel():
            with self._condition:
                if self._state == CANCELLED:
                    self.set_running_or_notify_cancel()
            return
        self._complete(exception)

    def _complete(self, exception: BaseException | None) -> None:
        with suppress(InvalidStateError):  # it was cancelled at this very moment
            if exception is None:
                self.set_result(None)
            else:
                self.set_exception(exception)

    def _give_up(self) -> None:
        self._session.cancel([self.key])

    # -- for other processes ---------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        if protocol.is_sealing():
            return self._inside_a_task()
        session = self._session
        with self._condition:
            pending = self._state in (PENDING, RUNNING)
            name = ""
            if pending:
                name = session.new_note()
                self._notes.append(name)
        answer = None
        if pending:
            session.write_note(name, None).result()
        else:
            answer = self._answer()
            if answer.stored is None:
                return DistantFuture, (self.key, answer)
        source = Source(session.place, session.backend_keys, session.secret, name)
        return DistantFuture, (self.key, answer, source)

    def _inside_a_task(self) -> tuple[Any, ...]:
        """Describe the future for a worker: without a secret, and only if it has ended."""
        if not protocol.is_collecting():
            raise TypeError(
                f"the future {self.key} cannot be stored inside other data: give it to calls as an "
                "argument of its own, or in a list, tuple, set, dict or dataclass"
            )
        with self._condition:
            if self._state != FINISHED:
                raise TypeError(
                    f"the future {self.key} is hidden in an argument, and its call has not ended: "
                    "the call would not know that it has to wait. Give the future as an argument "
                    "of its own, or in a list, tuple, set, dict or dataclass; or wait for it first"
                )
        if self._exception is not None:
            return calls.Finished, (self.key, None, self._exception)
        if self._session.at_hand(self._stored) is not None:
            return calls.Finished, (self.key, self._load())
        value = self._stored.value
        assert value is not None
        return calls.Finished, (self.key, protocol.Reference(value.name, value.size))

    def _answer(self) -> Answer:
        """Describe the outcome for another process."""
        if self.cancelled():
            return Answer(exception=CancelledError())
        if self._exception is not None:
            return Answer(exception=self._exception, log=self._log)
        if self._session.at_hand(self._stored) is not None:
            return Answer(value=(self._load(),), report=self.report)
        value = self._stored.value
        assert value is not None
        return Answer(stored=(value.name, value.size), report=self.report)

    def __del__(self) -> None:
        if notes := getattr(self, "_notes", None):
            self._session.erase_notes(notes)


class LateFuture(LambdaFuture):
    """The result of a call of which the engine hears later: it waits for another one of these."""

    _known = False

    def __init__(self, key: str, session: Session):
        super().__init__(key, session)
        self._late_lock = threading.RLock()
        self._waiting: list[Callable[[], None]] = []  # until the engine knows the call

    def _when_known(self, act: Callable[[], None]) -> None:
        """Have something done when the engine has heard of the call; in any thread."""
        with self._late_lock:
            if not self._known:
                self._waiting.append(act)
                return
        act()

    def _became_known(self) -> None:
        """Do what waited for that."""
        with self._late_lock:
            self._known = True
            waiting, self._waiting = self._waiting, []
        _do(waiting)
        if self.cancelled():  # before there was anything to give up
            self._give_up()


def _do(acts: Iterable[Callable[[], None]]) -> None:
    """Do one thing after the other, and what comes of that: not nested, however much it is."""
    if _here.acts is not None:
        _here.acts.extend(acts)
        return
    _here.acts = deque(acts)
    try:
        while _here.acts:
            _here.acts.popleft()()
    finally:
        _here.acts = None


class Heard:
    """Hears of one call in the engine's thread, and hands it on: a :class:`session_run.Call`."""

    __slots__ = ("_delivery", "_future")

    def __init__(self, future: LambdaFuture, delivery: Delivery):
        self._future = future
        self._delivery = delivery

    def started(self) -> bool:
        """Take note that the call is sent; False if nobody wants it any more."""
        return self._future._start()

    def finished(self, report: CallReport) -> None:
        """Hand on that the result is there."""
        self._delivery.inbox.put((self._future, report, ""))

    def failed(self, exception: BaseException, log: str) -> None:
        """Hand on that there will be no result."""
        self._delivery.inbox.put((self._future, exception, log))


class Delivery:
    """The thread in which the futures of one executor complete.

    Parameters
    ----------
    ended : callable
        Called in the thread when it ends.

    Attributes
    ----------
    inbox : SimpleQueue
        What was heard: a future, its report or exception or the download of its value, and the end
        of its log in base64.
    pending : set of LambdaFuture
        Whose end was not delivered yet.
    """

    def __init__(self, ended: Callable[[], None]):
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.pending: set[LambdaFuture] = set()
        self._ended = ended
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="dask-lambda-futures", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread when nothing is pending any more."""
        self._closing = True
        self.inbox.put(None)

    def join(self) -> None:
        """Wait for the end of the thread, unless this is it."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def deliver(self, future: LambdaFuture, timeout: float | None) -> None:
        """Go on until a future is done, or for so many seconds; in the thread, in a callback."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not future.done() and future in self.pending:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            with suppress(Empty):
                self._next(left)

    def _next(self, timeout: float | None = None) -> None:
        """Wait for news, and take them.

        Raises
        ------
        queue.Empty
            If there are none for so many seconds.
        """
        news = self.inbox.get(timeout=timeout)
        if news is None:
            return
        try:
            self._take(news)
        except Exception as error:  # a bug of ours must end the future, not hang who waits for it
            future = news[0]
            logger.exception("completing %s failed", future.key)
            if not future.done():
                future._fail(error, "")

    def _work(self) -> None:
        _here.delivery = self
        while True:
            self._next()
            if self._closing and not self.pending and self.inbox.empty():
                break
        self._ended()

    def _take(self, news: Any) -> None:
        future, outcome, log = news
        if isinstance(outcome, Future):  # its value was fetched
            future._value, outcome = _opened(outcome, future)
        elif isinstance(outcome, CallReport) and future._eager:
            self._fetch(future, outcome)
            return
        try:
            if isinstance(outcome, CallReport):
                future._succeed(outcome)
            else:
                future._fail(outcome, log)
            self.announce(future)
        finally:
            self.pending.discard(future)

    def _fetch(self, future: LambdaFuture, report: CallReport) -> None:
        """Begin to fetch the value of a future whose reader must not wait."""
        future.report = report
        try:
            fetched = future._session.fetch(future._stored)
        except Exception as error:  # noqa: BLE001  told by the future
            fetched = Future()
            fetched.set_exception(error)
        fetched.add_done_callback(lambda done: self.inbox.put((future, done, "")))

    def announce(self, future: LambdaFuture) -> None:
        """Write for readers elsewhere what became of a future that was pickled before its end."""
        session, answer = future._session, None
        for name in tuple(future._notes):
            answer = answer or future._answer()
            future._notes.append(answer_name(name))
            try:
                begun = session.write_note(answer_name(name), answer)
            except DaskLambdaError:  # the session is closed, and with it the notes are gone
                return
            except Exception as error:  # noqa: BLE001  an exception that cannot be pickled
                text = f"{type(answer.exception).__name__}: {answer.exception} ({error})"
                answer = Answer(exception=RemoteError(text), log=answer.log)
                begun = session.write_note(answer_name(name), answer)
            begun.add_done_callback(partial(_written, future))


def _written(future: LambdaFuture, done: Future[None]) -> None:
    """Say that an answer could not be written; until then the future, and the notes, are held."""
    if not done.cancelled() and (error := done.exception()) and not future._session.closed:
        logger.warning("other processes will not hear of the end of %s: %s", future.key, error)


def _opened(fetched: Future[Sealed], future: LambdaFuture) -> tuple[Any, Any]:
    """Return the value of a download and the report, or the error in its place."""
    try:
        return fetched.result().load(), future.report
    except BaseException as error:  # noqa: BLE001  told by the future
        return MISSING, error
