"""Nothing that is secret is in a payload, an object, a log, a reply, or an error's text.

The one exception: the secret of a run is in the payload, under "secrets", and nowhere else.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import secrets
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import dask
import numpy as np
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler
from dask_lambda.errors import DaskLambdaError
from dask_lambda.graph import normalise
from dask_lambda.kept_runs import KeptRun, Place
from dask_lambda.local import LocalAWS
from dask_lambda.plan import Plan
from dask_lambda.run import Sealed
from lambda_worker.protocol import Request as WorkerRequest
from lambda_worker.standalone import Settings
from lambda_worker.store import open_bucket
from tests.faults.proxy import DENIED, EXPIRED, NO_SUCH_KEY, Action, Corrupt, Proxy, Request, Reset
from tests.helpers import eventually

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("one_task_each")]
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]


class Recorder(Proxy):
    """Keeps what passes: the bodies of requests and answers, and the secrets of the runs."""

    def __init__(self, upstream: str):
        super().__init__(upstream)
        self.passed: list[tuple[str, bytes]] = []
        self.run_secrets: set[bytes] = set()

    async def _act(self, received: Any, request: Request, action: Action) -> Any:
        body = request.body
        if request.kind == "invoke":
            event = json.loads(body)
            given = event.pop("secrets").values()
            self.run_secrets |= {base64.b64decode(each) for each in given}
            body = json.dumps(event).encode()
        self.passed.append((f"{request.kind} {request.path}", body))
        return await super()._act(received, request, action)

    async def _send(self, received: Any, body: bytes) -> Any:
        answer = await super()._send(received, body)
        self.passed.append((f"answer to {received.path}", answer.body))
        return answer


@pytest.fixture
def recorder(aws: LocalAWS) -> Iterator[Recorder]:
    with Recorder(aws.endpoint_url) as running:
        yield running


@pytest.fixture
def markers(
    aws: LocalAWS, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """What must not be found anywhere, by what it is."""
    temporary = aws.client("sts").get_session_token()["Credentials"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", temporary["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", temporary["SecretAccessKey"])
    monkeypatch.setenv("AWS_SESSION_TOKEN", temporary["SessionToken"])
    environment, configuration = secrets.token_hex(16), secrets.token_hex(16)
    monkeypatch.setenv("DATABASE_PASSWORD", environment)

    def role() -> list[str]:
        return [os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_SESSION_TOKEN"]]

    with dask.config.set({"database.password": configuration}):
        of_the_role = delayed(role)().compute(scheduler=connect())
        yield {
            "the secret key": temporary["SecretAccessKey"],
            "the session token": temporary["SessionToken"],
            "an environment variable": environment,
            "a secret in Dask's configuration": configuration,
            "the role's secret key": of_the_role[0],
            "the role's session token": of_the_role[1],
        }


def forms(secret: bytes) -> list[bytes]:
    """How a secret may look."""
    padded = base64.b64encode(secret + bytes(-len(secret) % 3))
    plain = [secret, secret.hex().encode(), repr(secret)[2:-1].encode()]
    return [*plain, padded[: len(secret) * 4 // 3]]


def unpacked(body: bytes) -> bytes:
    """A body, and what is in it as base64."""
    found = [body]

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                if key == "data" and isinstance(value, str):
                    found.append(base64.b64decode(value))
                walk(value)
        elif isinstance(part, list):
            for each in part:
                walk(each)

    with suppress(ValueError):
        walk(json.loads(body))
    return b"\n".join(found)


def everything_about(error: BaseException | None) -> str:
    """An error and what led to it, as tracebacks, notes and representations show it."""
    shown = ["".join(traceback.format_exception(error))] if error else []
    while error is not None:
        shown += [repr(error), str(error), repr(error.args), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(shown)


def fail(x: Any) -> None:
    password = "local variables are nobody's business"  # noqa: F841
    raise ValueError("a task's own")


FAULTS: dict[str, dict[str, list[Any]]] = {
    "an exception": {},
    "denied": {"put": [DENIED]},
    "gone": {"get": [NO_SUCH_KEY]},
    "damaged": {"get": [Corrupt(), Corrupt()]},
    "expired": {"check": [EXPIRED]},
    "no answer": {"check": [Reset(forwarded=False)]},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_secret_is_found_anywhere(
    aws: LocalAWS,
    recorder: Recorder,
    markers: dict[str, str],
    connect: Connect,
    deploy: Deploy,
    caplog: pytest.LogCaptureFixture,
    fault: str,
) -> None:
    function = deploy(environment={"AWS_ENDPOINT_URL_S3": recorder.url})
    scheduler = connect(endpoint_url=recorder.url, function=function, inline_bytes=0)
    places: list[tuple[str, bytes]] = []
    with caplog.at_level(logging.DEBUG, "dask_lambda"):
        recorder.plan(**FAULTS[fault])
        x = delayed(np.sum)(delayed(np.ones(100_000)))
        task = delayed(fail)(x) if fault == "an exception" else delayed(abs)(x)
        with pytest.raises((ValueError, DaskLambdaError)) as info:
            task.compute(scheduler=scheduler, optimize_graph=False)
        places.append(("the exception", everything_about(info.value).encode()))
        recorder.plan()
        assert delayed(abs)(x).compute(scheduler=scheduler, optimize_graph=False) == 100_000
    scheduler.close()
    logs = aws.client("logs")

    def logged() -> list[Any]:
        return logs.filter_log_events(logGroupName=f"/aws/lambda/{function}")["events"]

    assert eventually(logged)
    places += [("the function's log", event["message"].encode()) for event in logged()]
    places += [("the client's log", record.getMessage().encode()) for record in caplog.records]
    places += [(what, unpacked(body)) for what, body in recorder.passed]
    assert recorder.run_secrets
    assert {what.split()[0] for what, _ in places} >= {"invoke", "put", "answer", "the"}
    sought = [(what, forms(value.encode())) for what, value in markers.items()]
    sought += [("the run's secret", forms(each)) for each in recorder.run_secrets]
    for what, looks in sought:
        for place, content in places:
            assert not any(form in content for form in looks), f"{what} is in {place}"


def test_what_is_sought_would_be_found() -> None:
    secret = secrets.token_bytes(32)
    body = json.dumps({"groups": [{"data": base64.b64encode(b"x" + secret).decode()}]}).encode()
    assert any(form in unpacked(body) for form in forms(secret))
    for shown in (repr(secret), secret.hex(), base64.b64encode(secret).decode()):
        assert any(form in everything_about(ValueError(shown)).encode() for form in forms(secret))


def test_representations_show_no_secrets(aws: LocalAWS, connect: Connect) -> None:
    scheduler = connect()
    engine = scheduler._engine(scheduler._settings({}))
    idle = Plan((), frozenset(), (), frozenset(), normalise({"x": 1}, []))
    run = engine.start(idle, inline_bytes=0)
    run.events.get(timeout=60)
    request = WorkerRequest("run", {"run": run.secret}, "bucket", 0, [])
    kept = KeptRun.new("name", Place("bucket", "prefix", None, None), "function")
    kept.secret = run.secret
    key = {"secret_access_key": aws.secret_access_key}
    process = Settings("bucket", partial(open_bucket, "bucket", **key), 1769, "folder")
    embedded = replace(engine.backend, keys=(aws.access_key_id, aws.secret_access_key))
    for each in (
        kept,
        process,
        embedded,
        run,
        run.encoder,
        engine,
        engine.backend,
        request,
        aws,
        scheduler,
        Sealed(b"", run.secret, "name"),
    ):
        shown = repr(each).encode()
        assert not any(form in shown for form in forms(run.secret))
        assert aws.secret_access_key.encode() not in shown
