"""The simulator next to real runs: ``python -m benchmarks.aws_model --validate``.

The same graphs are run for real and simulated, and their wall times and requests compared.  The
model's parameters (:data:`dask_lambda.aws_model.EMBEDDED`) are measured apart from these graphs,
with calls that do nothing; the sum of the seconds of all tasks is that which the workers report.
"""

from __future__ import annotations

import itertools
import operator
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import numpy as np

from benchmarks.workloads import dask_graph, graph_of
from dask_lambda import LambdaScheduler
from dask_lambda.aws_model import EMBEDDED, AwsModel, constant
from dask_lambda.cost_model import CostModel
from dask_lambda.estimates import Estimates
from dask_lambda.graph import Graph
from dask_lambda.kernels import size_of
from dask_lambda.plan import Plan, make_plan, topological
from dask_lambda.report import RunReport
from dask_lambda.simulate import simulate

#: Calibration and comparison take turns, since the machine may be a shared one.
ROUNDS = 3
CALLS = 300
BLOCKS, BLOCK = 60, 2_000_000
TOLERANCE = 0.25
COUNTED = ("tasks", "invocations", "s3_puts", "s3_gets")


def nothing(x: int) -> int:
    """Do nothing."""
    return x


def work(x: int, y: int = 0, seconds: float = 0.02) -> int:
    """Add, slowly."""
    time.sleep(seconds)
    return x + y


def tree() -> Any:
    """Return the sum of 128 numbers."""
    level: list[Any] = list(range(128))
    while len(level) > 1:
        pairs = zip(level[::2], level[1::2], strict=True)
        level = [dask.delayed(work)(*pair) for pair in pairs]
    return level[0]


def matrix(blocks: int, size: int) -> da.Array:
    """Return a positive definite matrix, made block by block where it is needed."""
    n = blocks * size
    return da.eye(n, chunks=size) * (2.0 * n) + da.ones((n, n), chunks=size)


CASES: dict[str, Callable[[], list[Any]]] = {
    "map of 500 calls of 20 ms": lambda: [dask.delayed(work)(i) for i in range(500)],
    "tree of 127 additions of 20 ms": lambda: [tree()],
    "matrix product, 4 x 4 tiles": lambda: [matrix(4, 500) @ matrix(4, 500)],
    "Cholesky, 8 x 8 tiles": lambda: [da.linalg.cholesky(matrix(8, 256), lower=True)],
}


@dataclass(frozen=True)
class Run:
    """What one real run of a graph took."""

    seconds: float
    report: RunReport


def run_for_real(scheduler: LambdaScheduler, make: Callable[[], list[Any]], **options: Any) -> Run:
    """Compute some collections, without the time that Dask takes to make their graph."""
    dsk, keys = dask_graph(*make())
    seconds = _seconds(lambda: scheduler.get(dsk, keys, **options))
    assert scheduler.last_report is not None
    return Run(seconds, scheduler.last_report)


def locally(graph: Graph) -> Estimates:
    """Run each task here, alone, and return what it takes and the size of its value."""
    values: dict[Any, Any] = dict(graph.literals)
    seconds: dict[Any, float] = {}
    for key in topological(graph, set()):
        task = graph.tasks[key]
        given = {name: values[graph.resolve(name)] for name in task.dependencies}
        started = time.perf_counter()
        values[key] = task(given)
        seconds[key] = time.perf_counter() - started
    every = (*graph.tasks, *graph.literals)
    return Estimates(seconds, {key: _bytes(values[key]) for key in every})


def _bytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return size_of(value)


