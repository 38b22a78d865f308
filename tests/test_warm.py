"""``warm()`` and prices on a function: on the embedded AWS, as AWS would be asked."""

from __future__ import annotations

import platform

import dask
import pytest

from dask_lambda import LambdaExecutor, errors
from dask_lambda.prices import prices_for
from dask_lambda.warming import hold_seconds
from lambda_worker import protocol
from lambda_worker.handler import handler
from tests.helpers import report

uses_bucket = True


def test_environments_are_started_once_and_serve_what_comes_then(connect, deploy) -> None:
    scheduler = connect(function=deploy(), concurrency=3)
    first = scheduler.warm(3)
    assert (first.invocations, first.cold_starts, first.throttles) == (3, 3, 0)
    second = scheduler.warm(3)
    assert (second.invocations, second.cold_starts) == (3, 0)
    tasks = [dask.delayed(abs)(i) for i in range(3)]
    assert dask.compute(*tasks, scheduler=scheduler) == (0, 1, 2)
    assert report().cold_starts == 0


def test_it_says_what_it_cost(connect) -> None:
    found = connect(architecture="x86_64").warm(2)
    assert found.billed_gb_seconds >= 2 * hold_seconds(2) * 0.99 * 1769 / 1024
    expected = prices_for("us-east-1").cost(invocations=2, gb_seconds=found.billed_gb_seconds)
    assert found.cost_usd == pytest.approx(expected)
    assert found.to_dict()["prices"] == found.prices
    assert "cold_starts=" in str(found)


@pytest.mark.parametrize("count", [0, -1, 3])
def test_no_more_than_the_window_can_be_warmed(connect, count) -> None:
    with pytest.raises(errors.ConfigurationError, match="from 1 to 2"):
        connect(concurrency=2).warm(count)


def test_a_function_that_is_not_ours_is_an_error(connect, deploy) -> None:
    files = {"other.py": "def handler(event, context): return {'hello': 'world'}\n"}
    with pytest.raises(errors.DaskLambdaError):
        connect(function=deploy(files, "other.handler")).warm(1)


class Context:
    memory_limit_in_mb = 1769
    aws_request_id = "request"


def test_a_request_to_warm_up_does_nothing_for_a_while_and_no_longer_than_allowed(
    monkeypatch,
) -> None:
    slept = []
    monkeypatch.setattr("lambda_worker.handler.time.sleep", slept.append)
    for seconds in (0.25, 1e9, -3):
        reply = handler(protocol.warming_request(seconds), Context())
        assert reply["groups"] == []
        assert reply["architecture"] == platform.machine()
    assert slept == [0.25, protocol.MAX_HOLD_SECONDS, 0.0]


def test_requests_are_held_long_enough_for_all_to_arrive_and_never_very_long() -> None:
    assert hold_seconds(1) < hold_seconds(1000)
    assert hold_seconds(1000) >= 1.0
    assert hold_seconds(10**6) == protocol.MAX_HOLD_SECONDS


def test_the_price_is_that_of_the_region_and_of_the_processor_that_is_set(connect) -> None:
    tasks = [dask.delayed(abs)(i) for i in range(4)]
    dask.compute(*tasks, scheduler=connect(architecture="arm64"), plan="none")
    done = report()
    usd = 4 * 0.2e-6 + done.billed_gb_seconds * 0.0000133334
    assert done.cost_usd == pytest.approx(usd + done.s3_puts * 5e-6 + done.s3_gets * 0.4e-6)
    dask.compute(*tasks, scheduler=connect(prices={"lambda-request": 1.0}), plan="none")
    assert report().cost_usd > 4
    assert "given by you: lambda_request" in report().prices


FREE = {"lambda-request": 0, "lambda-gb-second": 0, "s3-put": 0, "s3-get": 0}


@pytest.mark.parametrize(("architecture", "paid"), [("x86_64", False), ("arm64", True)])
def test_the_report_of_a_call_has_the_price_of_its_processor(architecture, paid) -> None:
    with LambdaExecutor(backend="local", architecture=architecture, prices=FREE) as executor:
        future = executor.submit(abs, -1)
        assert future.result() == 1
        assert future.report is not None
        assert (future.report.cost_usd > 0) == paid


def test_a_budget_reckons_with_the_prices_that_are_set(connect) -> None:
    tasks = [dask.delayed(abs)(i) for i in range(30)]
    scheduler = connect(prices={"lambda-request": 1.0})
    with pytest.raises(errors.BudgetExceededError):
        dask.compute(*tasks, scheduler=scheduler, plan="none", max_cost_usd=5.0)
    assert 0 < report().invocations < 30


def test_a_function_says_its_processor_and_is_priced_by_it(connect) -> None:
    scheduler = connect()
    dask.compute(dask.delayed(abs)(1), scheduler=scheduler)
    (engine,) = scheduler._engines.values()
    machine = "arm64" if platform.machine() in ("arm64", "aarch64") else "x86_64"
    assert engine.backend.invokers[0].architecture == machine
    price = prices_for("us-east-1").gb_second(machine)
    assert report().cost_usd == pytest.approx(0.2e-6 + report().billed_gb_seconds * price)
    assert engine.usual_prices.lambda_gb_second == price
