"""Every error that dask_lambda raises.  May import: :mod:`lambda_worker.errors`.

Each message says what happened, to which task, and what to do next.  A task's own exception
is not among them: it reaches the caller with its own type, and with the remote traceback as a
note under it.
"""

from __future__ import annotations

from lambda_worker.errors import (
    DaskLambdaError,
    IntegrityError,
    RemoteError,
    UnserializableError,
)

__all__ = [
    "AccessDeniedError",
    "BucketNotFoundError",
    "BudgetExceededError",
    "ConfigurationError",
    "CyclicGraphError",
    "DaskLambdaError",
    "DeploymentError",
    "FunctionNotFoundError",
    "FunctionTimeoutError",
    "IntegrityError",
    "InvocationError",
    "LocalAWSError",
    "LocalModulesError",
    "LostDataError",
    "MissingKeyError",
    "NotOnLambdaError",
    "OutOfMemoryError",
    "PackagingError",
    "PayloadTooLargeError",
    "RemoteError",
    "RunDeletedError",
    "ThrottledError",
    "UnserializableError",
    "VersionMismatchError",
    "WorkerDiedError",
]


class ConfigurationError(DaskLambdaError, ValueError):
    """A setting is missing, unknown or out of range."""


class PackagingError(DaskLambdaError):
    """The worker's environment cannot be built, or is larger than Lambda allows."""


class LocalAWSError(DaskLambdaError):
    """The embedded AWS could not be started, or has died."""


class DeploymentError(DaskLambdaError):
    """Something could not be made, changed or removed in the account; what was done so far stays.

    The message says what that is; the same command goes on from there.
    """


class CyclicGraphError(DaskLambdaError, RuntimeError):
    """The graph has a cycle (Dask's own schedulers raise RuntimeError too)."""


class MissingKeyError(DaskLambdaError, KeyError):
    """A requested key is not in the graph."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument
        return str(self.args[0]) if self.args else ""


class NotOnLambdaError(DaskLambdaError, RuntimeError):
    """A task needs what functions on Lambda do not have: a connection to other tasks."""


class FunctionNotFoundError(DaskLambdaError):
    """The Lambda function does not exist in this account and region."""


class BucketNotFoundError(DaskLambdaError):
    """The S3 bucket does not exist."""


class AccessDeniedError(DaskLambdaError, PermissionError):
    """AWS refused a request: wrong or expired credentials, or a missing permission."""


class InvocationError(DaskLambdaError):
    """An invocation failed for good; the base class of what can go wrong around a task."""


class FunctionTimeoutError(InvocationError, TimeoutError):
    """A task ran longer than the function's time-out."""


class OutOfMemoryError(MemoryError, InvocationError):  # the other way round has no usable __new__
    """A task needed more memory than the function has."""


class WorkerDiedError(InvocationError):
    """The worker process ended while it ran a task."""


class PayloadTooLargeError(InvocationError):
    """A request or a response exceeded Lambda's limit of 6 MB."""


class LocalModulesError(InvocationError):
    """The user's own modules cannot travel with the tasks: they are too large, or not readable."""


class BudgetExceededError(InvocationError):
    """The run was stopped before it exceeds ``max_cost_usd`` or ``max_seconds``."""


class ThrottledError(InvocationError):
    """Lambda went on refusing invocations (429) for longer than the scheduler waits."""


class LostDataError(InvocationError):
    """The object that holds an intermediate result is gone from the bucket."""


class RunDeletedError(InvocationError):
    """The objects of a run were deleted while it ran, and workers therefore stopped."""


class VersionMismatchError(InvocationError):
    """The worker has another Python, Dask or protocol, or a package of another series."""
