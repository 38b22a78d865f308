"""Inputs are fetched ahead of need, in the order of need.  May import: nothing of ours.

While the main thread computes, a pool of threads fetches what the next tasks will read, within a
budget of bytes.  An input counts from the start of its download until it is taken.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future, wait
from functools import partial
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")


class Slot(Generic[T]):
    """One input that will be needed once.

    Parameters
    ----------
    size : int
        Bytes that it takes, fetched.
    fetch : callable
    """

    __slots__ = ("fetch", "future", "size", "waiting")

    def __init__(self, size: int, fetch: Callable[[], T]):
        self.size = size
        self.fetch = fetch
        self.waiting = True
        self.future: Future[T] | None = None  # set when its turn has come


class Prefetcher(Generic[T]):
    """Fetches slots in their order, as far ahead as the budget allows.

    Parameters
    ----------
    pool : Executor
    limit : int
        Bytes on their way or waiting to be taken.  A larger input is fetched when it is alone.
    """

    def __init__(self, pool: Executor, limit: int):
        self.held = 0
        self._pool = pool
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: deque[Slot[T]] = deque()
        self._flying: set[Future[T]] = set()  # started and not taken

    def add(self, slots: Iterable[Slot[T]]) -> None:
        """Fetch these slots too, in the order in which they are likely to be taken."""
        with self._lock:
            self._waiting.extend(slots)
            self._fill()

    def put_first(self, slots: Sequence[Slot[T]]) -> None:
        """Fetch these slots, as far as they wait, before all others, in this order."""
        with self._lock:
            first = [slot for slot in slots if slot.waiting]
            if first != list(islice(self._waiting, len(first))):
                moved = set(first)
                others = (slot for slot in self._waiting if slot not in moved)
                self._waiting = deque([*first, *others])

    def take(self, slot: Slot[T]) -> T:
        """Return what a slot holds; fetch it in this thread if nobody has begun to."""
        with self._lock:
            future, slot.future = slot.future, None
            if slot.waiting:
                self._waiting.remove(slot)
                slot.waiting = False
        if future is None:
            return slot.fetch()
        try:
            return slot.fetch() if future.cancel() else future.result()
        finally:
            self._give_back(slot, future)

    def drop(self, slots: Iterable[Slot[T]]) -> None:
        """Do not fetch these slots, as far as they were not taken; forget what was fetched."""
        dropped = set(slots)
        with self._lock:
            if any(slot.waiting for slot in dropped):
                self._waiting = deque(slot for slot in self._waiting if slot not in dropped)
            started = [(slot, slot.future) for slot in dropped if slot.future is not None]
            for slot in dropped:
                slot.waiting, slot.future = False, None
        for slot, future in started:
            assert future is not None
            future.cancel()
            future.add_done_callback(partial(self._give_back, slot))

    def close(self) -> None:
        """Start nothing more, and wait until what was started has ended."""
        with self._lock:
            self._waiting.clear()
            flying = list(self._flying)
        for future in flying:
            future.cancel()
        wait(flying)

    def _give_back(self, slot: Slot[T], future: Future[T]) -> None:
        with self._lock:
            self._flying.discard(future)
            self.held -= slot.size
            self._fill()

    def _fill(self) -> None:
        while self._waiting:
            slot = self._waiting[0]
            if self.held and self.held + slot.size > self._limit:
                return
            self._waiting.popleft()
            slot.waiting = False
            self.held += slot.size
            slot.future = self._pool.submit(slot.fetch)
            self._flying.add(slot.future)
