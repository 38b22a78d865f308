"""What several test modules use."""

from __future__ import annotations

import time
from collections.abc import Callable

from dask_lambda import RunReport, last_report


def report() -> RunReport:
    """The report of the last run, which there was."""
    found = last_report()
    assert found is not None
    return found


def notes(error: BaseException) -> str:
    """The notes of an exception, which hold the remote traceback."""
    return "\n".join(getattr(error, "__notes__", []))


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether a condition becomes true within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
