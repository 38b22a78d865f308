"""What every system is asked to do, and what must come out.  May import: the standard library.

A result is one number that is known beforehand: exactly for sums of integers, and for blocks of
uniform random numbers up to a tolerance of many standard deviations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Size = dict[str, int]


@dataclass(frozen=True)
class Workload:
    """One thing to do.

    Attributes
    ----------
    title : str
        With placeholders for the sizes.
    full, small : dict
        Sizes of the measurement, and those of a quick look.
    warm : dict
        Sizes of the warm-up: every process has started and imported what it needs.
    expected : callable
        The result for a size.
    items : str
        The size that a system's time is proportional to, if there is one.
    tolerance : float
        Of the result, relative.
    """

    title: str
    full: Size
    small: Size
    warm: Size
    expected: Callable[[Size], float]
    tolerance: float = 0.0
    items: str = ""

    def describe(self, size: Size) -> str:
        """Say what is done, with its size."""
        return self.title.format(**size)

    def is_right(self, size: Size, value: float) -> bool:
        """Whether a result is what it must be."""
        expected = self.expected(size)
        return abs(value - expected) <= self.tolerance * abs(expected)


WORKLOADS: dict[str, Workload] = {
    "map": Workload(
        "map of {calls:,} trivial calls",
        full={"calls": 1000},
        small={"calls": 100},
        warm={"calls": 16},
        # x + 1 for each x in range(calls), summed by the client
        expected=lambda size: size["calls"] * (size["calls"] + 1) / 2,
        items="calls",
    ),
    "tree": Workload(
        "reduction of {leaves:,} leaves by binary additions",
        full={"leaves": 1024},
        small={"leaves": 64},
        warm={"leaves": 16},
        expected=lambda size: size["leaves"] * (size["leaves"] + 1) / 2,
        items="leaves",
    ),
    "matmul": Workload(
        "(x @ x).sum(), x {n:,} x {n:,} in chunks of {chunk} x {chunk}",
        full={"n": 4096, "chunk": 512},
        small={"n": 1024, "chunk": 256},
        warm={"n": 128, "chunk": 64},
        # E[x_ik x_kj] = 1/4 but for the diagonal, whose terms are few
        expected=lambda size: size["n"] ** 3 / 4,
        tolerance=0.02,
    ),
    "cholesky": Workload(
        "norm of the Cholesky factor of x x' + n I, x {n:,} x {n:,} in chunks of {chunk} x {chunk}",
        full={"n": 4096, "chunk": 512},
        small={"n": 1024, "chunk": 256},
        warm={"n": 128, "chunk": 64},
        # |L|^2 in the Frobenius norm is the trace of L L' = x x' + n I
        expected=lambda size: size["n"] ** 2 / 3 + size["n"] ** 2,
        tolerance=0.01,
    ),
    "tsqr": Workload(
        "norm of R of {rows:,} x {columns} in {blocks} blocks of rows",
        full={"rows": 200_000, "columns": 64, "blocks": 32},
        small={"rows": 20_000, "columns": 64, "blocks": 8},
        warm={"rows": 2_000, "columns": 16, "blocks": 4},
        # |R| in the Frobenius norm is |x|
        expected=lambda size: (size["rows"] * size["columns"] / 3) ** 0.5,
        tolerance=0.01,
    ),
}
