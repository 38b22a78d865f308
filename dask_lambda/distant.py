"""Futures of an executor in another process.

May import: kept_runs, loop_thread, failures, report, errors, the ground; late: backend.

What a pickled future carries says what became of its call, or where that will be written: the owner
writes an object when it pickles a future whose call has not ended, and another one when it has.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from dask_lambda import failures
from dask_lambda.errors import IntegrityError, LostDataError
from dask_lambda.kept_runs import Place
from dask_lambda.loop_thread import claim_process
from dask_lambda.report import CallReport
from lambda_worker import codec, protocol
from lambda_worker.errors import StoreError
from lambda_worker.store import Store

logger = logging.getLogger("dask_lambda")

#: Seconds between two looks, at first and at the most: a look costs a tenth of a millicent or two.
LOOK_SECONDS, MAX_LOOK_SECONDS = 0.1, 5.0
#: How often it is said that somebody still waits.
NOTICE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call.

    Attributes
    ----------
    value : tuple, optional
        The result, alone in it.
    stored : tuple of (str, int), optional
        Name and size of the object that holds the result.
    exception : BaseException, optional
    report : CallReport, optional
    log : str
        In base64, of a call that failed.
    """

    value: tuple[Any] | None = None
    stored: tuple[str, int] | None = None
    exception: BaseException | None = None
    report: CallReport | None = None
    log: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the objects are, and the secret under which they are sealed.

    Attributes
    ----------
    place : Place
    keys : tuple of str, optional
        Of an embedded AWS.  For AWS itself, who reads needs credentials of his own.
    secret : bytes
    note : str
        Name of the object that says that somebody will answer.
    """

    place: Place
    keys: tuple[str, str] | None = field(repr=False)
    secret: bytes = field(repr=False)
    note: str = ""


def answer_name(note: str) -> str:
    """Return the name of the answer to a note."""
    return f"{note}-answer"


class DistantFuture:
    """A future of an executor that lives in another process: what unpickling one makes.

    It works as long as the owner holds the original: then its objects are deleted.  On AWS it needs
    credentials that may read the bucket (``s3:GetObject``); the embedded AWS can be reached from
    the same machine.

    Attributes
    ----------
    key : str
        Name of the call.
    """

    def __init__(self, key: str, answer: Answer | None, source: Source | None = None):
        self.key = key
        self._answer = answer
        self._source = source
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<DistantFuture {self.key}{'' if self._answer is None else ' done'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if protocol.is_sealing():
            raise TypeError(
                f"the future {self.key} belongs to another process and cannot be given to a call: "
                "give its result()"
            )
        return DistantFuture, (self.key, self._answer, self._source)

    def done(self) -> bool:
        """Whether the call has ended, as far as its owner has told: asks S3.

        Raises
        ------
        LostDataError
            If the owner has let go of the future.
        """
        return self._answer is not None or self._look()

    def cancelled(self) -> bool:
        """Whether the call was cancelled."""
        return self.done() and isinstance(self._known().exception, CancelledError)

    def running(self) -> bool:
        """Whether the call has not ended."""
        return not self.done()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the call to end; return its result, or raise its exception.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for the end of the call; not for the download of the result.

        Raises
        ------
        TimeoutError
        LostDataError
            If the owner has let go of the future.  If the owner was killed, nobody can tell: it is
            waited for until the time-out, and a warning is logged every minute.
        IntegrityError, AccessDeniedError
        """
        answer = self._wait(timeout)
        if answer.exception is not None:
            raise answer.exception
        if answer.value is not None:
            return answer.value[0]
        assert answer.stored is not None
        assert self._source is not None
        name, size = answer.stored
        try:
            data = _store(self._source).get(name, size)
        except StoreError as error:
            raise self._lost(error) from error
        codec.verify(data, self._source.secret, name)
        return codec.deserialize(codec.frames_of(data, name))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the call to end; return its exception, or None."""
        return self._wait(timeout).exception

    @property
    def report(self) -> CallReport | None:
        """What the call did, once it is known to have succeeded."""
        return None if self._answer is None else self._answer.report

    def _known(self) -> Answer:
        assert self._answer is not None
        return self._answer

    def _wait(self, timeout: float | None) -> Answer:
        started = noticed = time.monotonic()
        delay = LOOK_SECONDS
        while not self.done():
            now = time.monotonic()
            left = delay if timeout is None else started + timeout - now
            if left <= 0:
                raise TimeoutError
            if now - noticed >= NOTICE_SECONDS:
                noticed = now
                logger.warning(
                    "the end of %s is waited for since %.0f s; if the process that called it was "
                    "killed, it will never be told",
                    self.key,
                    now - started,
                )
            time.sleep(min(delay * random.uniform(0.5, 1), left))
            delay = min(1.5 * delay, MAX_LOOK_SECONDS)
        return self._known()

    def _look(self) -> bool:
        """Look for the answer."""
        source = self._source
        assert source is not None
        store, name = _store(source), answer_name(source.note)
        with self._lock:
            if self._answer is not None:
                return True
            try:
                data = store.read(name)
            except StoreError as error:
                if error.kind != "missing":
                    raise self._lost(error) from error
                try:
                    if store.exists(source.note):
                        return False
                except StoreError as again:
                    raise self._lost(again) from again
                raise self._lost(error) from error
            answer = codec.loads(data, source.secret, name)
            if not isinstance(answer, Answer):
                raise IntegrityError(f"object {name!r} is no answer to a future")
            self._answer = answer
            return True

    def _lost(self, error: StoreError) -> BaseException:
        if error.kind != "missing":
            return failures.to_exception(failures.from_store_error(error), self.key, {})
        return LostDataError(
            f"the result of {self.key} does not exist any more: the process that called it has let "
            "go of its future, has shut down its executor, or has ended; hold the future there for "
            "as long as it is used elsewhere"
        )


@cache
def _opened(place: Place, keys: tuple[str, str] | None) -> Store:
    from dask_lambda.backend import open_elsewhere

    return Store(open_elsewhere(place.bucket, place.region, place.endpoint_url, keys))


def _store(source: Source) -> Store:
    claim_process()
    return _opened(source.place, source.keys)
