"""S3 objects by name, counted.

May import: codec, protocol, container_credentials, errors, obstore.

Large objects travel in parts, several at a time.

obstore retries 5xx answers (503 SlowDown among them) and broken connections by itself, with
jittered exponential backoff; what still fails is a :class:`StoreError` that says whether another
try makes sense.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
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

from lambda_worker import codec
from lambda_worker.container_credentials import UNAVAILABLE, ContainerCredentials
from lambda_worker.errors import StoreError, StoreErrorKind

#: A whole object of 10 GB at 75 MB/s, the sustained bandwidth of one Lambda, takes 133 s.
REQUEST_TIMEOUT = timedelta(seconds=300)
CONNECT_TIMEOUT = timedelta(seconds=10)
#: A conditional PUT that meets another one in flight (409) is tried again this often.
CONFLICT_ATTEMPTS = 5
#: Parts of large objects that a :class:`Store` reads at the same time, and that one upload sends.
#: One connection to S3 carries some 50 to 90 MB/s, the network of a Lambda at first 350 MB/s.
RANGES_AT_ONCE = 8
PARTS_AT_ONCE = 4
LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: How the regions of AWS's other partitions begin, and the domain of each, which obstore does not
#: know (AWS's list of partitions and endpoints, as botocore has it).
DOMAINS = {
    "cn-": "amazonaws.com.cn",
    "eusc-": "amazonaws.eu",
    "us-iso-": "c2s.ic.gov",
    "us-isob-": "sc2s.sgov.gov",
    "eu-isoe-": "cloud.adc-e.uk",
    "us-isof-": "csp.hci.ic.gov",
}

_DENIALS = (PermissionDeniedError, UnauthenticatedError)
#: The same where obstore has no class for it: lists, and batches of deletes.
_DENIED = re.compile(r"\bstatus: 40[13]\b")
#: Credentials that were good once, or are not yet ("Error responses", Amazon S3 API reference).
_EXPIRED = re.compile(
    r"\b(ExpiredToken|TokenRefreshRequired|InvalidToken|InvalidAccessKeyId|RequestTimeTooSkewed)"
)
#: A range that begins behind the end of an object.
_BEHIND_THE_END = re.compile(r"\bstatus code: 416\b|Wanted range starting at")
#: S3's own words.
_SAID = re.compile(r"<Code>([^<]*)</Code>\s*<Message>([^<]*)</Message>")
#: S3's answer in full, of which code and message say enough.
_XML = re.compile(r":?\s*(<\?xml|<Error>).*", re.DOTALL)


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


@dataclass(frozen=True, slots=True)
class Entry:
    """An object as a listing shows it."""

    name: str
    size: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class Parts:
    """From which size on objects travel in parts, and how large these are, in bytes.

    S3 takes up to 5 GB in one PUT, parts of 5 MiB or more (the last one excepted), and 10,000
    of them.
    """

    read_above: int = 8 * 2**20
    read: int = 8 * 2**20
    write_above: int = 64 * 2**20
    write: int = 16 * 2**20

    def ranges(self, size: int) -> list[tuple[int, int]]:
        """Return begin and end of each part in which an object is read."""
        return [(i, min(i + self.read, size)) for i in range(0, size, self.read)]


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
        standard environment variables, which Lambda sets for the execution role, or the endpoint
        that it names in their place (:mod:`lambda_worker.container_credentials`).
    """
    client: dict[str, Any] = {"timeout": REQUEST_TIMEOUT, "connect_timeout": CONNECT_TIMEOUT}
    config: dict[str, Any] = {}
    endpoint_url = endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint_url = endpoint_url or os.environ.get("AWS_ENDPOINT_URL")
    endpoint_url = endpoint_url or elsewhere(region or os.environ.get("AWS_REGION", ""))
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
    if not credentials and ContainerCredentials.wanted():
        credentials["credential_provider"] = ContainerCredentials()
    return S3Store(
        bucket,
        client_options=client,  # type: ignore[arg-type]
        retry_config={"retry_timeout": timedelta(seconds=retry_seconds)},
        **config,
        **credentials,
    )


