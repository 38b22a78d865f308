"""What went wrong: from the worker's and S3's words to a decision and an exception.

May import: events, libraries, errors, the ground.  Pure: recorded answers in, :class:`Failure` out.

A failure has a source.  Lambda refuses a request, or loses the environment
(:mod:`dask_lambda.lambda_answers`); nobody runs the task (:func:`from_needs`, ...); the worker
replies that a group failed (:func:`from_record`); S3 fails on the client
(:func:`from_store_error`).  :func:`to_exception` turns each into what the user sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dask_lambda import errors
from dask_lambda.events import Failure, FailureKind
from dask_lambda.libraries import missing_module
from lambda_worker import codec, protocol
from lambda_worker.errors import RequestError, StoreError

MORE_MEMORY = (
    "Make the chunks smaller, or give the function more memory (dask-lambda.memory; Lambda allows "
    "10,240 MB), or name functions with more memory in dask-lambda.larger-functions."
)
_MORE_MEMORY_HERE = (
    "Make the chunks smaller, or have dask-lambda.local-executor name an executor on a machine "
    "with more memory."
)


@dataclass(slots=True)
class Detail:
    """What to tell the user about a failure.

    Attributes
    ----------
    error : type
        The exception's class; the task's own exception has precedence if it can be rebuilt.
    message : str
        What happened, without the task's name, which is added later.
    advice : str
        What to do next.
    key : str
        The task of the group that failed, if the worker could tell.
    exception : Value, optional
        The task's own exception, pickled and sealed.
    note : str
        The remote traceback.
    """

    error: type[errors.DaskLambdaError]
    message: str
    advice: str = ""
    key: str = ""
    exception: protocol.Value | None = None
    note: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


#: Clocks that differ, in the words of Lambda's API and of S3's.
_CLOCK = re.compile("[Ss]ignature expired|[Ss]ignature not yet current|RequestTimeTooSkewed")


def expired(what: str) -> Failure:
    """Build the failure of credentials that were right once, and may be again."""
    if _CLOCK.search(what):
        message = f"the clock of this machine is wrong, or a request took minutes: {what}"
        advice = "Set the clock: AWS refuses what was signed more than some minutes ago or ahead."
    else:
        message = f"the AWS credentials have expired, were replaced, or are wrong: {what}"
        advice = (
            "Log in again ('aws sso login', or as you do), or write new credentials where the old "
            "ones are; a run that goes on meanwhile picks them up, unless they are in environment "
            "variables. A run with resume='...' can be resumed."
        )
    return Failure(FailureKind.EXPIRED, Detail(errors.AccessDeniedError, message, advice))


# ---------------------------------------------------------------------------------------------
# nobody ran it
# ---------------------------------------------------------------------------------------------


def from_needs(nbytes: int, memory_mb: int, what: str, *, local: bool = False) -> Failure:
    """Build the failure of a task that was not sent, since the function has not enough memory.

    Parameters
    ----------
    nbytes : int
        That it needs at least.
    memory_mb : int
        Of the function.
    what : str
        What needs it: "its inputs", "it is annotated with memory of".
    local : bool
        Whether it was to run on this machine.
    """
    whose = "this machine's" if local else "the function's"
    return Failure(
        FailureKind.MEMORY,
        Detail(
            errors.OutOfMemoryError,
            f"{what} {nbytes / 2**20:,.0f} MB, more than {whose} {memory_mb:,} MB; it was not sent",
            _MORE_MEMORY_HERE if local else MORE_MEMORY,
        ),
    )


def from_local_start(why: str) -> Failure:
    """Build the failure of a local process that did not come so far as to serve anything."""
    return Failure(
        FailureKind.DEATH,
        Detail(
            errors.WorkerDiedError,
            "a process of this machine, in which it was to run, could not start"
            + (f" ({why})" if why else ""),
            "What that process has printed says why; dask-lambda.local-executor names others.",
        ),
    )


def from_local_death(code: int) -> Failure:
    """Build the failure of a local process that ended while it ran a task.

    Parameters
    ----------
    code : int
        Its exit code; of a signal that has ended it, the negative number.
    """
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return Failure(
        FailureKind.DEATH,
        Detail(
            errors.WorkerDiedError,
            f"the local process died while it ran ({how})",
            "A crash of native code, os._exit, or too little memory (signal 9) ends it like this.",
        ),
    )


def from_executor(executor: str, why: str, *, died: bool = False) -> Failure:
    """Build the failure of a task that the user's executor did not run.

    Parameters
    ----------
    executor : str
    why : str
    died : bool
        Whether one of its processes did, in which it was running or may have been.
    """
    advice = "Check the executor that dask-lambda.local-executor names: is it open, and whole?"
    if "ForkedError" in why:
        advice = (
            "S3's client does not survive a fork: make the executor with processes that are not "
            "forked, ProcessPoolExecutor(mp_context=multiprocessing.get_context('spawn'))."
        )
    return Failure(
        FailureKind.DEATH if died else FailureKind.FATAL,
        Detail(
            errors.WorkerDiedError if died else errors.InvocationError,
            f"{executor} could not run it ({why})",
            advice,
        ),
    )


def from_foreign_reply(body: bytes, function: str, why: str = "") -> Failure:
    """Build the failure of an answer that is not one of lambda_worker's."""
    start = body[:200].decode("utf-8", "replace")
    return Failure(
        FailureKind.FATAL,
        Detail(
            errors.InvocationError,
            f"function {function!r} answered something that is not a reply of lambda_worker: "
            f"{start!r}" + (f" ({why})" if why else ""),
            "Check dask-lambda.function: it must name a function that runs lambda_worker.",
        ),
    )


