"""What the planner makes of a graph: ``python -m benchmarks.plans``.

Counted, not timed: invocations, PUTs and block GETs of products and factorisations of 16 x 16
tiles, of a tree, and what one invocation a task would take.  Then the same products and
factorisations on the embedded AWS, as their run reports count them.  Then the time and the memory
of planning, and the rate of the state machine alone.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
import warnings
from collections.abc import Callable
from operator import add
from typing import Any

import dask
import dask.array as da
import numpy as np

from benchmarks.overhead import graph_of
from dask_lambda import LambdaScheduler
from dask_lambda.cost_model import CostModel
from dask_lambda.events import Done, GroupsAdded, InvocationEnded, Invoke
from dask_lambda.graph import Graph, materialise, normalise
from dask_lambda.plan import Group, Plan, PlanMode, make_plan
from dask_lambda.state import State

TILES = 16


def tiled(tiles: int, tile: int = 512) -> Any:
    """Return a square array of so many tiles a side, which takes no memory."""
    return da.from_array(np.broadcast_to(1.0, (tiles * tile, tiles * tile)), chunks=tile)


def product(tiles: int = TILES) -> Any:
    """Return a product of two arrays."""
    return tiled(tiles) @ tiled(tiles)


def factor(tiles: int = TILES) -> Any:
    """Return a Cholesky factor."""
    return da.linalg.cholesky(tiled(tiles), lower=True)


def tree(leaves: int = 1024) -> Any:
    """Return a binary tree of additions."""
    level = [dask.delayed(add)(i, 1) for i in range(leaves)]
    while len(level) > 1:
        level = [dask.delayed(add)(*level[i : i + 2]) for i in range(0, len(level), 2)]
    return level[0]


def planned(collection: Any, mode: PlanMode, window: int = 1000) -> tuple[Graph, Plan]:
    """Return the graph of a collection, and its plan."""
    dsk, keys = graph_of([collection])
    graph = normalise(materialise(dsk), keys)
    return graph, make_plan(graph, mode=mode, model=CostModel(window=window))


def reads(plan: Plan) -> int:
    """Return how many values the groups of a plan read, literals and stored results among them."""
    total = 0
    for group in plan.groups:
        inside = set(group.tasks)
        total += len({d for key in group.tasks for d in plan.graph.dependencies(key)} - inside)
    return total


def print_counts() -> None:
    """Print what plans count."""
    print("plans: invocations, values written, values read")
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "product, 16 x 16 tiles, window 64": (product, 64),
        "product, 16 x 16 tiles, window 1,000": (product, 1000),
        "Cholesky, 16 x 16 tiles, window 64": (factor, 64),
        "Cholesky, 16 x 16 tiles, window 1,000": (factor, 1000),
        "tree of 1,024 leaves": (tree, 1000),
    }
    modes: tuple[PlanMode, PlanMode] = ("none", "auto")
    for name, (make, window) in works.items():
        for mode in modes:
            plan = planned(make(), mode, window)[1]
            written = sum(len(group.outputs) for group in plan.groups)
            print(f"  {name:40} {mode:5} {len(plan.groups):6,} {written:6,} {reads(plan):7,}")


def print_real(tile: int = 128) -> None:
    """Print what runs on the embedded AWS count, all data in S3."""
    print(f"on the embedded AWS, {TILES} x {TILES} tiles of {tile} x {tile} in S3")
    with LambdaScheduler(backend="local", inline_bytes=0) as scheduler:
        size = TILES * tile
        x = da.random.random((size, size), chunks=tile).persist(scheduler=scheduler)
        spd = (x @ x.T + size * da.eye(size, chunks=tile)).persist(scheduler=scheduler)
        for name, work in {"product": x @ x, "Cholesky": da.linalg.cholesky(spd)}.items():
            kept = work.persist(scheduler=scheduler)
            report = scheduler.last_report
            assert report is not None
            print(
                f"  {name:10} invocations {report.invocations:5,}  PUTs {report.s3_puts:5,}  "
                f"GETs {report.s3_gets:5,}  cache hits {report.cache_hits:5,}  "
                f"bytes written / result {report.bytes_written / kept.nbytes:.3f}"
            )


def print_planning(tiles: int = 32, rounds: int = 5) -> None:
    """Print time and memory of planning a large product."""
    dsk, keys = graph_of([product(tiles)])
    graph = normalise(materialise(dsk), keys)
    for mode in ("none", "auto"):
        seconds = []
        for _ in range(rounds):
            gc.collect()
            started = time.perf_counter()
            plan = make_plan(graph, mode=mode, model=CostModel(window=64))
            seconds.append(time.perf_counter() - started)
        tracemalloc.start()
        make_plan(graph, mode=mode, model=CostModel(window=64))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        print(
            f"planning {len(graph.tasks):,} tasks ({mode}): {statistics.median(seconds):.2f} s, "
            f"{peak / 2**20:.0f} MB, {len(plan.groups):,} groups"
        )


def print_state(tasks: int = 50_000, rounds: int = 5) -> None:
    """Print how many tasks a second the state machine decides on, alone."""
    rates = []
    groups = [Group((i,), (i // 2,) if i else (), (i,), i) for i in range(tasks)]
    for _ in range(rounds):
        state = State(1000)
        gc.collect()
        started = time.perf_counter()
        flying = [i for i in state.handle(GroupsAdded("r", groups), 0.0) if isinstance(i, Invoke)]
        while flying:
            more = []
            for invoke in flying:
                for said in state.handle(InvocationEnded(invoke.invocation, (Done(),)), 0.0):
                    if isinstance(said, Invoke):
                        more.append(said)
            flying = more
        rates.append(tasks / (time.perf_counter() - started))
    print(f"state machine: {statistics.median(rates):,.0f} tasks/s")


def main() -> None:
    """Print all."""
    warnings.simplefilter("ignore", da.PerformanceWarning)
    print_counts()
    print_planning()
    print_state()
    print_real()


if __name__ == "__main__":
    main()
