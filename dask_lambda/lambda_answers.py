"""What Lambda answered in place of the worker: from AWS's words to a :class:`Failure`.

May import: failures, events, errors.  Pure: recorded answers in, failures out.

Lambda's API refuses a request (:func:`from_response`), or accepts it and loses the environment
(:func:`from_function_error`).
"""

from __future__ import annotations

import json
import re

from dask_lambda import errors
from dask_lambda.events import Failure, FailureKind
from dask_lambda.failures import MORE_MEMORY, Detail, expired

#: Of functions whose code, handler or image is not what it should be.
CANNOT_START = (
    *("Runtime.ImportModuleError", "Runtime.HandlerNotFound", "Runtime.Userc"),
    "Runtime.Invalid",  # ...Entrypoint, ...WorkingDir, ...TaskConfig
)
#: In the words of Lambda's API ("Common errors", AWS Lambda API reference) and of S3's.
_EXPIRED = re.compile(
    "ExpiredToken|UnrecognizedClient|security token included in the request is (expired|invalid)"
    "|[Ss]ignature expired|[Ss]ignature not yet current|RequestTimeTooSkewed",
)
#: A version of which nothing runs yet: it is being made, or was idle for so long (14 days, with
#: SnapStart) that its snapshot is made anew, which the first Invoke begins.
_NOT_READY = re.compile("following state: (Pending|Inactive)")
_PEAK = re.compile(r"\tMax Memory Used: (\d+) MB")


def from_response(status: int, body: bytes, function: str, region: str, name: str = "") -> Failure:
    """Classify an answer of the Invoke API other than 2xx.

    Parameters
    ----------
    status : int
        HTTP status.
    body : bytes
        JSON with "Type", "Message" (or "message"), and for throttles "Reason".
    function, region : str
    name : str
        Of the error, as the header ``X-Amzn-ErrorType`` has it.

    Notes
    -----
    Statuses and names: "Invoke", AWS Lambda API reference, section Errors.
    """
    text, reason, named = _service_error(body)
    name = name or named
    said = f"AWS said: {name or status}: {text}" if text else f"AWS said: {name or status}"
    if status in (400, 401, 403) and _EXPIRED.search(f"{name} {text}"):
        return expired(
            f"lambda:InvokeFunction on function {function!r} in {region} was refused. {said}"
        )
    match status:
        case 429:
            return Failure(
                FailureKind.RATE_LIMITED if "Rate" in reason else FailureKind.THROTTLED,
                Detail(
                    errors.ThrottledError,
                    f"Lambda refused to start it for too long ({reason or 'throttled'}). {said}",
                    "Raise the function's reserved concurrency or the account's limit, or lower "
                    "dask-lambda.concurrency.",
                ),
            )
        case 413:
            return Failure(
                FailureKind.FATAL,
                Detail(errors.PayloadTooLargeError, f"the payload is too large. {said}"),
            )
        case 401 | 403:
            return Failure(
                FailureKind.FATAL,
                Detail(
                    errors.AccessDeniedError,
                    f"access denied: lambda:InvokeFunction on function {function!r} in "
                    f"{region}. {said}",
                    "Check that the credentials are right and have not expired, and that the "
                    "caller's policy allows the action on this function.",
                ),
            )
        case 404:
            return Failure(
                FailureKind.FATAL,
                Detail(
                    errors.FunctionNotFoundError,
                    f"function {function!r} does not exist in region {region}. {said}",
                    "Run 'dask-lambda deploy', or set dask-lambda.function, "
                    "dask-lambda.larger-functions and dask-lambda.region.",
                ),
            )
        case 400 if name == "SnapStartException":
            return Failure(
                FailureKind.FATAL,
                Detail(
                    errors.InvocationError,
                    f"function {function!r} in {region} could not go on from its snapshot. {said}",
                    "The function's log says what its runtime hook raised ('dask-lambda logs', or "
                    "CloudWatch). dask_lambda has no such hook: who has one, an extension or a "
                    "module that is imported early?",
                ),
            )
        case 408:  # SnapStartTimeoutException
            return Failure(
                FailureKind.TRANSIENT,
                Detail(
                    errors.InvocationError,
                    f"Lambda could not restore the snapshot of function {function!r} in {region} "
                    f"in time. {said}",
                    "If it goes on, deploy the function again, which makes another snapshot, or "
                    "without one.",
                ),
            )
        case 409 if name == "SnapStartNotReadyException" or _NOT_READY.search(text):
            return Failure(
                FailureKind.NOT_READY,
                Detail(
                    errors.InvocationError,
                    f"function {function!r} in {region} is not ready to be invoked. {said}",
                    "Lambda is making it or its snapshot, which it also does anew when nobody has "
                    "invoked the function for 14 days: this takes minutes. If it goes on, look at "
                    "the function's state ('dask-lambda doctor').",
                ),
            )
        case 409 if name == "SnapStartRegenerationFailureException":
            return Failure(
                FailureKind.TRANSIENT,
                Detail(
                    errors.InvocationError,
                    f"Lambda could not make the snapshot of function {function!r} in {region} "
                    f"anew. {said}",
                    "Lambda tries again by itself. If it goes on, deploy the function again.",
                ),
            )
        case 409:  # the function is being created or updated
            kind = FailureKind.TRANSIENT
        case _:
            kind = FailureKind.TRANSIENT if status >= 500 else FailureKind.FATAL
    return Failure(kind, Detail(errors.InvocationError, f"Lambda answered {status}. {said}"))


