"""Whether the run that an invocation works for still goes on.  May import: errors.

A run has a *lease*: a small object that the client writes when the first invocation has taken
long, and deletes when the run ends, in whatever way.  Nobody can stop an invocation from outside.
So one that takes long looks for the lease between its tasks; when it is gone, the run is, and the
worker stops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future

from lambda_worker.errors import StoreError

#: When an invocation looks for the lease first, and how often then at the most, in seconds.  A look
#: is a HEAD: some 27 ms, and the price of 12 ms of a function with one vCPU.
AFTER, EVERY = 2.0, 2.0
#: A lease that is not there when one looks after so many seconds was there before: the client
#: writes it when the invocation has taken one second.
LATE = 6.0
#: How long the next task waits for an answer; if it comes later, it counts before the task after.
WAIT = 0.2


class LeaseWatch:
    """Looks for the lease of a run.

    Parameters
    ----------
    exists : callable
        Whether the lease is there; called in another thread.
    said : bool
        Whether the client said that it has written the lease.  Otherwise it may be late.
    pool : Executor
    """

    def __init__(self, exists: Callable[[], bool], said: bool, pool: Executor):
        self._exists = exists
        self._expected = said
        self._pool = pool
        self._started = time.monotonic()
        self._next = self._started + AFTER
        self._look: Future[bool] | None = None
        self._late = False  # whether the lease had to be there when that began
        self._gone = False

    def gone(self) -> bool:
        """Return whether the run has ended; to be asked before each task."""
        wait = 0.0
        now = time.monotonic()
        if self._look is None and not self._gone and now >= self._next:
            self._late = now - self._started >= LATE
            self._look = self._pool.submit(self._exists)
            wait = WAIT
        if self._look is not None:
            try:
                self._answered(self._look.result(wait))
            except TimeoutError:
                return False
            except StoreError:  # then nobody knows
                pass
            self._look = None
            self._next = time.monotonic() + EVERY
        return self._gone

    def _answered(self, there: bool) -> None:
        self._gone = not there and (self._expected or self._late)
        self._expected = self._expected or there
