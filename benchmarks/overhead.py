"""What an invocation costs: ``python -m benchmarks.overhead``.

Three measurements, each printed as medians of several rounds:

* *engine*: from Dask's graph to the results (normalising, planning, state machine, encoding,
  dispatch) for trivial tasks, with Lambda replaced by a function in the same process that answers
  at once (no network, no AWS; the time inside that function is subtracted), in tasks for each
  second of processor time.
* *calls*: 1,000 trivial delayed calls, one invocation each, on the embedded AWS, next to
  dask.distributed with two worker processes in the same rounds, in seconds, with the ratio.
* *client CPU*: processor time of this process for each invocation, in milliseconds, with results
  inline and with every result through S3.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dask
from obstore.store import MemoryStore

from dask_lambda import LambdaScheduler
from dask_lambda.dispatch import Engine, RunFailed, RunSucceeded
from dask_lambda.graph import materialise, normalise
from dask_lambda.invoke import Reply
from dask_lambda.plan import make_plan
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
        await asyncio.sleep(0)
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

    invoker: InstantLambda = field(default_factory=InstantLambda)
    bucket_name: str = "memory"
    bucket: Any = field(default_factory=MemoryStore)
    prefix: str = "benchmark"
    window: int = 1000

    def is_alive(self) -> bool:
        """Always."""
        return True

    def check(self) -> None:
        """Find nothing wrong."""


def graph_of(collections: Any) -> tuple[Any, Any]:
    """Return what Dask would hand a scheduler."""
    from dask.base import collections_to_expr

    expr = collections_to_expr(collections, True).optimize()
    return expr, list(expr.__dask_keys__())


def engine_rate(collections: Any) -> float:
    """Return tasks for each processor second, from the graph to the results."""
    expr, keys = graph_of(collections)
    expr = expr.__dask_graph__()  # making the graph is Dask's own work
    backend = InstantBackend()
    engine = Engine(backend)
    engine.open()
    try:
        started = time.process_time()
        graph = normalise(materialise(expr), keys)
        plan = make_plan(graph)
        run = engine.start(graph, plan, inline_bytes=65536)
        match run.events.get():
            case RunFailed(exception):
                raise exception
            case RunSucceeded():
                pass
        for key in plan.fetch:
            run.load(key)
        seconds = time.process_time() - started - backend.invoker.seconds
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
    arguments = parser.parse_args()
    rounds = range(arguments.rounds)

    import dask.array as da

    work = {
        "10,000 delayed calls": calls(10_000),
        "tree reduction of 8,192 leaves": [tree(8192)],
        "matmul, 16 x 16 blocks": [
            da.ones((1600, 1600), chunks=100) @ da.ones((1600, 1600), chunks=100)
        ],
    }
    print("engine alone (no network)")
    for name, collections in work.items():
        rates = [engine_rate(collections) for _ in rounds]
        print(f"  {name:32} {statistics.median(rates):9,.0f} tasks/s")
    if arguments.engine_only:
        return

    from distributed import Client, LocalCluster

    count = arguments.calls
    ours: list[float] = []
    ours_cpu: list[float] = []
    s3_cpu: list[float] = []
    theirs: list[float] = []
    with (
        LambdaScheduler(backend="local") as scheduler,
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        s3 = LambdaScheduler(backend="local", inline_bytes=0)
        for each in (scheduler, s3, client):  # start processes, import modules
            dask.compute(calls(100), scheduler=each)
        for _ in rounds:
            wall, cpu = timed(lambda: dask.compute(calls(count), scheduler=scheduler))
            ours.append(wall)
            ours_cpu.append(cpu / count)
            theirs.append(timed(lambda: dask.compute(calls(count), scheduler=client))[0])
            s3_cpu.append(timed(lambda: dask.compute(calls(count), scheduler=s3))[1] / count)
        s3.close()
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(f"{count:,} trivial delayed calls, one invocation each, on the embedded AWS")
    print(f"  dask_lambda                      {mine:9.2f} s")
    print(f"  dask.distributed, 2 processes    {other:9.2f} s")
    print(f"  ratio (median of rounds)         {statistics.median(map(div, ours, theirs)):9.2f}")
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


def div(a: float, b: float) -> float:
    """Divide."""
    return a / b


if __name__ == "__main__":
    main()
