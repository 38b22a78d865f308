"""What an invocation costs: ``python -m benchmarks.overhead``.

Three measurements, each printed as medians of several rounds:

* *engine*: from Dask's graph to the results (normalising, planning, state machine, encoding,
  dispatch) for trivial tasks, with Lambda replaced by a function in the same process that answers
  at once (no network, no AWS; the time inside that function is subtracted), in tasks for each
  second of processor time.
* *calls*: 1,000 trivial delayed calls on the embedded AWS, as planned by default (they travel in
  batches) and with one invocation each, next to dask.distributed with two worker processes in the
  same rounds, in seconds, with the ratios.
* *client CPU*: processor time of this process for each of these invocations, in milliseconds, from
  Dask's graph to the results, with results inline and with every result through S3.

With ``--memory`` it prints what a graph of 100,000 tasks takes of the client's memory instead.
"""

from __future__ import annotations

import argparse
import base64
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import neg
from typing import Any

import dask
import psutil
from dask.base import collections_to_expr
from obstore.store import MemoryStore

from dask_lambda import LambdaScheduler
from dask_lambda.dispatch import Engine
from dask_lambda.graph import materialise, normalise
from dask_lambda.invoke import Reply
from dask_lambda.plan import make_plan
from dask_lambda.run import RunFailed, RunSucceeded
from lambda_worker import codec


def increment(x: int) -> int:
    """Do next to nothing."""
    return x + 1


def calls(count: int) -> list[Any]:
    """Return delayed trivial calls."""
    return [dask.delayed(increment)(i) for i in range(count)]


# ---------------------------------------------------------------------------------------------
# the engine alone
# ---------------------------------------------------------------------------------------------


class InstantLambda:
    """Answers every request at once with the same small inline result."""

    memory_mb = 1769
    seconds = 0.0  #: spent in this replacement itself

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def check(self) -> None:
        """Find nothing wrong."""

    async def invoke(self, payload: bytes) -> Reply:
        """Answer without running anything."""
        started = time.thread_time()
        event = json.loads(payload)
        groups = []
        for group in event["groups"]:
            secret = base64.b64decode(event["secrets"][event["run"]])
            outputs = []
            for name in group["outputs"]:
                data = codec.dumps(1, secret, name)
                outputs.append(
                    {"name": name, "size": len(data), "data": base64.b64encode(data).decode()}
                )
            groups.append({"outputs": outputs, "seconds": 0.0})
        content = {"cold": False, "memory_mb": 1769, "milliseconds": 1.0, "groups": groups}
        self.seconds += time.thread_time() - started
        return Reply(content)


@dataclass
class InstantBackend:
    """A backend without AWS."""

    local: None = None
    invokers: list[InstantLambda] = field(default_factory=lambda: [InstantLambda()])
    bucket_name: str = "memory"
    bucket: Any = field(default_factory=MemoryStore)
    prefix: str = "benchmark"
    window: int = 1000
    function: str = "instant"
    region: str = "nowhere"
    endpoint_url: str | None = None
    lasting: bool = False

    def is_alive(self) -> bool:
        """Always."""
        return True

    def check(self) -> None:
        """Find nothing wrong."""

    def refresh(self) -> None:
        """Keep the credentials, of which there are none."""


def graph_of(collections: Any) -> tuple[Any, Any]:
    """Return the graph and keys of what Dask would hand a scheduler: Dask's own work."""
    expr = collections_to_expr(collections, True).optimize()
    return expr.__dask_graph__(), list(expr.__dask_keys__())


def engine_rate(collections: Any) -> float:
    """Return tasks for each processor second, from the graph to the results."""
    dsk, keys = graph_of(collections)
    gc.collect()  # of making the graph
    backend = InstantBackend()
    engine = Engine(backend)
    engine.open()
    try:
        started = time.process_time()
        graph = normalise(materialise(dsk), keys)
        plan = make_plan(graph)
        run = engine.start(plan, inline_bytes=65536)
        match run.events.get():
            case RunFailed(exception):
                raise exception
            case RunSucceeded():
                pass
        for key in plan.fetch:
            run.load(key)
        seconds = time.process_time() - started - backend.invokers[0].seconds
        return len(plan.groups) / seconds
    finally:
        engine.close()


