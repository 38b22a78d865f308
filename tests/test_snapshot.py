"""A function that begins as a copy of a snapshot: what its copies do not have in common.

A fork is to memory what a snapshot is: each child goes on from what its parent had loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from dask._task_spec import Task

from dask_lambda.local import LocalAWS
from lambda_worker import codec, handler, protocol, snapshot
from lambda_worker.protocol import Body, GroupRequest, Request, Value
from lambda_worker.store import Store, open_bucket
from tests.credentials_endpoint import CredentialsEndpoint
from tests.handler_client import CONTEXT, RUN, SECRET, client, inc, name_of
from tests.runtime_api import RuntimeAPI, function_environment

__all__ = ["client"]

uses_bucket = True

ROOT = Path(handler.__file__).parents[1]
SNAP_START = {snapshot.VARIABLE: snapshot.SNAP_START}


def draw() -> list[float]:
    """What a task draws that is given no generator and no seed."""
    import random

    import numpy as np

    return [random.random(), float(np.random.random()), float(np.random.default_rng().random())]  # noqa: NPY002


def event(task: Task, bucket: str = "bucket", inline_bytes: int = 100_000) -> dict[str, Any]:
    """The event of an invocation that runs one task."""
    name = name_of("body")
    sealed = codec.dumps(Body([task], [], [], [task.key]).fields(), SECRET, name)
    group = GroupRequest(Value(name, len(sealed), sealed), [], [name_of("output")])
    return Request(RUN, {RUN: SECRET}, bucket, inline_bytes, [group]).to_json()


def value(record: dict[str, Any]) -> Any:
    """A value that came with the reply."""
    sealed = Value.from_json(record)
    return codec.loads(sealed.data, SECRET, sealed.name)


# -- random numbers ------------------------------------------------------------------------------

#: What is loaded once, and the copies that go on from there.
COPIES = """
import json, os, random, sys
from types import SimpleNamespace
from lambda_worker import handler
preimport = sys.argv[1]
if preimport:
    import numpy.random
context = SimpleNamespace(memory_limit_in_mb="1769", aws_request_id="1")
events = json.load(sys.stdin)
state = random.getstate()
for _ in range(2):
    reading, writing = os.pipe()
    if not (child := os.fork()):
        random.setstate(state)  # Python itself has drawn it anew, since it knows of forks
        replies = [handler.handler(event, context) for event in events]
        with open(writing, "w") as file:
            json.dump(replies, file)
        os._exit(0)
    os.close(writing)
    with open(reading) as file:
        print(file.read())
    assert os.waitpid(child, 0)[1] == 0
