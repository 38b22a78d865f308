"""What goes wrong in a task or its worker becomes the right error, in bounded time."""

from __future__ import annotations

import enum
import os
import re
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler, lambda_get
from dask_lambda.errors import (
    ConfigurationError,
    FunctionTimeoutError,
    RemoteError,
    UnserializableError,
    WorkerDiedError,
)
from tests.helpers import notes, report

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]


def inc(x: Any) -> Any:
    return x + 1


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


class Colour(enum.Enum):
    RED = 1


def test_an_enumeration_of_the_users_stays_itself() -> None:
    assert delayed(lambda c: c)(Colour.RED).compute(scheduler=lambda_get) is Colour.RED
