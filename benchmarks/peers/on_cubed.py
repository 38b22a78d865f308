"""The workloads in Cubed's array API, with its executor of processes and Zarr in S3.

Cubed has arrays only, so the map is ``map_blocks`` over an array with a chunk for each call, and
the tree is its ``sum`` in chunks of one with ``split_every=2``.  Of its options those are chosen
that were the fastest here: processes rather than threads, obstore rather than s3fs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cubed
import cubed.array_api as xp
import cubed.random

from benchmarks.peers.system import CORES, Function, serve

#: For each process; what makes the fewest rounds of these workloads.
ALLOWED_MEMORY = "2GB"


def increment(block: Any) -> Any:
    """Do next to nothing."""
    return block + 1


def trivial_calls(spec: Any, calls: int) -> float:
    """Map."""
    x = xp.arange(calls, chunks=1, spec=spec)
    return float(cubed.map_blocks(increment, x, dtype=x.dtype).compute().sum())


def tree(spec: Any, leaves: int) -> float:
    """Add in pairs."""
    x = xp.arange(leaves, chunks=1, spec=spec)
    leaf = cubed.map_blocks(increment, x, dtype=x.dtype)
    return float(xp.sum(leaf, split_every=2).compute())


def matmul(spec: Any, n: int, chunk: int) -> float:
    """Multiply."""
    x = cubed.random.random((n, n), chunks=(chunk, chunk), spec=spec)
    return float(xp.sum(xp.matmul(x, x)).compute())


def tsqr(spec: Any, rows: int, columns: int, blocks: int) -> float:
    """Orthogonalise a tall and skinny array."""
    x = cubed.random.random((rows, columns), chunks=(-(-rows // blocks), columns), spec=spec)
    _, r = xp.linalg.qr(x)
    return float(xp.sqrt(xp.sum(r * r)).compute())


WORK = {"map": trivial_calls, "tree": tree, "matmul": matmul, "tsqr": tsqr}


@contextmanager
def on_processes() -> Iterator[dict[str, Function]]:
    """With as many processes as cores; Cubed starts them for each computation."""
    spec = cubed.Spec(
        f"s3://{os.environ['BENCHMARK_BUCKET']}/cubed",
        allowed_mem=ALLOWED_MEMORY,
        executor_name="processes",
        executor_options={"max_workers": CORES},
        storage_options={"use_obstore": True},  # with AWS's environment variables
    )

    def run(work: Any, **size: int) -> tuple[float, dict[str, Any]]:
        return work(spec, **size), {}

    yield {name: partial(run, work) for name, work in WORK.items()}


if __name__ == "__main__":
    serve(["cubed", "zarr", "obstore"], on_processes)
