"""The Lambda function looks whether its run still goes on."""

from __future__ import annotations

import json
import threading
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from dask._task_spec import Task, TaskRef

from lambda_worker import handler, lease
from lambda_worker.errors import StoreError
from lambda_worker.protocol import GroupRequest, Request
from lambda_worker.store import Store
from tests.handler_client import CONTEXT, RUN, Client, client, inc, name_of

__all__ = ["client"]


# -- the lease -----------------------------------------------------------------------------------


@pytest.fixture
def leased(client, monkeypatch):
    """``leased(groups, ...)``: call with a lease that is looked for before each task."""
    monkeypatch.setattr(lease, "AFTER", 0.0)
    monkeypatch.setattr(lease, "EVERY", 0.0)
    monkeypatch.setattr(lease, "WAIT", 20.0)
    name = name_of("lease")

    def call(*groups: GroupRequest, there: bool, said: bool) -> list[dict[str, Any]]:
        if there:
            client.store.put_new(name, b"lease")
        request = Request(RUN, client.secrets, "bucket", 0, list(groups), lease=name, leased=said)
        return handler.handler(json.loads(json.dumps(request.to_json())), CONTEXT)["groups"]

    yield call
    handler.environment.looking.shutdown()


def end_the_run(name: str, *read: Any) -> None:
    obstore.delete(handler.environment.store("bucket").bucket, name)


def three_steps(client: Client, second: Any, *arguments: Any) -> GroupRequest:
    """A group of three tasks; the first and the last one are outputs."""
    return client.group(
        Task("a", inc, 1),
        Task("b", second, *arguments, TaskRef("a")),
        Task("c", str, TaskRef("b")),
        outputs=["a", "c"],
    )


def test_when_the_lease_is_gone_the_worker_stops_before_the_next_task(client, leased, capsys):
    group = three_steps(client, end_the_run, name_of("lease"))
    first, second = leased(group, client.group(Task("d", inc, 1)), there=True, said=False)
    assert first["error"]["kind"] == second["error"]["kind"] == "cancelled"
    assert name_of("lease") in first["error"]["message"]
    assert set(first["left"]) == client.objects() == {name_of("a")}
    assert json.loads(capsys.readouterr().err)["cancelled"] is True


def test_a_lease_that_was_said_to_be_there_and_is_not_is_gone(client, leased):
    (said,) = leased(three_steps(client, inc), there=False, said=True)
    assert said["error"]["kind"] == "cancelled"
    assert client.objects() == set()


@pytest.mark.parametrize("there", [False, True])
def test_a_lease_that_is_there_or_may_yet_come_stops_nobody(client, leased, there):
    (said,) = leased(three_steps(client, inc), there=there, said=there)
    assert len(said["outputs"]) == 2


def test_a_lease_that_does_not_come_in_time_was_deleted_before(client, leased, monkeypatch):
    monkeypatch.setattr(lease, "LATE", 0.0)
    (said,) = leased(three_steps(client, inc), there=False, said=False)
    assert said["error"]["kind"] == "cancelled"


def test_an_answer_is_as_old_as_the_question(monkeypatch):
    """A task takes long while S3 answers: the client may have written the lease meanwhile."""
    clock, looks = [0.0], []

    class Pool(Executor):
        def submit(self, *work):
            looks.append(Future())
            return looks[-1]

    monkeypatch.setattr(lease, "WAIT", 0.0)
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    watch = lease.LeaseWatch(lambda: True, False, Pool())
    clock[0] = lease.AFTER
    assert not watch.gone()
    clock[0] = lease.LATE + 1
    looks.pop().set_result(False)
    assert not watch.gone()
    clock[0] += lease.EVERY
    watch.gone()
    looks.pop().set_result(False)
    assert watch.gone()


def test_a_look_is_counted(client, leased):
    leased(client.group(Task("a", inc, 1)), there=True, said=True)
    request = Request(RUN, client.secrets, "bucket", 0, [], lease=name_of("lease"), leased=True)
    request.groups = [client.group(Task("b", inc, 1))]
    reply = handler.handler(json.loads(json.dumps(request.to_json())), CONTEXT)
    assert reply["s3"]["gets"] == 2  # before the group and before its task


def test_while_s3_does_not_answer_nobody_is_stopped(client, leased, monkeypatch):
    def refuse(self, name):
        raise StoreError("transient", "s3:GetObject: no answer")

    monkeypatch.setattr(Store, "exists", refuse)
    (said,) = leased(three_steps(client, inc), there=False, said=True)
    assert len(said["outputs"]) == 2


def test_nobody_waits_for_an_answer_that_takes_long(client, leased, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(lease, "WAIT", 0.0)
    monkeypatch.setattr(Store, "exists", lambda self, name: not answer.wait(20))
    (said,) = leased(three_steps(client, inc), there=False, said=True)
    answer.set()
    assert len(said["outputs"]) == 2


def test_a_short_invocation_does_not_look(client):
    request = Request(RUN, client.secrets, "bucket", 0, [client.group(Task("a", inc, 1))])
    request.lease, request.leased = name_of("lease"), True
    reply = handler.handler(json.loads(json.dumps(request.to_json())), CONTEXT)
    assert len(reply["groups"][0]["outputs"]) == 1
    assert reply["s3"]["gets"] == 0
