"""What AWS Lambda and S3 take: the numbers behind the simulator.  Pure.

May import: cost, the ground.

Every number is a parameter of :class:`AwsModel` with its source, or marked as assumed.
Distributions are given by quantiles, as they are published; bandwidth is a token bucket; the start
of environments is another one.  :data:`AWS` is us-east-1 as its sources describe it,
:data:`EMBEDDED` the embedded AWS on a machine with two cores, against which the simulator is
checked (``benchmarks/aws_model.py``).
"""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dask_lambda.cost import Prices
from lambda_worker.memory import Shares, share_out
from lambda_worker.store import PARTS_AT_ONCE, RANGES_AT_ONCE, Parts

#: AWS: one vCPU for each 1,769 MB (Lambda Developer Guide, "Configure Lambda function memory").
MB_PER_VCPU = 1769
#: Steps in which a distribution is tabulated: fine enough for its quantile of 0.999.
TABLE = 8192


@dataclass(frozen=True)
class Quantiles:
    """A distribution of latencies, given by some of its quantiles.

    Between two of them the logarithm of the latency is linear in ``-log(1 - p)``, which makes the
    tail that of a power law, as tails of storage services are; outside, it is constant.

    Attributes
    ----------
    points : tuple of (probability, seconds)
        Both increasing, probabilities below 1.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, probability: float) -> float:
        """Return the latency in seconds that is not exceeded with this probability."""
        points = self.points
        place = bisect.bisect_right(points, probability, key=lambda point: point[0])
        if place == 0:
            return points[0][1]
        if place == len(points):
            return points[-1][1]
        (p, low), (q, high) = points[place - 1], points[place]
        if low <= 0.0:
            return high * (probability - p) / (q - p)
        depth = math.log1p(-p) - math.log1p(-probability)
        share = depth / (math.log1p(-p) - math.log1p(-q))
        return low * (high / low) ** share

    @property
    def median(self) -> float:
        """The latency in seconds that half of the requests exceed."""
        return self.at(0.5)

    @cached_property
    def _table(self) -> list[float]:
        return [self.at((i + 0.5) / TABLE) for i in range(TABLE)]

    def sample(self, random: random.Random) -> float:
        """Draw a latency, in seconds."""
        return self._table[int(random.random() * TABLE)]


def constant(seconds: float) -> Quantiles:
    """Return the distribution of a latency that is always the same."""
    return Quantiles(((0.0, seconds),))


@dataclass(slots=True)
class Link:
    """The network of one execution environment: a token bucket, first come first served.

    While it holds tokens bytes move at the burst rate and use them up; without any they move at the
    sustained rate.  Tokens come back at the sustained rate while nothing moves.

    Attributes
    ----------
    burst, rate : float
        Bytes a second with and without tokens.
    bucket : float
        Bytes that a full bucket is worth.
    tokens : float
        What it holds.
    free : float
        When the last transfer ends.
    """

    burst: float
    rate: float
    bucket: float
    tokens: float
    free: float = 0.0

    def transfer(self, at: float, nbytes: float) -> float:
        """Move some bytes that are ready at a time; return when the last of them arrives."""
        if at > self.free:
            self.tokens = min(self.bucket, self.tokens + (at - self.free) * self.rate)
            self.free = at
        fast = min(nbytes, self.tokens)
        self.tokens -= fast
        self.free += fast / self.burst + (nbytes - fast) / self.rate
        return self.free


@dataclass(frozen=True)
class AwsModel:
    """AWS as the simulator sees it: times in seconds, rates in bytes a second.

    Attributes
    ----------
    memory_mb : int
        Of the function, which fixes its processor (:attr:`vcpus`).
    concurrency : int
        Executions at the same time, above which Lambda answers 429.  Default of an account: 1,000;
        new accounts have as few as 10 (Lambda quotas).
    scaling_burst, scaling_rate : float
        New environments at once, and for each second after that: 1,000 every 10 s for one
        function (Lambda Developer Guide, "Lambda scaling behavior").
    request_interval : float
        An environment takes 10 requests a second (Lambda quotas): it is free for the next one
        that long after the last one began.
    warm_environments : int
        Environments that are warm when the run begins: those of an earlier run.
    invoke : Quantiles
        A synchronous Invoke of a warm environment, without the handler: 20 to 50 ms; the tail
        is assumed.
    refuse : Quantiles
        An answer of 429 or 5xx (assumed).
    cold_start : Quantiles
        Added by a new environment: Python 200 to 400 ms at the median, 0.8 to 1.2 s at 0.99.
    import_seconds : float
        Added by a new environment: importing the handler, Dask and NumPy (docs/benchmarks.md,
        cold start).
    get, put : Quantiles
        Time to the first byte of an S3 GET, and of a PUT beyond its transfer: 1 KB objects from
        Lambda (raw data of the Skyrise project: hpides/skyrise); below the median assumed.
    burst_bytes, sustained_bytes, bucket_bytes : float
        Bandwidth of one environment, both directions together: about 290 MB at up to 350 MB/s,
        then 75 MB/s (Skyrise; sjakthol's measurements).
    stream_bytes : float
        Bandwidth of one S3 request: 85 to 90 MB/s ("Performance design patterns for Amazon S3").
    parts : Parts
        In which large objects travel (lambda_worker.store).  Writing in parts takes four requests
        one after the other: to begin, the last part, to complete, and a pointer.
    reads_at_once, writes_at_once : int
        Parts of one object at the same time (lambda_worker.store).
    requests_in_flight : int
        S3 requests of one environment at the same time (lambda_worker.handler).
    prefetch_bytes : int, optional
        For inputs that are fetched ahead of their need; default: as lambda_worker.memory says.
    cache_bytes : int, optional
        For inputs that several groups read; default: likewise.
    codec_bytes : float
        Bytes a second that are sealed or verified (HMAC-SHA256) on the way to S3 and back
        (assumed).
    group_seconds : float
        Of a worker for each group: unpickling its tasks, naming its objects (assumed).
    straggler_probability, straggler_factor : float
        Invocations whose tasks take that much longer: a slower processor, a noisy neighbour
        (assumed).
    error_probability : float
        Requests that are answered with a 5xx.
    death_probability : float
        Invocations whose environment is lost, half-way through.
    client_seconds : float
        Of the client's processor for each invocation, one after the other (docs/benchmarks.md).
    client_bytes : float
        The client's bandwidth: 1 Gbit/s (assumed).
    client_get, client_put : Quantiles, optional
        S3 requests of the client; as those of the workers if not given.
    request_bytes : int
        Of a request or a reply, for each task, next to the values in it.
    seal_bytes : int
        By which a stored value is larger than its buffers.
    cores : int, optional
        Processors that client, server and workers share for what is not inside of tasks; None where
        each has its own.
    server_seconds, server_bytes : float
        Of those cores: seconds for each invocation, and bytes a second to S3 and back.
    prices : Prices
    """

    memory_mb: int = 1769
    concurrency: int = 1000
    scaling_burst: float = 1000.0
    scaling_rate: float = 100.0
    request_interval: float = 0.1
    warm_environments: int = 0
    invoke: Quantiles = Quantiles(((0.05, 0.020), (0.5, 0.030), (0.95, 0.050), (0.999, 0.150)))
    refuse: Quantiles = Quantiles(((0.05, 0.010), (0.5, 0.015), (0.95, 0.030)))
    cold_start: Quantiles = Quantiles(((0.05, 0.200), (0.5, 0.300), (0.99, 1.000)))
    import_seconds: float = 0.384
    get: Quantiles = Quantiles(
        ((0.05, 0.015), (0.5, 0.027), (0.95, 0.072), (0.99, 0.103), (0.999, 0.173))
    )
    put: Quantiles = Quantiles(
        ((0.05, 0.025), (0.5, 0.041), (0.95, 0.092), (0.99, 0.125), (0.999, 0.210))
    )
    burst_bytes: float = 350e6
    sustained_bytes: float = 75e6
    bucket_bytes: float = 290e6
    stream_bytes: float = 90e6
    parts: Parts = field(default_factory=Parts)
    reads_at_once: int = RANGES_AT_ONCE
    writes_at_once: int = PARTS_AT_ONCE
    requests_in_flight: int = 16
    prefetch_bytes: int | None = None
    cache_bytes: int | None = None
    codec_bytes: float = 1.5e9
    group_seconds: float = 0.001
    straggler_probability: float = 0.001
    straggler_factor: float = 3.0
    error_probability: float = 0.0
    death_probability: float = 0.0
    client_seconds: float = 0.001
    client_bytes: float = 125e6
    client_get: Quantiles | None = None
    client_put: Quantiles | None = None
    request_bytes: int = 1000
    seal_bytes: int = 256
    cores: int | None = None
    server_seconds: float = 0.0
    server_bytes: float = math.inf
    prices: Prices = field(default_factory=Prices)

    @property
    def vcpus(self) -> float:
        """Processors of one environment: one for each 1,769 MB."""
        return self.memory_mb / MB_PER_VCPU

    @property
    def shares(self) -> Shares:
        """How the worker shares out its memory."""
        shares = share_out(self.memory_mb)
        if self.cache_bytes is not None:
            shares = replace(shares, cache=self.cache_bytes)
        if self.prefetch_bytes is not None:
            shares = replace(shares, prefetch=self.prefetch_bytes)
        return shares

    def gets(self, nbytes: int) -> int:
        """Return the requests that it takes to read an object."""
        parts = self.parts
        return 1 if nbytes <= parts.read_above else -(-nbytes // parts.read)

    def puts(self, nbytes: int) -> int:
        """Return the requests that it takes to write an object."""
        parts = self.parts
        return 1 if nbytes <= parts.write_above else 3 - (-nbytes // parts.write)

    def read_rate(self, nbytes: int) -> float:
        """Return the bytes a second at which an object can be read, bandwidth permitting."""
        return self.stream_bytes * min(self.gets(nbytes), self.reads_at_once)

    def write_rate(self, nbytes: int) -> float:
        """Return the bytes a second at which an object can be written, bandwidth permitting."""
        if nbytes <= self.parts.write_above:
            return self.stream_bytes
        return self.stream_bytes * self.writes_at_once

    def link(self, at: float = 0.0) -> Link:
        """Return the network of a new environment."""
        return Link(
            self.burst_bytes, self.sustained_bytes, self.bucket_bytes, self.bucket_bytes, at
        )

    def replace(self, **changes: Any) -> AwsModel:
        """Return the model with some parameters changed."""
        return replace(self, **changes)

    def without_chance(self) -> AwsModel:
        """Return the model with every latency at its median, no stragglers and no faults."""
        medians: dict[str, Any] = {
            name: constant(getattr(self, name).median)
            for name in ("invoke", "refuse", "cold_start", "get", "put")
        }
        return replace(
            self,
            **medians,
            client_get=self.client_get and constant(self.client_get.median),
            client_put=self.client_put and constant(self.client_put.median),
            straggler_probability=0.0,
            error_probability=0.0,
            death_probability=0.0,
        )


AWS = AwsModel()

#: MiniStack on two cores, next to the client (measured; docs/benchmarks.md, "Simulated AWS").
EMBEDDED = AwsModel(
    scaling_burst=math.inf,
    request_interval=0.0,
    invoke=constant(0.002),
    refuse=constant(0.002),
    cold_start=constant(0.3),
    import_seconds=0.1,
    get=constant(0.0027),
    put=constant(0.0027),
    burst_bytes=970e6,
    sustained_bytes=970e6,
    bucket_bytes=0.0,
    stream_bytes=970e6,
    straggler_probability=0.0,
    client_seconds=0.001,
    client_bytes=1e9,
    cores=2,
    server_seconds=0.002,
    server_bytes=200e6,
)
