"""The Lambda API: one signed HTTP request for each invocation.

May import: failures, lambda_answers, replies, config, cost, the ground, aiohttp, botocore.  aiohttp
and botocore's signer take a quarter of the CPU that boto3 takes for an Invoke, and never send one
twice by themselves: whether to try again is decided in :mod:`dask_lambda.state`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError
from yarl import URL

from dask_lambda import failures, lambda_answers, replies
from dask_lambda.config import MAX_TIMEOUT
from dask_lambda.cost import Architecture
from dask_lambda.events import Failure, FailureKind

#: How much longer than the function's time-out the client waits for an answer: the start of an
#: environment (up to 10 s of init, once more on failure) and the way there and back.
TIMEOUT_MARGIN = 60.0
CONNECT_TIMEOUT = 30.0
#: A NAT gateway drops connections that are idle for 350 s; probes keep long invocations alive.
KEEPALIVE_SECONDS = 60

#: What processors call themselves, and Lambda's names for them.
ARCHITECTURES: dict[Any, Architecture] = {
    "x86_64": "x86_64",
    "aarch64": "arm64",
    "arm64": "arm64",
}

#: Where an environment was restored from a snapshot, "Billed Restore Duration" stands there too.
#: It is charged like duration, and "Billed Duration" holds it already: in all lines of Lambda's
#: that were found quoted this is the sum of "Duration", rounded up, and that (128 + 26 = 154,
#: 160 + 118 = 278, 307 + 303 = 610, 2,339 + 182 = 2,521).  "Monitoring for Lambda SnapStart" says
#: what is charged, but not whether one number holds the other.
_BILLED = re.compile(r"REPORT RequestId:.*\tBilled Duration: (\d+) ms")
_RESTORED = re.compile(r"REPORT RequestId:.*\tRestore Duration: ")


@dataclass(slots=True)
class Reply:
    """What came back from one Invoke.

    Attributes
    ----------
    content : dict, optional
        The worker's reply; None if there is none.
    failure : Failure, optional
        Why there is none.
    billed_ms : float, optional
        From the REPORT line of the log, where Lambda sent it.
    restored : bool
        Whether its environment began as a copy of a snapshot: the worker says so, or that line.
    ran : bool
        Whether the function may have run: its effects have to be reckoned with.
    answered : bool
        Whether there was any HTTP answer.
    log : str
        The last 4 kB of the invocation's log, in base64.
    """

    content: dict[str, Any] | None
    failure: Failure | None = None
    billed_ms: float | None = None
    restored: bool = False
    ran: bool = True
    answered: bool = True
    log: str = ""


class LambdaInvoker:
    """Invokes one function.  To be used in one event loop.

    Parameters
    ----------
    function : str
        Name or ARN.
    region : str
    credentials : object
        With ``get_frozen_credentials``, which is called for each request, as botocore's; or
        :class:`dask_lambda.credentials.Credentials`.
    endpoint_url : str, optional
        Default: the region's own.
    timeout : float
        The function's time-out in seconds: an answer that does not come within it and a margin
        is given up.
    memory_mb : int, optional
        Of the function, if it is known; it says so itself in each reply.

    Attributes
    ----------
    architecture : {"x86_64", "arm64"}, optional
        Of the function, once it has said so.
    """

    def __init__(
        self,
        function: str,
        region: str,
        credentials: Any,
        endpoint_url: str | None = None,
        timeout: float = MAX_TIMEOUT,
        memory_mb: int | None = None,
    ):
        self.function = function
        self.region = region
        self.credentials = credentials
        base = endpoint_url or f"https://lambda.{region}.amazonaws.com"
        name = quote(function, safe="")
        self.url = f"{base.rstrip('/')}/2015-03-31/functions/{name}/invocations"
        # As it is signed: the colons of an ARN stay escaped.
        self._encoded_url = URL(self.url, encoded=True)
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.architecture: Architecture | None = None
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Open the connection pool."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, ttl_dns_cache=300, keepalive_timeout=30, socket_factory=_socket
            ),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=CONNECT_TIMEOUT,
                sock_read=self.timeout + TIMEOUT_MARGIN,
            ),
            auto_decompress=False,
            trust_env=not self.url.startswith("http://127."),
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def check(self) -> Failure | None:
        """Ask whether the function exists and may be invoked, without running it (free).

        One that is not ready yet does and may: whoever invokes it waits until it is.
        """
        try:
            status, headers, body = await self._post(b"{}", {"X-Amz-Invocation-Type": "DryRun"})
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return lambda_answers.from_network(error)
        except BotoCoreError as error:
            return lambda_answers.from_credentials(error)
        if status // 100 == 2:
            return None
        failure = self._refusal(status, headers, body)
        return None if failure.kind is FailureKind.NOT_READY else failure

    def _refusal(self, status: int, headers: Any, body: bytes) -> Failure:
        # "ThisException", or "ThisException:http://..."
        name = headers.get("X-Amzn-ErrorType", "").partition(":")[0]
        return lambda_answers.from_response(status, body, self.function, self.region, name)

    async def invoke(self, payload: bytes) -> Reply:
        """Invoke the function and wait for its answer.  Never raises for what AWS does."""
        try:
            status, headers, body = await self._post(payload, {"X-Amz-Log-Type": "Tail"})
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Reply(None, lambda_answers.from_network(error), ran=False, answered=False)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return Reply(None, lambda_answers.from_network(error), answered=False)
        except BotoCoreError as error:  # nothing to sign with: botocore could not renew it
            return Reply(None, lambda_answers.from_credentials(error), ran=False)
        if status // 100 != 2:
            failure = self._refusal(status, headers, body)
            return Reply(None, failure, ran=status >= 500)
        tail = headers.get("X-Amz-Log-Result", "")
        log = base64.b64decode(tail).decode("utf-8", "replace")
        report = _BILLED.search(log)
        billed = float(report[1]) if report else None
        restored = _RESTORED.search(log) is not None
        if "X-Amz-Function-Error" in headers:
            failure = lambda_answers.from_function_error(body, log, self.memory_mb)
            return Reply(None, failure, billed, restored, log=tail)
        try:
            content = json.loads(body)
            replies.check(content)
        except (ValueError, RecursionError) as error:
            failure = failures.from_foreign_reply(body, self.function, str(error))
            return Reply(None, failure, billed, restored, log=tail)
        self.memory_mb = int(content["memory_mb"])
        self.architecture = ARCHITECTURES.get(content.get("architecture"), self.architecture)
        return Reply(content, None, billed, restored or content.get("restored", False), log=tail)

    async def _post(self, payload: bytes, headers: dict[str, str]) -> tuple[int, Any, bytes]:
        assert self._session is not None
        request = AWSRequest("POST", self.url, data=payload, headers=headers)
        if getattr(self.credentials, "at_hand", True):
            frozen = self.credentials.get_frozen_credentials()
        else:  # which may take long, and must not hold up everything else
            frozen = await asyncio.to_thread(self.credentials.get_frozen_credentials)
        SigV4Auth(frozen, "lambda", self.region).add_auth(request)
        async with self._session.post(
            self._encoded_url, data=payload, headers=dict(request.headers.items())
        ) as response:
            return response.status, response.headers, await response.read()


def _socket(address: Any) -> socket.socket:
    """Make a socket with TCP keep-alive."""
    family, kind, proto, _, _ = address
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, name):  # not on macOS
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), KEEPALIVE_SECONDS)
    return made
