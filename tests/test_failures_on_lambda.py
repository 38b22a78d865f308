"""What goes wrong becomes the right error, in bounded time, or is not noticed at all."""

from __future__ import annotations

import enum
import os
import re
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import numpy as np
import pytest
from dask import delayed
from dask._task_spec import Alias, Task, TaskRef

from dask_lambda import LambdaScheduler, RunReport, lambda_get, last_report
from dask_lambda.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigurationError,
    CyclicGraphError,
    DaskLambdaError,
    FunctionNotFoundError,
    FunctionTimeoutError,
    InvocationError,
    MissingKeyError,
    PayloadTooLargeError,
    RemoteError,
    UnserializableError,
    VersionMismatchError,
    WorkerDiedError,
)
from dask_lambda.local import LocalAWS
from tests.proxy import Answer, Proxy, Reset, s3_error, throttle

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]


def report() -> RunReport:
    found = last_report()
    assert found is not None
    return found


def inc(x: Any) -> Any:
    return x + 1


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


# -- the task's own exception --------------------------------------------------------------------


class Broken(Exception):
    """An exception of the user's, with more than a message."""

    def __init__(self, code: int, *, detail: str = ""):
        super().__init__(code)
        self.code = code
        self.detail = detail


def raise_in_a_helper(error: Any) -> None:
    def helper() -> None:
        raise error

    helper()


def test_an_exception_arrives_with_its_type_and_the_remote_traceback() -> None:
    error = Broken(7, detail="why")
    task = delayed(raise_in_a_helper)(error, dask_key_name="the-culprit")
    later = delayed(inc)(task)
    with pytest.raises(Broken) as caught:
        later.compute(scheduler=lambda_get)
    assert (caught.value.code, caught.value.detail) == (7, "why")
    assert caught.value.args == (7,)
    text = notes(caught.value)
    assert re.search(r"Raised by task .*the-culprit.* on Lambda", text)
    assert "in helper" in text
    assert "raise error" in text
    assert "lambda_worker" not in text
    assert report().failed


def test_the_cause_is_in_the_traceback() -> None:
    @delayed
    def fails() -> None:
        try:
            {}["missing"]
        except KeyError as error:
            raise Broken(1) from error

    with pytest.raises(Broken) as caught:
        fails().compute(scheduler=lambda_get)
    assert "KeyError: 'missing'" in notes(caught.value)
    assert "direct cause" in notes(caught.value)


def test_an_exception_of_a_module_that_only_the_caller_has() -> None:
    module = types.ModuleType("of_the_caller_only")
    source = "class Special(ValueError):\n    pass\ndef fail():\n    raise Special('here')\n"
    sys.modules[module.__name__] = module
    exec(source, module.__dict__)
    cloudpickle.register_pickle_by_value(module)
    try:
        with pytest.raises(module.Special, match="here"):
            delayed(module.fail)().compute(scheduler=lambda_get)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        del sys.modules[module.__name__]


class NotPicklable(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class NotUnpicklable(Exception):
    """Has the wrong arguments when it is rebuilt."""

    def __init__(self, first: str, second: str):
        super().__init__(f"{first} and {second}")


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class OnTheCallerOnly(Exception):
    """Unpickles where it was raised, and nowhere else."""

    def __init__(self, pid: int):
        super().__init__(pid)
        if pid != os.getpid():
            raise RuntimeError("another process")


class Huge(Exception):
    pass


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (NotPicklable, "NotPicklable: holds a lock"),
        (lambda: NotUnpicklable("one", "two"), "NotUnpicklable: one and two"),
        (lambda: OnTheCallerOnly(os.getpid()), "OnTheCallerOnly"),
        (lambda: Huge("x" * 10**7), "Huge: xxx"),
        (SystemExit, "SystemExit"),
        (KeyboardInterrupt, "KeyboardInterrupt"),
        (GeneratorExit, "GeneratorExit"),
    ],
    ids=lambda case: getattr(case, "__name__", None),
)
def test_an_exception_that_cannot_come_over_is_shown_as_text(make: Any, text: str) -> None:
    @delayed
    def fails() -> None:
        raise make()

    with pytest.raises(RemoteError, match=text) as caught:
        fails().compute(scheduler=lambda_get)
    assert "Task 'fails-" in str(caught.value)
    assert "raise make()" in notes(caught.value)
    assert delayed(inc)(1).compute(scheduler=lambda_get) == 2


