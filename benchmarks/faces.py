"""What futures cost next to a graph: ``python -m benchmarks.faces``.

In the same rounds, on the embedded AWS, 10,000 calls of a trivial function:

* *lambda_get*: as a graph of delayed calls, planned as by default;
* *executor*: with ``LambdaExecutor.map``.

Printed are medians of the rounds in seconds, their ratio, processor time of this process for each
call in microseconds, and invocations.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import dask

from dask_lambda import LambdaExecutor, LambdaScheduler


def increment(x: int) -> int:
    """Do next to nothing."""
    return x + 1


class Face:
    """One way to make the calls, and what its rounds took.

    Parameters
    ----------
    name : str
    work : callable
        Makes so many calls; returns their results.
    invocations : callable
        How many there were, in all rounds so far or in the last one.
    """

    def __init__(self, name: str, work: Callable[[int], list[Any]], invocations: Callable[[], int]):
        self.name = name
        self.work = work
        self.invocations = invocations
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self.invoked: list[int] = []

    def run(self, count: int) -> None:
        """Do one round."""
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        result = self.work(count)
        self.walls.append(time.perf_counter() - wall)
        self.cpus.append(time.process_time() - cpu)
        assert result == list(range(1, count + 1))
        self.invoked.append(self.invocations())

    def line(self, count: int, other: Face) -> str:
        """Describe the rounds."""
        seconds = statistics.median(self.walls)
        ratio = seconds / statistics.median(other.walls)
        microseconds = statistics.median(self.cpus) / count * 1e6
        invoked = statistics.median(self.invoked)
        return (
            f"  {self.name:12}{seconds:8.2f} s {ratio:7.2f} {microseconds:10.0f} us{invoked:11,.0f}"
        )


class Since:
    """A counter's growth since it was last looked at."""

    def __init__(self, count: Callable[[], int]):
        self._count = count
        self._seen = 0

    def __call__(self) -> int:
        """Return it."""
        before, self._seen = self._seen, self._count()
        return self._seen - before


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with LambdaScheduler(backend="local") as scheduler, LambdaExecutor(backend="local") as executor:

        def graph(count: int) -> list[Any]:
            calls = [dask.delayed(increment)(i) for i in range(count)]
            return list(dask.compute(*calls, scheduler=scheduler))

        def graph_invocations() -> int:
            assert scheduler.last_report is not None
            return scheduler.last_report.invocations

        def futures(count: int) -> list[Any]:
            return list(executor.map(increment, range(count)))

        faces = [
            Face("lambda_get", graph, graph_invocations),
            Face("executor", futures, Since(lambda: executor.report.invocations)),
        ]
        for face in faces:
            face.work(100)  # start processes, import modules
            face.invocations()
        for _ in range(arguments.rounds):
            for face in faces:
                face.run(arguments.calls)
    print(f"{arguments.calls:,} trivial calls (medians of {arguments.rounds} rounds)")
    print(f"  {'':12}{'wall':>10} {'ratio':>7} {'CPU a call':>13} {'invoked':>10}")
    for face in faces:
        print(face.line(arguments.calls, faces[0]))


if __name__ == "__main__":
    main()
