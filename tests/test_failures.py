"""Recorded answers of AWS and of the worker: the right decision, and words that help."""

from __future__ import annotations

import json
import pickle
from importlib import metadata

import pytest

from dask_lambda import errors, failures, lambda_answers
from dask_lambda.events import Failure, FailureKind
from lambda_worker import codec, protocol
from lambda_worker.errors import StoreError

SECRET = b"s" * 32
OUTPUT = "0/prefix/run/label"


def answer(status: int, **body) -> Failure:
    return lambda_answers.from_response(
        status, json.dumps(body).encode(), "my-function", "eu-north-1"
    )


def function_error(body, log="", memory_mb=1769) -> Failure:
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda_answers.from_function_error(text, log, memory_mb)


def shown(failure: Failure, key: str = "'add-1'") -> BaseException:
    return failures.to_exception(failure, key, {"run": SECRET})


# -- the API refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reason",
    [
        "ConcurrentInvocationLimitExceeded",
        "ReservedFunctionConcurrentInvocationLimitExceeded",
        "FunctionInvocationRateLimitExceeded",
        "ReservedFunctionInvocationRateLimitExceeded",
        "CallerRateLimitExceeded",
        "ConcurrentSnapshotCreateLimitExceeded",
    ],
)
def test_every_throttle_is_a_throttle_and_its_reason_is_shown(reason):
    failure = answer(429, Reason=reason, Type="User", message="Rate Exceeded.")
    by_rate = "Rate" in reason
    assert failure.kind is (FailureKind.RATE_LIMITED if by_rate else FailureKind.THROTTLED)
    exception = shown(failure)
    assert type(exception) is errors.ThrottledError
    assert reason in str(exception)
    assert "dask-lambda.concurrency" in str(exception)


def test_a_throttle_without_a_reason_is_one_all_the_same():
    assert lambda_answers.from_response(429, b"", "f", "r").kind is FailureKind.THROTTLED


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (
            403,
            {
                "Message": "User: arn:aws:iam::123456789012:user/me is not authorized to perform: "
                "lambda:InvokeFunction on resource: arn:aws:lambda:eu-north-1:123456789012:"
                "function:my-function"
            },
        ),
        (403, {"message": "The request signature we calculated does not match"}),
        (403, {"Message": None}),
        (401, {"message": "Unauthorized", "__type": "UnauthorizedException"}),
    ],
)
def test_wrong_credentials_name_the_action_and_the_resource_and_are_not_retried(status, body):
    failure = answer(status, **body)
    assert failure.kind is FailureKind.FATAL
    exception = shown(failure, "")
    assert type(exception) is errors.AccessDeniedError
    assert isinstance(exception, PermissionError)
    text = str(exception)
    assert "lambda:InvokeFunction" in text
    assert "'my-function'" in text
    assert "eu-north-1" in text
    assert "credentials" in text
    assert (body.get("message") or body.get("Message") or "") in text


@pytest.mark.parametrize(
    ("status", "body", "what"),
    [
        (403, {"message": "The security token included in the request is expired"}, "log in again"),
        (
            403,
            {"message": "The security token included in the request is invalid."},
            "log in again",
        ),
        (400, {"__type": "ExpiredTokenException", "message": ""}, "log in again"),
        (403, {"message": "Signature expired: 20260101T000000Z is now earlier than ..."}, "clock"),
        (403, {"message": "Signature not yet current: 20260101T000000Z is ..."}, "clock"),
    ],
)
def test_expired_credentials_and_a_wrong_clock_are_told_apart_and_may_pass(status, body, what):
    failure = answer(status, **body)
    assert failure.kind is FailureKind.EXPIRED
    exception = shown(failure, "")
    assert type(exception) is errors.AccessDeniedError
    text = str(exception)
    assert what in text.lower()
    assert ("clock" in text) == (what == "clock")
    assert "lambda:InvokeFunction on function 'my-function' in eu-north-1" in text
    assert body["message"] in text


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("ExpiredToken: The provided token has expired.", "Log in"),
        ("RequestTimeTooSkewed", "clock"),
    ],
)
def test_expired_credentials_at_s3_are_the_clients_affair_alone(said, what):
    error = StoreError("expired", f"s3:PutObject 0/prefix/run/x: {said}")
    failure = failures.from_store_error(error)
    assert failure.kind is FailureKind.EXPIRED
    text = str(shown(failure, ""))
    assert what in text
    assert "s3:PutObject 0/prefix/run/x" in text
    record = {"kind": "store-expired", "message": str(error)}
    on_the_worker = failures.from_record(record)  # its role: another environment has a new one
    assert on_the_worker.kind is FailureKind.TRANSIENT


