"""The server of the embedded AWS: MiniStack behind a guard.  May import: stdlib, ministack.

MiniStack believes whoever asks: it does not verify signatures, and ``test`` or no access key at
all is the root user to it.  On a loopback port that would let every other user of the machine,
and every web page in the user's browser, create a Lambda function, that is run code as the user.
The guard in front of it lets through only requests signed with this server's own access key (an
account number that is drawn at each start), and with the temporary keys that MiniStack itself
gave to the function's role and checks.

:mod:`dask_lambda.local` runs this file by its path, with ``AWS_ACCESS_KEY_ID`` in its
environment and MiniStack's settings.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = "/_ministack/health"
#: How AWS begins the access keys of temporary credentials.
TEMPORARY = b"ASIA"
#: MiniStack keeps the log of each invocation, about 3 kB, in memory for ever: forget them after
#: this many.
INVOCATIONS_KEPT = 5000

_CREDENTIAL = re.compile(rb"Credential=([^/,\s]*)/")
_DELETE_LOGS = "Logs_20140328.DeleteLogGroup"


def guarded(app: App, access_key: str) -> App:
    """Return an ASGI application that hides another one from strangers.

    Parameters
    ----------
    app : ASGI application
    access_key : str
        The key that requests have to name in their ``Authorization`` header.
    """
    secret = access_key.encode()
    invocations = 0
    background: set[asyncio.Task[None]] = set()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal invocations
        if scope["type"] == "http" and not _allowed(scope, secret):
            await _refuse(send)
        elif scope["type"] in ("http", "lifespan"):
            await app(scope, receive, send)
            if scope.get("path", "").endswith("/invocations"):
                invocations += 1
                if invocations % INVOCATIONS_KEPT == 0:
                    function = scope["path"].split("/")[-2]
                    task = asyncio.create_task(_delete_logs(app, scope, function))
                    background.add(task)
                    task.add_done_callback(background.discard)

    return guard


def _allowed(scope: Scope, secret: bytes) -> bool:
    if scope["path"] == HEALTH and scope["method"] == "GET":
        return True
    for name, value in scope["headers"]:
        if name == b"authorization" and (found := _CREDENTIAL.search(value)):
            return found[1].startswith(TEMPORARY) or hmac.compare_digest(found[1], secret)
    return False


async def _refuse(send: Send) -> None:
    body = json.dumps(
        {
            "__type": "InvalidClientTokenId",
            "message": "This server belongs to another user or another run.",
        }
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _delete_logs(app: App, scope: Scope, function: str) -> None:
    """Call CloudWatch Logs' DeleteLogGroup as whoever made the last invocation."""
    body = json.dumps({"logGroupName": f"/aws/lambda/{function}"}).encode()
    headers = {
        **dict(scope["headers"]),
        b"content-type": b"application/x-amz-json-1.1",
        b"content-length": b"%d" % len(body),
        b"x-amz-target": _DELETE_LOGS.encode(),
    }
    headers[b"authorization"] = headers[b"authorization"].replace(b"/lambda/", b"/logs/")
    request = {
        **scope,
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "headers": list(headers.items()),
    }

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        return

    await app(request, receive, send)


def main() -> None:
    """Run MiniStack behind the guard."""
    import ministack.app

    ministack.app.app = guarded(ministack.app.app, os.environ["AWS_ACCESS_KEY_ID"])
    ministack.app.main()


if __name__ == "__main__":
    main()
