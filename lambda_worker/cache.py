"""Downloaded inputs of one execution environment.  May import: nothing.

An environment serves one invocation after another, and tasks that follow each other often
read the same blocks.  What is kept is the sealed bytes, after they were verified, not the decoded
value: each task decodes its own, so that no task can change what the next one sees.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any


class Cache:
    """Least recently used sealed values, bounded in bytes.  Inputs are fetched by many threads.

    Parameters
    ----------
    limit : int
        Bytes to hold at the most; a larger value is not kept.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.size = 0
        self.hits = 0
        self._entries: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> Any | None:
        """Return the bytes of an object, or None."""
        with self._lock:
            data = self._entries.get(name)
            if data is not None:
                self._entries.move_to_end(name)
                self.hits += 1
            return data

    def put(self, name: str, data: Any) -> bool:
        """Keep the bytes of an object, at the expense of those that were used least recently.

        Returns
        -------
        bool
            Whether they are kept, and so must not be changed.
        """
        with self._lock:
            if len(data) > self.limit or name in self._entries:
                return False
            self._entries[name] = data
            self.size += len(data)
            while self.size > self.limit:
                _, dropped = self._entries.popitem(last=False)
                self.size -= len(dropped)
            return True

    def drop(self, name: str) -> None:
        """Keep the bytes of an object no longer."""
        with self._lock:
            data = self._entries.pop(name, None)
            if data is not None:
                self.size -= len(data)

    def __len__(self) -> int:
        return len(self._entries)
