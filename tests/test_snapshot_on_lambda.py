"""Functions that begin as copies of a snapshot: what a run counts, pays, and waits for.

The embedded AWS takes no snapshots.  A function there only says that its environments are copies,
which is all that the worker sees of it on AWS.
"""

from __future__ import annotations

import logging
from typing import Any

import dask
import pytest

from dask_lambda import LambdaExecutor
from dask_lambda.errors import InvocationError
from dask_lambda.prices import prices_for
from lambda_worker import snapshot
from tests.faults.proxy import Answer
from tests.helpers import report

pytestmark = pytest.mark.local
uses_bucket = True

PRICES = prices_for("us-east-1")
GB = 1769 / 1024


@pytest.fixture(scope="module")
def function(deploy) -> str:
    """A function whose environments say that they are copies of a snapshot."""
    return str(deploy(environment={snapshot.VARIABLE: snapshot.SNAP_START}))


def test_copies_are_counted_and_paid_once_each(connect, deploy) -> None:
    function = deploy(environment={snapshot.VARIABLE: snapshot.SNAP_START})
    scheduler = connect(function=function, architecture="x86_64")
    tasks = [dask.delayed(abs)(i) for i in range(4)]
    assert dask.compute(*tasks, scheduler=scheduler, plan="none") == (0, 1, 2, 3)
    first = report()
    assert first.restores == first.cold_starts > 0
    counted = {
        "invocations": 4,
        "gb_seconds": first.billed_gb_seconds,
        "puts": first.s3_puts,
        "gets": first.s3_gets,
    }
    usd = PRICES.cost(**counted) + first.restores * GB * 0.0001397998
    assert first.cost_usd == pytest.approx(usd, rel=1e-9)
    while report().cold_starts:
        dask.compute(*tasks, scheduler=scheduler, plan="none")
    assert report().restores == 0


def test_environments_that_are_warmed_are_paid_too(connect, function) -> None:
    found = connect(function=function, architecture="x86_64").warm(2)
    assert found.restores == found.cold_starts > 0
    usd = PRICES.cost(invocations=2, gb_seconds=found.billed_gb_seconds)
    assert found.cost_usd == pytest.approx(usd + found.restores * GB * 0.0001397998)


def test_a_call_that_met_a_new_copy_has_paid_for_it(aws_settings, credentials, deploy, monkeypatch):
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    settings: dict[str, Any] = {
        **aws_settings,
        "function": deploy(environment={snapshot.VARIABLE: snapshot.SNAP_START}),
        "concurrency": 1,
        "prices": {"lambda-request": 0, "lambda-gb-second": 0, "lambda-gb-second-arm64": 0}
        | {"s3-put": 0, "s3-get": 0},
    }
    with LambdaExecutor(**settings) as executor:
        for new in (True, False):
            future = executor.submit(abs, -1)
            assert future.result() == 1
            assert future.report is not None
            assert future.report.cold_start is new
            assert future.report.cost_usd == pytest.approx(GB * 0.0001397998 if new else 0)


NOT_READY = Answer(
    409,
    b'{"Type":"User","Message":"Lambda is initializing your function. It will be ready to invoke '
    b'once your function state becomes ACTIVE."}',
    {"x-amzn-ErrorType": "SnapStartNotReadyException"},
)


def test_a_function_whose_snapshot_is_made_anew_is_waited_for(proxy, connect, caplog) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(check=[NOT_READY], invoke=[NOT_READY] * 3)
    tasks = [dask.delayed(abs)(i) for i in range(3)]
    with caplog.at_level(logging.WARNING, logger="dask_lambda"):
        # Less patience than a failure of the network's would need.
        found = dask.compute(*tasks, scheduler=scheduler, plan="none", patience=0)
    assert found == (0, 1, 2)
    done = report()
    assert (done.invocations, done.throttles) == (3, 0)
    assert done.retries >= 1


def test_what_a_hook_has_broken_is_said_at_once(proxy, connect) -> None:
    broken = Answer(
        400,
        b'{"Type":"User","message":"The afterRestore() runtime hook encountered an error."}',
        {"x-amzn-ErrorType": "SnapStartException"},
    )
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(invoke=[broken])
    with pytest.raises(InvocationError, match=r"snapshot.*afterRestore.*dask-lambda logs"):
        dask.delayed(abs)(1).compute(scheduler=scheduler)
    assert report().retries == 0
