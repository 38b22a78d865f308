"""An endpoint that hands out credentials, on loopback, as Lambda's for functions with SnapStart."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lambda_worker.container_credentials import ADDRESS, TOKEN


class CredentialsEndpoint:
    """One endpoint.  To be used in a ``with`` statement.

    Parameters
    ----------
    keys : dict
        What it hands out: "AccessKeyId", "SecretAccessKey", "Token".

    Attributes
    ----------
    token : str
        Whoever does not present it is refused.
    lifetime : timedelta
        Of what it hands out.
    statuses : list of int
        With which it answers the next requests, before it hands out anything.
    headers : dict
        Of these answers.
    body : bytes, optional
        What it says in place of credentials.
    asked, given : int
        Requests, and how many of them got credentials.
    """

    def __init__(self, keys: dict[str, str]):
        self.keys = keys
        self.token = "the-token-that-nobody-may-see"
        self.lifetime = timedelta(hours=6)
        self.statuses: list[int] = []
        self.headers: dict[str, str] = {}
        self.body: bytes | None = None
        self.asked = self.given = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._requests())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # whoever asked may have gone
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/credentials?of=function"

    def __enter__(self) -> CredentialsEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer nobody any more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def variables(self) -> dict[str, str]:
        """The environment variables that lead to it."""
        return {ADDRESS: self.url, TOKEN: self.token}

    def _answer(self, path: str, token: str | None) -> tuple[int, bytes]:
        with self._lock:
            self.asked += 1
            if token != self.token or path != "/credentials?of=function":
                return 401, f"not with {token}".encode()
            if self.statuses:
                return self.statuses.pop(0), b""
            self.given += 1
            if self.body is not None:
                return 200, self.body
            until = f"{datetime.now(UTC) + self.lifetime:%FT%TZ}"
            return 200, json.dumps({**self.keys, "Expiration": until}).encode()

    def _requests(self) -> type[BaseHTTPRequestHandler]:
        endpoint = self

        class Requests(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = endpoint._answer(self.path, self.headers["Authorization"])
                self.send_response(status)
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        return Requests