def test_an_exception_that_cannot_be_read_is_told_as_text():
    value = {"name": "x", "size": 3, "data": "a"}  # which is no base64
    record = {"kind": "exception", "message": "ValueError: no", "exception": value}
    exception = shown(failures.from_record(record), "y")
    assert type(exception) is errors.RemoteError
    assert "ValueError: no" in str(exception)


def test_credentials_that_botocore_cannot_renew_say_so():
    failure = lambda_answers.from_credentials(RuntimeError("the SSO session has expired"))
    assert failure.kind is FailureKind.EXPIRED
    text = str(shown(failure, ""))
    assert "the SSO session has expired" in text
    assert "aws sso login" in text


def test_a_function_that_does_not_exist_is_named_with_its_region():
    failure = answer(
        404,
        Type="User",
        Message="Function not found: arn:aws:lambda:eu-north-1:123456789012:function:my-function",
    )
    assert failure.kind is FailureKind.FATAL
    exception = shown(failure, "")
    assert type(exception) is errors.FunctionNotFoundError
    assert "'my-function' does not exist in region eu-north-1" in str(exception)
    assert "dask-lambda.function" in str(exception)


def test_aws_is_quoted_without_the_name_of_the_culprit():
    # "Type" is "User" or "Service": whose fault it was, which tells the user nothing.
    text = str(shown(answer(404, Type="User", Message="Function not found: f"), ""))
    assert "AWS said: 404: Function not found: f" in text


def test_too_large_a_request_is_fatal():
    failure = answer(413, Type="User", message="6291556 byte payload is too large")
    assert failure.kind is FailureKind.FATAL
    exception = shown(failure)
    assert type(exception) is errors.PayloadTooLargeError
    assert str(exception).startswith("Task 'add-1': ")


@pytest.mark.parametrize("status", [500, 502, 503, 504, 409])
def test_the_services_own_failures_are_transient(status):
    failure = answer(status, Type="Service", Message="Service error.")
    assert failure.kind is FailureKind.TRANSIENT
    assert f"Lambda answered {status}" in str(shown(failure))


#: Name, status, message, and what is decided.
SNAP_START = [
    (
        "SnapStartNotReadyException",
        409,
        "Lambda is initializing your function. It will be ready to invoke once your function state "
        "becomes ACTIVE.",
        FailureKind.NOT_READY,
        "14 days",
    ),
    (
        "ResourceConflictException",
        409,
        "The operation cannot be performed at this time. The function is currently in the "
        "following state: Pending",
        FailureKind.NOT_READY,
        "takes minutes",
    ),
    (
        "SnapStartTimeoutException",
        408,
        "Lambda couldn't restore the snapshot within the timeout limit.",
        FailureKind.TRANSIENT,
        "in time",
    ),
    (
        "SnapStartRegenerationFailureException",
        409,
        "Lambda couldn't regenerate the SnapStart snapshot for the function.",
        FailureKind.TRANSIENT,
        "deploy the function again",
    ),
    (
        "SnapStartException",
        400,
        "The afterRestore() runtime hook encountered an error. For more information, check the "
        "Amazon CloudWatch logs.",
        FailureKind.FATAL,
        "dask-lambda logs",
    ),
]


@pytest.mark.parametrize(("name", "status", "message", "kind", "advice"), SNAP_START)
def test_what_lambda_says_of_snapshots(name, status, message, kind, advice):
    body = json.dumps({"Type": "User", "Message": message}).encode()
    failure = lambda_answers.from_response(status, body, "my-function:live", "eu-north-1", name)
    assert failure.kind is kind
    exception = shown(failure)
    assert type(exception) is errors.InvocationError
    text = str(exception)
    assert "function 'my-function:live' in eu-north-1" in text
    assert f"AWS said: {name}: {message}" in text
    assert advice in text


def test_a_function_that_has_failed_or_is_changed_is_not_waited_for_as_long():
    said = "The operation cannot be performed at this time. The function is currently in the "
    failure = answer(409, Type="User", Message=f"{said}following state: Failed")
    assert failure.kind is FailureKind.TRANSIENT
    failure = answer(409, Message="An update is in progress for resource: my-function")
    assert failure.kind is FailureKind.TRANSIENT


@pytest.mark.parametrize("status", [400, 405, 415, 302])
def test_other_answers_are_fatal(status):
    assert answer(status, Message="no").kind is FailureKind.FATAL


