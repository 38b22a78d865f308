"""Duplicates that run at the same time, of tasks that are not deterministic: one version is seen.

The proxy sends invocations twice, and lets the writes of the two attempts overtake each other.
"""

from __future__ import annotations

import operator
import re
import secrets
from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import pytest
from dask._task_spec import Task, TaskRef

from dask_lambda import LambdaScheduler
from tests.faults.deploy import FAULTY
from tests.faults.proxy import Action, Delay, Duplicate, Proxy, Request, Reset
from tests.helpers import report

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]

MARK = re.compile(rb"token-[0-9a-f]{16}")


@pytest.fixture(scope="module")
def proxied(shared_proxy: Proxy, deploy: Deploy) -> str:
    environment = {"AWS_ENDPOINT_URL_S3": shared_proxy.url, "FAULTS_SMALL_PARTS": "1"}
    return deploy(**FAULTY, environment=environment)


def draw() -> str:
    """Another one at each call."""
    return f"token-{secrets.token_hex(8)}"


def draw_pair() -> tuple[str, str]:
    token = draw()
    return token, token


def after(token: Any) -> str:
    """The same token, of another task."""
    return str(token)


def with_noise(token: str, size: int) -> tuple[str, np.ndarray]:
    return token, np.random.default_rng().random(size)


def read(value: Any) -> tuple[str, float]:
    token, noise = value
    return token, float(noise.sum())


class Overtaking:
    """Sends each invocation twice, and each output of the two in the other order.

    Of the attempt that was the first to write one output, the writes of all other outputs are late:
    so if each output were committed by itself, they would come from both.
    """

    def __init__(self, action: Action):
        self.action = action
        self.first: bytes | None = None
        self.written: set[str] = set()
        self.overtaken = 0

    def __call__(self, request: Request) -> Action:
        if request.kind == "invoke":
            return self.action if self.first is None else None
        found = MARK.search(request.body) if request.kind == "put" else None
        if found is None:
            return None
        if self.first is None:
            self.first = found[0]
            self.written.add(request.names[0])
        elif found[0] == self.first and request.names[0] not in self.written:
            self.overtaken += 1
            return Delay(0.5)
        return None


@pytest.mark.parametrize(
    "action",
    [Duplicate(second=False), Duplicate(second=True), Reset(forwarded=True, after=0.001)],
    ids=["the first answers", "the second answers", "nobody heard the first"],
)
def test_all_outputs_of_a_group_come_from_one_attempt(
    proxy: Proxy, proxied: str, connect: Connect, action: Action
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0, plan="auto")
    dsk: dict[str, Task] = {"pair": Task("pair", draw_pair)}
    halves = ["half-0", "half-1"]
    for i, half in enumerate(halves):
        dsk[half] = Task(half, operator.getitem, TaskRef("pair"), i)
    proxy.decide = overtaking = Overtaking(action)
    values = scheduler.get(dsk, halves)
    assert values[0] == values[1]
    assert report().tasks == 3
    assert report().invocations == (1 if isinstance(action, Duplicate) else 2)  # one group
    if isinstance(action, Duplicate):
        assert overtaking.overtaken  # else nothing was shown


@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "in parts"])
@pytest.mark.parametrize("plan", ["none", "auto"])
@pytest.mark.parametrize("inline_bytes", [0, 65536])
def test_every_reader_of_a_task_that_was_run_twice_sees_the_same(
    proxy: Proxy, proxied: str, connect: Connect, plan: str, inline_bytes: int, size: int
) -> None:
    scheduler = connect(
        endpoint_url=proxy.url, function=proxied, inline_bytes=inline_bytes, plan=plan
    )
    dsk: dict[Any, Task] = {"token": Task("token", draw)}
    dsk["source"] = Task("source", with_noise, TaskRef("token"), size)
    readers = [f"reader-{i}" for i in range(4)]
    dsk.update({key: Task(key, read, TaskRef("source")) for key in readers})
    proxy.plan(
        invoke=[Duplicate(second=True), Duplicate(second=False), Reset(forwarded=True, after=0.01)]
        * 2
    )
    *seen, token, source = scheduler.get(dsk, [*readers, "token", "source"])
    assert set(seen) == {read(source)}
    assert token == source[0]


def test_what_was_persisted_is_what_was_read(proxy: Proxy, proxied: str, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, plan="none")
    token = dask.delayed(draw)()
    proxy.plan(invoke=[Duplicate(second=True)] * 3)
    (kept,) = dask.persist(token, scheduler=scheduler.get)
    first = kept.compute(scheduler=scheduler)
    assert dask.delayed(after)(kept).compute(scheduler=scheduler) == first
    assert kept.compute(scheduler=scheduler) == first
