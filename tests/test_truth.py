"""The benchmark's shapes next to what the tasks really return."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest

from benchmarks.truth import Machine, true_estimates
from benchmarks.workloads import Inputs, cholesky, gemm, graph_of, svd, tree, tsqr
from dask_lambda.graph import Graph
from dask_lambda.plan import make_plan, topological

MACHINE = Machine()


def run(graph: Graph) -> dict[Any, Any]:
    """The values of all tasks."""
    values = dict(graph.literals)
    for key in topological(graph, set()):
        task = graph.tasks[key]
        values[key] = task({name: values[graph.resolve(name)] for name in task.dependencies})
    return values


def size(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(size, value))
    return np.asarray(value).nbytes


def positive_definite(blocks: int) -> da.Array:
    n = 10 * blocks
    x = da.random.default_rng(1).random((n, n), chunks=10)
    return x + x.T + 2 * n * da.eye(n, chunks=10)


def product() -> Any:
    return da.random.default_rng(1).random((60, 40), chunks=10) @ da.ones((40, 50), chunks=10)


TALL = (200, 8), (25, 8)


@pytest.mark.parametrize(
    "make",
    [
        product,
        lambda: da.linalg.cholesky(positive_definite(7), lower=True),
        lambda: da.linalg.tsqr(da.random.default_rng(1).random(TALL[0], chunks=TALL[1])),
        lambda: da.linalg.svd(da.random.default_rng(1).random(TALL[0], chunks=TALL[1])),
    ],
    ids=["matmul", "cholesky", "tsqr", "svd"],
)
def test_sizes_are_those_of_the_values(make):
    made = make()
    graph = graph_of(*(made if isinstance(made, tuple | list) else [made]))
    expected = true_estimates(graph, MACHINE)
    real = run(graph)
    finalised = {key for key in graph.tasks if "finalize" in str(key)}
    wrong = {
        key: (expected.nbytes[key], size(real[key]))
        for key in graph.tasks.keys() - finalised
        if expected.nbytes[key] != size(real[key])
    }
    assert not wrong


def test_a_product_takes_two_operations_for_each_pair_of_numbers():
    inputs = Inputs()
    graph = graph_of(*gemm(400, 100)(inputs))
    machine = Machine(vcpus=2.0, bytes=1e30, call=0.0)
    seconds = true_estimates(graph, machine, inputs.shapes).seconds
    assert sum(seconds.values()) == pytest.approx(2 * 400**3 / 50e9)


@pytest.mark.parametrize(
    "make", [gemm(40, 10), cholesky(80, 10), tsqr(160, 4, 20), svd(160, 4, 20), tree(16)]
)
def test_workloads_read_their_inputs_from_s3_and_can_be_planned(make):
    inputs = Inputs()
    graph = graph_of(*make(inputs))
    assert len(inputs.shapes) == 0 or graph.stored
    for mode in ("none", "auto"):
        plan = make_plan(graph, mode=mode, finalise=False)
        assert {key for group in plan.groups for key in group.tasks} == set(plan.graph.tasks)
