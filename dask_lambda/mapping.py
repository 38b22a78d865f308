"""The results of ``map``: calls that are made while their results are read.

May import: calling, futures, the ground.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from dask_lambda.futures import LambdaFuture

logger = logging.getLogger("dask_lambda")

#: Calls that are made ahead of the results that are read: for a window of 1,000 and functions that
#: travel in batches of four.
LOOK_AHEAD = 4096
#: And bytes that their arguments take in this process, as far as they say so (``nbytes``).
LOOK_AHEAD_BYTES = 2**30
#: They are made in blocks of this part of all, since many at once cost less than one by one.
BLOCKS = 4


class Results(Iterator[Any]):
    """Results in the order of the calls.

    Parameters
    ----------
    submit : callable
        Makes the call with some arguments.
    arguments : iterator
        Of the calls.
    chunked : bool
        Whether each call has a list of results.
    look_ahead : int
    timeout : float, optional
        Seconds from now on, for all results.
    """

    def __init__(
        self,
        submit: Callable[[Any], LambdaFuture],
        arguments: Iterator[Any],
        *,
        chunked: bool,
        look_ahead: int,
        timeout: float | None,
    ):
        self._submit = submit
        self._arguments: Iterator[Any] | None = arguments
        self._chunked = chunked
        self._look_ahead = look_ahead
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._futures: deque[tuple[LambdaFuture, int]] = deque()
        self._nbytes = 0
        self._chunk: deque[Any] = deque()
        self._begun = False
        with ExitStack() as stack:
            stack.callback(self.close)  # if anything goes wrong, Ctrl-C included
            self._fill()
            stack.pop_all()

    def __iter__(self) -> Results:
        return self

    def __next__(self) -> Any:
        self._begun = True
        if self._chunk:
            return self._chunk.popleft()
        try:
            if len(self._futures) <= self._look_ahead - max(1, self._look_ahead // BLOCKS):
                self._fill()
            while self._futures:
                future, nbytes = self._futures[0]  # among those to give up, until it is read
                value = self._result(future)
                self._futures.popleft()
                self._nbytes -= nbytes
                if not self._chunked:
                    return value
                self._chunk.extend(value)
                if self._chunk:
                    return self._chunk.popleft()
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Give up all calls that were not sent yet; there are no more results."""
        self._arguments = None
        self._chunk.clear()
        while self._futures:
            self._futures.pop()[0].cancel()

    def __del__(self) -> None:
        if getattr(self, "_begun", False):
            self.close()
        elif getattr(self, "_arguments", None) is not None and self._is_there_more():
            logger.warning(
                "nobody has read a result of map(): the first %d calls are made, and no more; "
                "use list(executor.map(...)), or submit()",
                len(self._futures),
            )

    def _is_there_more(self) -> bool:
        arguments, self._arguments = self._arguments, None
        try:
            return arguments is not None and next(arguments, None) is not None
        except Exception:  # noqa: BLE001  which nobody will meet
            return False

    def _result(self, future: LambdaFuture) -> Any:
        left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        try:
            return future.result(left)
        except StopIteration as error:  # which would be taken for the end of the results
            raise RuntimeError(f"{future.key} raised StopIteration") from error

    def _fill(self) -> None:
        """Make calls, as many as may be ahead."""
        while self._arguments is not None and (
            not self._futures
            or (len(self._futures) < self._look_ahead and self._nbytes < LOOK_AHEAD_BYTES)
        ):
            try:
                arguments = next(self._arguments)
            except StopIteration:
                self._arguments = None
                return
            nbytes = _nbytes(arguments)
            self._futures.append((self._submit(arguments), nbytes))
            self._nbytes += nbytes


def _nbytes(arguments: Any) -> int:
    total = 0
    for each in arguments:
        nbytes = getattr(each, "nbytes", 0)
        total += nbytes if isinstance(nbytes, int) else 0
    return total