def elsewhere(region: str) -> str | None:
    """Return the endpoint of S3 in a region that is not in AWS's usual partition."""
    for begin, domain in DOMAINS.items():
        if region.startswith(begin):
            return f"https://s3.{region}.{domain}"
    return None


class Store:
    """The objects of one bucket.

    Parameters
    ----------
    bucket : obstore.store.ObjectStore
        What :func:`open_bucket` returned.
    parts : Parts

    Notes
    -----
    The worker uses the synchronous methods, from any thread, the client the ``_async`` ones.
    """

    def __init__(self, bucket: Any, parts: Parts | None = None):
        self.bucket = bucket
        self.parts = parts or Parts()
        self.counts = Counts()
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._ranges_at_once = asyncio.Semaphore(RANGES_AT_ONCE)

    # -- reading ---------------------------------------------------------------------------------

    def get(self, name: str, size: int) -> Any:
        """Return an object's bytes, of which there are ``size``.

        If there are fewer, it is an IntegrityError.
        Small objects are read-only; large ones, read in parts, are a writable buffer that
        belongs to the caller.
        """
        if size <= self.parts.read_above:
            return self._get(name, 0, size)
        buffer = codec.allocate(size)

        def get(part: tuple[int, int]) -> None:
            start, end = part
            buffer[start:end] = self._get(name, start, end)

        parts = [self._pool().submit(get, part) for part in self.parts.ranges(size)]
        try:
            for done in parts:
                done.result()
        finally:
            for done in parts:
                done.cancel()
            wait(parts)
        return buffer

    async def get_async(self, name: str, size: int) -> Any:
        """Return an object's bytes; see :meth:`get`."""
        if size <= self.parts.read_above:
            return await self._get_async(name, 0, size)
        buffer = codec.allocate(size)

        async def get(part: tuple[int, int]) -> None:
            async with self._ranges_at_once:
                start, end = part
                buffer[start:end] = await self._get_async(name, start, end)

        parts = [asyncio.ensure_future(get(part)) for part in self.parts.ranges(size)]
        try:
            await asyncio.gather(*parts)
        finally:
            for done in parts:
                done.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        return buffer

    def _get(self, name: str, start: int, end: int) -> Any:
        with _translated("s3:GetObject", name):
            data = obstore.get_range(self.bucket, name, start=start, end=end)
        return self._got(name, start, end, data)

    async def _get_async(self, name: str, start: int, end: int) -> Any:
        with _translated("s3:GetObject", name):  # one step, where get and bytes would be two
            data = await obstore.get_range_async(self.bucket, name, start=start, end=end)
        return self._got(name, start, end, data)

    def _got(self, name: str, start: int, end: int, data: Any) -> Any:
        self._count(gets=1, bytes_read=len(data))
        if len(data) != end - start:
            raise codec.damaged(name, f"is truncated: it ends at {start + len(data)}")
        return data

    def read(self, name: str) -> bytes:
        """Return the bytes of a small object, however many there are."""
        with _translated("s3:GetObject", name):
            data = obstore.get(self.bucket, name).bytes().to_bytes()
        self._count(gets=1, bytes_read=len(data))
        return data

    def exists(self, name: str) -> bool:
        """Whether an object is there."""
        try:
            with _translated("s3:GetObject", name):
                obstore.head(self.bucket, name)
        except StoreError as error:
            if error.kind != "missing":
                raise
            return False
        finally:
            self._count(gets=1)
        return True

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(RANGES_AT_ONCE, "range")
            return self._threads

    # -- writing ---------------------------------------------------------------------------------

    def is_large(self, size: int) -> bool:
        """Whether an object of this size is written in parts, and so unconditionally."""
        return size > self.parts.write_above

    def put(self, name: str, data: bytes | bytearray) -> None:
        """Write an object in parts, whatever was there before."""
        with _translated("s3:PutObject", name):
            obstore.put(self.bucket, name, data, **self._in_parts())
        self._count_parts(len(data))

    async def put_async(self, name: str, data: bytes | bytearray) -> None:
        """Write an object of which nobody else could write another version."""
        if not self.is_large(len(data)):
            await self.put_new_async(name, data)
            return
        with _translated("s3:PutObject", name):
            await obstore.put_async(self.bucket, name, data, **self._in_parts())
        self._count_parts(len(data))

    def _in_parts(self) -> dict[str, Any]:
        # When one fails, obstore aborts the upload.
        return {
            "use_multipart": True,
            "chunk_size": self.parts.write,
            "max_concurrency": PARTS_AT_ONCE,
        }

    def _count_parts(self, size: int) -> None:
        parts = -(-size // self.parts.write)
        self._count(puts=parts + 2, bytes_written=size)  # with create and complete

    def put_new(self, name: str, data: bytes | bytearray) -> int | None:
        """Commit an object unless it exists already (``If-None-Match: *``): first wins.

        Returns
        -------
        int or None
            None if it is there now; the size of the object that came first, if one did.
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
                self._count(gets=1)
                return size
            self._count(puts=1, bytes_written=len(data))
            return None
        raise StoreError("transient", f"s3:PutObject {name}: conflicting writes went on")

    async def put_new_async(self, name: str, data: bytes | bytearray) -> int | None:
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
                self._count(gets=1)
                return size
            self._count(puts=1, bytes_written=len(data))
            return None
        raise StoreError("transient", f"s3:PutObject {name}: conflicting writes went on")

    # -- the rest --------------------------------------------------------------------------------

    def delete(self, name: str) -> None:
        """Delete one object, and nothing that points to it."""
        with _missing_is_fine(), _translated("s3:DeleteObject", name):
            obstore.delete(self.bucket, name)
        self._count(deletes=1)

    async def delete_async(self, names: Sequence[str]) -> None:
        """Delete objects, a thousand a request; those that are not there do not matter."""
        if not names:
            return
        names = list(dict.fromkeys(names))
        with _missing_is_fine(), _translated("s3:DeleteObject", names[0]):
            await obstore.delete_async(self.bucket, names)
        self._count(deletes=-(-len(names) // 1000))

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.counts, name, getattr(self.counts, name) + amount)

    async def list_async(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names of all objects in a folder, at any depth."""
        async for entry in self.entries_async(prefix):
            yield entry.name

    async def entries_async(self, prefix: str) -> AsyncIterator[Entry]:
        """Yield all objects in a folder, at any depth."""
        stream = obstore.list(self.bucket, prefix, chunk_size=1000)
        pages = 0
        while True:
            with _translated("s3:ListBucket", prefix):
                try:
                    page = await stream.__anext__()
                except StopAsyncIteration:
                    if not pages:  # S3 was asked nevertheless
                        self._count(lists=1)
                    return
            pages += 1
            self._count(lists=1)
            for entry in page:
                yield Entry(entry["path"], entry["size"], entry["last_modified"])


@contextmanager
def _missing_is_fine() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        if error.kind != "missing":
            raise


@contextmanager
def _translated(action: str, name: str) -> Iterator[None]:
    try:
        yield
    except AlreadyExistsError:
        raise
    except (BaseError, OSError, ValueError) as error:
        text = str(error)
        if _BEHIND_THE_END.search(text):
            raise codec.damaged(name, "is truncated: S3 has less of it than was written") from error
        kind: StoreErrorKind = "transient"
        if "NoSuchBucket" in text:
            kind = "no-bucket"
        elif isinstance(error, FileNotFoundError):
            kind = "missing"
        elif _EXPIRED.search(text):
            kind = "expired"
        elif UNAVAILABLE in text:
            kind = "transient"
        elif isinstance(error, _DENIALS) or _DENIED.search(text):
            kind = "denied"
        said = _SAID.search(text)
        text = _XML.sub("", text.partition("\n\nDebug source:")[0])
        if said and said[1] not in text:
            text += f" ({said[1]}: {said[2]})"
        raise StoreError(kind, f"{action} {name}: {text}") from error
