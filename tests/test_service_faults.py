"""Faults of the network and of AWS are waited out, or become an error that names them."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler, lambda_get
from dask_lambda.errors import (
    AccessDeniedError,
    FunctionTimeoutError,
    IntegrityError,
    InvocationError,
    LostDataError,
    OutOfMemoryError,
    PayloadTooLargeError,
    WorkerDiedError,
)
from tests.faults.deploy import FAULTY
from tests.faults.plans import INTENSITIES, Faults
from tests.faults.proxy import (
    CONFLICT,
    DENIED,
    EXPIRED,
    EXPIRED_TOKEN,
    FORBIDDEN,
    NO_SUCH_KEY,
    REASONS,
    SLOW_DOWN,
    Action,
    Answer,
    Corrupt,
    Damage,
    Delay,
    Duplicate,
    Proxy,
    Request,
    Reset,
    Stall,
    Strike,
    Truncate,
    exited,
    out_of_memory,
    s3_error,
    throttle,
    timed_out,
)
from tests.helpers import eventually, report

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("one_task_each")]
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]


def inc(x: Any) -> Any:
    return x + 1


# -- faults that pass ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxied(shared_proxy: Proxy, deploy: Deploy) -> str:
    """A function whose workers reach S3 through the proxy, and do to themselves what it says."""
    return deploy(**FAULTY, environment={"AWS_ENDPOINT_URL_S3": shared_proxy.url})


def small_graph() -> Any:
    return delayed(sum)([delayed(inc)(i) for i in range(6)])


UNAVAILABLE = Answer(503, b'{"message":"Service Unavailable"}')
BROKEN = Answer(500, b'{"Type":"Service","message":"ServiceException"}')


def test_throttles_are_waited_for_and_counted(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(invoke=[None, *(throttle(reason) for reason in REASONS)])
    assert small_graph().compute(scheduler=scheduler) == 21
    assert report().throttles == len(REASONS)
    assert report().invocations == 7
    assert proxy.seen["invoke"] == 7 + len(REASONS)


def test_no_more_run_at_the_same_time_than_lambda_lets(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url, concurrency=8)
    proxy.limit(concurrency=2)
    made = [delayed(inc)(i) for i in range(40)]
    assert dask.compute(*made, scheduler=scheduler) == tuple(range(1, 41))
    assert proxy.peak <= 2
    assert report().invocations == 40
    assert report().throttles == proxy.seen["invoke"] - 40 > 0


def test_a_new_account_with_ten_executions_at_a_time_is_slow_and_no_error(
    proxy: Proxy, connect: Connect
) -> None:
    scheduler = connect(endpoint_url=proxy.url, concurrency=1000)  # as if it were any account
    proxy.limit(concurrency=10)
    made = [delayed(inc)(i) for i in range(60)]
    assert dask.compute(*made, scheduler=scheduler, plan="none") == tuple(range(1, 61))
    assert proxy.peak <= 10
    assert report().invocations == 60


def test_no_more_are_started_in_a_second_than_lambda_lets(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url, concurrency=8)
    proxy.limit(rate=50)
    made = [delayed(inc)(i) for i in range(40)]
    assert dask.compute(*made, scheduler=scheduler) == tuple(range(1, 41))
    assert report().throttles == proxy.seen["invoke"] - 40 > 0


@pytest.mark.parametrize(
    ("faults", "invocations"),
    [
        ([UNAVAILABLE, None, BROKEN], None),
        ([Answer(502), Answer(504)], None),
        ([Reset(forwarded=False), None, Reset(forwarded=False)], None),
        ([Reset(forwarded=True), None, Reset(forwarded=True)], 9),
        ([Stall(0.1, forwarded=False), None, Stall(0.1, forwarded=True)], None),
        ([Truncate(0.5), None, Truncate(0.0)], 9),
        ([Reset(forwarded=True, after=0.001), None, Reset(forwarded=True, after=0.01)], 9),
        ([exited(), None, exited(forwarded=True)], 9),
    ],
    ids=[
        "500 and 503",
        "no body",
        "reset before",
        "reset after",
        "stalled",
        "truncated",
        "reset during",
        "dead",
    ],
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


def test_an_invocation_that_runs_twice_counts_once(
    proxy: Proxy, proxied: str, connect: Connect
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    proxy.plan(invoke=[Duplicate(i % 2 == 0) for i in range(7)])
    assert small_graph().compute(scheduler=scheduler) == 21
    assert report().tasks == report().invocations == 7
    assert report().retries == 0


@pytest.mark.parametrize("inline_bytes", [0, 65536])
def test_workers_that_die_before_in_or_after_their_work_are_replaced(
    proxy: Proxy, proxied: str, connect: Connect, inline_bytes: int
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=inline_bytes)
    deaths = [Strike({"kind": "kill", "seconds": s}) for s in (0, 0.005, 3600)]
    proxy.plan(invoke=[None, *deaths])
    assert small_graph().compute(scheduler=scheduler) == 21
    assert report().retries == 3
    assert report().tasks == 7


def test_a_task_under_which_workers_die_is_named(
    proxy: Proxy, proxied: str, connect: Connect
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied)
    proxy.plan(invoke=[Strike({"kind": "kill", "seconds": 0})] * 3)
    with pytest.raises(WorkerDiedError, match="Task 'deadly'"):
        delayed(inc)(1, dask_key_name="deadly").compute(scheduler=scheduler)
    assert proxy.seen["invoke"] == 3


def test_stragglers_are_late_and_right(proxy: Proxy, proxied: str, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied)
    proxy.plan(invoke=[Strike({"kind": "sleep", "seconds": 0.5}), Delay(0.3)])
    assert small_graph().compute(scheduler=scheduler) == 21
    assert not report().failed


@pytest.mark.parametrize("forwarded", [False, True])
@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (out_of_memory, OutOfMemoryError, r"'hungry'.*MB.*dask-lambda\.memory"),
        (timed_out, FunctionTimeoutError, r"'hungry'.*3\.00 seconds.*dask-lambda\.timeout"),
    ],
    ids=["out of memory", "timed out"],
)
def test_out_of_memory_or_time_is_retried_if_asked_for_else_an_error(
    proxy: Proxy, connect: Connect, fault: Any, error: Any, words: str, forwarded: bool
) -> None:
    scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
    once = delayed(inc)(1, dask_key_name="hungry")
    proxy.plan(invoke=[fault(forwarded=forwarded)] * 2)
    assert once.compute(scheduler=scheduler, retries=2) == 2
    proxy.plan(invoke=[fault(forwarded=forwarded)])
    with pytest.raises(error, match=words):
        once.compute(scheduler=scheduler)


def test_a_function_that_oversleeps_once_is_called_again(
    proxy: Proxy, deploy: Deploy, connect: Connect
) -> None:
    hasty = deploy(**FAULTY, timeout=2)
    scheduler = connect(endpoint_url=proxy.url, function=hasty, inline_bytes=0, timeout=2)
    proxy.plan(invoke=[None, Strike({"kind": "sleep", "seconds": 3600})])
    assert small_graph().compute(scheduler=scheduler, retries=1) == 21
    assert report().retries == 1


@pytest.mark.parametrize("seed", range(2))
def test_when_30_percent_of_invocations_fail_the_result_is_right(
    proxy: Proxy, proxied: str, connect: Connect, seed: int
) -> None:
    # A duplicate that fails is no retry.
    scheduler = connect(endpoint_url=proxy.url, function=proxied, concurrency=4, speculate=False)
    proxy.decide = faults = Faults(seed, INTENSITIES["30 % of invocations fail"])
    made = [delayed(inc)(i) for i in range(40)]
    total = delayed(sum)(made)
    assert total.compute(scheduler=scheduler) == sum(range(1, 41))
    assert faults.injected.total() > 8
    assert report().retries == faults.injected.total()
    assert report().tasks == 41


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


@pytest.mark.parametrize(
    "plan",
    [
        {"put": [SLOW_DOWN, None, SLOW_DOWN]},
        {"get": [SLOW_DOWN, s3_error(500, "InternalError"), None, SLOW_DOWN]},
        {"put": [CONFLICT, None, CONFLICT]},
        {"put": [Reset(forwarded=False), None, Reset(forwarded=True)]},
        {"get": [Reset(forwarded=False), None, Reset(forwarded=True)]},
        {"delete": [SLOW_DOWN, Reset(forwarded=True)]},
        {"get": [Stall(0.1, forwarded=True), Delay(0.1)], "put": [Stall(0.1, forwarded=True)]},
        {"get": [Truncate(0.5), None, Truncate(0.0), Truncate(0.99)]},
    ],
    ids=[
        "503 on put",
        "5xx on get",
        "409 on put",
        "reset put",
        "reset get",
        "faults on delete",
        "stalled",
        "truncated",
    ],
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


@pytest.mark.parametrize("damage", [Damage(0.9), Damage(0.0), Damage(0.5, cut=True)])
@pytest.mark.parametrize("reader", ["worker", "client"])
def test_an_object_that_was_changed_for_good_is_refused_by_name(
    proxy: Proxy, proxied: str, connect: Connect, damage: Action, reader: str
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    x = delayed(np.ones)(1000, dask_key_name="x")
    y = delayed(np.sum)(x, dask_key_name="y")
    proxy.plan(put=[damage] if reader == "worker" else [None, damage])
    with pytest.raises(IntegrityError, match=r"object '\w/dask-lambda/\w+/\w+'"):
        y.compute(scheduler=scheduler, optimize_graph=False)


@pytest.mark.parametrize("reader", ["worker", "client"])
def test_an_object_that_is_gone_is_named(
    proxy: Proxy, proxied: str, connect: Connect, reader: str
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    x = delayed(np.ones)(1000, dask_key_name="x")
    y = delayed(np.sum)(x, dask_key_name="y")
    proxy.plan(get=[NO_SUCH_KEY] if reader == "worker" else [None, NO_SUCH_KEY])
    with pytest.raises(LostDataError, match=r"\w/dask-lambda/\w+/\w+"):
        y.compute(scheduler=scheduler, optimize_graph=False)


# -- credentials that expire ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        {"invoke": [None, EXPIRED, None, EXPIRED]},
        {"get": [None, EXPIRED_TOKEN, None, EXPIRED_TOKEN]},
        {"put": [EXPIRED_TOKEN, None, None, EXPIRED_TOKEN]},
        {"delete": [EXPIRED_TOKEN]},
    ],
    ids=["invoke", "get", "put", "delete"],
)
def test_expired_credentials_are_refreshed_and_the_run_goes_on(
    proxy: Proxy, proxied: str, connect: Connect, plan: dict[str, Any]
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    made = [delayed(np.full)(40_000, i) for i in range(4)]
    literal = delayed(np.ones(40_000))
    total = delayed(lambda parts, one: int(np.sum(parts) + one.sum()))(made, literal)
    assert total.compute(scheduler=scheduler) == 40_000 * 7
    proxy.plan(**plan)
    assert total.compute(scheduler=scheduler) == 40_000 * 7
    assert not report().failed


@pytest.mark.parametrize(
    "plan",
    [
        {"get": [EXPIRED_TOKEN, None, EXPIRED_TOKEN]},
        {"put": [EXPIRED_TOKEN]},
        {"list": [EXPIRED_TOKEN], "invoke": [Reset(forwarded=True)]},
        {"delete": [EXPIRED_TOKEN]},
    ],
    ids=["get", "put", "list", "delete"],
)
def test_expired_credentials_of_the_client_are_refreshed_for_s3(
    proxy: Proxy, connect: Connect, plan: dict[str, Any]
) -> None:
    scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
    doubled = delayed(np.add)(np.ones(40_000), 1)
    assert doubled.compute(scheduler=scheduler).sum() == 80_000
    proxy.plan(**plan)
    assert doubled.compute(scheduler=scheduler).sum() == 80_000


def test_a_fault_that_does_not_pass_is_an_error(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url, patience=1)
    assert small_graph().compute(scheduler=scheduler) == 21
    proxy.plan(invoke=[BROKEN] * 50)
    with pytest.raises(InvocationError, match="500"):
        delayed(inc)(1).compute(scheduler=scheduler)
    assert 2 <= report().retries < 20


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
    proxy.plan(**{kind: [DENIED]})
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
    proxy.plan(**{kind: [DENIED]})
    with pytest.raises(AccessDeniedError, match=action):
        delayed(np.sum)(np.ones(100_000)).compute(scheduler=scheduler)


@pytest.mark.parametrize(
    "action",
    [Corrupt(0.0), Corrupt(0.5), Truncate(0.5, announced=False), Truncate(0.0, announced=False)],
    ids=["tag", "data", "half", "nothing"],
)
def test_what_is_damaged_on_the_way_is_fetched_once_more(
    proxy: Proxy, proxied: str, connect: Connect, action: Action
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    damaged: set[str] = set()

    def first_fetch(request: Request) -> Action:
        """Damage each object once."""
        if request.kind != "get" or request.names[0] in damaged:
            return None
        damaged.add(request.names[0])
        return action

    made = [delayed(np.full)(40_000, i) for i in range(4)]
    literal = delayed(np.ones(40_000))
    proxy.decide = first_fetch
    *parts, total = dask.compute(*made, delayed(sum)([*made, literal]), scheduler=scheduler)
    assert total.tolist() == [7] * 40_000
    assert [part[0] for part in parts] == [0, 1, 2, 3]
    assert len(damaged) == 6
    assert report().retries == 0


def test_what_is_being_uploaded_when_a_run_fails_is_not_left_behind(
    proxy: Proxy, connect: Connect
) -> None:
    scheduler = connect(endpoint_url=proxy.url, concurrency=4)
    sums = [delayed(np.sum)(np.full(40_000, i)) for i in range(4)]
    proxy.plan(put=[Delay(0.5), DENIED, Delay(0.5), Delay(0.5)])
    with pytest.raises(AccessDeniedError, match="s3:PutObject"):
        dask.compute(*sums, scheduler=scheduler)
    assert eventually(lambda: not proxy.in_flight)


def test_what_is_being_uploaded_when_persist_fails_is_not_left_behind(
    proxy: Proxy, connect: Connect
) -> None:
    scheduler = connect(endpoint_url=proxy.url, concurrency=4)
    made = [delayed(inc)(i) for i in range(4)]
    proxy.plan(put=[Delay(0.5), DENIED, Delay(0.5), Delay(0.5)])
    with pytest.raises(AccessDeniedError, match="s3:PutObject"):
        dask.persist(*made, scheduler=scheduler.get)
    assert eventually(lambda: not proxy.in_flight)


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
