"""An HTTP proxy in front of the embedded AWS that fails as it is told.

It stands between the client and AWS (``endpoint_url=proxy.url``) and, if the function's
environment has its address in ``AWS_ENDPOINT_URL_S3``, between the workers and S3.  What it does to
each request is an :data:`Action`, from a list (:meth:`Proxy.plan`) or from a function (``decide``).
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import aiohttp
from aiohttp import web
from yarl import URL

from lambda_worker import protocol

HOP_BY_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding"}
#: An idle connection to the server behind is not used again after so many seconds.
KEEPALIVE = 2.0
FINISH_SECONDS = 10.0

# ---------------------------------------------------------------------------------------------
# what can happen to a request
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """Answer in place of AWS, which sees the request only if it is ``forwarded``."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    forwarded: bool = False


@dataclass(frozen=True)
class Reset:
    """Break the connection; AWS sees the request only if it is ``forwarded``.

    Attributes
    ----------
    after : float, optional
        So many seconds after AWS has begun to work on it; default: when it has answered.
    """

    forwarded: bool
    after: float | None = None


@dataclass(frozen=True)
class Stall:
    """Say nothing for some seconds, then break the connection."""

    seconds: float
    forwarded: bool


@dataclass(frozen=True)
class Delay:
    """Forward late, and answer rightly."""

    seconds: float


@dataclass(frozen=True)
class Duplicate:
    """Forward twice at the same time; answer, when both have ended, with one of the answers."""

    second: bool


@dataclass(frozen=True)
class Truncate:
    """Answer with a part of the body.

    Attributes
    ----------
    share : float
        Of the body.
    announced : bool
        Whether the length of all of it is announced, so that the reader can see that some is
        missing; else that of the part.
    """

    share: float
    announced: bool = True


@dataclass(frozen=True)
class Corrupt:
    """Change one byte of the answer's body."""

    place: float = 0.5  #: where, as a share of the body


@dataclass(frozen=True)
class Damage:
    """Change one byte of what is stored, or store the beginning only."""

    place: float = 0.5
    cut: bool = False


@dataclass(frozen=True)
class Strike:
    """Have the worker do something to itself; see :mod:`tests.faults.worker`."""

    fault: dict[str, Any]


Action = Answer | Reset | Stall | Delay | Duplicate | Truncate | Corrupt | Damage | Strike | None

# In the words of Lambda (Invoke, AWS Lambda API reference, section Errors)

#: Every reason that Lambda documents for a 429 of Invoke.
REASONS = (
    "ConcurrentInvocationLimitExceeded",
    "FunctionInvocationRateLimitExceeded",
    "ReservedFunctionConcurrentInvocationLimitExceeded",
    "ReservedFunctionInvocationRateLimitExceeded",
    "CallerRateLimitExceeded",
)


def throttle(reason: str = REASONS[0]) -> Answer:
    """How Lambda refuses an invocation when there are too many."""
    body = b'{"Reason":"%s","Type":"User","message":"Rate Exceeded."}' % reason.encode()
    return Answer(429, body, {"x-amzn-ErrorType": "TooManyRequestsException"})


def lambda_error(status: int, name: str, message: str, *, forwarded: bool = False) -> Answer:
    """An error in the words of Lambda's API."""
    body = json.dumps({"Type": "User" if status < 500 else "Service", "message": message})
    return Answer(status, body.encode(), {"x-amzn-ErrorType": name}, forwarded)


FORBIDDEN = Answer(403, b'{"Message":"User: u is not authorized","Type":"AccessDeniedException"}')
EXPIRED = Answer(
    403,
    b'{"message":"The security token included in the request is expired"}',
    {"x-amzn-ErrorType": "ExpiredTokenException"},
)


