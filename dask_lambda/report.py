"""What a run did: counted where the requests are made.  May import: cost, the ground."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from html import escape
from typing import Any

from dask_lambda.cost import Architecture, Prices
from lambda_worker.store import Counts


@dataclass(frozen=True, slots=True)
class CallReport:
    """What one call did.

    Attributes
    ----------
    seconds : float
        Inside the function that was called.
    peak_memory_mb : float
        The most that the execution environment has taken so far.
    cold_start : bool
        Whether the call met a new execution environment.
    cost_usd : float
        Of all attempts, with the worker's requests to S3; of invocations that ran several calls,
        its share.  On the embedded AWS: what they would have cost.
    invocations : int
        Attempts: invocations that Lambda accepted, or times that it was run elsewhere.
    nbytes : int
        Size of the result in the worker's memory.
    kind : str
        Type of the result, as ``module.name``.
    finished : float
        When the reply came, in seconds since 1970.
    log : str
        The end of the invocation's log (at most 4 kB), in base64.
    invocation : int
        A number that calls have in common which one invocation has run.
    """

    seconds: float
    peak_memory_mb: float
    cold_start: bool
    cost_usd: float
    invocations: int
    nbytes: int
    kind: str
    finished: float
    log: str = field(default="", repr=False)
    invocation: int = 0


@dataclass(frozen=True, slots=True)
class RunReport:
    """What one run did.

    Attributes
    ----------
    tasks : int
        Tasks that were done.
    local_tasks : int
        Those of them that were done outside of Lambda.
    reused : int
        Tasks that were not run, since their results, or results made of them, were there from an
        earlier computation of the same name (``resume``).
    invocations : int
        Requests that Lambda accepted, including those whose result was of no use.
    cold_starts : int
        Invocations that met a new execution environment.
    restores : int
        Those of them whose environment began as a copy of a snapshot (SnapStart), each of which
        Lambda charges for.
    retries : int
        Requests beyond the first one of their group, after whatever failure.
    throttles : int
        Requests that Lambda refused with 429.
    speculative : int
        Invocations that duplicated one in flight.
    wall_seconds : float
        From the call to the result, on the client.
    compute_seconds : float
        Inside the tasks, over all workers.
    billed_gb_seconds : float
        Duration, rounded up to 1 ms, times memory: from Lambda's own REPORT where it is sent,
        else from the worker's clock (which does not see the start of an environment, nor what of a
        restoration is billed as time).
    s3_puts, s3_gets, s3_lists, s3_deletes : int
        Requests of client and workers; a batch of deletes is one.
    bytes_written, bytes_read : int
        To and from S3.
    cache_hits : int
        Inputs that a worker did not have to download, since it had them already.
    peak_memory_mb : float
        The most that one worker has taken.  An environment that serves several invocations
        reports its maximum so far, also of earlier runs.
    cost_usd : float
        The counts times the price table; on the embedded AWS: what they would have cost.
    prices : str
        Whose prices these are: the region, and when they were checked.
    failed : bool
    """

    tasks: int
    local_tasks: int
    reused: int
    invocations: int
    cold_starts: int
    restores: int
    retries: int
    throttles: int
    speculative: int
    wall_seconds: float
    compute_seconds: float
    billed_gb_seconds: float
    s3_puts: int
    s3_gets: int
    s3_lists: int
    s3_deletes: int
    bytes_written: int
    bytes_read: int
    cache_hits: int
    peak_memory_mb: float
    cost_usd: float
    prices: str
    failed: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)

    def _rows(self) -> list[tuple[str, str]]:
        rows = []
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "cost_usd":
                text = f"{value:.6f}"
            elif isinstance(value, str):
                text = value
            elif isinstance(value, bool):
                text = "yes" if value else "no"
            elif isinstance(value, float):
                text = f"{value:,.3f}"
            else:
                text = f"{value:,}"
            rows.append((each.name.replace("_", " "), text))
        return rows

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(["run report", *(f"  {name:<{width}}  {text}" for name, text in rows)])

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'>{escape(name)}</td><td>{escape(text)}</td></tr>"
            for name, text in self._rows()
        )
        return f"<table><caption>run report</caption>{cells}</table>"


@dataclass(slots=True)
class RunCounts:
    """The counters of a run while it goes on."""

    tasks: int = 0
    local_tasks: int = 0
    reused: int = 0
    invocations: int = 0
    cold_starts: int = 0
    restores: int = 0
    restored_gb: float = 0.0  #: memory of their functions
    retries: int = 0
    throttles: int = 0
    speculative: int = 0
    compute_seconds: float = 0.0
    billed_gb_seconds: float = 0.0
    arm64_gb_seconds: float = 0.0  #: those of them that were on arm64
    cache_hits: int = 0
    peak_memory_mb: float = 0.0
    workers: Counts = field(default_factory=Counts)

    def add_reply(
        self,
        content: dict[str, Any],
        billed_ms: float | None,
        architecture: Architecture = "x86_64",
    ) -> None:
        """Count what a worker reported."""
        self.cold_starts += bool(content["cold"])
        milliseconds = content["milliseconds"] if billed_ms is None else billed_ms
        self.add_billed(math.ceil(milliseconds), content["memory_mb"], architecture)
        self.add_work(content)

    def add_restore(self, memory_mb: int) -> None:
        """Count an environment that began as a copy of a snapshot."""
        self.restores += 1
        self.restored_gb += memory_mb / 1024

    def add_work(self, content: dict[str, Any]) -> None:
        """Count what whoever served a request did, on Lambda or elsewhere."""
        self.cache_hits += content.get("cache_hits", 0)
        self.peak_memory_mb = max(self.peak_memory_mb, content.get("peak_memory", 0) / 2**20)
        for name, count in content.get("s3", {}).items():
            setattr(self.workers, name, getattr(self.workers, name) + count)

    def add_billed(
        self, milliseconds: float, memory_mb: int, architecture: Architecture = "x86_64"
    ) -> None:
        """Count billed time."""
        gb_seconds = milliseconds / 1e3 * memory_mb / 1024
        self.billed_gb_seconds += gb_seconds
        if architecture == "arm64":
            self.arm64_gb_seconds += gb_seconds

    def report(
        self, client: Counts, wall_seconds: float, *, failed: bool, prices: Prices
    ) -> RunReport:
        """Sum up."""
        total = self._total(client)
        return RunReport(
            tasks=self.tasks,
            local_tasks=self.local_tasks,
            reused=self.reused,
            invocations=self.invocations,
            cold_starts=self.cold_starts,
            restores=self.restores,
            retries=self.retries,
            throttles=self.throttles,
            speculative=self.speculative,
            wall_seconds=wall_seconds,
            compute_seconds=self.compute_seconds,
            billed_gb_seconds=self.billed_gb_seconds,
            s3_puts=total.puts,
            s3_gets=total.gets,
            s3_lists=total.lists,
            s3_deletes=total.deletes,
            bytes_written=total.bytes_written,
            bytes_read=total.bytes_read,
            cache_hits=self.cache_hits,
            peak_memory_mb=self.peak_memory_mb,
            cost_usd=self.usd(client, prices),
            prices=prices.source,
            failed=failed,
        )

    def usd(self, client: Counts, prices: Prices) -> float:
        """Return what was spent so far, in US dollars.

        Parameters
        ----------
        client : Counts
            What the client itself asked of S3.
        prices : Prices
        """
        total = self._total(client)
        return prices.cost(
            invocations=self.invocations,
            gb_seconds=self.billed_gb_seconds,
            arm64_gb_seconds=self.arm64_gb_seconds,
            puts=total.puts,
            lists=total.lists,
            gets=total.gets,
            restored_gb=self.restored_gb,
        )

    def _total(self, client: Counts) -> Counts:
        return Counts(*(getattr(client, n) + getattr(self.workers, n) for n in Counts.__slots__))
