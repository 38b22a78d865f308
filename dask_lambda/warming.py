"""Starting execution environments before they are needed.

May import: failures, invoke, report, cost, errors, the ground.  To be used in the engine's thread.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

from dask_lambda import failures
from dask_lambda.cost import Architecture, Prices
from dask_lambda.events import FailureKind
from dask_lambda.report import RunCounts
from lambda_worker import protocol
from lambda_worker.store import Counts

#: How long each request keeps its environment busy, in seconds: until all have arrived, so that
#: none is served by an environment that was free again.  The client sends some 1,000 a second.
HOLD_SECONDS = 0.2
HOLD_SECONDS_EACH = 0.001


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What it took to warm a function up.

    Attributes
    ----------
    invocations : int
        Requests that Lambda accepted: so many environments are warm now.
    cold_starts : int
        Environments that had to be started for them.
    restores : int
        Those of them that began as a copy of a snapshot.
    throttles : int
        Requests that Lambda refused with 429: the account's limit, or too many at once.
    wall_seconds : float
    billed_gb_seconds : float
    cost_usd : float
    prices : str
        Whose prices these are.
    """

    invocations: int
    cold_starts: int
    restores: int
    throttles: int
    wall_seconds: float
    billed_gb_seconds: float
    cost_usd: float
    prices: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)

    def __str__(self) -> str:
        shown = (f"{each.name}={getattr(self, each.name)}" for each in fields(self))
        return f"warm: {', '.join(shown)}"


def hold_seconds(count: int) -> float:
    """Return how long each of so many requests keeps its environment busy."""
    return min(HOLD_SECONDS + HOLD_SECONDS_EACH * count, protocol.MAX_HOLD_SECONDS)


async def warm(
    invoker: Any, count: int, memory_mb: int, prices: Prices, architecture: Architecture | None
) -> WarmReport:
    """Have so many environments busy at the same time.

    Parameters
    ----------
    invoker : LambdaInvoker
    count : int
    memory_mb : int
        Of the function, as far as is known before it says so itself.
    prices : Prices
    architecture : {"x86_64", "arm64"}, optional
        Of the function; default: what it says itself.

    Raises
    ------
    DaskLambdaError
        If a request fails in any other way than that there are too many.
    """
    payload = json.dumps(protocol.warming_request(hold_seconds(count))).encode()
    started = time.perf_counter()
    replies = await asyncio.gather(*(invoker.invoke(payload) for _ in range(count)))
    counts = RunCounts()
    failure = None
    for reply in replies:
        if reply.failure is not None and reply.failure.kind in (
            FailureKind.THROTTLED,
            FailureKind.RATE_LIMITED,
        ):
            counts.throttles += 1
            continue
        counts.invocations += reply.ran
        of = architecture or invoker.architecture or "x86_64"
        if reply.restored:
            counts.add_restore(invoker.memory_mb or memory_mb)
        if reply.content is None:
            counts.add_billed(reply.billed_ms or 0.0, invoker.memory_mb or memory_mb, of)
            failure = failure or reply.failure
            continue
        counts.add_reply(reply.content, reply.billed_ms, of)
        if "refused" in reply.content:
            failure = failure or failures.from_refusal(reply.content["refused"])
    if failure is not None:
        raise failures.to_exception(failure, "", {})
    return WarmReport(
        counts.invocations,
        counts.cold_starts,
        counts.restores,
        counts.throttles,
        time.perf_counter() - started,
        counts.billed_gb_seconds,
        counts.usd(Counts(), prices),
        prices.source,
    )
