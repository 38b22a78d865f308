"""Persisted collections stay in S3, are used from there, and go when nobody needs them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed

import dask_lambda
from dask_lambda import LambdaScheduler, lambda_get, last_report
from dask_lambda.errors import LostDataError
from tests.helpers import eventually

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("one_task_each")]
ROOT = Path(dask_lambda.__file__).parents[1]
uses_bucket = True

Names = Callable[[], list[str]]


def given() -> da.Array:
    return da.from_array(np.arange(24.0).reshape(6, 4), chunks=(2, 4))


def blocks() -> da.Array:
    return given() * 1


def squares() -> Any:
    return db.from_sequence(range(9), npartitions=3).map(lambda x: x * x)


def table() -> Any:
    frame = pd.DataFrame({"key": list("abab"), "value": [1.0, 2.0, 3.0, 4.0]})
    return dd.from_pandas(frame, npartitions=2).assign(more=1)


def invocations() -> int:
    report = last_report()
    assert report is not None
    return report.invocations


CASES = {
    "array": (blocks, lambda x: (x + 1).sum(), 3),
    "bag": (squares, lambda x: x.sum(), 3),
    "delayed": (lambda: delayed(sum)([1, 2]), lambda x: x + 1, 1),
    "dataframe": (table, lambda x: x.groupby("key").value.sum(), 2),
}


@pytest.mark.parametrize(("make", "use", "count"), CASES.values(), ids=CASES)
def test_results_stay_in_s3_until_the_collection_is_gone(
    make: Callable[[], Any],
    use: Callable[[Any], Any],
    count: int,
    bucket_names: Names,
) -> None:
    expected = make().compute(scheduler="sync")
    expected_use = use(make()).compute(scheduler="sync")

    kept = make().persist(scheduler=lambda_get)

    assert type(kept) is type(make())
    assert len(bucket_names()) == count

    # Itself: nothing runs.
    found = kept.compute(scheduler=lambda_get)
    assert invocations() == 0
    assert type(found) is type(expected)
    assert str(found) == str(expected)

    # Something made from it: no invocation only loads.
    found = use(kept).compute(scheduler=lambda_get)
    assert str(found) == str(expected_use)
    assert len(bucket_names()) == count
    plain = invocations()
    use(make()).compute(scheduler=lambda_get)
    assert plain <= invocations()

    # In this process.
    assert str(use(kept).compute(scheduler="threads")) == str(expected_use)
    assert str(kept.compute(scheduler="sync")) == str(expected)

    del kept, found
    gc.collect()
    assert eventually(lambda: not bucket_names())


def test_a_load_does_not_take_an_invocation_of_its_own(bucket_names: Names) -> None:
    kept = delayed(np.ones)(5).persist(scheduler=lambda_get)
    used = delayed(np.sum)(kept)
    assert used.compute(scheduler=lambda_get) == 5
    assert invocations() == 1
    a, b = dask.compute(used, kept, scheduler=lambda_get)
    assert invocations() == 1
    assert (a, b.tolist()) == (5, [1] * 5)
    assert len(bucket_names()) == 1


def test_what_was_made_from_a_collection_keeps_its_objects(bucket_names: Names) -> None:
    kept = blocks().persist(scheduler=lambda_get)
    later = kept[:2] * 2
    again = kept.persist(scheduler=lambda_get)
    assert invocations() == 0
    del kept
    gc.collect()
    assert (later.compute(scheduler=lambda_get) == np.arange(8.0).reshape(2, 4) * 2).all()
    del later
    gc.collect()
    assert again.sum().compute(scheduler=lambda_get) == 276
    assert len(bucket_names()) == 3
    del again
    gc.collect()
    assert eventually(lambda: not bucket_names())


def test_persisted_results_of_several_runs_meet_in_one_task() -> None:
    first = blocks().persist(scheduler=lambda_get)
    second = (first + 1).persist(scheduler=lambda_get)
    third = delayed(np.ones)(4).persist(scheduler=lambda_get)
    found = (first * second + da.from_delayed(third, (4,), float)).sum()
    assert found.compute(scheduler=lambda_get) == found.compute(scheduler="sync")


def test_collections_of_several_kinds_are_persisted_at_once(bucket_names: Names) -> None:
    x, y, z, other = dask.persist(
        blocks(), squares(), {"nested": delayed(sum)([1, 2])}, 5, scheduler=lambda_get
    )
    assert len(bucket_names()) == 3 + 3 + 1
    assert other == 5
    found = dask.compute(x.sum(), y.sum(), z["nested"], scheduler=lambda_get)
    assert found == (276, 204, 3)


@pytest.mark.parametrize("optimize_graph", [True, False])
def test_persist_without_and_with_optimisation(optimize_graph: bool) -> None:
    kept = (blocks() + 1).persist(scheduler="lambda", optimize_graph=optimize_graph)
    assert kept.sum().compute(scheduler=lambda_get) == 276 + 24


def test_a_task_may_change_a_persisted_block_in_place() -> None:
    kept = delayed(np.zeros)(30_000).persist(scheduler=lambda_get)

    @delayed
    def fill(x: np.ndarray, value: float) -> float:
        seen = float(x.sum())
        x[:] = value
        return seen

    assert dask.compute(*[fill(kept, i + 1) for i in range(4)], scheduler=lambda_get) == (0.0,) * 4
    mine = kept.compute(scheduler=lambda_get)
    mine[:] = 7
    assert not kept.compute(scheduler=lambda_get).any()


def test_data_that_the_graph_holds_already_may_be_persisted_too(bucket_names: Names) -> None:
    number = delayed(5).persist(scheduler=lambda_get)
    assert number.compute(scheduler=lambda_get) == 5
    assert (number + 1).compute(scheduler=lambda_get) == 6
    kept = given().persist(scheduler=lambda_get)
    assert invocations() == 0
    assert kept.sum().compute(scheduler=lambda_get) == 276


def test_closing_deletes_what_was_persisted_and_says_so_later(bucket_names: Names) -> None:
    scheduler = LambdaScheduler()
    kept = blocks().persist(scheduler=scheduler)
    assert len(bucket_names()) == 3
    assert kept.sum().compute(scheduler=scheduler) == 276

    scheduler.close()

    assert not bucket_names()
    for get in (scheduler, lambda_get):
        with pytest.raises(LostDataError, match="persist again"):
            kept.sum().compute(scheduler=get)
        with pytest.raises(LostDataError, match="persist again"):
            kept.compute(scheduler=get)
    with pytest.raises(LookupError, match="closed"):
        kept.compute(scheduler="sync")
    scheduler.close()


def test_a_failure_while_persisting_leaves_nothing(bucket_names: Names) -> None:
    broken = blocks().map_blocks(lambda b: 1 / 0 if b[0, 0] else b, dtype=float, meta=np.ones(1))
    with pytest.raises(ZeroDivisionError):
        broken.persist(scheduler=lambda_get)
    assert eventually(lambda: not bucket_names())


PROGRAM = """
import dask.array as da, os, sys
from dask_lambda import LambdaScheduler

s = LambdaScheduler(backend="aws", function=sys.argv[1], bucket=sys.argv[2],
                    region="us-east-1", endpoint_url=sys.argv[3], concurrency=2)
x = da.ones((4, 50_000), chunks=(1, -1)).persist(scheduler=s)
print(int(x.sum().compute(scheduler=s)), flush=True)
sys.stdin.readline()
if sys.argv[4] == "exit with an error":
    raise SystemExit(3)
"""


@pytest.mark.parametrize("way", ["exit", "exit with an error"])
def test_the_end_of_the_interpreter_deletes_what_was_persisted(
    aws: Any, credentials: dict[str, str], bucket_names: Names, way: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, aws.function, aws.bucket, aws.endpoint_url, way],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **credentials, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "200000\n"
        assert len(bucket_names()) == 4
        process.communicate("\n", timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == (3 if way == "exit with an error" else 0)
    assert not bucket_names()
