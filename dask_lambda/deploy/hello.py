"""A function in Lambda says hello: that it runs, where, and how long it takes.

May import: aws, config, scheduler, report, errors, the standard library.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dask.delayed import delayed

from dask_lambda.config import Settings
from dask_lambda.deploy.aws import Account
from dask_lambda.errors import AccessDeniedError
from dask_lambda.report import RunReport
from dask_lambda.scheduler import LambdaScheduler, last_report

#: Calls after the first one.
WARM_CALLS = 5
#: Seconds until permissions are looked at once more.
RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Hello:
    """What a function said, and how long it took.

    Attributes
    ----------
    place : dict
        Region, function, memory, processor, Python, as the function sees them.
    first_seconds : float
        From the first call to its result, with the start of the client's engine.
    cold : bool
        Whether the first call met a new execution environment.
    restored : bool
        Whether that began as a copy of a snapshot.
    warm_seconds : float
        Median of the following calls.
    stored_seconds : float
        The same with the result through S3, which needs the role's permissions.
    cost_usd : float
        Of everything.
    local : bool
        It was the embedded AWS.
    endpoint_url : str, optional
        Who answered, if that is configured: an emulator, say.
    """

    place: dict[str, Any]
    first_seconds: float
    cold: bool
    restored: bool
    warm_seconds: float
    stored_seconds: float
    cost_usd: float
    local: bool
    endpoint_url: str | None


def hello(
    *, patience: float = 0.0, sleep: Callable[[float], None] = time.sleep, **settings: Any
) -> Hello:
    """Call the function that is configured, several times.

    Parameters
    ----------
    patience : float
        Seconds for which a missing permission is waited for: those of a new role take some time
        until they are known everywhere.
    sleep : callable
        As in :mod:`time`.
    **settings
        As of :class:`LambdaScheduler`.

    Raises
    ------
    DaskLambdaError
        What is in the way.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return _hello(settings)
        except AccessDeniedError:
            if time.monotonic() >= deadline:
                raise
            sleep(RETRY_SECONDS)


def _hello(settings: dict[str, Any]) -> Hello:
    wanted = Settings.resolve(**settings)
    endpoint = None
    if not wanted.is_local:
        endpoint = Account.open(wanted.region, wanted.endpoint_url).configured_endpoint("lambda")

    def where() -> dict[str, Any]:  # not by name: the worker has none of this package
        import os
        import platform

        return {
            "region": os.environ.get("AWS_REGION"),
            "function": os.environ.get("AWS_LAMBDA_FUNCTION_NAME"),
            "memory_mb": os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE"),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "system": platform.platform(terse=True),
        }

    cost = 0.0
    with LambdaScheduler(**settings) as scheduler:
        place, first, report = _timed(scheduler, where)
        cold, restored = report.cold_starts > 0, report.restores > 0
        cost += report.cost_usd
        warm = []
        for _ in range(WARM_CALLS):
            _, seconds, report = _timed(scheduler, where)
            warm.append(seconds)
            cost += report.cost_usd
    with LambdaScheduler(**{**settings, "inline_bytes": 0}) as scheduler:
        _, stored, report = _timed(scheduler, where)
        cost += report.cost_usd
    return Hello(
        place,
        first,
        cold,
        restored,
        statistics.median(warm),
        stored,
        cost,
        wanted.is_local,
        endpoint,
    )


def _timed(scheduler: LambdaScheduler, function: Any) -> tuple[Any, float, RunReport]:
    started = time.perf_counter()
    result = delayed(function, pure=False)().compute(scheduler=scheduler)
    seconds = time.perf_counter() - started
    report = last_report()
    assert report is not None
    return result, seconds, report