@pytest.mark.parametrize("body", [b"", b"<html>Bad gateway</html>", b"null", b"[1]", b"\xff\xfe"])
def test_an_answer_that_is_not_json_is_quoted(body):
    failure = lambda_answers.from_response(502, body, "f", "r")
    assert failure.kind is FailureKind.TRANSIENT
    assert "502" in str(shown(failure))


def test_a_broken_connection_is_transient():
    failure = lambda_answers.from_network(ConnectionResetError(104, "Connection reset by peer"))
    assert failure.kind is FailureKind.TRANSIENT
    text = str(shown(failure))
    assert "ConnectionResetError: [Errno 104] Connection reset by peer" in text
    assert "dask-lambda.endpoint-url" in text
    assert "(TimeoutError)" in str(shown(lambda_answers.from_network(TimeoutError())))


# -- the environment was lost --------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {
            "errorType": "Sandbox.Timedout",
            "errorMessage": "RequestId: 41d0 Error: Task timed out after 1.00 seconds",
        },
        {"errorMessage": "2026-01-01T00:00:00.000Z 41d0 Task timed out after 1.00 seconds"},
    ],
)
def test_a_time_out_says_so_and_names_seconds_and_setting(body):
    failure = function_error(body)
    assert failure.kind is FailureKind.TIMEOUT
    exception = shown(failure)
    assert type(exception) is errors.FunctionTimeoutError
    assert isinstance(exception, TimeoutError)
    text = str(exception)
    assert text.startswith("Task 'add-1': ran longer than the function's time-out of 1.00 seconds")
    assert "dask-lambda.timeout" in text


@pytest.mark.parametrize(
    "body",
    [
        {
            "errorType": "Runtime.OutOfMemory",
            "errorMessage": "RequestId: 41d0 Error: Runtime exited with error: signal: killed",
        },
        {
            "errorType": "Runtime.ExitError",
            "errorMessage": "RequestId: 41d0 Error: Runtime exited with error: signal: killed",
        },
        {"errorMessage": "RequestId: 41d0 Process exited before completing: signal: killed"},
    ],
)
def test_no_memory_left_says_so_and_names_the_memory_and_the_setting(body):
    failure = function_error(body, memory_mb=512)
    assert failure.kind is FailureKind.MEMORY
    exception = shown(failure)
    assert type(exception) is errors.OutOfMemoryError
    assert isinstance(exception, MemoryError)
    assert "512 MB" in str(exception)
    assert "dask-lambda.memory" in str(exception)


def test_no_memory_left_tells_the_peak_that_lambda_measured():
    log = "REPORT RequestId: 1\tDuration: 9.00 ms\tMemory Size: 512 MB\tMax Memory Used: 511 MB"
    text = str(shown(function_error({"errorType": "Runtime.OutOfMemory"}, log, 512)))
    assert "function's 512 MB" in text
    assert "at its peak it took 511 MB" in text


def test_what_the_function_itself_raises_is_not_tried_again():
    failure = function_error({"errorType": "KeyError", "errorMessage": "'groups'"})
    assert failure.kind is FailureKind.FATAL
    assert "KeyError" in str(shown(failure))
    assert "dask-lambda.function" in str(shown(failure))


def test_no_memory_left_can_be_told_before_the_memory_is_known():
    text = str(shown(function_error({"errorType": "Runtime.OutOfMemory"}, memory_mb=None)))
    assert "None" not in text
    assert "dask-lambda.memory" in text


@pytest.mark.parametrize(
    "body",
    [
        {
            "errorType": "Runtime.ExitError",
            "errorMessage": "RequestId: 41d0 Error: Runtime exited with error: exit status 1",
        },
        {
            "errorType": "Runtime.ExitError",
            "errorMessage": "Runtime exited with error: signal: segmentation fault (core dumped)",
        },
        {"errorMessage": "Lambda worker process died"},
        b"not json",
    ],
)
def test_a_dead_worker_is_tried_again(body):
    failure = function_error(body)
    assert failure.kind is FailureKind.DEATH
    exception = shown(failure)
    assert type(exception) is errors.WorkerDiedError
    assert "Task 'add-1': the worker died" in str(exception)


def test_too_large_a_response_names_the_setting_to_lower():
    failure = function_error(
        {
            "errorType": "Function.ResponseSizeTooLarge",
            "errorMessage": "Response payload size exceeded maximum allowed payload size "
            "(6291556 bytes).",
        }
    )
    assert failure.kind is FailureKind.FATAL
    exception = shown(failure)
    assert type(exception) is errors.PayloadTooLargeError
    assert "dask-lambda.inline-bytes" in str(exception)
    assert "6291556 bytes" in str(exception)