def test_an_exception_that_holds_its_inputs_does_not_blow_up_the_reply() -> None:
    @delayed
    def fails() -> None:
        raise Broken(1, detail="x" * 10**7)

    with pytest.raises(RemoteError, match=r"Broken: 1"):
        fails().compute(scheduler=lambda_get)


def test_an_exception_without_a_text_comes_over() -> None:
    @delayed
    def fails() -> None:
        raise NoText

    with pytest.raises(NoText):
        fails().compute(scheduler=lambda_get)


def test_a_group_of_exceptions_comes_over() -> None:
    @delayed
    def fails() -> None:
        raise ExceptionGroup("several", [ValueError(1), KeyError(2)])

    with pytest.raises(ExceptionGroup, match="several") as caught:
        fails().compute(scheduler=lambda_get)
    assert [type(e) for e in caught.value.exceptions] == [ValueError, KeyError]


def test_stop_iteration_is_an_error_like_any_other() -> None:
    with pytest.raises(StopIteration):
        delayed(next)(delayed(iter)([])).compute(scheduler=lambda_get)


# -- tries ---------------------------------------------------------------------------------------


def attempts(directory: Path) -> int:
    return len(list(directory.iterdir()))


def fails_at_first(directory: Path, times: int) -> str:
    """Fail so many times; workers and tests share the file system."""
    (directory / uuid.uuid4().hex).touch()
    done = len(list(directory.iterdir()))
    if done <= times:
        raise OSError(f"attempt {done}")
    return f"attempt {done}"


def test_retries_are_a_keyword(tmp_path: Path) -> None:
    task = delayed(fails_at_first)(tmp_path, 2)
    assert task.compute(scheduler=lambda_get, retries=2) == "attempt 3"
    assert report().retries == 2
    assert report().invocations == 3
    assert report().tasks == 1


def test_after_the_last_retry_the_last_exception_is_raised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="attempt 3"):
        delayed(fails_at_first)(tmp_path, 99).compute(scheduler=lambda_get, retries=2)
    assert attempts(tmp_path) == 3


def test_without_retries_there_is_one_try(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="attempt 1"):
        delayed(fails_at_first)(tmp_path, 1).compute(scheduler=lambda_get)
    assert attempts(tmp_path) == 1
    with pytest.raises(ConfigurationError, match="retries"):
        delayed(inc)(1).compute(scheduler=lambda_get, retries=-1)


