"""S3 objects by name, counted.  May import: :mod:`lambda_worker.errors`, obstore.

obstore retries 5xx answers (503 SlowDown among them) and broken connections by itself, with
jittered exponential backoff; what still fails is a :class:`StoreError` that says whether another
try makes sense.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from lambda_worker.errors import StoreError, StoreErrorKind

#: A whole object of 10 GB at 75 MB/s, the sustained bandwidth of one Lambda, takes 133 s.
REQUEST_TIMEOUT = timedelta(seconds=300)
CONNECT_TIMEOUT = timedelta(seconds=10)
#: A conditional PUT that meets another one in flight (409) is tried again this often.
CONFLICT_ATTEMPTS = 5
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_DENIALS = (PermissionDeniedError, UnauthenticatedError)
#: The same where obstore has no class for it: lists, and batches of deletes.
_DENIED = re.compile(r"\bstatus: 40[13]\b")
#: S3's own words.
_SAID = re.compile(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)</Message>")


@dataclass(slots=True)
class Counts:
    """Requests and bytes, counted where they are made."""

    gets: int = 0
    puts: int = 0
    lists: int = 0
    deletes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def take(self) -> Counts:
        """Return what was counted since the last call."""
        taken = Counts(*(getattr(self, name) for name in self.__slots__))
        for name in self.__slots__:
            setattr(self, name, 0)
        return taken


def open_bucket(
    bucket: str,
    *,
    endpoint_url: str | None = None,
    region: str | None = None,
    retry_seconds: float = 60.0,
    **credentials: Any,
) -> S3Store:
    """Open a bucket.

    Parameters
    ----------
    bucket : str
    endpoint_url : str, optional
        Default: AWS's own endpoint of the region, or ``AWS_ENDPOINT_URL``.
    region : str, optional
        Default: ``AWS_REGION``.
    retry_seconds : float
        How long obstore goes on retrying one request.
    **credentials
        ``access_key_id`` and ``secret_access_key``, or ``credential_provider``; default: the
        standard environment variables, which Lambda sets for the execution role.
    """
    client: dict[str, Any] = {"timeout": REQUEST_TIMEOUT, "connect_timeout": CONNECT_TIMEOUT}
    config: dict[str, Any] = {}
    endpoint_url = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint_url = endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint_url:
        # obstore reads AWS_* variables too, and some would win over the arguments.
        config["aws_endpoint_url_s3"] = endpoint_url
        config["virtual_hosted_style_request"] = False
        config["skip_signature"] = False
        client["allow_http"] = endpoint_url.startswith("http://")
        if urlsplit(endpoint_url).hostname in LOOPBACK:
            client["proxy_url"] = endpoint_url  # in place of HTTP_PROXY, and never used:
            client["proxy_excludes"] = ",".join(LOOPBACK)
    if region:
        config["region"] = region
    return S3Store(
        bucket,
        client_options=client,  # type: ignore[arg-type]
        retry_config={"retry_timeout": timedelta(seconds=retry_seconds)},
        **config,
        **credentials,
    )


class Store:
    """The objects of one bucket.

    Parameters
    ----------
    bucket : obstore.store.ObjectStore
        What :func:`open_bucket` returned.

    Notes
    -----
    The worker uses the synchronous methods, the client the ``_async`` ones.
    """

    def __init__(self, bucket: Any):
        self.bucket = bucket
        self.counts = Counts()

    def get(self, name: str, size: int) -> Any:
        """Return an object's bytes, of which there are ``size``, as a read-only buffer."""
        with _translated("s3:GetObject", name):
            data = obstore.get_range(self.bucket, name, start=0, length=size)
        return self._got(data)

    async def get_async(self, name: str, size: int) -> Any:
        """Return an object's bytes, of which there are ``size``, as a read-only buffer."""
        with _translated("s3:GetObject", name):  # one step, where get and bytes would be two
            data = await obstore.get_range_async(self.bucket, name, start=0, length=size)
        return self._got(data)

    def _got(self, data: Any) -> Any:
        self.counts.gets += 1
        self.counts.bytes_read += len(data)
        return data

    def put_new(self, name: str, data: bytes | bytearray) -> int:
        """Commit an object unless it exists already (``If-None-Match: *``): first wins.

        Returns
        -------
        int
            Size of the object that is there now: this one, or the one that came first.
        """
        for _ in range(CONFLICT_ATTEMPTS):
            try:
                with _translated("s3:PutObject", name):
                    obstore.put(self.bucket, name, data, mode="create", use_multipart=False)
            except AlreadyExistsError:  # 412: somebody was first; 409: somebody is about to be
                try:
                    with _translated("s3:GetObject", name):
                        size = obstore.head(self.bucket, name)["size"]
                except StoreError as error:
                    if error.kind != "missing":
                        raise
                    continue
                self.counts.gets += 1
                return size
            return self._put(data)
        raise StoreError("transient", f"s3:PutObject {name}: conflicting writes went on")

    async def put_new_async(self, name: str, data: bytes | bytearray) -> int:
        """Commit an object unless it exists already; see :meth:`put_new`."""
        for _ in range(CONFLICT_ATTEMPTS):
            try:
                with _translated("s3:PutObject", name):
                    await obstore.put_async(
                        self.bucket, name, data, mode="create", use_multipart=False
                    )
            except AlreadyExistsError:
                try:
                    with _translated("s3:GetObject", name):
                        size = (await obstore.head_async(self.bucket, name))["size"]
                except StoreError as error:
                    if error.kind != "missing":
                        raise
                    continue
                self.counts.gets += 1
                return size
            return self._put(data)
        raise StoreError("transient", f"s3:PutObject {name}: conflicting writes went on")

    def _put(self, data: bytes | bytearray) -> int:
        self.counts.puts += 1
        self.counts.bytes_written += len(data)
        return len(data)

    async def delete_async(self, names: Sequence[str]) -> None:
        """Delete objects, a thousand a request; those that are not there do not matter."""
        if not names:
            return
        try:
            with _translated("s3:DeleteObject", names[0]):
                await obstore.delete_async(self.bucket, list(names))
        except StoreError as error:
            if error.kind != "missing":
                raise
        self.counts.deletes += -(-len(names) // 1000)

    async def list_async(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names of all objects below a prefix."""
        stream = obstore.list(self.bucket, prefix, chunk_size=1000)
        while True:
            with _translated("s3:ListBucket", prefix):
                try:
                    page = await stream.__anext__()
                except StopAsyncIteration:
                    return
            self.counts.lists += 1
            for entry in page:
                yield entry["path"]


@contextmanager
def _translated(action: str, name: str) -> Iterator[None]:
    try:
        yield
    except AlreadyExistsError:
        raise
    except (BaseError, OSError, ValueError) as error:
        text = str(error)
        kind: StoreErrorKind = "transient"
        if "NoSuchBucket" in text:
            kind = "no-bucket"
        elif isinstance(error, FileNotFoundError):
            kind = "missing"
        elif isinstance(error, _DENIALS) or _DENIED.search(text):
            kind = "denied"
        said = _SAID.search(text)
        text = text.partition("\n\nDebug source:")[0]
        if said and said[1] not in text:
            text += f" ({said[1]}: {said[2]})"
        raise StoreError(kind, f"{action} {name}: {text}") from error