# ---------------------------------------------------------------------------------------------
# the worker replied
# ---------------------------------------------------------------------------------------------


def from_refusal(worker: dict[str, Any]) -> Failure:
    """Build the failure of a request that the worker refused for its versions.

    Parameters
    ----------
    worker : dict
        Its versions; in "packages", those of packages that differ, with the client's.
    """
    differing = differing_versions(worker)
    installable = [
        f"{name}=={theirs}"
        for name, (theirs, _) in differing.items()
        if name not in ("protocol", "python")
    ]
    here = f"'python -m pip install {' '.join(installable)}'" if installable else ""
    return Failure(
        FailureKind.FATAL,
        Detail(
            errors.VersionMismatchError,
            f"the worker refused to run it, since its versions differ from the client's "
            f"({describe_versions(differing)})",
            "Deploy the function again from this environment ('dask-lambda deploy'), or install "
            f"the worker's versions here{f' ({here})' if here else ''}.",
        ),
    )


def describe_differing(function: str, packages: dict[str, Any]) -> str:
    """Return a warning of packages that differ in a way that seldom matters.

    Parameters
    ----------
    function : str
    packages : dict
        Name to the worker's version and the client's.
    """
    return (
        f"function {function!r} has other versions of packages than this process "
        f"({describe_versions(packages)}); it goes on, since this seldom matters. To be sure, "
        "deploy the function again from this environment ('dask-lambda deploy')."
    )


def differing_versions(worker: dict[str, Any]) -> dict[str, Any]:
    """Return in what a worker that refuses differs: name to its version and the client's.

    Parameters
    ----------
    worker : dict
        As of :func:`from_refusal`.
    """
    ours = {"protocol": protocol.PROTOCOL, **protocol.versions()}
    differing = {
        name: (worker.get(name), ours[name]) for name in ours if ours[name] != worker.get(name)
    }
    return {**differing, **worker.get("packages", {})}


def describe_versions(differing: dict[str, Any]) -> str:
    """Say which versions differ, of names to the worker's and the client's."""
    return "; ".join(
        f"{name}: worker {worker}, client {client}" for name, (worker, client) in differing.items()
    )


