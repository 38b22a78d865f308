"""The workloads of two papers as Dask collections, whose inputs are in S3 already.

Wukong: Carver et al., "Wukong: A Scalable and Locality-Enhanced Framework for Serverless Parallel
Computing", SoCC 2020.  numpywren: Shankar et al., "Serverless Linear Algebra", SoCC 2020.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import dask
import dask.array as da
from dask.base import collections_to_expr

from dask_lambda.estimates import Estimates
from dask_lambda.graph import Graph, materialise, normalise
from dask_lambda.stored import StoredBlock
from lambda_worker.protocol import Reference, load_reference


def graph_of(*collections: Any) -> Graph:
    """Return the graph that a scheduler is asked to run for some collections."""
    dsk, keys = dask_graph(*collections)
    return normalise(materialise(dsk), keys)


def dask_graph(*collections: Any) -> tuple[Any, list[Any]]:
    """Return what Dask hands a scheduler for some collections."""
    expr = collections_to_expr(list(collections), True).optimize()
    return expr, list(expr.__dask_keys__())


@dataclass
class Inputs:
    """Matrices whose blocks are in S3.

    Attributes
    ----------
    shapes : dict
        Object name to shape.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def matrix(self, name: str, shape: tuple[int, ...], chunks: Any) -> da.Array:
        """Return an array as :func:`dask.persist` returns it."""
        chunks = da.core.normalize_chunks(chunks, shape, dtype=float)
        graph = {}
        for index in itertools.product(*(range(len(axis)) for axis in chunks)):
            block = tuple(axis[i] for axis, i in zip(chunks, index, strict=True))
            name_of_block = f"0/benchmark/inputs/{name}-{'-'.join(map(str, index))}"
            self.shapes[name_of_block] = block
            key = (name, *index)
            reference = Reference(name_of_block, math.prod(block) * 8)
            graph[key] = StoredBlock(key, load_reference, reference)
        return da.Array(graph, name, chunks, dtype=float)


@dataclass(frozen=True)
class Workload:
    """One row of the benchmark.

    Attributes
    ----------
    name : str
    make : callable
        The collections, from the inputs.
    published : float, optional
        Seconds.
    source : str
        Where.
    memory_mb : int
        Of the function.
    chunks : str
        What the blocks are, in words.
    sleep : float, optional
        What each task takes, where that is given and not computed.
    """

    name: str
    make: Callable[[Inputs], list[Any]]
    published: float | None
    source: str
    memory_mb: int
    chunks: str
    sleep: float | None = None


def gemm(n: int, chunk: int) -> Callable[[Inputs], list[Any]]:
    """Return the product of two square matrices."""

    def make(inputs: Inputs) -> list[Any]:
        a = inputs.matrix("A", (n, n), chunk)
        b = inputs.matrix("B", (n, n), chunk)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", da.PerformanceWarning)
            return [a @ b]

    return make


def cholesky(n: int, chunk: int) -> Callable[[Inputs], list[Any]]:
    """Return the lower Cholesky factor of a matrix."""
    return lambda inputs: [da.linalg.cholesky(inputs.matrix("A", (n, n), chunk), lower=True)]


def tsqr(rows: int, columns: int, chunk: int) -> Callable[[Inputs], list[Any]]:
    """Return both factors of the QR decomposition of a tall matrix."""
    return lambda inputs: list(
        da.linalg.tsqr(inputs.matrix("A", (rows, columns), (chunk, columns)))
    )


def svd(rows: int, columns: int, chunk: int) -> Callable[[Inputs], list[Any]]:
    """Return the singular value decomposition of a tall matrix."""
    return lambda inputs: list(da.linalg.svd(inputs.matrix("A", (rows, columns), (chunk, columns))))


def tree(leaves: int) -> Callable[[Inputs], list[Any]]:
    """Return the sum of so many numbers, two at a time."""

    def make(inputs: Inputs) -> list[Any]:
        level = list(range(leaves))
        add = dask.delayed(lambda a, b: a + b, pure=False, name="add")
        while len(level) > 1:
            level = [add(*level[i : i + 2]) for i in range(0, len(level), 2)]
        return level

    return make


def sleeping(graph: Graph, seconds: float) -> Estimates:
    """Return the truth about tasks that sleep and return a number."""
    every = (*graph.tasks, *graph.literals, *graph.stored)
    return Estimates(dict.fromkeys(graph.tasks, seconds), dict.fromkeys(every, 8))


LARGE = 10240

WORKLOADS = (
    Workload("tree reduction, 0.5 s tasks", tree(1024), 7.0, "Wukong", 1769, "1,024 numbers", 0.5),
    Workload("tree reduction, 0 s tasks", tree(1024), 1.7, "Wukong", 1769, "1,024 numbers", 0.0),
    Workload("GEMM 10k x 10k", gemm(10_000, 1000), 12.5, "Wukong", LARGE, "1,000 x 1,000"),
    Workload("GEMM 15k x 15k", gemm(15_000, 1000), 25.1, "Wukong", LARGE, "1,000 x 1,000"),
    Workload("GEMM 25k x 25k", gemm(25_000, 1000), 59.5, "Wukong", LARGE, "1,000 x 1,000"),
    Workload("TSQR 4.1M x 128", tsqr(2**22, 128, 2**16), 2.7, "Wukong", LARGE, "65,536 x 128"),
    Workload("TSQR 16.7M x 128", tsqr(2**24, 128, 2**16), 6.9, "Wukong", LARGE, "65,536 x 128"),
    Workload("SVD 8.1M x 100", svd(8_100_000, 100, 81_000), 3.3, "Wukong", LARGE, "81,000 x 100"),
    Workload(
        "Cholesky 256k x 256k", cholesky(2**18, 4096), 3100.0, "numpywren", LARGE, "4,096 x 4,096"
    ),
    Workload("GEMM 256k x 256k", gemm(2**18, 4096), 2670.0, "numpywren", LARGE, "4,096 x 4,096"),
)