def function_error(kind: str, message: str, *, forwarded: bool = False) -> Answer:
    """A function that was lost: 200, and the error's name in a header."""
    body = json.dumps({"errorType": kind, "errorMessage": f"RequestId: 8d3a Error: {message}"})
    return Answer(200, body.encode(), {"X-Amz-Function-Error": "Unhandled"}, forwarded)


def out_of_memory(*, forwarded: bool = False) -> Answer:
    """The environment needed more memory than it had."""
    message = "Runtime exited with error: signal: killed"
    return function_error("Runtime.OutOfMemory", message, forwarded=forwarded)


def exited(*, forwarded: bool = False) -> Answer:
    """The process of the environment ended."""
    message = "Runtime exited with error: exit status 1"
    return function_error("Runtime.ExitError", message, forwarded=forwarded)


def timed_out(*, forwarded: bool = False) -> Answer:
    """The function took longer than its time-out."""
    message = "Task timed out after 3.00 seconds"
    return function_error("Sandbox.Timedout", message, forwarded=forwarded)


# In the words of S3


def s3_error(status: int, code: str, message: str = "", *, forwarded: bool = False) -> Answer:
    """An error in the words of S3."""
    text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, text.encode(), {"Content-Type": "application/xml"}, forwarded)


SLOW_DOWN = s3_error(503, "SlowDown", "Please reduce your request rate.")
CONFLICT = s3_error(409, "ConditionalRequestConflict", "The conditional request cannot succeed.")
NO_SUCH_KEY = s3_error(404, "NoSuchKey", "The specified key does not exist.")
DENIED = s3_error(403, "AccessDenied", "Access Denied")
EXPIRED_TOKEN = s3_error(400, "ExpiredToken", "The provided token has expired.")


# ---------------------------------------------------------------------------------------------
# requests
# ---------------------------------------------------------------------------------------------

_KEY = re.compile(rb"<Key>([^<]+)</Key>")