"""


def copies(
    first: dict[str, Any], *more: dict[str, Any], preimport: str = "numpy", **variables: str
):
    """What two copies of one environment reply to some events."""
    done = subprocess.run(
        [sys.executable, "-c", COPIES, preimport],
        cwd=ROOT,
        input=json.dumps([first, *more]),
        env={"PATH": os.environ["PATH"], "AWS_REGION": "us-east-1", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def drawn(reply: dict[str, Any]) -> list[float]:
    (group,) = reply["groups"]
    return value(group["outputs"][0])


@pytest.mark.parametrize("preimport", ["numpy", ""])
def test_copies_of_a_snapshot_draw_different_numbers(preimport: str) -> None:
    draws = event(Task("y", draw))
    one, other = copies(draws, draws, preimport=preimport, **SNAP_START)
    numbers = [number for reply in (*one, *other) for number in drawn(reply)]
    assert len(numbers) == len(set(numbers)) == 12


def test_they_would_draw_the_same_if_nothing_was_renewed() -> None:
    """So the test before this one shows something."""
    (one,), (other,) = copies(event(Task("y", draw)))
    assert drawn(one)[:2] == drawn(other)[:2]
    assert drawn(one)[2] != drawn(other)[2]  # a generator of the task's own


def test_a_request_that_only_warms_an_environment_is_its_first_one_too() -> None:
    warming = {**protocol.warming_request(0.0), "client": protocol.versions()}
    replies = copies(warming, event(Task("y", draw)), **SNAP_START)
    assert [[reply.get("restored") for reply in each] for each in replies] == [[True, None]] * 2
    assert drawn(replies[0][1])[:2] != drawn(replies[1][1])[:2]


def test_a_seed_that_a_task_sets_stays_for_the_next_invocation(client, monkeypatch) -> None:
    """As in any other environment: only the first invocation draws anew."""
    monkeypatch.setenv(snapshot.VARIABLE, snapshot.SNAP_START)

    def seed() -> None:
        import random

        random.seed(7)

    def first() -> float:
        import random

        return random.random()

    client.result(Task("a", seed))
    assert client.result(Task("b", first)) == pytest.approx(0.32383276483316237)


# -- what is said of it --------------------------------------------------------------------------


def test_only_the_first_reply_of_a_copy_says_that_it_was_restored(
    client, monkeypatch, capsys
) -> None:
    monkeypatch.setenv(snapshot.VARIABLE, snapshot.SNAP_START)
    request = client.event(client.group(Task("a", inc, 1)))
    first, second = (handler.handler(request, CONTEXT) for _ in range(2))
    assert (first["cold"], first["restored"]) == (True, True)
    assert not second["cold"]
    assert "restored" not in second
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("restored") for line in lines] == [True, None]
    assert [line["cold"] for line in lines] == [True, False]


@pytest.mark.parametrize("kind", ["on-demand", "provisioned-concurrency", None])
def test_others_are_not_restored(client, monkeypatch, kind: str | None) -> None:
    if kind:
        monkeypatch.setenv(snapshot.VARIABLE, kind)
    reply = handler.handler(client.event(client.group(Task("a", inc, 1))), CONTEXT)
    assert reply["cold"]
    assert "restored" not in reply


LOADED = """
import json, os, threading, sys
import lambda_worker.handler as handler
sockets = [f for f in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{f}")
           and os.readlink(f"/proc/self/fd/{f}").startswith("socket:")]
print(json.dumps([threading.active_count(), len(sockets), len(handler.environment._stores),
                  "http.client" in sys.modules]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("kind", ["snap-start", "on-demand"])
def test_a_snapshot_holds_no_connection_and_no_thread_of_ours(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], snapshot.VARIABLE: kind},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    # What asks for credentials is in it, and costs others no time.
    assert json.loads(done.stdout) == [1, 0, 0, kind == "snap-start"]


# -- under Lambda's own runtime client -----------------------------------------------------------


@pytest.mark.local
def test_lambdas_runtime_client_drives_a_copy_whose_credentials_are_in_the_container(
    aws: LocalAWS, tmp_path: Path
) -> None:
    """As Lambda does it: a snapshot is taken before the first event, and there are no keys."""
    found = aws.client("sts").get_session_token()["Credentials"]
    keys = {name: found[name] for name in ("AccessKeyId", "SecretAccessKey")}
    with CredentialsEndpoint({**keys, "Token": found["SessionToken"]}) as endpoint:
        variables = function_environment(
            [ROOT, Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))],
            HOME=str(tmp_path),
            AWS_REGION=aws.region,
            AWS_ENDPOINT_URL=aws.endpoint_url,
            **SNAP_START,
            **endpoint.variables(),
        )
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del variables[name]
        with RuntimeAPI("lambda_worker.handler.handler", variables, tmp_path / "log") as api:
            kind, inline = api.invoke(event(Task("y", draw), aws.bucket))
            assert kind == "response", api.log()
            assert (inline["cold"], inline["restored"], api.restored) == (True, True, 1)
            assert len(drawn(inline)) == 3
            assert endpoint.asked == 0
            kind, reply = api.invoke(event(Task("y", draw), aws.bucket, inline_bytes=0))
            assert kind == "response", api.log()
            assert (reply["cold"], reply.get("restored"), api.restored) == (False, None, 1)
            (group,) = reply["groups"]
            assert "error" not in group, group
            assert endpoint.asked == endpoint.given == 1
            assert endpoint.token not in api.log()
    written = Value.from_json(group["outputs"][0])
    assert written.data is None
    store = Store(
        open_bucket(
            aws.bucket,
            endpoint_url=aws.endpoint_url,
            region=aws.region,
            access_key_id=aws.access_key_id,
            secret_access_key=aws.secret_access_key,
        )
    )
    assert len(codec.loads(store.get(written.name, written.size), SECRET, written.name)) == 3
    store.delete(written.name)
