"""One asyncio loop in one background thread, and the ways into it.

May import: errors.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any

from dask_lambda import errors

#: What callers hear for whom it is too late.
CLOSED = "the scheduler was closed"

_process: int | None = None  # the one in which obstore's threads are


def claim_process() -> None:
    """Note that this process uses obstore.

    Raises
    ------
    DaskLambdaError
        If it was forked from one that did: obstore's threads are not there, and would be waited
        for without end.
    """
    global _process
    if _process not in (None, os.getpid()):
        raise errors.DaskLambdaError(
            "this process was forked from one that had computed on Lambda already, which S3's "
            "client does not survive: fork before the first computation, or start processes with "
            "multiprocessing's method 'spawn' or 'forkserver'"
        )
    _process = os.getpid()


class LoopThread:
    """The loop and the thread of an engine, which begins at once.

    It works in scripts, in notebooks (where a loop is running already) and inside other schedulers.

    Attributes
    ----------
    pid : int
        The process in which it lives.
    closed : bool
        Nothing can be asked of it any more.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.closed = False
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="dask-lambda", daemon=True)
        self._thread.start()

    # -- called from any thread ------------------------------------------------------------------

    def post(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have a function called in the engine's thread, soon.

        Raises
        ------
        InvocationError
            If the engine is closed.
        """
        with self._lock:  # close() ends every run that was started before it
            if self.closed:
                raise errors.InvocationError(CLOSED)
            self._loop.call_soon_threadsafe(self._safely, function, *arguments)

    def wake(self, function: Callable[[], None]) -> None:
        """Have a function called in the engine's thread, if that goes on: takes no lock."""
        if not self.closed and self.pid == os.getpid():
            with suppress(RuntimeError):  # the loop may be closing at this moment
                self._loop.call_soon_threadsafe(self._safely, function)

    def begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Begin to do something in the engine's thread.

        Raises
        ------
        InvocationError
            If the engine is closed.
        """
        with self._lock:
            if self.closed:
                work.close()
                raise errors.InvocationError(CLOSED)
            return self._call(work)

    def ask(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Have something done in the engine's thread, and wait for it.

        Raises
        ------
        InvocationError
            If the engine is closed, before or meanwhile.
        """
        try:
            return self.begin(work).result()
        except CancelledError:
            raise errors.InvocationError(CLOSED) from None

    def _call(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop(self) -> None:
        """End the thread; whatever is still going on is cancelled."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    # -- in its thread ---------------------------------------------------------------------------

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)  # for which callers may be waiting
            for task in left:
                task.cancel()
            if left:
                self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _safely(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function of ours from the loop, which would only log what it raises."""
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001  told to all callers
            self._panic(error)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._panic(error)

    def _panic(self, error: BaseException) -> None:
        """Do what has to be done after an error that nobody expected."""
        raise NotImplementedError