def from_record(
    record: dict[str, Any],
    *,
    leased: bool = True,
    local: bool = False,
    missing: Callable[[str], str] = missing_module,
) -> Failure:
    """Classify the "error" of one group in a reply.

    Parameters
    ----------
    record : dict
    leased : bool
        Whether the run's lease was written in time: else a worker that misses it is right to stop.
    local : bool
        Whether it was no invocation of Lambda's.
    missing : callable
        What to do about a module that a worker could not import.
    """
    kind, message = record["kind"], record["message"]
    key = record.get("key", "")
    match kind:
        case "exception":
            value = record.get("exception")
            more_memory = _MORE_MEMORY_HERE if local else MORE_MEMORY
            advice = more_memory if record.get("memory") else ""
            if "module" in record and not local:
                advice = missing(str(record["module"]))
            return Failure(
                FailureKind.MEMORY if record.get("memory") else FailureKind.TASK,
                Detail(
                    errors.RemoteError,
                    message,
                    advice,
                    key,
                    None if value is None else _readable(value),
                    record.get("traceback", ""),
                    {
                        "type": record.get("type"),
                        "unpicklable": record.get("unpicklable"),
                        "local": local,
                    },
                ),
            )
        case "timeout":
            return Failure(
                FailureKind.TIMEOUT,
                Detail(
                    errors.FunctionTimeoutError,
                    f"was interrupted: {message}",
                    "Give it more time (timeout=; Lambda allows 900 seconds), or less to do.",
                ),
            )
        case "disk":
            return Failure(
                FailureKind.TRANSIENT,
                Detail(
                    errors.InvocationError,
                    f"a worker's disk is full: {message}",
                    "What do tasks leave in the worker's temporary directory? Give the function "
                    "more ephemeral storage, or have fewer modules travel "
                    "(dask_lambda.config.modules.exclude).",
                ),
            )
        case "unserializable":
            return Failure(FailureKind.TASK, Detail(errors.UnserializableError, message, key=key))
        case "integrity":
            return Failure(
                FailureKind.FATAL,
                Detail(errors.IntegrityError, f"the worker refused what it read: {message}"),
            )
        case "request" | "broken":
            return Failure(
                FailureKind.FATAL,
                Detail(
                    errors.InvocationError,
                    f"the worker could not serve the request: {message}",
                    "If the function was deployed from this environment, this is a bug of "
                    "dask_lambda: please report it.",
                    note=record.get("traceback", ""),
                ),
            )
        case "cancelled" if not leased:
            return Failure(
                FailureKind.TRANSIENT,
                Detail(
                    errors.InvocationError,
                    f"a worker stopped, since the client was late to tell it to go on: {message}",
                    "Is the client's network or S3 very slow?",
                ),
            )
        case "cancelled":
            return Failure(
                FailureKind.FATAL,
                Detail(
                    errors.RunDeletedError,
                    f"a worker stopped although the run goes on: {message}",
                    "Were the run's objects deleted, with 'dask-lambda clean' in another process, "
                    "by a lifecycle rule or by hand? Compute again; clean only what is older than "
                    "the longest run.",
                ),
            )
    return _store_failure(kind.removeprefix("store-"), f"on the worker: {message}")


def _readable(record: dict[str, Any]) -> protocol.Value | None:
    try:
        return protocol.Value.from_json(record)
    except RequestError:  # the text of the exception will do
        return None


def from_store_error(error: StoreError) -> Failure:
    """Classify a failure of S3 on the client."""
    if error.kind == "expired":
        return expired(str(error))
    return _store_failure(error.kind, str(error))


@contextmanager
def translated() -> Iterator[None]:
    """Raise what S3 could not do as one of our errors."""
    try:
        yield
    except StoreError as error:
        raise to_exception(from_store_error(error), "", {}) from error


