"""Stragglers, budgets and larger functions, on the embedded AWS."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dask import annotate, compute, delayed

from dask_lambda import LambdaScheduler, lambda_get
from dask_lambda.errors import (
    BudgetExceededError,
    ConfigurationError,
    FunctionNotFoundError,
    OutOfMemoryError,
)
from tests.helpers import report

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]


# -- stragglers ----------------------------------------------------------------------------------


def slow_the_first_time(number: int, directory: str, released: str) -> int:
    """Straggle if it is number 13 and nobody has tried it before."""
    if number == 13:
        try:
            Path(directory, "tried").touch(exist_ok=False)
        except FileExistsError:
            return number
        while not Path(released).exists():
            time.sleep(0.01)
    return number


@pytest.mark.parametrize("inline_bytes", [65536, 0])
def test_a_straggler_is_sent_once_more_and_the_first_result_counts(
    tmp_path: Path, connect: Connect, inline_bytes: int
) -> None:
    scheduler = connect(concurrency=3, plan="none", inline_bytes=inline_bytes)
    released = tmp_path / "released"
    task = delayed(slow_the_first_time)
    try:
        values = compute(
            *(task(i, str(tmp_path), str(released)) for i in range(20)), scheduler=scheduler
        )
    finally:
        released.touch()
    assert values == tuple(range(20))
    assert report().speculative == 1
    assert report().invocations == 20  # of which one was not waited for
    assert report().tasks == 20
    assert report().retries == 0


def test_stragglers_are_left_alone_if_that_is_asked_for(tmp_path: Path, connect: Connect) -> None:
    scheduler = connect(concurrency=3, plan="none", speculate=False)
    released = tmp_path / "released"
    task = delayed(slow_the_first_time)
    release = delayed(lambda directory: time.sleep(6) or Path(directory, "released").touch())
    tasks = [task(i, str(tmp_path), str(released)) for i in range(20)]
    compute(*tasks, release(str(tmp_path)), scheduler=scheduler)
    assert report().speculative == 0
    assert report().invocations == 21


# -- budgets -------------------------------------------------------------------------------------


def test_a_run_that_has_spent_its_money_says_what_it_took() -> None:
    wait = delayed(lambda i: time.sleep(0.2) or i)
    compute(*(wait(i) for i in range(12)), scheduler=lambda_get, plan="none")  # no cold start below
    tasks = [wait(i) for i in range(300)]
    with pytest.raises(BudgetExceededError) as caught:
        compute(*tasks, scheduler=lambda_get, max_cost_usd=0.0008, plan="none")
    assert "max_cost_usd=0.0008" in str(caught.value)
    assert "None of it is kept: with resume='...' it would be. Raise the limit" in str(caught.value)
    assert report().failed
    assert 0.0001 < report().cost_usd <= 0.0008
    assert 20 < report().invocations < 250


def test_money_that_is_enough_is_no_hindrance() -> None:
    tasks = [delayed(lambda i: i)(i) for i in range(50)]
    assert compute(*tasks, scheduler=lambda_get, max_cost_usd=1.0) == tuple(range(50))


def test_a_run_that_has_taken_its_time_is_stopped(tmp_path: Path) -> None:
    def wait(directory: str) -> None:
        while not Path(directory, "released").exists():
            time.sleep(0.01)

    started = time.monotonic()
    try:
        with pytest.raises(BudgetExceededError, match="max_seconds=1"):
            delayed(wait)(str(tmp_path)).compute(scheduler=lambda_get, max_seconds=1)
        assert time.monotonic() - started < 30
    finally:
        (tmp_path / "released").touch()


@pytest.mark.parametrize("setting", ["max_cost_usd", "max_seconds"])
@pytest.mark.parametrize("value", [0, -1, "much", True])
def test_a_budget_that_is_none_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=setting.replace("_", "-")):
        delayed(1).compute(scheduler=lambda_get, **{setting: value})


# -- functions with more memory ------------------------------------------------------------------


def where() -> str:
    return os.environ["AWS_LAMBDA_FUNCTION_NAME"]


def too_much(but: str) -> str:
    if where() != but:
        raise MemoryError("Unable to allocate 3.2 GiB")
    return where()


def test_a_task_that_runs_out_of_memory_goes_to_a_larger_function(
    connect: Connect, deploy: Deploy
) -> None:
    larger, largest = deploy(), deploy()
    scheduler = connect(larger_functions={3008: larger, 10_240: largest})
    assert delayed(where)().compute(scheduler=scheduler) not in (larger, largest)
    assert delayed(too_much)(largest).compute(scheduler=scheduler) == largest
    assert report().invocations == 3


def test_if_no_function_is_large_enough_it_is_the_tasks_own_error(
    connect: Connect, deploy: Deploy
) -> None:
    scheduler = connect(larger_functions={3008: deploy()})
    with pytest.raises(MemoryError, match=r"3\.2 GiB"):
        delayed(too_much)("nowhere").compute(scheduler=scheduler)
    assert report().invocations == 2


def test_a_task_that_says_what_it_needs_goes_there_at_once(
    connect: Connect, deploy: Deploy
) -> None:
    larger = deploy()
    scheduler = connect(larger_functions={3008: larger})
    with annotate(memory="2.5 GB"):
        task = delayed(where)()
    assert delayed(str)(task).compute(scheduler=scheduler) == larger
    assert report().invocations == 2
    with annotate(memory="4 GB"):
        task = delayed(where)()
    with pytest.raises(OutOfMemoryError, match=r"3,815 MB.*3,008 MB.*nothing was sent"):
        task.compute(scheduler=scheduler)


def test_larger_functions_must_be_there(connect: Connect) -> None:
    scheduler = connect(larger_functions={3008: "no-such-function"})
    with pytest.raises(FunctionNotFoundError, match="no-such-function"):
        delayed(where)().compute(scheduler=scheduler)


@pytest.mark.parametrize("functions", [{"3 GB": "f"}, {20_000: "f"}, {3008: ""}, "f"])
def test_larger_functions_that_mean_nothing_are_refused(connect: Connect, functions: Any) -> None:
    with pytest.raises(ConfigurationError, match="larger-functions"):
        delayed(where)().compute(scheduler=connect(larger_functions=functions))
