"""What a task costs through distributed: ``python -m benchmarks.faces_cluster``.

Trivial tasks on the embedded AWS, in rounds, of which medians are printed:

* through :class:`~dask_lambda.LambdaCluster`, ``client.gather(client.map(...))``, next to the same
  work with ``lambda_get`` and one invocation for each task (``plan="none"``): seconds, their ratio,
  and processor time of this process for each task;
* many futures in flight at once, once: seconds, tasks in a second, and by how much the memory of
  this process has grown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import dask
import psutil

from dask_lambda import LambdaCluster, LambdaScheduler


def increment(x: int) -> int:
    """Do next to nothing."""
    return x + 1


def timed(work: Callable[[], Any], tasks: int) -> tuple[float, float]:
    """Return the seconds that some tasks take, and milliseconds of processor time for each."""
    wall, cpu = time.perf_counter(), time.process_time()
    assert sum(work()) == tasks * (tasks + 1) // 2
    return time.perf_counter() - wall, (time.process_time() - cpu) / tasks * 1e3


def with_lambda_get(scheduler: LambdaScheduler, tasks: int) -> Any:
    """Compute delayed calls."""
    return dask.compute(*(dask.delayed(increment)(i) for i in range(tasks)), scheduler=scheduler)


def main() -> None:
    """Print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flight", type=int, default=10_000, help="futures in flight at once")
    options = parser.parse_args()
    tasks = options.tasks
    columns: dict[str, list[tuple[float, float]]] = {"lambda_get": [], "LambdaCluster": []}
    with (
        LambdaScheduler(plan="none") as scheduler,
        LambdaCluster(dashboard_address=None) as cluster,
        cluster.get_client() as client,
    ):

        def through(tasks: int) -> Any:
            return client.gather(client.map(increment, range(tasks), pure=False))

        for _ in range(options.rounds + 1):
            columns["lambda_get"].append(timed(lambda: with_lambda_get(scheduler, tasks), tasks))
            columns["LambdaCluster"].append(timed(lambda: through(tasks), tasks))
        print(f"{tasks:,} trivial tasks, medians of {options.rounds} rounds")
        print(f"{'':16}{'seconds':>10}{'ms CPU/task':>14}")
        seconds = {}
        for name, rounds in columns.items():
            wall, cpu = map(statistics.median, zip(*rounds[1:], strict=True))  # the first warms up
            seconds[name] = wall
            print(f"{name:16}{wall:10.2f}{cpu:14.3f}")
        print(f"LambdaCluster / lambda_get: {seconds['LambdaCluster'] / seconds['lambda_get']:.2f}")
        process = psutil.Process(os.getpid())
        before = process.memory_info().rss
        wall, cpu = timed(lambda: through(options.flight), options.flight)
        grown = (process.memory_info().rss - before) / 2**20
        print(
            f"{options.flight:,} futures in flight: {wall:.2f} s, {options.flight / wall:,.0f} "
            f"tasks/s, {cpu:.3f} ms CPU/task, memory of this process +{grown:,.0f} MB"
        )


if __name__ == "__main__":
    main()