def calibrate(scheduler: LambdaScheduler) -> AwsModel:
    """Measure the model's parameters on this machine, with calls that do nothing.

    One call after the other gives the latency of an invocation, many at a time the processor time
    of client and server together; the client's own part is its processor time.  Blocks that are
    written and read, and not computed, give what S3 and the codec take for each byte.
    """
    chain: Any = 0
    for _ in range(CALLS // 10):
        chain = dask.delayed(nothing)(chain)
    calls = [dask.delayed(nothing)(i) for i in range(CALLS)]
    latencies, walls, cpus = [], [], []
    for _ in range(ROUNDS):
        latencies.append(_seconds(lambda: _get(scheduler, [chain])) * 10 / CALLS)
        cpu = time.process_time()
        walls.append(_seconds(lambda: _get(scheduler, calls)) / CALLS)
        cpus.append((time.process_time() - cpu) / CALLS)
    latency, wall, cpu = (statistics.median(each) for each in (latencies, walls, cpus))
    cores = EMBEDDED.cores
    assert cores is not None
    server = max(0.0, wall * cores - cpu)
    blocks = [dask.delayed(np.ones)(BLOCK // 8) for _ in range(BLOCKS)]
    firsts = [dask.delayed(operator.getitem)(block, 0) for block in blocks]
    copying = statistics.median(_seconds(lambda: _get(scheduler, firsts)) for _ in range(ROUNDS))
    processor = max(copying * cores - 2 * BLOCKS * (cpu + server), 1e-3)
    return EMBEDDED.replace(
        server_bytes=2 * BLOCKS * BLOCK / processor,
        client_seconds=cpu,
        server_seconds=server,
        group_seconds=0.0,
        invoke=constant(max(0.0, latency - cpu - server)),
    )


def _get(scheduler: LambdaScheduler, collections: list[Any]) -> None:
    dsk = {key: node for each in collections for key, node in each.__dask_graph__().items()}
    scheduler.get(dsk, [each.key for each in collections], plan="none")


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def scaled(truth: Estimates, graph: Graph, plan: Plan, compute_seconds: float) -> Estimates:
    """Return the truth with the sum of seconds that the workers have reported.

    Alone a task takes less than next to others on the same processors.
    """
    alone = sum(truth.seconds[key] for group in plan.groups for key in group.tasks)
    factor = compute_seconds / alone
    return Estimates({key: s * factor for key, s in truth.seconds.items()}, truth.nbytes)


def validate() -> None:
    """Print the comparison."""
    with LambdaScheduler(backend="local") as scheduler:
        dask.compute([dask.delayed(work)(i) for i in range(100)], scheduler=scheduler)
        dask.compute(matrix(2, 100) @ matrix(2, 100), scheduler=scheduler)  # import NumPy
        window = next(iter(scheduler._engines.values())).backend.window
        print(
            "| graph | plan | measured s | simulated s | ratio | requests, measured/simulated |\n"
            "|---|---|---|---|---|---|"
        )
        for (name, make), mode in itertools.product(CASES.items(), ("none", "auto")):
            graph = graph_of(*make())
            truth = locally(graph)
            found = [compare(scheduler, window, make, graph, truth, mode) for _ in range(ROUNDS)]
            columns = zip(*(each[:3] for each in found), strict=True)
            measured, simulated, ratio = map(statistics.median, columns)
            real, report = found[-1][3:]
            counts = ", ".join(
                f"{field} {getattr(real, field):,}/{getattr(report, field):,}" for field in COUNTED
            )
            verdict = "" if abs(ratio - 1) <= TOLERANCE else " (!)"
            print(
                f"| {name} | {mode} | {measured:.2f} | {simulated:.2f} | {ratio:.2f}{verdict} "
                f"| {counts} |",
                flush=True,
            )


def compare(
    scheduler: LambdaScheduler,
    window: int,
    make: Callable[[], list[Any]],
    graph: Graph,
    truth: Estimates,
    mode: Any,
) -> tuple[float, float, float, RunReport, RunReport]:
    """Run a graph for real and simulate it; return the seconds, their ratio, and both reports."""
    aws = calibrate(scheduler).replace(warm_environments=window)
    real = run_for_real(scheduler, make, plan=mode)
    plan = make_plan(graph, mode=mode, estimates=truth, model=CostModel(window=window))
    exact = scaled(truth, graph, plan, real.report.compute_seconds)
    simulated = simulate(plan, exact, aws, window=window).report
    ratio = simulated.wall_seconds / real.seconds
    return real.seconds, simulated.wall_seconds, ratio, real.report, simulated
