"""Estimates: ranges that say what they rest on, and what a run then really does."""

from __future__ import annotations

import json
import operator
import time
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

import dask_lambda
from dask_lambda import Estimate, LambdaScheduler, planner
from dask_lambda.errors import ConfigurationError
from dask_lambda.forecast import Range
from dask_lambda.history import History
from tests.helpers import report

uses_bucket = True


@pytest.fixture(autouse=True)
def _nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what other tests of this process have taken."""
    monkeypatch.setattr(planner, "history", History())


def ours(x: int) -> int:
    """A function that nobody knows."""
    return x + 1


def calls(count: int, name: str) -> list[Any]:
    return [dask.delayed(ours)(i, dask_key_name=f"{name}-{i}") for i in range(count)]


def ones(tiles: int, size: int) -> da.Array:
    return da.ones((tiles * size, tiles * size), chunks=size)


def ranges(estimate: Estimate) -> dict[str, Range]:
    return {name: v for name, v in vars(estimate).items() if isinstance(v, Range)}


def on_aws(*collections: Any, **settings: Any) -> Estimate:
    return LambdaScheduler(**settings).estimate(*collections, on="aws")


def test_every_figure_is_between_its_two_ends() -> None:
    estimate = on_aws(ones(4, 300) @ ones(4, 300), *calls(3, "between"))
    found = ranges(estimate)
    assert {"invocations", "cost_usd", "wall_seconds", "s3_puts", "billed_gb_seconds"} <= set(found)
    for each in found.values():
        assert 0 <= each.low <= each.expected <= each.high


def test_the_dollars_are_the_counts_times_the_prices() -> None:
    estimate = on_aws(*calls(5, "dollars"), default_task_seconds={"dollars": 2.0})
    # Nothing goes through S3; a lease is written, since the calls take longer than a second.
    assert estimate.invocations == Range(5, 5, 5)
    counted = 5 * 0.2e-6 + estimate.billed_gb_seconds.expected * 0.0000166667
    puts = estimate.s3_puts.expected * 5e-6
    assert estimate.cost_usd.expected == pytest.approx(counted + puts)
    # Each takes 2 s and the start of an environment, on 1,769 MB.
    assert estimate.billed_gb_seconds.low >= 5 * 2.0 / 1.25 * 1769 / 1024
    assert estimate.billed_gb_seconds.expected >= 5 * 2.0 * 1769 / 1024


def test_of_functions_that_nobody_knows_the_range_is_wide_and_they_are_named() -> None:
    estimate = on_aws(*calls(20, "mystery"), ones(1, 100).sum())
    assert estimate.unknown == {"mystery": 20}
    assert estimate.basis["unknown"] == 20
    assert estimate.compute_seconds.high > 1000 * estimate.compute_seconds.low
    assert estimate.s3_puts.high >= 20 > estimate.s3_puts.low  # results may be large
    assert "mystery (20)" in str(estimate)
    assert "default_task_seconds" in str(estimate)


def test_what_the_user_says_makes_the_range_narrow() -> None:
    said = on_aws(*calls(20, "spoken"), default_task_seconds={"spoken": 10.0})
    assert said.unknown == {}
    assert said.basis == {"said": 20}
    assert said.compute_seconds.expected == pytest.approx(200)
    assert said.compute_seconds.high < 2 * said.compute_seconds.low
    with dask.annotate(seconds=10.0):
        annotated = calls(20, "annotated")
    assert on_aws(*annotated).compute_seconds == said.compute_seconds


def test_arm64_costs_a_fifth_less_for_the_same_seconds() -> None:
    settings = {"default_task_seconds": {"priced": 30.0}}
    x86 = on_aws(*calls(10, "priced"), **settings)
    arm64 = on_aws(*calls(10, "priced"), architecture="arm64", **settings)
    assert arm64.billed_gb_seconds == x86.billed_gb_seconds
    assert arm64.cost_usd.expected / x86.cost_usd.expected == pytest.approx(0.8, abs=0.01)


def test_the_region_gives_the_prices_and_one_that_is_not_known_says_so() -> None:
    x = ones(4, 300) @ ones(4, 300)
    frankfurt = on_aws(x, region="eu-central-1", plan="none")
    usual = on_aws(x, region="us-east-1", plan="none")
    assert frankfurt.prices.startswith("eu-central-1")
    assert frankfurt.cost_usd.expected > usual.cost_usd.expected
    unknown = on_aws(x, region="mars-north-1", plan="none")
    assert unknown.cost_usd == usual.cost_usd
    assert "in place of mars-north-1" in str(unknown)


def test_the_region_is_that_of_the_environment_if_none_is_set(monkeypatch) -> None:
    monkeypatch.setenv("AWS_REGION", "sa-east-1")
    assert on_aws(ones(1, 10)).prices.startswith("sa-east-1")


def test_prices_that_are_given_are_the_ones_that_are_taken() -> None:
    free = on_aws(
        *calls(3, "free"), prices={"lambda-request": 0, "lambda-gb-second": 0, "s3-put": 0}
    )
    assert free.cost_usd.low == free.cost_usd.expected == 0
    assert "given by you" in free.prices


def test_an_estimate_sends_nothing_and_connects_to_nothing() -> None:
    scheduler = LambdaScheduler(function="none", bucket="none", region="us-east-1")
    estimate = dask_lambda.estimate(*calls(2, "unsent"), scheduler=scheduler)
    assert estimate.tasks == 2
    assert estimate.where == "aws"
    assert not scheduler._engines


def test_buffers_inside_of_tasks_are_counted() -> None:
    data = np.ones((4, 2**16))  # four chunks of 512 kB, each an object of its own
    x = da.from_array(data, chunks=(1, 2**16))
    estimate = on_aws(x.sum(axis=1), plan="none")
    assert estimate.s3_puts.low >= 4
    assert estimate.bytes_written.low >= data.nbytes


def test_collections_may_be_nested_and_none_at_all_is_an_error() -> None:
    with LambdaScheduler() as scheduler:
        found = dask_lambda.estimate([ones(1, 10), {"x": ones(2, 10)}], on="aws")
        assert found.tasks >= 2
        with pytest.raises(TypeError, match="no Dask collection"):
            scheduler.estimate(3)
        with pytest.raises(ConfigurationError, match="'aws' or for 'local'"):
            scheduler.estimate(ones(1, 10), on="azure")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="estimates are made by a LambdaScheduler"):
        dask_lambda.estimate(ones(1, 10), scheduler="threads")


def test_a_task_that_takes_longer_than_lambda_allows_is_told() -> None:
    estimate = on_aws(*calls(1, "endless"), default_task_seconds={"endless": 10_000.0})
    assert "would fail" in str(estimate)


def test_people_and_programs_can_read_it() -> None:
    estimate = on_aws(ones(2, 100) @ ones(2, 100), *calls(1, "shown"))
    record = json.loads(json.dumps(estimate.to_dict()))
    assert record["cost_usd"]["low"] <= record["cost_usd"]["expected"]
    assert record["prices"] == estimate.prices
    lines = str(estimate).splitlines()
    assert lines[1].split() == ["low", "expected", "high"]
    assert any(line.split()[:2] == ["cost", "usd"] for line in lines)
    html = estimate._repr_html_()
    assert html.count("<tr>") == 1 + len(ranges(estimate))
    assert "shown (1)" in html


@pytest.mark.parametrize(
    "make",
    [
        lambda: [ones(3, 200) @ ones(3, 200)],
        lambda: [da.linalg.cholesky(da.eye(600, chunks=200) * 3.0, lower=True)],
        lambda: [dask.delayed(operator.add)(i, 1) for i in range(30)],
    ],
    ids=["product", "Cholesky", "map"],
)
def test_with_one_task_each_the_requests_are_those_of_the_run(make, without_lease) -> None:
    settings = {"plan": "none", "speculate": False}
    with LambdaScheduler(backend="local") as scheduler:
        estimate = scheduler.estimate(*make(), **settings)
        dask.compute(*make(), scheduler=scheduler, **settings)
    done = report()
    assert estimate.where == "local"
    assert estimate.tasks == done.tasks
    assert estimate.invocations.expected == done.invocations
    assert estimate.s3_puts.expected == done.s3_puts
    assert estimate.s3_gets.low <= done.s3_gets <= estimate.s3_gets.high


def test_what_was_measured_is_expected_the_next_time() -> None:
    def slow(x: int) -> int:
        time.sleep(0.05)
        return x

    def make() -> list[Any]:
        return [dask.delayed(slow)(i, dask_key_name=f"slow-{i}") for i in range(8)]

    with LambdaScheduler(backend="local") as scheduler:
        before = scheduler.estimate(*make())
        dask.compute(*make(), scheduler=scheduler)
        after = scheduler.estimate(*make())
    assert before.unknown == {"slow": 8}
    assert after.unknown == {}
    assert after.basis == {"measured": 8}
    assert after.compute_seconds.low <= report().compute_seconds <= after.compute_seconds.high
    assert after.compute_seconds.expected == pytest.approx(report().compute_seconds, rel=0.01)


def test_the_estimate_of_a_plan_is_about_that_plan(without_lease) -> None:
    def make() -> Any:
        return ones(4, 200) @ ones(4, 200)

    with LambdaScheduler(backend="local", speculate=False) as scheduler:
        estimate = scheduler.estimate(make())
        assert estimate.groups == len(scheduler.explain(make()).groups)
        dask.compute(make(), scheduler=scheduler)
    assert estimate.invocations.low <= report().invocations <= estimate.invocations.high
    assert estimate.s3_puts.low <= report().s3_puts <= estimate.s3_puts.high


def test_what_stays_in_the_bucket_is_written_there() -> None:
    inline = on_aws(*calls(6, "staying"))
    kept = LambdaScheduler().estimate(*calls(6, "staying"), on="aws", resume="a-name")
    assert inline.s3_puts.low == 0
    assert kept.s3_puts.low == 6