def test_retries_are_an_annotation_of_some_tasks(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with dask.annotate(retries=3):
        annotated = delayed(fails_at_first)(one, 3)
    plain = delayed(fails_at_first)(other, 1)
    assert annotated.compute(scheduler=lambda_get) == "attempt 4"
    with pytest.raises(OSError, match="attempt 1"):
        plain.compute(scheduler=lambda_get)


def test_retries_are_an_annotation_of_the_moment_and_a_setting(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with dask.annotate(retries=1):
        assert delayed(fails_at_first)(one, 1).compute(scheduler=lambda_get) == "attempt 2"
    with dask.config.set({"dask-lambda.retries": 1}):
        assert delayed(fails_at_first)(other, 1).compute(scheduler=lambda_get) == "attempt 2"


# -- the environment is lost ---------------------------------------------------------------------


def test_a_task_that_kills_its_worker_is_named_after_some_tries(tmp_path: Path) -> None:
    def dies(directory: Path) -> None:
        (directory / uuid.uuid4().hex).touch()
        os._exit(3)

    with pytest.raises(WorkerDiedError, match="Task 'murderer'") as caught:
        delayed(dies)(tmp_path, dask_key_name="murderer").compute(scheduler=lambda_get)
    assert "os._exit" in str(caught.value)
    assert attempts(tmp_path) == 3
    assert report().retries == 2
    assert delayed(inc)(1).compute(scheduler=lambda_get) == 2


def test_a_worker_that_dies_once_is_not_noticed(tmp_path: Path) -> None:
    def dies_once(directory: Path) -> int:
        mark = directory / "mark"
        if not mark.exists():
            mark.touch()
            os._exit(3)
        return 5

    assert delayed(dies_once)(tmp_path).compute(scheduler=lambda_get) == 5
    assert report().retries == 1


def test_a_task_that_takes_too_long_is_named_with_the_time_and_the_setting(
    deploy: Deploy, connect: Connect
) -> None:
    scheduler = connect(function=deploy(timeout=1))
    with pytest.raises(FunctionTimeoutError, match="Task 'sleeper'") as caught:
        delayed(time.sleep)(30, dask_key_name="sleeper").compute(scheduler=scheduler)
    assert re.search(r"\b1(\.0+)? seconds", str(caught.value))
    assert "dask-lambda.timeout" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)


def test_a_time_out_is_a_setting_of_the_embedded_aws() -> None:
    with (
        LambdaScheduler(timeout=1, concurrency=1) as scheduler,
        pytest.raises(FunctionTimeoutError, match="1"),
    ):
        delayed(time.sleep)(30).compute(scheduler=scheduler)


# -- what cannot be pickled ----------------------------------------------------------------------


def test_a_result_that_cannot_be_pickled_is_named() -> None:
    @delayed
    def generates() -> Any:
        return (i for i in range(3))

    with pytest.raises(UnserializableError, match=r"'generates-.*generator.*list\("):
        generates().compute(scheduler=lambda_get)
    with pytest.raises(UnserializableError, match="lock"):
        delayed(threading.Lock)().compute(scheduler=lambda_get)


def test_a_task_that_cannot_be_pickled_is_named_before_anything_is_sent() -> None:
    lock = threading.Lock()
    with pytest.raises(UnserializableError, match=r"Task 'locked'.*lock"):
        delayed(lambda: lock)(dask_key_name="locked").compute(scheduler=lambda_get)
    assert report().invocations == 0
    with pytest.raises(UnserializableError, match="lock"):
        lambda_get({"data": lock, "task": (repr, "data")}, "task")
    assert report().invocations == 0


class OnlyHere:
    """Unpickles in the process that made it, and nowhere else."""

    def __init__(self, pid: int):
        self.pid = pid
        if pid != os.getpid():
            raise RuntimeError("not in this process")

    def __reduce__(self) -> Any:
        return OnlyHere, (self.pid,)


def test_what_fails_to_unpickle_is_an_error_of_its_task() -> None:
    here = OnlyHere(os.getpid())
    with pytest.raises(RuntimeError, match="not in this process"):
        delayed(repr)(here).compute(scheduler=lambda_get)
    with pytest.raises(RuntimeError, match="not in this process"):
        lambda_get({"data": here, "task": (repr, "data")}, "task")

    @delayed
    def made_there() -> OnlyHere:
        return OnlyHere(os.getpid())

    with pytest.raises(RuntimeError, match="not in this process"):
        made_there().compute(scheduler=lambda_get)


def test_a_module_that_the_worker_does_not_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "of_the_client_only.py").write_text("def f():\n    return 1\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import of_the_client_only  # type: ignore[import-not-found]

        with pytest.raises(ModuleNotFoundError, match="of_the_client_only") as caught:
            delayed(of_the_client_only.f)().compute(scheduler=lambda_get)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("of_the_client_only", None)
    assert "'of_the_client_only' is not installed on the worker" in notes(caught.value)


class Colour(enum.Enum):
    RED = 1


def test_an_enumeration_of_the_users_stays_itself() -> None:
    assert delayed(lambda c: c)(Colour.RED).compute(scheduler=lambda_get) is Colour.RED


# -- the wrong function --------------------------------------------------------------------------

OTHER_VERSION = """
from lambda_worker import protocol
protocol._versions = {"python": "2.7", "dask": "0.1"}
from lambda_worker.handler import handler
"""

FOREIGN = """
import sys

def handler(event, context):
    print("invoked", file=sys.stderr, flush=True)
    return {"hello": 1}
"""

CANNOT_START = """
import a_package_that_is_not_there
"""

WRONG_TYPE = FOREIGN.replace('{"hello": 1}', '"hello"')
FAILS = FOREIGN.replace('return {"hello": 1}', "raise ValueError('not ours')")


def test_a_worker_of_another_version_is_refused_with_both_versions(
    deploy: Deploy, connect: Connect
) -> None:
    function = deploy({"other_version.py": OTHER_VERSION}, "other_version.handler")
    with pytest.raises(VersionMismatchError) as caught:
        delayed(inc)(1).compute(scheduler=connect(function=function))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"worker 2.7, client {python}" in str(caught.value)
    assert f"worker 0.1, client {dask.__version__}" in str(caught.value)
    assert "eploy" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (FOREIGN, "hello"),
        (WRONG_TYPE, "hello"),
        (FAILS, "not ours"),
        (CANNOT_START, "a_package_that_is_not_there"),
    ],
    ids=["another reply", "a text", "an exception", "cannot start"],
)
def test_a_function_that_is_not_ours_is_named(
    deploy: Deploy, connect: Connect, source: str, text: str
) -> None:
    function = deploy({"foreign.py": source}, "foreign.handler")
    with pytest.raises(InvocationError, match=text):
        delayed(inc)(1).compute(scheduler=connect(function=function))


