"""Whether the run that an invocation works for still goes on.  May import: errors.

A run has a *lease*: a small object that the client writes when the first invocation has taken
long, and deletes when the run ends, in whatever way.  Nobody can stop an invocation from outside.
So one that takes long looks for the lease now and then; when it is gone, the run is, and the
worker stops before the next task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lambda_worker.errors import StoreError

#: When an invocation looks for the lease first, and how often then, in seconds.  A look is a HEAD,
#: and costs about as much as 12 ms of a function with one vCPU.
AFTER, EVERY = 2.0, 2.0
#: A lease that was not there at so many looks, from the first on, was deleted before: the client
#: writes it when the invocation has taken one second.
LOOKS = 3


class LeaseWatch:
    """Looks for the lease of a run in the background.  To be closed.

    Parameters
    ----------
    exists : callable
        Whether the lease is there; called in another thread.
    said : bool
        Whether the client said that it has written the lease: then it is gone if it is not there
        at the first look.  Otherwise the client may be late.

    Attributes
    ----------
    gone : bool
        Whether the run has ended.
    """

    def __init__(self, exists: Callable[[], bool], said: bool):
        self.gone = False
        self._exists = exists
        self._looks = 1 if said else LOOKS  # at which it is not there until it is gone
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="lease", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def _look(self) -> None:
        wait = AFTER
        while not self._closed.wait(wait):
            wait = EVERY
            try:
                there = self._exists()
            except StoreError:  # then nobody knows
                continue
            if there:
                self._looks = 1
                continue
            self._looks -= 1
            if not self._looks:
                self.gone = True
                return
