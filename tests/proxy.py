"""An HTTP proxy in front of the embedded AWS that fails as it is told."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from yarl import URL

HOP_BY_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding"}


@dataclass(frozen=True)
class Answer:
    """Answer in place of AWS."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reset:
    """Break the connection; AWS sees the request only if it is ``forwarded``."""

    forwarded: bool


Action = Answer | Reset | None


def throttle(reason: str = "ConcurrentInvocationLimitExceeded") -> Answer:
    """How Lambda refuses an invocation when there are too many."""
    body = b'{"Reason":"%s","Type":"User","message":"Rate Exceeded."}' % reason.encode()
    return Answer(429, body, {"x-amzn-ErrorType": "TooManyRequestsException"})


def s3_error(status: int, code: str, message: str = "") -> Answer:
    """An error in the words of S3."""
    text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, text.encode(), {"Content-Type": "application/xml"})


class Proxy:
    """Forwards every request to one upstream, but for those that the plan says.

    A plan gives, for one kind of request (``"invoke"``, ``"check"``, ``"put"``, ``"post"``,
    ``"get"``, ``"head"``, ``"list"``, ``"delete"``, ``"abort"`` of an upload in parts), what
    happens to the first, the second, ... of them; None forwards it, as does the end of the plan.

    Attributes
    ----------
    seen : Counter
        Requests of each kind.
    """

    def __init__(self, upstream: str):
        self.upstream = upstream
        self.seen: Counter[str] = Counter()
        self._plans: dict[str, list[Action]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *exc_info: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def plan(self, **plans: Iterable[Action]) -> None:
        """Start anew with these plans; nothing was seen."""
        self._plans = {kind: list(actions) for kind, actions in plans.items()}
        self.seen.clear()

    async def _start(self) -> None:
        self._client = aiohttp.ClientSession(auto_decompress=False)
        server = web.Server(self._serve)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"

    async def _stop(self) -> None:
        await self._client.close()
        await self._runner.cleanup()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        kind = _kind(request)
        self.seen[kind] += 1
        body = await request.content.read()  # of any length
        plan = self._plans.get(kind)
        action = plan.pop(0) if plan else None
        if isinstance(action, Answer):
            return web.Response(status=action.status, body=action.body, headers=action.headers)
        if action is None or action.forwarded:
            response = await self._forward(request, body)
        if isinstance(action, Reset):
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return response

    async def _forward(self, request: web.BaseRequest, body: bytes) -> web.Response:
        headers = [(n, v) for n, v in request.headers.items() if n.lower() not in HOP_BY_HOP]
        url = URL(self.upstream + request.raw_path, encoded=True)
        async with self._client.request(
            request.method, url, data=body, headers=headers, allow_redirects=False
        ) as answer:
            content = await answer.read()
            kept = [(n, v) for n, v in answer.headers.items() if n.lower() not in HOP_BY_HOP]
            response = web.Response(status=answer.status, body=content)
            if request.method == "HEAD":  # the length is that of a body that is not there
                response.headers["Content-Length"] = answer.headers.get("Content-Length", "0")
            response.headers.update(kept)
            return response


def _kind(request: web.BaseRequest) -> str:
    if request.path.endswith("/invocations"):
        dry = request.headers.get("X-Amz-Invocation-Type") == "DryRun"
        return "check" if dry else "invoke"
    if request.method == "POST" and "delete" in request.query:
        return "delete"
    if request.method == "DELETE" and "uploadId" in request.query:
        return "abort"
    if request.method == "GET" and "list-type" in request.query:
        return "list"
    return request.method.lower()