def test_a_function_that_cannot_import_the_worker_is_not_tried_again():
    failure = function_error(
        {
            "errorType": "Runtime.ImportModuleError",
            "errorMessage": "Unable to import module 'lambda_worker.handler': "
            "No module named 'obstore'",
        }
    )
    assert failure.kind is FailureKind.FATAL
    assert "No module named 'obstore'" in str(shown(failure))
    assert "lambda_worker" in str(shown(failure))


def test_the_end_of_the_log_is_a_note():
    exception = shown(function_error({"errorMessage": "died"}, log="last words\nREPORT ..."))
    assert exception.__notes__ == ["Last lines of the invocation's log:\nlast words\nREPORT ..."]
    assert not hasattr(shown(function_error({"errorMessage": "died"})), "__notes__")


def test_a_foreign_function_is_recognised_by_its_answer():
    failure = failures.from_foreign_reply(b'{"statusCode": 200}', "my-function")
    assert failure.kind is FailureKind.FATAL
    text = str(shown(failure, ""))
    assert "'my-function'" in text
    assert '{"statusCode": 200}' in text


# -- the worker replied --------------------------------------------------------------------------


def test_a_version_mismatch_names_what_differs_on_both_sides_and_nothing_else():
    ours = protocol.versions()
    worker = {"protocol": protocol.PROTOCOL, **ours, "python": "3.7"}
    failure = failures.from_refusal(worker)
    assert failure.kind is FailureKind.FATAL
    exception = shown(failure)
    assert type(exception) is errors.VersionMismatchError
    assert f"python: worker 3.7, client {ours['python']}" in str(exception)
    assert ours["dask"] not in str(exception)


class Odd(Exception):
    """Can be pickled and not rebuilt."""

    def __reduce__(self):
        return _fail_to_load, ()


def _fail_to_load():
    raise OSError("not here")


def record_of(error: BaseException, **fields) -> dict:
    name = protocol.error_name(OUTPUT)
    data = codec.dumps(error, SECRET, name)
    return {
        "kind": "exception",
        "message": f"{type(error).__name__}: {error}",
        "type": f"builtins.{type(error).__name__}",
        "traceback": 'Traceback (most recent call last):\n  File "x.py", line 1, in f\n',
        "key": "'add-2'",
        "exception": protocol.Value(name, len(data), data).to_json(),
        **fields,
    }


def test_a_tasks_exception_arrives_as_itself_with_the_remote_traceback_below():
    failure = failures.from_record(record_of(ZeroDivisionError("division by zero")))
    assert failure.kind is FailureKind.TASK
    exception = shown(failure)
    assert type(exception) is ZeroDivisionError
    assert str(exception) == "division by zero"
    (note,) = exception.__notes__
    assert note.startswith("Raised by task 'add-2' on Lambda:\nTraceback")
    assert note.endswith("in f")


def test_an_exception_without_its_pickle_is_told_in_words():
    record = record_of(ValueError("no"), unpicklable="TypeError: cannot pickle a lock")
    del record["exception"]
    exception = shown(failures.from_record(record))
    assert type(exception) is errors.RemoteError
    assert str(exception).startswith("Task 'add-2' raised ValueError: no")
    assert "cannot pickle a lock" in str(exception)
    assert exception.__notes__[0].startswith("Remote traceback:\nTraceback")


def test_an_exception_that_does_not_unpickle_here_is_told_in_words():
    exception = shown(failures.from_record(record_of(Odd("a"))))
    assert type(exception) is errors.RemoteError
    assert "Odd: a" in str(exception)


def test_an_exception_that_was_tampered_with_is_not_unpickled():
    record = record_of(ValueError("no"))
    name = protocol.error_name(OUTPUT)
    forged = pickle.dumps(SystemExit("owned"))
    record["exception"] = protocol.Value(name, len(forged), forged).to_json()
    exception = shown(failures.from_record(record))
    assert type(exception) is errors.RemoteError
    assert "owned" not in str(exception)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_an_exit_of_a_task_does_not_end_the_callers_program(error):
    exception = shown(failures.from_record(record_of(error)))
    assert type(exception) is errors.RemoteError
    assert type(error).__name__ in str(exception)


