"""Calls of a session that can be waited for: what the tests of sessions share."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dask._task_spec import Task, TaskRef

from dask_lambda.report import CallReport
from dask_lambda.session import Session
from dask_lambda.session_run import Stored


class Heard:
    """A call that can be waited for."""

    def __init__(self) -> None:
        self.starts = 0
        self.log = ""
        self.end: Future[CallReport] = Future()

    def started(self) -> None:
        self.starts += 1

    def finished(self, report: CallReport) -> None:
        self.end.set_result(report)

    def failed(self, exception: BaseException, log: str) -> None:
        self.log = log
        self.end.set_exception(exception)


class Calls:
    """Calls functions in a session."""

    def __init__(self, session: Session):
        self.session = session
        self.count = 0

    def __call__(
        self, function: Callable[..., Any], *arguments: Any, **options: Any
    ) -> tuple[Stored, Heard]:
        """Call a function; a :class:`Stored` among its arguments is replaced by its value."""
        self.count += 1
        inputs = [each.key for each in arguments if isinstance(each, Stored)]
        arguments = tuple(TaskRef(a.key) if isinstance(a, Stored) else a for a in arguments)
        heard = Heard()
        task = Task(f"{function.__name__}-{self.count}", function, *arguments)
        return self.session.submit(task, heard, inputs=inputs, **options), heard


def value(result: tuple[Stored, Heard]) -> Any:
    stored, heard = result
    heard.end.result(60)
    return stored.load()