def _store_failure(kind: str, message: str) -> Failure:
    match kind:
        case "missing":
            return Failure(
                FailureKind.FATAL,
                Detail(
                    errors.LostDataError,
                    f"an object that the run wrote is gone: {message}",
                    "Was it deleted by hand, or by a lifecycle rule? Compute again.",
                ),
            )
        case "denied":
            return Failure(
                FailureKind.FATAL,
                Detail(
                    errors.AccessDeniedError,
                    f"access denied: {message}",
                    "Check the credentials, and that the policy (on the worker: of the "
                    "function's role) allows the action on this bucket and prefix.",
                ),
            )
        case "no-bucket":
            return Failure(
                FailureKind.FATAL,
                Detail(
                    errors.BucketNotFoundError,
                    f"the bucket does not exist: {message}",
                    "Set dask-lambda.bucket to a bucket in the function's region.",
                ),
            )
    # The role of an environment that was kept too long, which another one is not ("expired"), too.
    return Failure(FailureKind.TRANSIENT, Detail(errors.InvocationError, f"S3 failed: {message}"))


# ---------------------------------------------------------------------------------------------
# what the user sees
# ---------------------------------------------------------------------------------------------


def from_budget(spent_usd: float, seconds: float, limits: str, advice: str) -> Failure:
    """Build the failure of a run that may not spend more.

    Parameters
    ----------
    spent_usd : float
    seconds : float
        That it took.
    limits : str
        What it was allowed, in the words of the settings.
    advice : str
        How to go on.
    """
    return Failure(
        FailureKind.BUDGET,
        Detail(
            errors.BudgetExceededError,
            f"the run was stopped before it exceeds {limits}: it took {seconds:,.1f} s and "
            f"about ${spent_usd:.6f} so far",
            advice,
        ),
    )


def describe(failure: Failure) -> str:
    """Return what a failure says, without a task's name."""
    detail = failure.detail
    return detail.message if isinstance(detail, Detail) else str(detail)


def to_exception(failure: Failure, key: str, secrets: dict[str, bytes]) -> BaseException:
    """Build the exception to raise for a failure.

    Parameters
    ----------
    failure : Failure
        Its detail is a :class:`Detail`, or an exception that is raised as it is.
    key : str
        The task for which the invocation was made, as text.
    secrets : dict
        Run to secret, to verify the task's own exception before it is unpickled.
    """
    detail = failure.detail
    if isinstance(detail, BaseException):
        return detail
    assert isinstance(detail, Detail)
    key = detail.key or key
    if detail.exception is not None:
        own = _own_exception(detail.exception, secrets)
        if own is not None:
            place = "outside of Lambda" if detail.fields.get("local") else "on Lambda"
            _add_note(own, f"Raised by task {key} {place}:\n{detail.note.rstrip()}")
            if detail.advice:
                _add_note(own, detail.advice)
            return own
    words = f"Task {key}: {detail.message}" if key else detail.message
    if detail.error is errors.RemoteError:
        words = f"Task {key} raised {detail.message}"
        if detail.fields.get("unpicklable"):
            words += (
                f" (shown as text, since it cannot be rebuilt here: {detail.fields['unpicklable']})"
            )
    if detail.advice:
        words += f"{' ' if words.endswith('.') else '. '}{detail.advice}"
    exception = detail.error(words)
    if detail.note:
        heading = "Remote traceback:\n" if detail.error is errors.RemoteError else ""
        _add_note(exception, heading + detail.note.rstrip())
    return exception


def _own_exception(value: protocol.Value, secrets: dict[str, bytes]) -> Exception | None:
    run = protocol.run_of(value.name)
    try:
        exception = codec.loads(value.data, secrets[run], value.name)
    except Exception:  # noqa: BLE001  a user's __setstate__ may raise anything here; the text will do
        return None
    # SystemExit and the like must not end the caller's program: the text will do for them.
    return exception if isinstance(exception, Exception) else None


def _add_note(exception: BaseException, note: str) -> None:
    try:
        exception.add_note(note)
    except Exception:  # noqa: BLE001  it may forbid attributes; its type matters more
        return
