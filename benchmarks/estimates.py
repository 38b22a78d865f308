"""Estimates next to what runs did: ``python -m benchmarks.estimates``.

Some graphs are estimated and then run on the embedded AWS, twice: first nothing but the functions
and the sizes of blocks is known (or what the user says), the second time what the first run has
measured.  Printed are the expected figures, their range, and what the run's report counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da

from benchmarks.validation import matrix, nothing, work
from dask_lambda import Estimate, LambdaScheduler, RunReport
from dask_lambda.forecast import Range

COUNTS = ("invocations", "s3_puts", "s3_gets")


def slowly(x: int) -> int:
    """Add nothing, in 20 ms."""
    return work(x)


def mystery(x: int) -> int:
    """Do the same, and nobody says so."""
    return work(x)


@dataclass(frozen=True)
class Case:
    """A graph, and the settings with which it is estimated and run."""

    name: str
    make: Callable[[], list[Any]]
    settings: dict[str, Any]


CASES = (
    Case(
        "map of 300 calls of 20 ms, said",
        lambda: [dask.delayed(slowly)(i) for i in range(300)],
        {"default_task_seconds": {"slowly": 0.02}},
    ),
    Case(
        "the same, not said",
        lambda: [dask.delayed(mystery)(i) for i in range(300)],
        {},
    ),
    Case("product, 4 x 4 tiles", lambda: [matrix(4, 500) @ matrix(4, 500)], {}),
    Case("the same, plan: none", lambda: [matrix(4, 500) @ matrix(4, 500)], {"plan": "none"}),
    Case("Cholesky, 8 x 8 tiles", lambda: [da.linalg.cholesky(matrix(8, 256), lower=True)], {}),
    Case(
        "the same, plan: none",
        lambda: [da.linalg.cholesky(matrix(8, 256), lower=True)],
        {"plan": "none"},
    ),
)


def compare(scheduler: LambdaScheduler, case: Case) -> tuple[Estimate, RunReport]:
    """Estimate a graph, then run it."""
    estimate = scheduler.estimate(*case.make(), **case.settings)
    dask.compute(*case.make(), scheduler=scheduler, **case.settings)
    assert scheduler.last_report is not None
    return estimate, scheduler.last_report


def cell(expected: Range, measured: float, digits: int) -> str:
    """Show a figure: expected (range) and measured, marked if that is outside of the range."""
    figures = [f"{v:,.{digits}f}" for v in (expected.expected, expected.low, expected.high)]
    mark = "" if expected.low <= measured <= expected.high else " (!)"
    return f"{figures[0]} ({figures[1]} to {figures[2]}) / {measured:,.{digits}f}{mark}"


def main() -> None:
    """Print the comparison."""
    with LambdaScheduler(backend="local") as scheduler:
        # All processes import NumPy and SciPy; with plan="none" nothing is learned from it.
        dask.compute([dask.delayed(nothing)(i) for i in range(50)], scheduler=scheduler)
        for _ in range(2):
            factor = da.linalg.cholesky(matrix(8, 50), lower=True)
            dask.compute(factor, scheduler=scheduler, plan="none")
        columns = ("graph", "run", "invocations", "PUTs", "GETs", "GB-s", "seconds in tasks")
        columns += ("seconds", "USD for 1,000 such runs")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for case in CASES:
            for number in ("first", "second"):
                estimate, report = compare(scheduler, case)
                cells = [cell(getattr(estimate, name), getattr(report, name), 0) for name in COUNTS]
                for name in ("billed_gb_seconds", "compute_seconds", "wall_seconds"):
                    cells.append(cell(getattr(estimate, name), getattr(report, name), 2))
                usd = estimate.cost_usd
                thousand = Range(1e3 * usd.low, 1e3 * usd.expected, 1e3 * usd.high)
                cells.append(cell(thousand, 1e3 * report.cost_usd, 3))
                print(f"| {case.name} | {number} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
