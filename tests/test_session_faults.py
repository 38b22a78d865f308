"""Single calls under faults of the network, of AWS and of workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dask_lambda import LambdaScheduler
from dask_lambda.errors import IntegrityError, LostDataError, WorkerDiedError
from tests.faults.deploy import FAULTY
from tests.faults.plans import INTENSITIES, Faults
from tests.faults.proxy import (
    NO_SUCH_KEY,
    SLOW_DOWN,
    Corrupt,
    Damage,
    Proxy,
    Reset,
    Strike,
    exited,
    throttle,
)
from tests.helpers import eventually
from tests.session_calls import Calls, value

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("without_lease")]
uses_bucket = True

Connect = Callable[..., LambdaScheduler]


def inc(x: Any) -> Any:
    return x + 1


@pytest.fixture(scope="module")
def proxied(shared_proxy: Proxy, deploy: Callable[..., str]) -> str:
    """A function whose workers reach S3 through the proxy, and do to themselves what it says."""
    return deploy(**FAULTY, environment={"AWS_ENDPOINT_URL_S3": shared_proxy.url})


@pytest.fixture
def call(proxy: Proxy, proxied: str, connect: Connect) -> Calls:
    """Calls through the proxy; everything goes through S3."""
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0, speculate=False)
    return Calls(scheduler.session())


def test_refused_and_lost_invocations_are_sent_again(proxy: Proxy, call: Calls) -> None:
    proxy.plan(
        invoke=[
            throttle(),
            Reset(forwarded=False),
            Reset(forwarded=True),
            exited(),
            Strike({"kind": "kill", "seconds": 3600}),
        ]
    )
    chain = call(inc, 0)
    for _ in range(3):
        chain = call(inc, chain[0])
    assert value(chain) == 4
    assert call.session.report().throttles == 1


def test_a_call_under_which_workers_die_fails_alone(proxy: Proxy, call: Calls) -> None:
    proxy.plan(invoke=[Strike({"kind": "kill", "seconds": 0})] * 3)
    _, heard = call(inc, 1)
    with pytest.raises(WorkerDiedError, match="inc-1"):
        heard.end.result(60)
    assert value(call(inc, 2)) == 3


def test_every_call_ends_once_and_rightly_when_30_percent_of_invocations_fail(
    proxy: Proxy, call: Calls
) -> None:
    proxy.decide = faults = Faults(3, INTENSITIES["30 % of invocations fail"])
    chain = call(inc, 0)  # one after the other, so that each is an invocation
    for _ in range(15):
        chain = call(inc, chain[0])
    rest = [call(inc, number) for number in range(12)]
    assert value(chain) == 16
    assert [value(each) for each in rest] == [number + 1 for number in range(12)]
    assert faults.injected.total() > 3


def test_a_result_is_fetched_again_if_s3_is_slow_or_damages_it(proxy: Proxy, call: Calls) -> None:
    stored, heard = call(np.arange, 1000)
    heard.end.result(60)
    proxy.plan(get=[SLOW_DOWN, Corrupt(), None])
    assert stored.load().sum() == 499_500


def test_a_result_that_is_damaged_or_gone_is_an_error_of_whoever_wants_it(
    proxy: Proxy, call: Calls
) -> None:
    proxy.plan(put=[Damage()])
    stored, heard = call(np.arange, 1000)
    heard.end.result(60)
    with pytest.raises(IntegrityError, match=stored.value.name if stored.value else ""):
        stored.load()
    proxy.plan(get=[NO_SUCH_KEY] * 20)
    with pytest.raises(LostDataError, match="gone"):
        stored.load()
    proxy.plan()
    assert value(call(inc, 1)) == 2


def test_what_a_lost_invocation_has_written_goes_with_the_session(
    proxy: Proxy, call: Calls, bucket_names: Any
) -> None:
    proxy.plan(invoke=[Reset(forwarded=True), *[exited()] * 3])
    _, heard = call(np.ones, 1000)
    heard.end.exception(60)
    call.session.close()
    assert eventually(lambda: not bucket_names())
