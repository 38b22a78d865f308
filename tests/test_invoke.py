"""What is sent to the Lambda API, as a server on loopback sees it."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from aiohttp import web
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from dask_lambda.events import Failure, FailureKind
from dask_lambda.invoke import LambdaInvoker, Reply

ARN = "arn:aws:lambda:eu-west-1:123456789012:function:work:live"
NOT_READY = "SnapStartNotReadyException:http://internal.amazon.com/coral/com.amazonaws.awsgirapi/"
REPLY = {"memory_mb": 128, "cold": False, "milliseconds": 1.5, "groups": []}
CREDENTIALS = Credentials("AKIDEXAMPLE", "secret", "token")


def invoke(
    function: str,
    payload: bytes,
    headers: dict[str, str] | None = None,
    content: Any = REPLY,
    status: int = 200,
    only_check: bool = False,
) -> tuple[Any, web.Request]:
    """Invoke once, or ask whether one could; the answer and the request that the server got."""
    seen: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        seen.append(request)
        return web.json_response(content, headers=headers, status=status)

    async def run() -> Reply | Failure | None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        url = f"http://127.0.0.1:{port}"
        invoker = LambdaInvoker(function, "eu-west-1", CREDENTIALS, url, timeout=5)
        await invoker.open()
        try:
            return await (invoker.check() if only_check else invoker.invoke(payload))
        finally:
            await invoker.close()
            await runner.cleanup()

    return asyncio.run(run()), seen[0]


def test_the_colons_of_an_arn_are_escaped_on_the_way_as_in_the_signature() -> None:
    _, request = invoke(ARN, b"{}")
    escaped = ARN.replace(":", "%3A")
    assert request.raw_path == f"/2015-03-31/functions/{escaped}/invocations"


def test_the_signature_is_that_of_botocore_for_what_was_sent() -> None:
    _, request = invoke(ARN, b'{"a": 1}')
    again = AWSRequest("POST", f"http://{request.host}{request.raw_path}", data=b'{"a": 1}')
    again.headers["X-Amz-Log-Type"] = request.headers["X-Amz-Log-Type"]
    again.context["timestamp"] = request.headers["X-Amz-Date"]
    signer = SigV4Auth(CREDENTIALS.get_frozen_credentials(), "lambda", "eu-west-1")
    again.headers["X-Amz-Date"] = request.headers["X-Amz-Date"]
    again.headers["X-Amz-Security-Token"] = "token"
    signature = signer.signature(
        signer.string_to_sign(again, signer.canonical_request(again)), again
    )
    assert request.headers["Authorization"].endswith(f"Signature={signature}")


def test_a_reply_of_the_worker_is_read_and_its_memory_remembered() -> None:
    reply, _ = invoke("work", b"{}")
    assert reply.content == REPLY
    assert reply.failure is None


def test_what_was_billed_is_read_from_the_log_as_lambda_sends_it() -> None:
    request = "RequestId: 8f5e33a9-1c1d-4e6b-b3c3-5d2f2c6f3a11"
    log = (
        f"START {request} Version: $LATEST\nEND {request}\n"
        f"REPORT {request}\tDuration: 12.34 ms\tBilled Duration: 437 ms\tMemory Size: 128 MB\t"
        "Max Memory Used: 71 MB\tInit Duration: 424.11 ms\t\n"
    )
    header = {"X-Amz-Log-Result": base64.b64encode(log.encode()).decode()}
    reply, request_sent = invoke("work", b"{}", header)
    assert request_sent.headers["X-Amz-Log-Type"] == "Tail"
    assert reply.billed_ms == 437
    assert invoke("work", b"{}")[0].billed_ms is None


#: As Lambda writes them: with a new environment, with one that it has restored from a snapshot
#: (where the billed part of that is in the billed duration already: 160 + 118), with a used one.
REPORTS = {
    "new": (
        "Duration: 12.34 ms\tBilled Duration: 437 ms",
        "Init Duration: 424.11 ms\t",
        437,
        False,
    ),
    "restored": (
        "Duration: 159.87 ms\tBilled Duration: 278 ms",
        "Restore Duration: 562.43 ms\tBilled Restore Duration: 118 ms\t",
        278,
        True,
    ),
    "used": ("Duration: 12.34 ms\tBilled Duration: 13 ms", "", 13, False),
}


def log_header(name: str) -> dict[str, str]:
    """A header with the end of the log of an invocation."""
    duration, start, _, _ = REPORTS[name]
    request = "RequestId: 8f5e33a9-1c1d-4e6b-b3c3-5d2f2c6f3a11"
    memory = "Memory Size: 1024 MB\tMax Memory Used: 88 MB"
    log = f"REPORT {request}\t{duration}\t{memory}\t{start}\n"
    return {"X-Amz-Log-Result": base64.b64encode(log.encode()).decode()}


@pytest.mark.parametrize("name", REPORTS)
def test_what_a_restoration_is_billed_as_time_is_counted_once(name: str) -> None:
    _, _, billed, restored = REPORTS[name]
    reply, _ = invoke("work", b"{}", log_header(name))
    assert (reply.billed_ms, reply.restored) == (billed, restored)


def test_an_environment_that_was_restored_is_known_by_what_the_worker_says_too() -> None:
    reply, _ = invoke("work", b"{}", content={**REPLY, "cold": True, "restored": True})
    assert reply.restored
    assert not invoke("work", b"{}")[0].restored
    reply, _ = invoke("work", b"{}", content={**REPLY, "restored": "yes"})
    assert reply.failure is not None


def test_one_that_was_lost_has_been_paid_for_nevertheless() -> None:
    headers = {**log_header("restored"), "X-Amz-Function-Error": "Unhandled"}
    reply, _ = invoke("work", b"{}", headers, {"errorType": "Runtime.ExitError"})
    assert reply.failure is not None
    assert (reply.billed_ms, reply.restored) == (278, True)


@pytest.mark.parametrize("name", ["X-Amzn-ErrorType", "x-amzn-errortype"])
def test_the_name_of_an_error_comes_in_a_header(name: str) -> None:
    body = {"Type": "User", "Message": "Lambda is initializing your function."}
    reply, _ = invoke("work", b"{}", {name: NOT_READY}, body, status=409)
    assert reply.failure is not None
    assert reply.failure.kind is FailureKind.NOT_READY
    assert not reply.ran
    assert "SnapStartNotReadyException: Lambda is" in reply.failure.detail.message


def test_a_function_that_is_not_ready_exists_and_will_be_waited_for() -> None:
    headers = {"X-Amzn-ErrorType": NOT_READY}
    assert invoke("work", b"{}", headers, {}, status=409, only_check=True)[0] is None
    failure, _ = invoke("work", b"{}", content={}, status=409, only_check=True)
    assert failure.kind is FailureKind.TRANSIENT