@dataclass
class Request:
    """One request that the proxy has received.

    Attributes
    ----------
    kind : str
        ``"invoke"``, ``"check"`` (an Invoke that is a dry run), ``"put"``, ``"post"`` (begin and
        end of an upload in parts), ``"get"``, ``"head"``, ``"list"``, ``"delete"``, or
        ``"abort"`` of an upload in parts.
    path : str
    body : bytes
    """

    kind: str
    path: str
    body: bytes
    query: Any

    @cached_property
    def event(self) -> dict[str, Any]:
        """What the function is invoked with."""
        return json.loads(self.body)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The objects that it is about: outputs of an invocation, or what S3 is asked for."""
        if self.kind == "invoke":
            groups = self.event["groups"]
            if isinstance(groups, dict):  # they are elsewhere
                return ()
            return tuple(name for group in groups for name in group["outputs"])
        if self.kind == "delete" and self.body:
            return tuple(unquote(key.decode()) for key in _KEY.findall(self.body))
        if self.kind == "list":
            return (self.query.get("prefix", ""),)
        return (unquote(self.path).removeprefix("/").partition("/")[2],)

    @cached_property
    def run(self) -> str:
        """The run to which it belongs, if that can be told."""
        if self.kind == "invoke":
            return str(self.event.get("run", ""))
        if self.kind == "list":
            return "".join(self.names[0].split("/")[2:3])
        try:
            return protocol.run_of(self.names[0])
        except IndexError:
            return ""


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


# ---------------------------------------------------------------------------------------------
# the proxy
# ---------------------------------------------------------------------------------------------


@dataclass
class _Forwarded:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    length: str  # of a body that is not there


class Proxy:
    """Forwards every request to one upstream, but for those that it is told to fail.

    Parameters
    ----------
    upstream : str
        URL.
    decide : callable, optional
        What happens to each request for which no plan (:meth:`plan`) says something.

    Attributes
    ----------
    seen : Counter
        Requests of each kind.
    peak : int
        The most invocations that AWS had at the same time.
    in_flight : int
        Requests that have not ended, those that were given up by the client among them.

    Notes
    -----
    An invocation that goes on after its connection was broken (``Reset(after=...)``) runs at the
    same time as the one that is sent in its place; but the answer to the latter is held back until
    the former has ended.  For what is written after a run has ended is left behind whatever the
    client does.
    """

    def __init__(self, upstream: str, decide: Callable[[Request], Action] | None = None):
        self.upstream = upstream
        self.decide = decide
        self.seen: Counter[str] = Counter()
        self.peak = 0
        self.in_flight = 0
        self._plans: dict[str, list[Action]] = {}
        self._concurrency: int | None = None
        self._rate: float | None = None
        self._tokens, self._filled = 0.0, 0.0
        self._running = self._at_aws = 0
        self._orphans: dict[str, set[asyncio.Task[Any]]] = {}  # by the name of an output
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
        """Start anew with these plans; nothing was seen, and nothing is limited.

        A plan says for one kind of request what happens to the first, the second, ... of them;
        None forwards it, as does the end of the plan.
        """
        self._plans = {kind: list(actions) for kind, actions in plans.items()}
        self._concurrency = self._rate = None
        self.seen.clear()
        self.peak = self._at_aws

    def limit(self, *, concurrency: int | None = None, rate: float | None = None) -> None:
        """Throttle as Lambda does.

        Parameters
        ----------
        concurrency : int, optional
            Invocations at the same time.
        rate : float, optional
            Invocations a second; a tenth of them may come at once.
        """
        self._concurrency, self._rate = concurrency, rate
        self._tokens, self._filled = max(1.0, (rate or 0) / 10), time.monotonic()
        self.peak = self._at_aws

    # -- in the proxy's thread -------------------------------------------------------------------

    async def _start(self) -> None:
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        server = web.Server(self._serve)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"

    async def _stop(self) -> None:
        left = {task for tasks in self._orphans.values() for task in tasks}
        if left:
            await asyncio.wait(left, timeout=FINISH_SECONDS)
        await self._runner.cleanup()
        await self._client.close()

    async def _serve(self, received: web.BaseRequest) -> web.StreamResponse:
        self.in_flight += 1
        try:
            kind = _kind(received)
            self.seen[kind] += 1
            body = await received.content.read()  # of any length
            request = Request(kind, received.path, body, received.query)
            if kind != "invoke":
                return await self._act(received, request, self._next(request))
            refused = self._over_limit()
            if refused is not None:
                return _respond(refused)
            self._running += 1
            try:
                return await self._act(received, request, self._next(request))
            finally:
                self._running -= 1
        finally:
            self.in_flight -= 1

    def _next(self, request: Request) -> Action:
        plan = self._plans.get(request.kind)
        if plan:
            return plan.pop(0)
        return self.decide(request) if self.decide is not None else None

    def _over_limit(self) -> Answer | None:
        if self._concurrency is not None and self._running >= self._concurrency:
            return throttle("ReservedFunctionConcurrentInvocationLimitExceeded")
        if self._rate is not None:
            now = time.monotonic()
            earned = (now - self._filled) * self._rate
            self._tokens = min(max(1.0, self._rate / 10), self._tokens + earned)
            self._filled = now
            if self._tokens < 1:
                return throttle("FunctionInvocationRateLimitExceeded")
            self._tokens -= 1
        return None

    async def _act(
        self, received: web.BaseRequest, request: Request, action: Action
    ) -> web.StreamResponse:
        body = request.body
        match action:
            case Answer():
                if action.forwarded:
                    await self._forward(received, request, body)
                return _respond(action)
            case Reset(forwarded, after):
                if forwarded and after is not None:
                    await self._leave(received, request, after)
                elif forwarded:
                    await self._forward(received, request, body)
                return _broken(received)
            case Stall(seconds, forwarded):
                if forwarded:
                    await self._forward(received, request, body)
                await asyncio.sleep(seconds)
                return _broken(received)
            case Delay(seconds):
                await asyncio.sleep(seconds)
            case Duplicate(second):
                both = [self._forward(received, request, body) for _ in range(2)]
                return _pass_on((await asyncio.gather(*both))[second])
            case Truncate(share, announced):
                answer = await self._forward(received, request, body)
                part = answer.body[: int(share * len(answer.body))]
                return await _cut_off(received, answer, part, announced)
            case Corrupt(place):
                answer = await self._forward(received, request, body)
                answer.body = _flipped(answer.body, place)
                return _pass_on(answer)
            case Damage(place, cut):
                body = body[: int(place * len(body))] if cut else _flipped(body, place)
            case Strike(fault):
                body = json.dumps({**request.event, "fault": fault}).encode()
        return _pass_on(await self._forward(received, request, body))

    async def _leave(self, received: web.BaseRequest, request: Request, after: float) -> None:
        """Forward a request that nobody will hear the answer of."""
        task = asyncio.create_task(self._send(received, request.body))
        self.in_flight += 1
        for name in request.names:
            self._orphans.setdefault(name, set()).add(task)

        def ended(task: asyncio.Task[Any]) -> None:
            self.in_flight -= 1
            task.cancelled() or task.exception()
            for name in request.names:
                self._orphans[name].discard(task)
                if not self._orphans[name]:
                    del self._orphans[name]

        task.add_done_callback(ended)
        await asyncio.wait([task], timeout=after)

    async def _forward(
        self, received: web.BaseRequest, request: Request, body: bytes
    ) -> _Forwarded:
        answer = await self._send(received, body)
        if self._orphans and request.kind == "invoke":
            while earlier := {t for name in request.names for t in self._orphans.get(name, ())}:
                await asyncio.wait(earlier)
        return answer

    async def _send(self, received: web.BaseRequest, body: bytes) -> _Forwarded:
        if _kind(received) != "invoke":
            return await self._exchange(received, body)
        self._at_aws += 1
        self.peak = max(self.peak, self._at_aws)
        try:
            return await self._exchange(received, body)
        finally:
            self._at_aws -= 1

    async def _exchange(self, received: web.BaseRequest, body: bytes) -> _Forwarded:
        headers = [(n, v) for n, v in received.headers.items() if n.lower() not in HOP_BY_HOP]
        url = URL(self.upstream + received.raw_path, encoded=True)
        async with self._client.request(
            received.method, url, data=body, headers=headers, allow_redirects=False
        ) as answer:
            content = await answer.read()
            kept = [(n, v) for n, v in answer.headers.items() if n.lower() not in HOP_BY_HOP]
            length = answer.headers.get("Content-Length", "0") if received.method == "HEAD" else ""
            return _Forwarded(answer.status, kept, content, length)


def _respond(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers=answer.headers)


def _pass_on(answer: _Forwarded) -> web.Response:
    response = web.Response(status=answer.status, body=answer.body)
    if answer.length:
        response.headers["Content-Length"] = answer.length
    response.headers.update(answer.headers)
    return response


def _broken(received: web.BaseRequest) -> web.Response:
    if received.transport is not None:  # else the client was faster
        received.transport.abort()
    return web.Response()


async def _cut_off(
    received: web.BaseRequest, answer: _Forwarded, part: bytes, announced: bool
) -> web.StreamResponse:
    if not announced:
        answer.body = part
        return _pass_on(answer)
    response = web.StreamResponse(status=answer.status)
    response.headers.update(answer.headers)
    response.content_length = len(answer.body)
    with suppress(ConnectionError):  # the client was faster
        await response.prepare(received)
        await response.write(part)
    if received.transport is not None:
        received.transport.close()
    return response


def _flipped(body: bytes, place: float) -> bytes:
    if not body:
        return body
    changed = bytearray(body)
    changed[min(len(body) - 1, int(place * len(body)))] ^= 0x40
    return bytes(changed)