def from_network(error: Exception) -> Failure:
    """Classify a request that got no answer: it may or may not have taken effect."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Failure(
        FailureKind.TRANSIENT,
        Detail(
            errors.InvocationError,
            f"no answer from the Lambda API ({text})",
            "Check the network connection, and dask-lambda.endpoint-url if it is set.",
        ),
    )


def from_credentials(error: Exception) -> Failure:
    """Build the failure of a request that could not be signed: botocore has no credentials."""
    return expired(f"botocore could not renew them. {type(error).__name__}: {error}")


def _service_error(body: bytes) -> tuple[str, str, str]:
    try:
        record = json.loads(body)
        message = str(record.get("Message") or record.get("message") or "")
        name = str(
            record.get("__type") or record.get("Code") or ""
        )  # "Type" is "User" or "Service"
        return message[:1000], str(record.get("Reason") or ""), name
    except (ValueError, AttributeError):
        return body[:200].decode("utf-8", "replace"), "", ""


def from_function_error(body: bytes, log_tail: str, memory_mb: int | None) -> Failure:
    """Classify an answer 200 with ``X-Amz-Function-Error``.

    The worker catches whatever a task raises, so this is always the environment: a time-out, no
    memory left, a dead process, or a function that is not ours.

    Parameters
    ----------
    body : bytes
        JSON with "errorType" and "errorMessage" (time-outs may have the message only).
    log_tail : str
        The last lines of the invocation's log, as far as Lambda sent them.
    memory_mb : int, optional
        Memory of the function, if known.
    """
    try:
        record = json.loads(body)
        kind, text = str(record.get("errorType", "")), str(record.get("errorMessage", ""))
    except (ValueError, AttributeError):
        kind, text = "", body[:500].decode("utf-8", "replace")
    said = f"{kind}: {text}" if kind else text
    note = f"Last lines of the invocation's log:\n{log_tail}" if log_tail.strip() else ""
    if kind == "Sandbox.Timedout" or "Task timed out after" in text:
        seconds = text.rpartition("after ")[2].removesuffix(" seconds") if "after " in text else "?"
        return Failure(
            FailureKind.TIMEOUT,
            Detail(
                errors.FunctionTimeoutError,
                f"ran longer than the function's time-out of {seconds} seconds",
                "Make the chunks smaller, or raise the function's time-out (dask-lambda.timeout; "
                "Lambda allows 900 seconds).",
                note=note,
            ),
        )
    if kind == "Runtime.OutOfMemory" or "signal: killed" in text:
        size = f"{memory_mb:,} MB" if memory_mb else "memory"
        peak = _PEAK.search(log_tail)
        measured = f"; at its peak it took {int(peak[1]):,} MB" if peak else ""
        return Failure(
            FailureKind.MEMORY,
            Detail(
                errors.OutOfMemoryError,
                f"needed more than the function's {size} ({said}{measured})",
                MORE_MEMORY,
                note=note,
            ),
        )
    if kind == "Function.ResponseSizeTooLarge":
        return Failure(
            FailureKind.FATAL,
            Detail(
                errors.PayloadTooLargeError,
                f"the response exceeded Lambda's limit of 6 MB ({said})",
                "Lower dask-lambda.inline-bytes.",
                note=note,
            ),
        )
    if kind.startswith(CANNOT_START):
        return Failure(
            FailureKind.FATAL,
            Detail(
                errors.InvocationError,
                f"the function cannot start: {said}",
                "The function that dask-lambda.function names must hold the lambda_worker "
                "package and what it imports.",
                note=note,
            ),
        )
    if kind and not kind.startswith(("Runtime.", "Sandbox.", "Function.", "Extension.")):
        return Failure(
            FailureKind.FATAL,
            Detail(
                errors.InvocationError,
                f"the function itself failed, not a task ({said})",
                "Is dask-lambda.function a function that runs this version of lambda_worker?",
                note=note,
            ),
        )
    return Failure(
        FailureKind.DEATH,
        Detail(
            errors.WorkerDiedError,
            f"the worker died while it ran ({said})",
            "A crash of native code, os._exit, or too little memory ends a worker like this.",
            note=note,
        ),
    )
