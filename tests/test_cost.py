"""What things cost: examples that are worked out by hand, and what must always hold.

The prices in the comments are those of "AWS Lambda Pricing" and "Amazon S3 pricing".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_lambda.config import Settings
from dask_lambda.cost import ARCHITECTURES, GB, PRICED, Architecture, Prices
from dask_lambda.errors import ConfigurationError
from dask_lambda.prices import AS_OF, prices_for, regions
from dask_lambda.report import RunCounts
from lambda_worker.store import Counts

MILLION = 1_000_000

#: Region, what was counted, US dollars.
EXAMPLES: dict[str, tuple[str, dict[str, Any], float]] = {
    # AWS's first example for x86: 3 million requests of 120 ms with 1,536 MB are 540,000 GB-s:
    # 3 x $0.20 + 540,000 x $0.0000166667 = $0.60 + $9.000018 (AWS takes the free tier off it).
    "a mobile backend": (
        "us-east-1",
        {"invocations": 3 * MILLION, "gb_seconds": 3 * MILLION * 0.120 * 1.5},
        9.600018,
    ),
    # The same on arm64: $0.60 + 540,000 x $0.0000133334 = $0.60 + $7.200036.
    "a mobile backend on arm64": (
        "us-east-1",
        {
            "invocations": 3 * MILLION,
            "gb_seconds": 3 * MILLION * 0.120 * 1.5,
            "arm64_gb_seconds": 3 * MILLION * 0.120 * 1.5,
        },
        7.800036,
    ),
    # 1,000 tasks of 10 s on 1,769 MB: 1,000 x 10 x 1769 / 1024 = 17,275.390625 GB-s.
    # 1,000 x $0.0000002 + 17,275.390625 x $0.0000166667 = $0.0002 + $0.287923753...
    "a thousand tasks of ten seconds": (
        "us-west-2",
        {"invocations": 1000, "gb_seconds": 1000 * 10 * 1769 / 1024},
        0.0002 + 17_275.390625 * 0.0000166667,
    ),
    # Requests alone, Frankfurt: 10,000 PUTs at $0.0054 a thousand, 50 LISTs at the same, 200,000
    # GETs at $0.0043 for ten thousand: $0.054 + $0.00027 + $0.086.
    "requests in Frankfurt": (
        "eu-central-1",
        {"invocations": 0, "gb_seconds": 0.0, "puts": 10_000, "lists": 50, "gets": 200_000},
        0.14027,
    ),
    # Sao Paulo: $0.007 a thousand PUTs, $0.0056 for ten thousand GETs; Lambda as in us-east-1.
    # 500 x $0.0000002 + 100 x $0.0000166667 + 1,000 PUTs + 10,000 GETs
    # = $0.0001 + $0.00166667 + $0.007 + $0.0056.
    "a small run in Sao Paulo": (
        "sa-east-1",
        {"invocations": 500, "gb_seconds": 100.0, "puts": 1000, "gets": 10_000},
        0.01436667,
    ),
    # A ladder of functions, the large one on arm64: 60 GB-s x86 and 40 GB-s arm64:
    # 60 x $0.0000166667 + 40 x $0.0000133334 = $0.001000002 + $0.000533336.
    "two processors": (
        "eu-west-1",
        {"invocations": 0, "gb_seconds": 100.0, "arm64_gb_seconds": 40.0},
        0.001533338,
    ),
    # SnapStart: 1,000 environments of 1,769 MB begin as copies and run 2 s each, of which 3 ms are
    # the billed part of the restoration: 1,727.5390625 GB restored and 3,455.078125 GB-s:
    # $0.0002 + 3,455.078125 x $0.0000166667 + 1,727.5390625 x $0.0001397998
    # = $0.0002 + $0.057584... + $0.241509...
    "a thousand copies of a snapshot": (
        "us-east-1",
        {
            "invocations": 1000,
            "gb_seconds": 1000 * 2 * 1769 / 1024,
            "restored_gb": 1000 * 1769 / 1024,
        },
        0.0002 + 3_455.078125 * 0.0000166667 + 1_727.5390625 * 0.0001397998,
    ),
    # The same on arm64 for 10,240 MB, once: 10 GB restored: $0.001397998, and nothing else.
    "one large copy, on arm64": (
        "eu-west-1",
        {"invocations": 0, "gb_seconds": 0.0, "restored_gb": 10.0},
        0.001397998,
    ),
    # Tokyo: 4,700 PUTs at $0.0047 a thousand = $0.02209.
    "PUTs in Tokyo": ("ap-northeast-1", {"invocations": 0, "gb_seconds": 0, "puts": 4700}, 0.02209),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_cost_what_was_worked_out_by_hand(name: str) -> None:
    region, counted, usd = EXAMPLES[name]
    assert prices_for(region).cost(**counted) == pytest.approx(usd, rel=1e-9)


def test_storage_is_billed_in_gigabytes_of_two_to_the_thirtieth() -> None:
    # 100 GB for a month: us-east-1 $2.30, Frankfurt $2.45, Sao Paulo $4.05.
    assert prices_for("us-east-1").storage(100 * GB) == pytest.approx(2.30)
    assert prices_for("eu-central-1").storage(100 * GB) == pytest.approx(2.45)
    assert prices_for("sa-east-1").storage(100 * GB) == pytest.approx(4.05)
    assert GB == 1_073_741_824


def test_snapshots_are_paid_for_as_long_as_they_exist_and_for_three_hours_at_least() -> None:
    # 1 GB for 30 days: 2,592,000 s x $0.0000015046 = $3.8999232.
    month = 30 * 24 * 3600
    prices = prices_for("us-east-1")
    assert prices.snapshots([1024], month) == pytest.approx(3.8999232)
    # 1,769 and 3,538 MB (a ladder): 5.1826171875 GB: $20.2118090625.
    assert prices.snapshots([1769, 3538], month) == pytest.approx(20.2118090625)
    # 2 GB for a minute, as for three hours: 2 x 10,800 s x $0.0000015046 = $0.03249936.
    assert prices.snapshots([2048], 60) == pytest.approx(0.03249936)
    assert prices.snapshots(iter([2048]), 10_801) > 0.03249936
    assert prices.snapshots([], month) == 0
    own = prices_for("eu-central-1", {"snapshot_gb_second": 1e-6})
    assert own.snapshots([1024], month) == pytest.approx(2.592)


counted = st.fixed_dictionaries(
    {
        "invocations": st.integers(0, 10**9),
        "x86": st.floats(0, 1e9),
        "arm64": st.floats(0, 1e9),
        "puts": st.integers(0, 10**9),
        "lists": st.integers(0, 10**9),
        "gets": st.integers(0, 10**9),
        "restored_gb": st.floats(0, 1e9),
    }
)


def cost(prices: Prices, counts: dict[str, Any]) -> float:
    """Of GB-seconds of both processors."""
    counts = dict(counts)
    x86, arm64 = counts.pop("x86"), counts.pop("arm64")
    return prices.cost(gb_seconds=x86 + arm64, arm64_gb_seconds=arm64, **counts)


@given(counted, counted, st.sampled_from(regions()))
def test_two_runs_cost_what_each_of_them_costs(one, other, region) -> None:
    prices = prices_for(region)
    both = {name: one[name] + other[name] for name in one}
    assert cost(prices, both) == pytest.approx(cost(prices, one) + cost(prices, other), rel=1e-6)


@given(
    counted,
    st.sampled_from(["invocations", "x86", "arm64", "puts", "lists", "gets", "restored_gb"]),
)
def test_more_of_anything_never_costs_less(counts, name) -> None:
    more = {**counts, name: counts[name] + 1000}
    assert cost(Prices(), more) >= cost(Prices(), counts) >= 0


@given(st.floats(0, 1e6), st.sampled_from(ARCHITECTURES), st.sampled_from(regions()))
def test_prices_on_one_processor_are_those_of_its_gb_seconds(seconds, architecture, region) -> None:
    prices = prices_for(region)
    arm64 = seconds if architecture == "arm64" else 0.0
    both = prices.cost(invocations=0, gb_seconds=seconds, arm64_gb_seconds=arm64)
    assert prices.on(architecture).cost(invocations=0, gb_seconds=seconds) == both


@pytest.mark.parametrize("region", regions())
def test_each_region_of_the_table_says_its_name_and_is_in_bounds(region: str) -> None:
    prices = prices_for(region)
    assert prices.source == f"{region}, {AS_OF}"
    assert 0.75 < prices.lambda_gb_second_arm64 / prices.lambda_gb_second < 0.85  # a fifth less
    assert 10 < prices.s3_put / prices.s3_get < 15
    assert 0.02 < prices.s3_gb_month < 0.05


def test_a_region_that_is_not_in_the_table_costs_what_us_east_1_costs_and_says_so() -> None:
    prices = prices_for("mars-north-1")
    usual = prices_for("us-east-1")
    assert dataclasses.replace(prices, source=usual.source) == usual
    assert "us-east-1" in prices.source
    assert "in place of mars-north-1" in prices.source
    assert prices_for(None) == usual


def test_what_the_user_pays_counts_more_than_the_table_and_the_result_says_so() -> None:
    prices = prices_for("eu-central-1", {"s3_put": 1e-6})
    assert prices.cost(invocations=0, gb_seconds=0, puts=10) == pytest.approx(1e-5)
    assert prices.s3_get == prices_for("eu-central-1").s3_get
    assert prices.source.endswith("given by you: s3_put")
    free = prices_for("mars-north-1", dict.fromkeys(PRICED, 0.0))
    assert free.cost(invocations=9, gb_seconds=9, puts=9, gets=9, restored_gb=9) == 0
    assert free.snapshots([1769], 1e9) == 0


def test_prices_may_be_set_with_dashes_or_underscores() -> None:
    settings = Settings.resolve(prices={"restore-gb": 1e-4, "snapshot_gb_second": 0})
    assert settings.prices == {"restore_gb": 1e-4, "snapshot_gb_second": 0}
    settings = Settings.resolve(prices={"s3-put": 0.0, "lambda_gb_second": 1.5e-5})
    assert settings.prices == {"s3_put": 0.0, "lambda_gb_second": 1.5e-5}
    assert Settings.resolve(prices=None).prices == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prices", {"s3-putt": 1.0}),
        ("prices", {"s3-put": -1.0}),
        ("prices", {"s3-put": "5e-6"}),
        ("prices", {"s3-put": float("inf")}),
        ("prices", {3: 1.0}),
        ("prices", 5e-6),
        ("architecture", "aarch64"),
    ],
)
def test_prices_that_are_none_are_refused_before_anything_runs(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"dask-lambda.{name}.*must be"):
        Settings.resolve(**{name: value})


@pytest.mark.parametrize(
    ("architecture", "usd"), [("x86_64", 0.0000166667), ("arm64", 0.0000133334)]
)
def test_a_report_prices_each_invocation_by_its_processor(
    architecture: Architecture, usd: float
) -> None:
    counts = RunCounts()
    reply = {"cold": False, "milliseconds": 1000.0, "memory_mb": 1024}
    counts.add_reply(reply, None, architecture)
    counts.add_billed(500, 2048, architecture)
    report = counts.report(Counts(), 1.0, failed=False, prices=Prices())
    assert report.billed_gb_seconds == pytest.approx(2.0)
    assert report.cost_usd == pytest.approx(2 * usd)
    assert report.prices == "us-east-1"
