"""What it takes to run tasks in one way or another, in time and money.  Pure.

May import: kernels, cost.  The planner (:mod:`dask_lambda.grouping`) compares what these formulas
give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dask_lambda.cost import Prices
from dask_lambda.kernels import Speed


@dataclass(frozen=True, slots=True)
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
        Bytes a second between S3 and one environment in the long run: 75 MB/s (the same; a
        burst of some 290 MB is faster).
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
        The longest that an invocation of several tasks is planned to take: what a failure costs
        at the most, far below Lambda's limit of 900 s.
    waiting_usd : float
        What a second of waiting is worth in US dollars: 36 dollars an hour.  A plan that takes a
        second longer must be so much cheaper.
    tolerance : float
        Differences of a longest path below this part of it are not believed: the estimates are
        not that good.
    speed : Speed
        Of one vCPU.
    prices : Prices
    """

    invoke_seconds: float = 0.035
    get_seconds: float = 0.027
    put_seconds: float = 0.041
    bandwidth: float = 75e6
    connections: int = 16
    inline_bytes: int = 64 * 1024
    window: int = 1000
    memory_bytes: int = 1769 * 2**20
    task_memory: float = 0.6
    group_seconds: float = 120.0
    waiting_usd: float = 0.01
    tolerance: float = 0.15
    speed: Speed = field(default_factory=Speed)
    prices: Prices = field(default_factory=Prices)

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
        seconds = self.invoke_seconds
        reading = 0.0
        if reads:
            seconds += self.get_seconds
            reading = (reads - 1) // self.connections * self.get_seconds
            reading += read_bytes / self.bandwidth
        if writes:
            seconds += self.put_seconds + write_bytes / self.bandwidth
        return seconds + max(reading, work)

    def group_usd(self, seconds: float, reads: int, writes: int) -> float:
        """Return what an invocation costs that takes so long."""
        return self.prices.cost(
            invocations=1,
            gb_seconds=seconds * self.memory_bytes / 2**30,
            gets=reads,
            puts=writes,
        )