# -- the wrong settings --------------------------------------------------------------------------


def test_a_function_that_does_not_exist_is_named(connect: Connect) -> None:
    with pytest.raises(FunctionNotFoundError, match=r"'not-there'.*us-east-1"):
        delayed(inc)(1).compute(scheduler=connect(function="not-there"))


def test_a_bucket_that_does_not_exist_is_named(connect: Connect) -> None:
    with pytest.raises(BucketNotFoundError, match="not-there"):
        delayed(inc)(1).compute(scheduler=connect(bucket="not-there"))


def test_without_credentials_the_error_says_so(connect: Connect, monkeypatch: Any) -> None:
    scheduler = connect()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match="credentials"):
        delayed(inc)(1).compute(scheduler=scheduler)


def test_wrong_credentials_are_denied(connect: Connect, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "999999999999")
    with pytest.raises(AccessDeniedError, match="lambda:InvokeFunction"):
        delayed(inc)(1).compute(scheduler=connect())


def test_a_profile_that_does_not_exist_is_named(connect: Connect, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_PROFILE", "not-there")
    with pytest.raises(DaskLambdaError, match="not-there"):
        delayed(inc)(1).compute(scheduler=connect())


@pytest.mark.parametrize("region", [None, "not a region"])
def test_a_missing_or_malformed_region_is_an_error(connect: Connect, region: Any) -> None:
    with pytest.raises(ConfigurationError, match="region"):
        delayed(inc)(1).compute(scheduler=connect(region=region))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://"])
def test_an_endpoint_where_nobody_listens_is_an_error(connect: Connect, url: str) -> None:
    started = time.monotonic()
    with pytest.raises(DaskLambdaError):
        delayed(inc)(1).compute(scheduler=connect(endpoint_url=url))
    assert time.monotonic() - started < 20


def test_settings_are_checked(connect: Connect) -> None:
    for wrong in ({"concurrency": 0}, {"inline_bytes": -1}, {"timeout": 901}, {"backend": "x"}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong)).replace("_", "-")):
            delayed(inc)(1).compute(scheduler=connect(**wrong))
    with pytest.raises(ConfigurationError, match="'sizes'"):
        LambdaScheduler(sizes=1)
    with pytest.raises(ConfigurationError, match="'timeout' cannot be set for one computation"):
        delayed(inc)(1).compute(scheduler=lambda_get, timeout=1)
    with (
        dask.config.set({"dask-lambda.function": "f"}),
        pytest.raises(ConfigurationError, match=r"dask-lambda\.bucket"),
    ):
        delayed(inc)(1).compute(scheduler=lambda_get)


