"""Credentials that an endpoint near the function hands out.  May import: errors.

Functions that begin as a snapshot have no credentials in their environment, since these would be
too old by the time that it is restored.  ``AWS_CONTAINER_CREDENTIALS_FULL_URI`` names an address
that has them, for whoever presents the token in ``AWS_CONTAINER_AUTHORIZATION_TOKEN`` ("Container
credential provider", AWS SDKs and Tools Reference Guide).  obstore takes such an address only
with a token in a file.

obstore says of a provider that fails that credentials are not valid, and adds the text of the
exception.  By its first word, :mod:`lambda_worker.store` tells what may pass (:data:`UNAVAILABLE`,
``ExpiredToken``).  No text holds a token or a key.
"""

from __future__ import annotations

import ipaddress
import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import SplitResult, urlsplit

ADDRESS = "AWS_CONTAINER_CREDENTIALS_FULL_URI"
TOKEN = "AWS_CONTAINER_AUTHORIZATION_TOKEN"
TOKEN_FILE = "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"
#: Hosts that may be asked without TLS, besides loopback: those of ECS and EKS.
HOSTS = frozenset({"169.254.170.2", "169.254.170.23", "fd00:ec2::23"})
#: It answers from memory: what takes longer than that is broken.
TIMEOUT_SECONDS = 2.0
#: Further tries, and the seconds before each.
WAITS = (0.1, 0.3, 1.0)
MAX_ANSWER_BYTES = 100_000
#: How the text begins if nobody has refused, so that another try makes sense.
UNAVAILABLE = "CredentialsUnavailable"


class CredentialsError(OSError):
    """There are no credentials; the text says why."""


class ContainerCredentials:
    """Asks the endpoint that the environment names: a credential provider for obstore.

    obstore keeps what it gets until five minutes before its end.

    Parameters
    ----------
    environ : mapping, optional
        Default: the environment, as it is whenever credentials are needed.
    """

    def __init__(self, environ: Mapping[str, str] | None = None):
        self._environ: Mapping[str, str] = os.environ if environ is None else environ

    def __repr__(self) -> str:
        return "ContainerCredentials()"  # and nothing of what they are

    @staticmethod
    def wanted(environ: Mapping[str, str] | None = None) -> bool:
        """Whether an environment names an endpoint, and no credentials of its own."""
        environ = os.environ if environ is None else environ
        return bool(environ.get(ADDRESS)) and not environ.get("AWS_ACCESS_KEY_ID")

    def __call__(self) -> dict[str, Any]:
        """Return credentials in obstore's form.

        Raises
        ------
        CredentialsError
        """
        import http.client  # which takes 5 ms, and most environments never need it

        url = _checked(self._environ.get(ADDRESS, ""))
        headers = {"Accept": "application/json"}
        if token := self._token():
            headers["Authorization"] = token
        for wait in (*WAITS, None):
            try:
                status, body = _get(url, headers)
            except (OSError, http.client.HTTPException) as error:
                said = f"did not answer ({type(error).__name__})"
            else:
                if status == 200:
                    return _read(body)
                said = f"answered with status {status}"
                if status < 500 and status != 429:
                    raise CredentialsError(
                        f"the endpoint of {ADDRESS} refused to give credentials: it {said}"
                    )
            if wait is not None:
                time.sleep(wait)
        raise CredentialsError(
            f"{UNAVAILABLE}: the endpoint of {ADDRESS} {said}, {len(WAITS) + 1} times"
        )

    def _token(self) -> str:
        if path := self._environ.get(TOKEN_FILE):
            try:
                with open(path, encoding="utf-8") as file:
                    token = file.read().strip()
            except (OSError, ValueError) as error:
                raise CredentialsError(
                    f"the file that {TOKEN_FILE} names cannot be read ({type(error).__name__})"
                ) from None
        else:
            token = self._environ.get(TOKEN, "")
        if not (token.isascii() and token.isprintable()):
            raise CredentialsError("the token for credentials is not one line of text")
        return token


def _checked(address: str) -> SplitResult:
    """Return an address that may be asked, as AWS's own libraries see it."""
    try:
        url = urlsplit(address)
        host, _ = url.hostname or "", url.port
    except ValueError:
        raise CredentialsError(f"{ADDRESS} is no address") from None
    if url.scheme == "https" and host:
        return url
    if url.scheme == "http" and (host in HOSTS or _is_loopback(host)):
        return url
    raise CredentialsError(
        f"{ADDRESS} names neither https nor this machine (host {host!r}): a token is not sent there"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _get(url: SplitResult, headers: dict[str, str]) -> tuple[int, bytes]:
    """Ask; never through a proxy, nor wherever an answer redirects to."""
    from http.client import HTTPConnection, HTTPSConnection

    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=TIMEOUT_SECONDS)
    target = url._replace(scheme="", netloc="", fragment="", path=url.path or "/").geturl()
    try:
        connection.request("GET", target, headers=headers)
        response = connection.getresponse()
        return response.status, response.read(MAX_ANSWER_BYTES)
    finally:
        connection.close()


def _read(body: bytes) -> dict[str, Any]:
    """Turn an answer into obstore's form."""
    try:
        record = json.loads(body)
        key, secret, session = (record[n] for n in ("AccessKeyId", "SecretAccessKey", "Token"))
        until = datetime.fromisoformat(record["Expiration"])
        if not all(isinstance(each, str) and each for each in (key, secret, session)):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise CredentialsError(
            f"the endpoint of {ADDRESS} answered something that is no credentials"
        ) from None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    if until <= datetime.now(UTC):
        raise CredentialsError(
            f"ExpiredToken: the endpoint of {ADDRESS} gave credentials that ended {until:%FT%TZ}"
        )
    return {
        "access_key_id": key,
        "secret_access_key": secret,
        "token": session,
        "expires_at": until,
    }
