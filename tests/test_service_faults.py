"""Faults of the network and of AWS are waited out, or become an error that names them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler, lambda_get
from dask_lambda.errors import (
    AccessDeniedError,
    InvocationError,
    PayloadTooLargeError,
)
from dask_lambda.local import LocalAWS
from tests.faults.proxy import Answer, Proxy, Reset, s3_error, throttle
from tests.helpers import report

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("one_task_each")]
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]


def inc(x: Any) -> Any:
    return x + 1


# -- faults that pass ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_proxy(aws: LocalAWS) -> Iterator[Proxy]:
    with Proxy(aws.endpoint_url) as running:
        yield running


@pytest.fixture
def proxy(shared_proxy: Proxy) -> Iterator[Proxy]:
    shared_proxy.plan()
    yield shared_proxy
    shared_proxy.plan()


@pytest.fixture(scope="module")
def proxied(shared_proxy: Proxy, deploy: Deploy) -> str:
    """A function whose workers reach S3 through the proxy."""
    return deploy(environment={"AWS_ENDPOINT_URL_S3": shared_proxy.url})


def small_graph() -> Any:
    return delayed(sum)([delayed(inc)(i) for i in range(6)])


UNAVAILABLE = Answer(503, b'{"message":"Service Unavailable"}')
BROKEN = Answer(500, b'{"Type":"Service","message":"ServiceException"}')


def test_throttles_are_waited_for_and_counted(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(
        invoke=[
            throttle(),
            throttle("ReservedFunctionConcurrentInvocationLimitExceeded"),
            None,
            throttle("CallerRateLimitExceeded"),
            throttle("FunctionInvocationRateLimitExceeded"),
        ]
    )
    assert small_graph().compute(scheduler=scheduler) == 21
    assert report().throttles == 4
    assert report().invocations == 7
    assert proxy.seen["invoke"] == 11


@pytest.mark.parametrize(
    ("faults", "invocations"),
    [
        ([UNAVAILABLE, None, BROKEN], None),
        ([Answer(502), Answer(504)], None),
        ([Reset(forwarded=False), None, Reset(forwarded=False)], None),
        ([Reset(forwarded=True), None, Reset(forwarded=True)], 9),
    ],
    ids=["500 and 503", "no body", "reset before", "reset after"],
)
def test_passing_faults_of_the_lambda_api_are_retried(
    proxy: Proxy, connect: Connect, faults: list[Any], invocations: int | None
) -> None:
    scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
    proxy.plan(invoke=faults)
    assert small_graph().compute(scheduler=scheduler) == 21
    assert report().retries == 2
    assert report().tasks == 7
    if invocations is not None:
        assert report().invocations == invocations
    assert not report().failed


def test_the_first_result_counts_when_a_task_was_run_twice(
    proxy: Proxy, connect: Connect, tmp_path: Path
) -> None:
    def draw(directory: Path) -> str:
        drawn = uuid.uuid4().hex
        number = len(list(directory.iterdir()))
        (directory / f"{number}-{drawn}").touch()
        return drawn

    scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
    proxy.plan(invoke=[Reset(forwarded=True)])
    found = delayed(draw)(tmp_path).compute(scheduler=scheduler)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == 2
    assert drawn[0] == f"0-{found}"


def test_a_persisted_result_outlives_the_faults_of_its_making(
    proxy: Proxy, connect: Connect
) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(invoke=[Reset(forwarded=True)])
    kept = delayed(np.ones)(5).persist(scheduler=scheduler)
    assert report().retries == 1
    assert kept.compute(scheduler=scheduler).tolist() == [1] * 5


SLOW_DOWN = s3_error(503, "SlowDown", "Please reduce your request rate.")
CONFLICT = s3_error(409, "ConditionalRequestConflict", "The conditional request cannot succeed.")


@pytest.mark.parametrize(
    "plan",
    [
        {"put": [SLOW_DOWN, None, SLOW_DOWN]},
        {"get": [SLOW_DOWN, s3_error(500, "InternalError"), None, SLOW_DOWN]},
        {"put": [CONFLICT, None, CONFLICT]},
        {"put": [Reset(forwarded=False), None, Reset(forwarded=True)]},
        {"get": [Reset(forwarded=False), None, Reset(forwarded=True)]},
        {"delete": [SLOW_DOWN, Reset(forwarded=True)]},
    ],
    ids=["503 on put", "5xx on get", "409 on put", "reset put", "reset get", "faults on delete"],
)
def test_passing_faults_of_s3_are_not_noticed(
    proxy: Proxy, proxied: str, connect: Connect, plan: dict[str, Any]
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    made = [delayed(np.full)(40_000, i) for i in range(4)]
    literal = delayed(np.ones(40_000))
    proxy.plan(**plan)
    total = delayed(lambda parts, one: int(np.sum(parts) + one.sum()))(made, literal)
    assert total.compute(scheduler=scheduler) == 40_000 * 7
    assert proxy.seen["put"] >= 6
    assert not report().failed


def test_a_fault_that_does_not_pass_is_an_error(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    assert small_graph().compute(scheduler=scheduler) == 21
    proxy.plan(invoke=[BROKEN] * 50)
    with pytest.raises(InvocationError, match="500"):
        delayed(inc)(1).compute(scheduler=scheduler)
    assert report().retries < 20


FORBIDDEN = Answer(403, b'{"Message":"User: u is not authorized","Type":"AccessDeniedException"}')


def test_no_permission_to_invoke_names_action_and_function(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(check=[FORBIDDEN])
    pattern = "lambda:InvokeFunction.*'dask-lambda'.*not authorized"
    with pytest.raises(AccessDeniedError, match=pattern):
        delayed(inc)(1).compute(scheduler=scheduler)
    proxy.plan(invoke=[FORBIDDEN])
    with pytest.raises(AccessDeniedError, match=pattern):
        delayed(inc)(1).compute(scheduler=scheduler)
    assert proxy.seen["invoke"] == 1


@pytest.mark.parametrize(("kind", "action"), [("put", "s3:PutObject"), ("get", "s3:GetObject")])
def test_no_permission_of_the_worker_names_action_and_object(
    proxy: Proxy, proxied: str, connect: Connect, kind: str, action: str
) -> None:
    scheduler = connect(function=proxied, inline_bytes=0)
    proxy.plan(**{kind: [s3_error(403, "AccessDenied", "Access Denied")]})
    with pytest.raises(AccessDeniedError, match=rf"on the worker.*{action} \w+/dask-lambda/"):
        delayed(inc)(delayed(inc)(1)).compute(scheduler=scheduler, optimize_graph=False)
    assert proxy.seen["put"] + proxy.seen["get"] <= 2


@pytest.mark.parametrize(
    ("kind", "action"),
    [("list", "s3:ListBucket"), ("put", "s3:PutObject"), ("get", "s3:GetObject")],
)
def test_no_permission_of_the_caller_names_action(
    proxy: Proxy, connect: Connect, kind: str, action: str
) -> None:
    scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
    proxy.plan(**{kind: [s3_error(403, "AccessDenied", "Access Denied")]})
    with pytest.raises(AccessDeniedError, match=action):
        delayed(np.sum)(np.ones(100_000)).compute(scheduler=scheduler)


def test_a_payload_that_lambda_finds_too_large_is_an_error(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(invoke=[Answer(413, b'{"Type":"User","message":"Request must be smaller"}')])
    with pytest.raises(PayloadTooLargeError, match="Task 'large'"):
        delayed(inc)(1, dask_key_name="large").compute(scheduler=scheduler)


def test_an_answer_that_is_no_json_is_an_error(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    for answer in (Answer(200, b"<html>a captive portal</html>"), Answer(200, b""), Answer(302)):
        proxy.plan(invoke=[answer])
        with pytest.raises(InvocationError):
            delayed(inc)(1).compute(scheduler=scheduler)


def test_one_failed_run_does_not_touch_the_next() -> None:
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            delayed(lambda: 1 / 0)().compute(scheduler=lambda_get)
        assert small_graph().compute(scheduler=lambda_get) == 21
