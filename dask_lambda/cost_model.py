"""What it takes to run tasks in one way or another, in time and money.  Pure.

May import: kernels, cost.  The planner (:mod:`dask_lambda.grouping`) compares what these formulas
give.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dask_lambda.cost import Prices
from dask_lambda.kernels import Speed


@dataclass(frozen=True)
class CostModel:
    """Times and bounds of Lambda and S3, as the planner sees them.

    Attributes
    ----------
    invoke_seconds : float
        A warm invocation beyond its tasks: 20 to 50 ms (published measurements of synchronous
        Invoke in one region).
    get_seconds, put_seconds : float
        The first byte of a GET, and a small PUT, from Lambda: medians of 27 and 41 ms for 1 kB
        objects (skyrise, the raw data of "An Empirical Evaluation of Serverless Cloud
        Infrastructure for Large-Scale Data Processing").
    bandwidth : float
        Bytes a second between S3 and one environment in the long run: 75 MB/s (the same).
    burst_bytes, burst_bandwidth : float
        Of these bytes, the first that an environment moves are faster: 290 MB at 350 MB/s
        (the same).
    connections : int
        Requests at the same time from one invocation (:mod:`lambda_worker`).
    inline_bytes : int
        Values up to this size travel in payload and reply and cost neither PUT nor GET.
    window : int
        Invocations in flight.
    memory_bytes : int
        Of the function; 1,769 MB are one vCPU (Lambda's documentation).
    task_memory : float
        The part of it that tasks may fill: the rest is the interpreter, the cache, and inputs
        and outputs on their way.
    group_seconds : float
        The longest that an invocation of several tasks is planned to take: a third of Lambda's
        limit, for estimates may be wrong, and some environments are slow.
    waiting_usd : float
        What a second of waiting is worth in US dollars: 36 dollars an hour.  A plan that takes a
        second longer must be so much cheaper.
    tolerance : float
        Differences of a longest path below this part of it, over all decisions, are not
        believed: the estimates are not that good.
    fold_seconds : float
        Sums whose terms take less than this to make are not cut (:mod:`dask_lambda.folding`):
        the objects that it takes are not worth it.
    fold_bytes : int
        Nor are sums of terms below this size, which may be numbers: from Python 3.12 on, the
        sum of floats is not that of its parts.
    speed : Speed
        Of one vCPU.
    prices : Prices
    """

    invoke_seconds: float = 0.035
    get_seconds: float = 0.027
    put_seconds: float = 0.041
    bandwidth: float = 75e6
    burst_bytes: float = 290e6
    burst_bandwidth: float = 350e6
    connections: int = 16
    inline_bytes: int = 64 * 1024
    window: int = 1000
    memory_bytes: int = 1769 * 2**20
    task_memory: float = 0.6
    group_seconds: float = 300.0
    waiting_usd: float = 0.01
    tolerance: float = 0.1
    fold_seconds: float = 1.0
    fold_bytes: int = 16 * 1024
    speed: Speed = field(default_factory=Speed)
    prices: Prices = field(default_factory=Prices)

    @classmethod
    def of(cls, memory_mb: int, timeout: float = 900.0, **settings: Any) -> CostModel:
        """Return the model of a function with so much memory, and so many seconds of time-out."""
        return cls(
            memory_bytes=memory_mb * 2**20,
            speed=Speed.of(memory_mb),
            group_seconds=timeout / 3,
            **settings,
        )

    @property
    def room(self) -> float:
        """Bytes that the tasks of a group may hold."""
        return self.memory_bytes * self.task_memory

    def is_inline(self, nbytes: float) -> bool:
        """Whether a value travels in payload and reply."""
        return nbytes <= self.inline_bytes

    def read_seconds(self, nbytes: float) -> float:
        """Return what it takes to get one value, when nothing else goes on."""
        return 0.0 if self.is_inline(nbytes) else self.get_seconds + nbytes / self.bandwidth

    def write_seconds(self, nbytes: float) -> float:
        """Return what it takes to commit one value."""
        return 0.0 if self.is_inline(nbytes) else self.put_seconds + nbytes / self.bandwidth

    def group_time(
        self, work: float, reads: int, read_bytes: float, writes: int, write_bytes: float
    ) -> float:
        """Return how long an invocation takes.

        Parameters
        ----------
        work : float
            Seconds inside its tasks.
        reads, read_bytes : int, float
            Objects that it gets, while it computes, and their bytes.
        writes, write_bytes : int, float
            Objects that it puts, and their bytes.
        """
        seconds, reading = self.invoke_seconds, 0.0
        if reads:
            transfer = self.transfer_seconds(read_bytes)
            seconds += self.get_seconds
            reading = (reads - 1) // self.connections * self.get_seconds + transfer
        else:
            transfer = 0.0
        if writes:
            seconds += self.put_seconds
            seconds += self.transfer_seconds(read_bytes + write_bytes) - transfer
        return seconds + (reading if reading > work else work)

    def transfer_seconds(self, nbytes: float) -> float:
        """Return what it takes to move so many bytes to or from one environment."""
        if nbytes <= self.burst_bytes:
            return nbytes / self.burst_bandwidth
        burst = self.burst_bytes
        return burst / self.burst_bandwidth + (nbytes - burst) / self.bandwidth

    def group_usd(self, seconds: float, reads: int, writes: int) -> float:
        """Return what an invocation costs that takes so long."""
        return self.prices.cost(
            invocations=1,
            gb_seconds=seconds * self.memory_bytes / 2**30,
            gets=reads,
            puts=writes,
        )
