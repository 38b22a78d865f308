"""``lambda_get``, counting: what it does is left as it is, and the invocations are added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dask_lambda import LambdaScheduler


class CountingScheduler(LambdaScheduler):
    """A default scheduler, which is what ``lambda_get`` is a method of.

    Attributes
    ----------
    tasks
        how many invocations there have been
    """

    def __init__(self) -> None:
        super().__init__()
        self.tasks = 0

    def get(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        before = self.last_report
        try:
            return super().get(dsk, keys, **kwargs)
        finally:
            self._count(before)

    def persist(self, collections: Sequence[Any], **kwargs: Any) -> list[Any]:
        before = self.last_report
        try:
            return super().persist(collections, **kwargs)
        finally:
            self._count(before)

    def _count(self, before: Any) -> None:
        report = self.last_report
        if report is not None and report is not before:
            self.tasks += report.invocations
