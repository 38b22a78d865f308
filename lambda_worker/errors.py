"""Errors that the worker and the client share.  May import: nothing."""

from __future__ import annotations

from typing import Literal

__all__ = [
    "DaskLambdaError",
    "IntegrityError",
    "RemoteError",
    "RequestError",
    "StoreError",
    "UnserializableError",
]


class DaskLambdaError(Exception):
    """Base class of every error that is raised by dask_lambda itself."""


class IntegrityError(DaskLambdaError):
    """An object is not what the run wrote under this name; it was not unpickled."""


class UnserializableError(DaskLambdaError, TypeError):
    """A task or a result cannot be pickled, so that it can not travel to or from Lambda."""


class RemoteError(DaskLambdaError):
    """A task raised an exception that cannot be rebuilt on the client.

    It stands for an exception whose class cannot be pickled or that fails to unpickle.  The
    message holds the original type and text; the remote traceback is attached as a note.
    """


class RequestError(DaskLambdaError):
    """A request is not one that the worker can read."""


StoreErrorKind = Literal["missing", "denied", "expired", "no-bucket", "transient"]


class StoreError(DaskLambdaError):
    """S3 refused or failed a request.

    Parameters
    ----------
    kind : {"missing", "denied", "expired", "no-bucket", "transient"}
        What to do about it: only "transient" is worth another try, and "expired" with other
        credentials.
    message : str
        Action, object and S3's own words.
    """

    def __init__(self, kind: StoreErrorKind, message: str):
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message
