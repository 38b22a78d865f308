"""What is sent to the Lambda API, as a server on loopback sees it."""

from __future__ import annotations

import asyncio
import base64

from aiohttp import web
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from dask_lambda.invoke import LambdaInvoker, Reply

ARN = "arn:aws:lambda:eu-west-1:123456789012:function:work:live"
REPLY = {"memory_mb": 128, "cold": False, "milliseconds": 1.5, "groups": []}
CREDENTIALS = Credentials("AKIDEXAMPLE", "secret", "token")


def invoke(
    function: str, payload: bytes, headers: dict[str, str] | None = None
) -> tuple[Reply, web.Request]:
    """Invoke once, answered with headers; return the reply and the request that the server got."""
    seen: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        await request.read()
        seen.append(request)
        return web.json_response(REPLY, headers=headers)

    async def run() -> Reply:
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
            return await invoker.invoke(payload)
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