# -- faults that pass ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_proxy(aws: LocalAWS) -> Iterator[Proxy]:
    with Proxy(aws.endpoint_url) as running:
        yield running


@pytest.fixture
def proxy(shared_proxy: Proxy) -> Iterator[Proxy]:
    shared_proxy.plan()
    yield shared_proxy
    shared_proxy.plan()


@pytest.fixture(scope="module")
def proxied(shared_proxy: Proxy, deploy: Deploy) -> str:
    """A function whose workers reach S3 through the proxy."""
    return deploy(environment={"AWS_ENDPOINT_URL_S3": shared_proxy.url})


def small_graph() -> Any:
    return delayed(sum)([delayed(inc)(i) for i in range(6)])


UNAVAILABLE = Answer(503, b'{"message":"Service Unavailable"}')
BROKEN = Answer(500, b'{"Type":"Service","message":"ServiceException"}')


def test_throttles_are_waited_for_and_counted(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(
        invoke=[
            throttle(),
            throttle("ReservedFunctionConcurrentInvocationLimitExceeded"),
            None,
            throttle("CallerRateLimitExceeded"),
            throttle("FunctionInvocationRateLimitExceeded"),
        ]
    )
    assert small_graph().compute(scheduler=scheduler) == 21
    assert report().throttles == 4
    assert report().invocations == 7
    assert proxy.seen["invoke"] == 11


@pytest.mark.parametrize(
    ("faults", "invocations"),
    [
        ([UNAVAILABLE, None, BROKEN], None),
        ([Answer(502), Answer(504)], None),
        ([Reset(forwarded=False), None, Reset(forwarded=False)], None),
        ([Reset(forwarded=True), None, Reset(forwarded=True)], 9),
    ],
    ids=["500 and 503", "no body", "reset before", "reset after"],
)
def test_passing_faults_of_the_lambda_api_are_retried(
    proxy: Proxy, connect: Connect, faults: list[Any], invocations: int | None
) -> None:
    scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
    proxy.plan(invoke=faults)
    assert small_graph().compute(scheduler=scheduler) == 21
    assert report().retries == 2
    assert report().tasks == 7
    if invocations is not None:
        assert report().invocations == invocations
    assert not report().failed


def test_the_first_result_counts_when_a_task_was_run_twice(
    proxy: Proxy, connect: Connect, tmp_path: Path
) -> None:
    def draw(directory: Path) -> str:
        drawn = uuid.uuid4().hex
        number = len(list(directory.iterdir()))
        (directory / f"{number}-{drawn}").touch()
        return drawn

    scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
    proxy.plan(invoke=[Reset(forwarded=True)])
    found = delayed(draw)(tmp_path).compute(scheduler=scheduler)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == 2
    assert drawn[0] == f"0-{found}"


def test_a_persisted_result_outlives_the_faults_of_its_making(
    proxy: Proxy, connect: Connect
) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(invoke=[Reset(forwarded=True)])
    kept = delayed(np.ones)(5).persist(scheduler=scheduler)
    assert report().retries == 1
    assert kept.compute(scheduler=scheduler).tolist() == [1] * 5


SLOW_DOWN = s3_error(503, "SlowDown", "Please reduce your request rate.")
CONFLICT = s3_error(409, "ConditionalRequestConflict", "The conditional request cannot succeed.")


@pytest.mark.parametrize(
    "plan",
    [
        {"put": [SLOW_DOWN, None, SLOW_DOWN]},
        {"get": [SLOW_DOWN, s3_error(500, "InternalError"), None, SLOW_DOWN]},
        {"put": [CONFLICT, None, CONFLICT]},
        {"put": [Reset(forwarded=False), None, Reset(forwarded=True)]},
        {"get": [Reset(forwarded=False), None, Reset(forwarded=True)]},
        {"delete": [SLOW_DOWN, Reset(forwarded=True)]},
    ],
    ids=["503 on put", "5xx on get", "409 on put", "reset put", "reset get", "faults on delete"],
)
def test_passing_faults_of_s3_are_not_noticed(
    proxy: Proxy, proxied: str, connect: Connect, plan: dict[str, Any]
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    made = [delayed(np.full)(40_000, i) for i in range(4)]
    literal = delayed(np.ones(40_000))
    proxy.plan(**plan)
    total = delayed(lambda parts, one: int(np.sum(parts) + one.sum()))(made, literal)
    assert total.compute(scheduler=scheduler) == 40_000 * 7
    assert proxy.seen["put"] >= 6
    assert not report().failed


def test_a_fault_that_does_not_pass_is_an_error(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    assert small_graph().compute(scheduler=scheduler) == 21
    proxy.plan(invoke=[BROKEN] * 50)
    with pytest.raises(InvocationError, match="500"):
        delayed(inc)(1).compute(scheduler=scheduler)
    assert report().retries < 20


FORBIDDEN = Answer(403, b'{"Message":"User: u is not authorized","Type":"AccessDeniedException"}')


def test_no_permission_to_invoke_names_action_and_function(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(check=[FORBIDDEN])
    pattern = "lambda:InvokeFunction.*'dask-lambda'.*not authorized"
    with pytest.raises(AccessDeniedError, match=pattern):
        delayed(inc)(1).compute(scheduler=scheduler)
    proxy.plan(invoke=[FORBIDDEN])
    with pytest.raises(AccessDeniedError, match=pattern):
        delayed(inc)(1).compute(scheduler=scheduler)
    assert proxy.seen["invoke"] == 1


@pytest.mark.parametrize(("kind", "action"), [("put", "s3:PutObject"), ("get", "s3:GetObject")])
def test_no_permission_of_the_worker_names_action_and_object(
    proxy: Proxy, proxied: str, connect: Connect, kind: str, action: str
) -> None:
    scheduler = connect(function=proxied, inline_bytes=0)
    proxy.plan(**{kind: [s3_error(403, "AccessDenied", "Access Denied")]})
    with pytest.raises(AccessDeniedError, match=rf"on the worker.*{action} \w+/dask-lambda/"):
        delayed(inc)(delayed(inc)(1)).compute(scheduler=scheduler, optimize_graph=False)
    assert proxy.seen["put"] + proxy.seen["get"] <= 2


@pytest.mark.parametrize(
    ("kind", "action"),
    [("list", "s3:ListBucket"), ("put", "s3:PutObject"), ("get", "s3:GetObject")],
)
def test_no_permission_of_the_caller_names_action(
    proxy: Proxy, connect: Connect, kind: str, action: str
) -> None:
    scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
    proxy.plan(**{kind: [s3_error(403, "AccessDenied", "Access Denied")]})
    with pytest.raises(AccessDeniedError, match=action):
        delayed(np.sum)(np.ones(100_000)).compute(scheduler=scheduler)


def test_a_payload_that_lambda_finds_too_large_is_an_error(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(invoke=[Answer(413, b'{"Type":"User","message":"Request must be smaller"}')])
    with pytest.raises(PayloadTooLargeError, match="Task 'large'"):
        delayed(inc)(1, dask_key_name="large").compute(scheduler=scheduler)


def test_an_answer_that_is_no_json_is_an_error(proxy: Proxy, connect: Connect) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    for answer in (Answer(200, b"<html>a captive portal</html>"), Answer(200, b""), Answer(302)):
        proxy.plan(invoke=[answer])
        with pytest.raises(InvocationError):
            delayed(inc)(1).compute(scheduler=scheduler)


def test_one_failed_run_does_not_touch_the_next() -> None:
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            delayed(lambda: 1 / 0)().compute(scheduler=lambda_get)
        assert small_graph().compute(scheduler=lambda_get) == 21


# -- bad input -----------------------------------------------------------------------------------


def test_an_empty_graph_and_no_keys_are_fine() -> None:
    assert lambda_get({}, []) == ()
    assert lambda_get({"a": (inc, 1)}, []) == ()
    assert lambda_get({"a": (inc, 1)}, [[], [[]]]) == dask.get({"a": (inc, 1)}, [[], [[]]])
    assert report().invocations == 0


def test_a_key_that_is_missing_is_named() -> None:
    with pytest.raises(MissingKeyError, match="'b' was requested"):
        lambda_get({"a": (inc, 1)}, "b")
    with pytest.raises(KeyError, match="'b'"):
        lambda_get({"a": (inc, 1)}, ["a", ["b"]])
    with pytest.raises(KeyError):
        lambda_get({}, "a")


def test_a_dependency_that_is_missing_is_named() -> None:
    with pytest.raises(MissingKeyError, match=r"'b' is read by task \('a', 0\)"):
        lambda_get({("a", 0): Task(("a", 0), inc, TaskRef("b"))}, ("a", 0))
    with pytest.raises(MissingKeyError, match="'b' is read by task 'a'"):
        lambda_get({"a": Alias("a", "b")}, "a")


@pytest.mark.parametrize(
    "dsk",
    [
        {"a": (inc, "b"), "b": (inc, "a")},
        {"a": (inc, "a")},
        {"a": "b", "b": "a"},
        {"a": "b", "b": (inc, "c"), "c": "a"},
        {"a": (inc, "b"), "b": [(inc, "c")], "c": "b"},
    ],
    ids=str,
)
def test_a_cycle_is_an_error(dsk: Any) -> None:
    with pytest.raises(CyclicGraphError, match="Cycle"):
        lambda_get(dsk, "a")


@pytest.mark.parametrize(
    "key",
    [
        "x" * 10_000,
        ("x" * 5_000, 1, "y" * 5_000),
        7,
        -1.5,
        b"bytes",
        ("tuple", 1, 2.0, b"x"),
        "ключ/?#%00 \n\t\x00😀\ud800",
        "../../escape",
        "",
    ],
    ids=["long", "long tuple", "int", "float", "bytes", "tuple", "odd text", "path", "empty"],
)
def test_keys_may_be_anything_that_dask_takes(key: Any) -> None:
    dsk = {key: (np.full, 10, 2.0), "last": Task("last", np.sum, TaskRef(key))}
    scheduler = LambdaScheduler(inline_bytes=0)
    assert lambda_get(dsk, "last") == 20
    assert scheduler.get(dsk, ["last", key])[1].sum() == 20
    scheduler.close()
    with pytest.raises(ZeroDivisionError) as caught:
        lambda_get({key: (lambda: 1 / 0,)}, key)
    assert len(notes(caught.value)) < 5000


def test_keys_that_print_alike_are_not_mixed_up() -> None:
    dsk = {1: (inc, 11), "1": (inc, 12), ("1",): (inc, 13), (1,): (inc, 14), b"1": (inc, 15)}
    for inline_bytes in (0, 1000):
        with LambdaScheduler(inline_bytes=inline_bytes) as scheduler:
            assert scheduler.get(dsk, list(dsk)) == dask.get(dsk, list(dsk))
