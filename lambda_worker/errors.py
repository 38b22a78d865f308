"""Errors that the worker and the client share.  May import: nothing."""

from __future__ import annotations

__all__ = ["DaskLambdaError", "IntegrityError", "RemoteError", "UnserializableError"]


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
