"""How long the tasks of a group may take.  May import: the standard library.

The function's own time-out ends the environment.  A call's own limit only interrupts the call, with
the signal of an interval timer: Python code stops at once, a long call of native code when it
returns.
"""

from __future__ import annotations

import signal
import threading
from typing import Any


class OutOfTime(BaseException):
    """The tasks of a group took longer than they may: not to be caught by ``except Exception``."""


class TimeLimit:
    """A context that raises :class:`OutOfTime` in its body if that takes too long.

    Signals reach the main thread only, in which Lambda runs handlers; in any other thread nothing
    is interrupted.

    Parameters
    ----------
    seconds : float, optional
        Without it there is no limit.

    Attributes
    ----------
    exceeded : bool
    """

    def __init__(self, seconds: float | None):
        self.exceeded = False
        self._seconds = seconds
        if threading.current_thread() is not threading.main_thread():
            self._seconds = None

    def __enter__(self) -> TimeLimit:
        if self._seconds is not None:
            self._before = signal.signal(signal.SIGALRM, self._interrupt)
            signal.setitimer(signal.ITIMER_REAL, self._seconds)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def _interrupt(self, number: int, frame: Any) -> None:
        self.exceeded = True
        raise OutOfTime(self._seconds)