# ---------------------------------------------------------------------------------------------
# with the embedded AWS
# ---------------------------------------------------------------------------------------------


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and processor seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Print all measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine-only", action="store_true")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    rounds = range(arguments.rounds)
    if arguments.memory:
        print_memory()
        return

    work: dict[str, Callable[[], list[Any]]] = {
        "10,000 calls of this module": lambda: calls(10_000),
        "10,000 calls of a library": lambda: [dask.delayed(neg)(i) for i in range(10_000)],
        "tree reduction of 8,192 leaves": lambda: [tree(8192)],
        "matmul, 16 x 16 blocks": lambda: [matmul(16)],
    }
    print("engine alone (no network)")
    for name, make in work.items():
        rates = [engine_rate(make()) for _ in rounds]
        print(f"  {name:32} {statistics.median(rates):9,.0f} tasks/s")
    if arguments.engine_only:
        return

    from distributed import Client, LocalCluster

    count = arguments.calls
    batched: list[float] = []
    single: list[float] = []
    ours_cpu: list[float] = []
    s3_cpu: list[float] = []
    theirs: list[float] = []
    with (
        LambdaScheduler(backend="local") as scheduler,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        graph, keys = graph_of(calls(count))
        one_each: dict[str, Any] = {"scheduler": scheduler, "plan": "none"}
        through_s3: dict[str, Any] = {"inline_bytes": 0, "plan": "none"}
        for each in (scheduler, client):  # start processes, import modules
            dask.compute(calls(100), scheduler=each)
        for _ in rounds:
            batched.append(timed(lambda: dask.compute(calls(count), scheduler=scheduler))[0])
            theirs.append(timed(lambda: dask.compute(calls(count), scheduler=client))[0])
            single.append(timed(lambda: dask.compute(calls(count), **one_each))[0])
            ours_cpu.append(timed(lambda: scheduler.get(graph, keys, plan="none"))[1] / count)
            s3_cpu.append(timed(lambda: scheduler.get(graph, keys, **through_s3))[1] / count)
    print(f"{count:,} trivial delayed calls on the embedded AWS (medians of rounds)")
    print(f"  dask.distributed, 2 processes    {statistics.median(theirs):9.2f} s   ratio")
    for name, ours in {"in batches": batched, "one invocation each": single}.items():
        ratio = statistics.median(map(div, ours, theirs))
        text = f"dask_lambda, {name}"
        print(f"  {text:32} {statistics.median(ours):9.2f} s   {ratio:5.2f}")
    print("client CPU for each invocation")
    print(f"  results inline                   {statistics.median(ours_cpu) * 1e3:9.2f} ms")
    print(f"  results through S3               {statistics.median(s3_cpu) * 1e3:9.2f} ms")


def tree(leaves: int) -> Any:
    """Return a binary tree of trivial additions."""
    level = calls(leaves)
    add = dask.delayed(lambda a, b: a + b)
    while len(level) > 1:
        level = [add(*level[i : i + 2]) for i in range(0, len(level), 2)]
    return level[0]


def matmul(blocks: int) -> Any:
    """Return a product of matrices of so many small blocks a side."""
    import dask.array as da

    x = da.ones((100 * blocks, 100 * blocks), chunks=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", da.PerformanceWarning)
        return x @ x


def print_memory() -> None:
    """Print the memory of this process before, while and after 100,000 tasks are run."""
    count, width = 100_000, 16
    graph: dict[Any, Any] = {("leaf", i): (increment, i) for i in range(count)}
    level, depth = list(graph), 0
    while len(level) > 1:
        level_below, level = level, []
        for start in range(0, len(level_below), width):
            level.append(("sum", depth, start))
            graph[level[-1]] = (sum, level_below[start : start + width])
        depth += 1
    print(f"{len(graph):,} tasks, a reduction by {width}")
    print(f"  with the graph         {megabytes():6.0f} MB")
    engine = Engine(InstantBackend())
    engine.open()
    try:
        nodes = normalise(materialise(graph), level[0])
        plan = make_plan(nodes)
        print(f"  with the plan          {megabytes():6.0f} MB")
        run = engine.start(plan, inline_bytes=65536)
        peak = 0.0
        while run.events.empty():
            peak = max(peak, megabytes())
            time.sleep(0.05)
    finally:
        engine.close()
    print(f"  peak during the run    {peak:6.0f} MB")


def megabytes() -> float:
    """Return this process's memory."""
    return psutil.Process().memory_info().rss / 2**20


def div(a: float, b: float) -> float:
    """Divide."""
    return a / b


if __name__ == "__main__":
    main()
