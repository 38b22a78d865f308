"""The embedded AWS's server with a count of what passes: stdlib and ministack.

A layer of a few lines inside the server, between the guard and MiniStack, sees every request of
every system, those of the Lambda workers among them, which talk to the server directly.  Nothing
is added to the way of a request, and nobody's signature, connection or HTTP client is touched.

:mod:`benchmarks.peers.emulator` has it run by its path in place of
``dask_lambda/local_server.py``, which it loads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs

#: Answers with the counts since the last time it was asked.
COUNTS = "/_benchmark/counts"
#: In place of a bucket.
INVOCATIONS = "lambda"
SERVER = Path(__file__).parents[2] / "dask_lambda" / "local_server.py"

#: The service in the scope of a signature: who signs for S3 talks to S3.
_SERVICE = re.compile(rb"Credential=[^/,\s]*/[0-9]*/[^/]*/([^/]*)/")


def counted(app: Any) -> Any:
    """Return an ASGI application that counts S3 requests and invocations of another one.

    Counts are kept for each bucket, and each system has one of its own: what a system does in the
    background is not counted as another one's.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    async def layer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        if scope["path"] == COUNTS:
            content = json.dumps(counts).encode()
            counts.clear()
            headers = [(b"content-length", b"%d" % len(content))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": content})
            return
        if _is_invocation(scope):
            counts[INVOCATIONS]["invocations"] += 1
        if not _is_for_s3(scope):
            await app(scope, receive, send)
            return
        bucket = counts[scope["path"].split("/")[1]]
        bucket[_kind(scope)] += 1

        async def receive_counted() -> Any:
            message = await receive()
            bucket["bytes_in"] += len(message.get("body", b""))
            return message

        async def send_counted(message: Any) -> None:
            bucket["bytes_out"] += len(message.get("body", b""))
            await send(message)

        await app(scope, receive_counted, send_counted)

    return layer


def _is_invocation(scope: Any) -> bool:
    dry = (b"x-amz-invocation-type", b"DryRun") in scope["headers"]
    return scope["path"].endswith("/invocations") and not dry


def _is_for_s3(scope: Any) -> bool:
    found = _SERVICE.search(dict(scope["headers"]).get(b"authorization", b""))
    return found is not None and found[1] == b"s3"


def _kind(scope: Any) -> str:
    """Return what an S3 request is: ``get``, ``put``, ``list``, ``head`` or ``delete``."""
    method: str = scope["method"].lower()
    query = parse_qs(scope["query_string"].decode(), keep_blank_values=True)
    if method == "post":
        return "delete" if "delete" in query else "put"  # else of a multipart upload
    if method == "get" and "/" not in scope["path"].strip("/"):  # of a bucket
        return "list"
    return method


def _server() -> ModuleType:
    spec = importlib.util.spec_from_file_location("local_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run MiniStack behind the guard, counted."""
    import ministack.app

    assert os.environ["AWS_ACCESS_KEY_ID"]  # the counts are for the owner only
    ministack.app.app = counted(ministack.app.app)
    _server().main()


if __name__ == "__main__":
    main()
