"""What would run together, asked without running it."""

from __future__ import annotations

from typing import Any

import dask
import dask.array as da
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler, last_report


def product() -> Any:
    x = da.random.default_rng(0).random((2048, 2048), chunks=512)
    return (x @ x).sum()


def test_the_plan_says_what_runs_together_and_why() -> None:
    text = str(LambdaScheduler(concurrency=1000).explain(product()))
    assert "plan: auto" in text
    assert " repeated in " in text
    assert " merged into " in text
    assert " not merged into " in text


def test_it_follows_the_settings() -> None:
    plan = LambdaScheduler(plan="none").explain(product())
    assert all(len(group.tasks) == 1 for group in plan.groups)
    few = LambdaScheduler(concurrency=1).explain(product())
    many = LambdaScheduler(concurrency=1000).explain(product())
    assert len(few.groups) < len(many.groups)


def test_several_collections_are_planned_together() -> None:
    plan = LambdaScheduler().explain(delayed(abs)(-1), delayed(abs)(-2))
    assert len(plan.fetch) == 2


def test_nothing_runs_and_nothing_is_connected_to() -> None:
    before = last_report()
    settings = {"dask-lambda.function": "f", "dask-lambda.bucket": "b"}
    with dask.config.set(settings):  # of an account that nobody can reach
        LambdaScheduler(endpoint_url="http://127.0.0.1:9").explain(product())
    assert last_report() is before


def test_what_cannot_fit_is_said_before_anything_runs() -> None:
    with dask.annotate(memory="5 GB"):
        big = delayed(abs)(-1)
    with pytest.raises(MemoryError, match="4,768 MB"):
        LambdaScheduler().explain(big)
