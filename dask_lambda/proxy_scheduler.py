"""The scheduler of a ``distributed`` cluster whose tasks run on Lambda.

May import: the ground, distributed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import distributed
from distributed.metrics import time

from lambda_worker.protocol import Key

#: How many tasks are at hand for each invocation that may be in flight.  Those that wait are
#: sent without a word with the scheduler in between, several small ones in one invocation.
AHEAD = 16
#: How long a task may wait for a worker that has what it asks for, in seconds.
NO_WORKER_SECONDS = 10.0


class ProxyScheduler(distributed.Scheduler):
    """distributed's own, which tells clients why a value cannot be loaded or stored.

    Parameters
    ----------
    unmoved : dict
        Filled by the worker: what it met when it loaded or stored a key.
    **options
        Of :class:`distributed.Scheduler`.
    """

    no_workers_timeout: float | None
    WORKER_SATURATION: float

    def __init__(self, *, unmoved: dict[Key, BaseException], **options: Any):
        self._unmoved = unmoved
        super().__init__(**options)
        if self.no_workers_timeout is None:  # else such a task waits without end
            self.no_workers_timeout = NO_WORKER_SECONDS
        # Small tasks are sent several at a time: they have to be at hand.
        self.WORKER_SATURATION = max(self.WORKER_SATURATION, AHEAD)

    async def start_unsafe(self) -> Any:
        """Start, without what looks after several workers."""
        await super().start_unsafe()
        if (manager := self.extensions.get("amm")) is not None:
            manager.stop()
        if (stealing := self.extensions.get("stealing")) is not None:
            await stealing.stop()
        return self

    async def gather(
        self, keys: Collection[Key], serializers: list[str] | None = None
    ) -> dict[Key, object]:
        """Collect values from the workers."""
        response: dict[Key, object] = await super().gather(keys, serializers)
        failed: Any = response.get("keys", ())
        for key in failed:
            if (error := self._unmoved.pop(key, None)) is not None:
                raise error
        return response

    async def scatter(self, data: dict[Key, object], *arguments: Any, **options: Any) -> list[Key]:
        """Send values to the workers."""
        try:
            keys: list[Key] = await super().scatter(data, *arguments, **options)
        except Exception:
            for key in data:
                if (error := self._unmoved.pop(key, None)) is not None:
                    raise error from None
            raise
        return keys

    def set_nthreads(self, address: str, nthreads: int) -> None:
        """Take note of how many tasks a worker runs at the same time."""
        worker = self.workers.get(address)
        if worker is None:
            return
        more = nthreads - worker.nthreads
        worker.nthreads = nthreads
        self.host_info[worker.host]["nthreads"] += more
        self.total_nthreads += more
        self.total_nthreads_history.append((time(), self.total_nthreads))
        self.check_idle_saturated(worker)
        self.stimulus_queue_slots_maybe_opened(stimulus_id=f"window-{time()}")

    def unfinished(self) -> int:
        """Return how many tasks run or could."""
        processing = sum(len(worker.processing) for worker in self.workers.values())
        return processing + len(self.queued) + len(self.unrunnable)
