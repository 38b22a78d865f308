"""SIGTERM ends a program as Ctrl-C does: what it has in the bucket is deleted.

May import: the standard library.

By default SIGTERM ends a process at once, without ``finally`` and ``atexit``.  While an engine is
open it becomes ``SystemExit(143)`` instead, which a shell shows for a process that SIGTERM has
ended (128 + 15).  Only the main thread may set handlers, and a program's own handler is left alone.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

#: 128 and the signal's number.
EXIT_CODE = 128 + signal.SIGTERM

_lock = threading.Lock()
_users = 0
_installed = False
_owner = 0  # the process that installed it


def hold() -> None:
    """Have SIGTERM end the program in order, until :func:`release` is called as often."""
    global _users, _installed, _owner
    with _lock:
        _users += 1
        if _installed or threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit)
            _installed, _owner = True, os.getpid()


def release() -> None:
    """Undo one :func:`hold`; the last one puts the default handler back."""
    global _users, _installed
    with _lock:
        _users -= 1
        if _users or not _installed:
            return
        if threading.current_thread() is not threading.main_thread():
            return  # it stays, and does no harm: the next hold() finds it
        _installed = False
        if signal.getsignal(signal.SIGTERM) is _exit:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # who does not want to wait sends another one
    if os.getpid() != _owner:  # a forked child, which has nothing to delete
        os.kill(os.getpid(), signal.SIGTERM)
    raise SystemExit(EXIT_CODE)
