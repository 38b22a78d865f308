"""Outputs are uploaded behind the computation.  May import: nothing of ours.

While the next task runs, threads sign and upload what earlier tasks have made.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Uploads(Generic[T]):
    """Runs uploads in the background, within a budget of bytes.

    Parameters
    ----------
    pool : Executor
    limit : int
        Bytes on their way.  A larger upload runs alone.
    """

    def __init__(self, pool: Executor, limit: int):
        self.held = 0
        self._pool = pool
        self._limit = limit
        self._flying: set[Future[T]] = set()
        self._room = threading.Condition()

    def make_room(self, size: int) -> None:
        """Wait until so many bytes may be on their way as well."""
        with self._room:
            self._room.wait_for(lambda: not self.held or self.held + size <= self._limit)

    def start(self, size: int, upload: Callable[[], T]) -> Future[T]:
        """Upload so many bytes in the background; there should be room for them."""
        with self._room:
            self.held += size
            future = self._pool.submit(upload)
            self._flying.add(future)

        def ended(future: Future[T]) -> None:
            with self._room:
                self.held -= size
                self._flying.discard(future)
                self._room.notify_all()

        future.add_done_callback(ended)
        return future

    def close(self) -> None:
        """Wait until all has ended, however it ended."""
        with self._room:
            flying = list(self._flying)
        wait(flying)
