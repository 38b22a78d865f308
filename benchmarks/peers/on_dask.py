"""The workloads in Dask: on Lambda with dask_lambda, or with dask.distributed.

Both systems run the same code in the same environment; the first argument says which.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import dask.array as da
from dask.base import compute
from dask.delayed import delayed

from benchmarks.peers.system import CORES, Function, serve


def increment(x: int) -> int:
    """Do next to nothing."""
    return x + 1


def add(x: int, y: int) -> int:
    """Do next to nothing with two."""
    return x + y


def trivial_calls(scheduler: Any, calls: int) -> float:
    """Map."""
    call = delayed(increment)
    return float(sum(compute([call(i) for i in range(calls)], scheduler=scheduler)[0]))


def tree(scheduler: Any, leaves: int) -> float:
    """Add in pairs."""
    first, pair = delayed(increment), delayed(add)
    level = [first(i) for i in range(leaves)]
    while len(level) > 1:
        level = [pair(*level[i : i + 2]) for i in range(0, len(level), 2)]
    return float(level[0].compute(scheduler=scheduler))


def uniform(rows: int, columns: int, chunks: tuple[int, int]) -> Any:
    """Return an array of random numbers; the same at each call."""
    return da.random.default_rng(0).random((rows, columns), chunks=chunks)


def matmul(scheduler: Any, n: int, chunk: int) -> float:
    """Multiply."""
    x = uniform(n, n, (chunk, chunk))
    return float((x @ x).sum().compute(scheduler=scheduler))


def cholesky(scheduler: Any, n: int, chunk: int) -> float:
    """Factorise."""
    x = uniform(n, n, (chunk, chunk))
    factor = da.linalg.cholesky(x @ x.T + n * da.eye(n, chunks=chunk), lower=True)
    return float((factor**2).sum().compute(scheduler=scheduler))


def tsqr(scheduler: Any, rows: int, columns: int, blocks: int) -> float:
    """Orthogonalise a tall and skinny array."""
    x = uniform(rows, columns, (-(-rows // blocks), columns))
    _, r = da.linalg.qr(x)
    return float(da.linalg.norm(r).compute(scheduler=scheduler))


WORK = {
    "map": trivial_calls,
    "tree": tree,
    "matmul": matmul,
    "cholesky": cholesky,
    "tsqr": tsqr,
}


@contextmanager
def on_lambda() -> Iterator[dict[str, Function]]:
    """With dask_lambda as it is, but for where the function and the bucket are."""
    from dask_lambda import LambdaScheduler

    with LambdaScheduler(
        backend="aws",
        function=os.environ["BENCHMARK_FUNCTION"],
        bucket=os.environ["BENCHMARK_FUNCTION_BUCKET"],
        endpoint_url=os.environ["AWS_ENDPOINT_URL"],
        concurrency=int(os.environ["BENCHMARK_CONCURRENCY"]),
    ) as scheduler:

        def run(work: Any, **size: int) -> tuple[float, dict[str, Any]]:
            value = work(scheduler, **size)
            assert scheduler.last_report is not None
            return value, {"report": scheduler.last_report.to_dict()}

        yield {name: partial(run, work) for name, work in WORK.items()}


@contextmanager
def on_distributed() -> Iterator[dict[str, Function]]:
    """With a local cluster: one process of one thread for each core."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=CORES, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):

        def run(work: Any, **size: int) -> tuple[float, dict[str, Any]]:
            return work(client, **size), {}

        yield {name: partial(run, work) for name, work in WORK.items()}


if __name__ == "__main__":
    if sys.argv[1] == "lambda":
        serve(["dask"], on_lambda)
    else:
        serve(["distributed"], on_distributed)