def test_an_exception_that_forbids_notes_arrives_all_the_same():
    class Closed(Exception):
        def add_note(self, note):
            raise TypeError("no notes")

    exception = shown(failures.from_record(record_of(Closed("x"))))
    assert type(exception).__name__ == "Closed"


def test_a_missing_package_is_named_with_what_to_do():
    error = ModuleNotFoundError("No module named 'left_pad'", name="left_pad")
    exception = shown(failures.from_record(record_of(error, module="left_pad")))
    assert type(exception) is ModuleNotFoundError
    assert any("'left_pad' is not installed on the worker" in n for n in exception.__notes__)


def test_a_missing_package_is_told_with_its_name_in_pips_words_and_its_version_here():
    error = ModuleNotFoundError("No module named 'yaml.cyaml'", name="yaml.cyaml")
    exception = shown(failures.from_record(record_of(error, module="yaml.cyaml")))
    version = metadata.version("PyYAML")
    assert any(f"Here it comes with 'PyYAML=={version}'" in n for n in exception.__notes__)


def test_who_knows_better_says_what_to_do_about_a_missing_module():
    error = ModuleNotFoundError("No module named 'mine'", name="mine")
    record = record_of(error, module="mine")
    exception = shown(failures.from_record(record, missing=lambda name: f"include {name}"))
    assert "include mine" in exception.__notes__


def test_a_full_disk_of_a_worker_is_another_ones_turn():
    record = {"kind": "disk", "message": "unpacking the local modules: OSError: no space left"}
    failure = failures.from_record(record)
    assert failure.kind is FailureKind.TRANSIENT
    assert "no space left" in str(shown(failure))


def test_pythons_own_memory_error_is_told_with_what_to_do():
    exception = shown(failures.from_record(record_of(MemoryError(), memory=True)))
    assert type(exception) is MemoryError
    assert any("Make the chunks smaller" in n for n in exception.__notes__)


def test_a_budget_that_is_used_up_says_what_comes_next():
    failure = failures.from_budget(0.5, 12.0, "max_cost_usd=0.5", "Raise the limit.")
    text = str(shown(failure, ""))
    assert "12.0 s and about $0.5" in text
    assert text.endswith("Raise the limit.")


def test_a_result_that_cannot_be_pickled_names_its_task():
    record = {"kind": "unserializable", "message": "its result, a generator, ...", "key": "'g'"}
    exception = shown(failures.from_record(record))
    assert type(exception) is errors.UnserializableError
    assert isinstance(exception, TypeError)
    assert str(exception) == "Task 'g': its result, a generator, ..."


def test_a_broken_seal_is_fatal():
    failure = failures.from_record({"kind": "integrity", "message": "object 'x' does not ..."})
    assert failure.kind is FailureKind.FATAL
    assert type(shown(failure)) is errors.IntegrityError


@pytest.mark.parametrize(
    ("kind", "decision", "error", "words"),
    [
        ("missing", FailureKind.FATAL, errors.LostDataError, "gone"),
        ("denied", FailureKind.FATAL, errors.AccessDeniedError, "policy"),
        ("no-bucket", FailureKind.FATAL, errors.BucketNotFoundError, "dask-lambda.bucket"),
        ("transient", FailureKind.TRANSIENT, errors.InvocationError, "S3 failed"),
    ],
)
def test_failures_of_s3_read_alike_from_both_sides(kind, decision, error, words):
    message = "s3:GetObject 0/prefix/run/label: 503 SlowDown"
    here = failures.from_store_error(StoreError(kind, message))
    there = failures.from_record({"kind": f"store-{kind}", "message": message})
    for failure in (here, there):
        assert failure.kind is decision
        exception = shown(failure)
        assert type(exception) is error
        assert message in str(exception)
        assert words in str(exception)
    assert "on the worker" in str(shown(there))
    assert f"on the worker: {message}" not in str(shown(here))


def test_an_error_that_was_made_on_the_client_is_raised_as_it_is():
    error = errors.PayloadTooLargeError("too large")
    assert shown(Failure(FailureKind.FATAL, error)) is error


def test_every_error_of_ours_has_one_base_and_survives_pickling():
    for name in errors.__all__:
        error = getattr(errors, name)
        assert isinstance(error.__new__(error), error)  # as tblib does, which distributed installs
        assert issubclass(error, errors.DaskLambdaError)
        again = pickle.loads(pickle.dumps(error("words")))
        assert type(again) is error
        assert str(again) == "words"
    again = pickle.loads(pickle.dumps(StoreError("denied", "words")))
    assert (again.kind, str(again)) == ("denied", "words")
