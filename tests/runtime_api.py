"""Lambda's side of a function, on loopback: what the runtime interface client talks to.

:class:`RuntimeAPI` serves one environment ("AWS Lambda runtime API", developer guide): it hands out
events, takes the answers, and ends the process when an invocation takes too long, as Lambda does.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import files
from pathlib import Path
from typing import Any

from dask_lambda.deploy.environment import find_installed, resolve
from dask_lambda.deploy.platforms import IMAGE_GLIBC, Platform

#: Lambda's platform with a C library for which there are wheels of every Python.
HERE = Platform(
    f"{sys.version_info.major}.{sys.version_info.minor}",
    "arm64" if platform.machine() == "aarch64" else "x86_64",
    IMAGE_GLIBC,
)
PREFIX = "/2018-06-01/runtime/"


def runtime_client(directory: Path) -> None:
    """Give a directory Lambda's runtime interface client, and nothing else of this environment."""
    for package in resolve(["awslambdaric"], Platform.of_lambda(), find_installed).packages:
        for file in files(package) or []:
            if file.parts[0] != ".." and "__pycache__" not in file.parts:
                link = directory / file
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.locate())


def function_environment(paths: list[Path], **more: str) -> dict[str, str]:
    """The environment variables of a function whose code is on some paths."""
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "AWS_LAMBDA_FUNCTION_NAME": "function",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1769",
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        **more,
    }


def bootstrap(handler: str) -> list[str]:
    """The command that runs a handler: an interpreter with nothing installed in it."""
    return [sys.executable, "-S", "-s", "-P", "-m", "awslambdaric", handler]


class RuntimeAPI:
    """One execution environment.  To be used in a ``with`` statement.

    Parameters
    ----------
    handler : str
    environment : dict
        Of the function.
    log : Path
        Where it writes what the function logs.

    Attributes
    ----------
    restored : int
        How often the function has said that a snapshot of it may be taken, and was told to go on
        as a copy of it.
    """

    def __init__(self, handler: str, environment: dict[str, str], log: Path):
        self._handler = handler
        self._environment = environment
        self._log = log
        self.restored = 0
        self._events: queue.Queue[tuple[str, bytes, float] | None] = queue.Queue()
        self._answers: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._requests())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> RuntimeAPI:
        self._thread.start()
        address = f"127.0.0.1:{self._server.server_address[1]}"
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                bootstrap(self._handler),
                env={**self._environment, "AWS_LAMBDA_RUNTIME_API": address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        self._events.put(None)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def invoke(self, event: Any, timeout: float = 60.0) -> tuple[str, Any]:
        """Send one event; what came of it ("response", "error", "timeout", "exit"), the answer."""
        deadline = time.time() + timeout
        self._events.put(("request-1", json.dumps(event).encode(), deadline))
        while True:
            try:
                kind, body = self._answers.get(timeout=0.1)
            except queue.Empty:
                if self.process.poll() is not None:
                    return "exit", None
                if time.time() > deadline:
                    self.process.kill()
                    return "timeout", None
            else:
                return kind, json.loads(body)

    def log(self) -> str:
        """What the function has logged so far."""
        return self._log.read_text("utf-8")

    def _requests(self) -> type[BaseHTTPRequestHandler]:
        events, answers, api = self._events, self._answers, self

        class Requests(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == PREFIX + "restore/next":
                    api.restored += 1
                    self.send_response(200)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                assert self.path == PREFIX + "invocation/next"
                event = events.get()
                if event is None:
                    self.close_connection = True
                    return
                request, body, deadline = event
                self.send_response(200)
                self.send_header("Lambda-Runtime-Aws-Request-Id", request)
                self.send_header("Lambda-Runtime-Deadline-Ms", str(int(deadline * 1000)))
                arn = "arn:aws:lambda:us-east-1:123456789012:function:function"
                self.send_header("Lambda-Runtime-Invoked-Function-Arn", arn)
                self.send_header("Content-Type", "application/json")  # without it, it crashes
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answers.put((self.path.rsplit("/", 1)[1], body))
                self.send_response(202)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        return Requests
