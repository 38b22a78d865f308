"""Where tasks run: on Lambda if it can run them, elsewhere if they say so or Lambda never could."""

from __future__ import annotations

import logging
from typing import Any

import dask
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler
from dask_lambda.config import Settings
from dask_lambda.errors import ConfigurationError, FunctionTimeoutError, OutOfMemoryError
from dask_lambda.placement import NAMED, Declared, Offer, Placement, place
from dask_lambda.plan import Plan

GB = 2**30
#: A function of 2 GB and 300 s, on a machine of 16 GB.
USUAL = Offer(2048, 300, local_mb=16 * 1024)
CHOSEN = Offer(2048, 300, chosen=True, local_mb=16 * 1024)
NOWHERE_ELSE = Offer(2048, 300, local=False, local_mb=16 * 1024)
CLUSTER = Offer(2048, 300, chosen=True)


def inc(x: Any) -> Any:
    return x + 1


@pytest.mark.parametrize(
    ("declared", "offer", "where"),
    [
        (Declared(), USUAL, "lambda"),
        (Declared(memory=2 * GB, seconds=300), USUAL, "lambda"),
        (Declared("local"), USUAL, "local"),
        (Declared("local", 16 * GB), USUAL, "local"),
        # more than Lambda could have, whatever is configured
        (Declared(memory=11 * GB), USUAL, "local"),
        (Declared(seconds=901), USUAL, "local"),
        # more than the function has, where somebody has named who does the rest
        (Declared(memory=3 * GB), CHOSEN, "local"),
        (Declared(seconds=400), CHOSEN, "local"),
        (Declared(memory=2 * GB), CHOSEN, "lambda"),
        # nobody knows how large the machines of a cluster are
        (Declared(memory=4000 * GB), CLUSTER, "local"),
        # an estimate of time does not overrule who says where
        (Declared("lambda", seconds=1e6), USUAL, "lambda"),
    ],
)
def test_a_task_runs_where_it_fits(declared: Declared, offer: Offer, where: str) -> None:
    assert place("'x'", declared, offer)[0] == where


@pytest.mark.parametrize(
    ("declared", "offer", "error", "said"),
    [
        (Declared(memory=3 * GB), USUAL, OutOfMemoryError, "3,072 MB.*2,048 MB.*where='local'"),
        (Declared(seconds=400), USUAL, FunctionTimeoutError, "400 s.*300 s.*dask-lambda.timeout"),
        (Declared("lambda", 3 * GB), CHOSEN, OutOfMemoryError, "2,048 MB"),
        (Declared(memory=17 * GB), USUAL, OutOfMemoryError, "fits nowhere.*2,048 MB.*16,384 MB"),
        (Declared("local", 17 * GB), USUAL, OutOfMemoryError, "fits nowhere.*16,384 MB"),
        (Declared(memory=11 * GB), NOWHERE_ELSE, OutOfMemoryError, "fits nowhere.*local-executor"),
        (Declared(seconds=901), NOWHERE_ELSE, FunctionTimeoutError, "fits nowhere.*901 s.*900 s"),
        (Declared("local"), NOWHERE_ELSE, ConfigurationError, "local-executor is 'none'"),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_was_compared(
    declared: Declared, offer: Offer, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=f"(?s)'x'.*{said}"):
        place("'x'", declared, offer)


def test_the_offer_is_that_of_the_settings() -> None:
    functions = {"function": "f", "bucket": "b", "larger_functions": {3008: "g"}}
    offer = Offer.of(Settings.resolve(**functions), 1769)
    assert offer.memory_mb == 3008
    assert not offer.chosen
    assert offer.local
    assert Offer.of(Settings.resolve(local_executor="processes"), 1769).chosen
    assert not Offer.of(Settings.resolve(local_executor="none"), 1769).local


@pytest.mark.parametrize("executor", ["threads", 3, None.__class__, {"auto"}])
def test_what_is_no_executor_is_refused(executor: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"local-executor is .*submit"):
        Settings.resolve(local_executor=executor)


def test_none_in_an_environment_variable_is_the_word() -> None:
    with dask.config.set({"dask-lambda.local-executor": None}):
        assert Settings.resolve().local_executor == "none"


# -- in a plan -----------------------------------------------------------------------------------


def explained(collection: Any, **settings: Any) -> Plan:
    return LambdaScheduler(**settings).explain(collection)


def places(plan: Plan) -> dict[tuple[str, ...], str]:
    return {tuple(sorted(map(str, group.tasks))): group.where for group in plan.groups}


def row(**annotations: dict[str, Any]) -> Any:
    """Three tasks that each read the one before, with annotations by name."""
    value: Any = 1
    for name in ("first", "second", "third"):
        with dask.annotate(**annotations.get(name, {})):
            value = delayed(inc)(value, dask_key_name=name)
    return value


@pytest.mark.parametrize("mode", ["auto", "none"])
def test_a_task_is_apart_from_those_that_run_elsewhere(mode: str) -> None:
    plan = explained(row(second={"where": "local"}), plan=mode)
    assert places(plan) == {("first",): "lambda", ("second",): "local", ("third",): "lambda"}
    assert "not on Lambda" in plan.describe()


def test_local_tasks_run_together_as_others_do() -> None:
    plan = explained(row(first={"where": "local"}, second={"where": "local"}))
    assert places(plan) == {("first", "second"): "local", ("third",): "lambda"}


def test_a_whole_computation_may_be_local() -> None:
    with dask.annotate(where="local"):
        plan = explained(row(second={"where": "lambda"}))
    assert places(plan) == {("first",): "local", ("second",): "lambda", ("third",): "local"}


def test_what_declares_more_than_lambda_has_is_local() -> None:
    plan = explained(row(second={"seconds": 1000}))
    assert places(plan) == {("first",): "lambda", ("second",): "local", ("third",): "lambda"}


def test_a_place_that_does_not_exist_is_refused_with_the_task() -> None:
    with pytest.raises(ConfigurationError, match=r"where='moon'.*'second' is not a place"):
        explained(row(second={"where": "moon"}))


# -- who hears of it -------------------------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture, placement: Placement, *keys: str) -> str:
    with caplog.at_level(logging.INFO, "dask_lambda"):
        placement.tell(keys)
    return caplog.text


def test_one_line_says_what_runs_elsewhere_and_why(caplog: pytest.LogCaptureFixture) -> None:
    why = {f"x{i}": "it declares 20 GB" for i in range(NAMED + 2)}
    text = said(caplog, Placement("lambda", {}, why), *why)
    assert len(caplog.records) == 1
    assert "'x0' (it declares 20 GB)" in text
    assert "and 2 more" in text
    assert "dask-lambda.memory" in text


def test_nothing_is_said_of_tasks_that_are_not_run_or_that_asked_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert not said(caplog, Placement("lambda", {}, {"x": "why"}), "y")
    assert not said(caplog, Placement("local", {"x": "local"}), "x")
