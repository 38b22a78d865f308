"""The lease of a run: as long as it is in the bucket, workers go on.  May import: the ground.

To be used in the engine's thread.  :mod:`lambda_worker.lease` says what workers do with it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lambda_worker import codec
from lambda_worker.errors import StoreError
from lambda_worker.lease import LATE
from lambda_worker.store import Store

logger = logging.getLogger("dask_lambda")

#: A run whose invocations are all shorter, in seconds, has no lease, and pays for none.
AFTER = 1.0


class Lease:
    """One run's lease.

    Parameters
    ----------
    store : Store
    name : str
        Of the object.
    secret : bytes
        Of the run.

    Attributes
    ----------
    name : str
        Nothing if it cannot be written: then workers do not look for it.
    there : bool
        Whether it was written.
    """

    def __init__(self, store: Store, name: str, secret: bytes):
        self.name = name
        self.there = False
        self._object = name
        self._store = store
        self._secret = secret
        self._writing: asyncio.Task[None] | None = None
        self._ended = False
        self._since = math.inf

    @contextmanager
    def held(self) -> Iterator[None]:
        """Write the lease if what is done inside takes long."""
        if self.there or self._ended:
            yield
            return
        timer = asyncio.get_running_loop().call_later(AFTER, self._write_once)
        try:
            yield
        finally:
            timer.cancel()

    def was_due(self, sent: float) -> bool:
        """Whether an invocation that was sent at this time found the lease, unless it is gone.

        A worker that was not told of it takes it for gone when it misses it after some seconds;
        by the time that this is heard, a client that S3 held up may have written it.
        """
        return self._since <= sent + LATE

    async def end(self) -> None:
        """Delete the lease, so that workers stop.  Idempotent."""
        ended, self._ended = self._ended, True
        if ended or self._writing is None:
            return
        await asyncio.wait([self._writing])
        try:
            await self._store.delete_async([self._object])
        except StoreError as error:
            logger.warning("the lease of a run is left behind, workers may go on: %s", error)

    def _write_once(self) -> None:
        if not self._ended and (self._writing is None or self._writing.done()) and not self.there:
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def _write(self) -> None:
        try:
            sealed = codec.seal([memoryview(b"lease")], self._secret, self._object)
            await self._store.put_new_async(self._object, sealed)
            self.name, self.there, self._since = self._object, True, time.monotonic()
        except StoreError as error:  # no reason to stop the run
            self.name = ""
            logger.debug("the lease of a run could not be written: %s", error)
