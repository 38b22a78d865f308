"""What the Lambda function says of tasks that go wrong."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
from dask._task_spec import Task, TaskRef

from lambda_worker import codec
from lambda_worker.protocol import Reference, Value, load_reference
from tests.handler_client import SECRET, client, inc

__all__ = ["client"]


# -- what goes wrong in a task -------------------------------------------------------------------


def exception_of(record: dict[str, Any]) -> BaseException:
    value = Value.from_json(record["exception"])
    return codec.loads(value.data, SECRET, value.name)


def test_a_tasks_exception_comes_back_as_itself_with_its_key_and_traceback(client):
    def reciprocal(x):
        return 1 / x

    error = client.run(Task(("y", 3), reciprocal, 0))["error"]
    assert error["kind"] == "exception"
    assert error["type"] == "builtins.ZeroDivisionError"
    assert error["message"] == "ZeroDivisionError: division by zero"
    assert error["key"] == "('y', 3)"
    exception = exception_of(error)
    assert type(exception) is ZeroDivisionError
    assert exception.__traceback__ is None
    assert "in reciprocal" in error["traceback"]


def test_the_traceback_begins_outside_of_the_worker(client):
    traceback = client.run(Task("y", inc, "text"))["error"]["traceback"]
    assert traceback.startswith("Traceback (most recent call last):\n")
    assert "lambda_worker/execute.py" not in traceback
    assert "in inc" in traceback


def test_the_cause_of_an_exception_is_in_the_traceback(client):
    def fail():
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer") from error

    error = client.run(Task("y", fail))["error"]
    assert "KeyError: 'inner'" in error["traceback"]
    assert "direct cause" in error["traceback"]
    assert str(exception_of(error)) == "outer"


def test_in_a_group_of_several_tasks_the_one_that_failed_is_named(client):
    tasks = [Task("a", inc, 1), Task("b", inc, None), Task("c", inc, TaskRef("b"))]
    assert client.run(*tasks)["error"]["key"] == "'b'"


def test_an_exception_that_cannot_be_pickled_is_told_in_words(client):
    class Locked(Exception):
        def __init__(self, text):
            super().__init__(text)
            self.lock = threading.Lock()

    def fail():
        raise Locked("no")

    error = client.run(Task("y", fail))["error"]
    assert "exception" not in error
    assert error["message"] == "Locked: no"
    assert "lock" in error["unpicklable"]


def test_an_exception_that_cannot_be_unpickled_is_told_in_words(client):
    class Odd(Exception):
        def __reduce__(self):
            return _fail_to_load, ()

    def fail():
        raise Odd("no")

    error = client.run(Task("y", fail))["error"]
    assert "exception" not in error
    assert error["message"] == "Odd: no"
    assert error["unpicklable"] == "OSError: not here"


def test_an_exception_whose_text_fails_is_told_by_its_type(client):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    def fail():
        raise Mute

    assert client.run(Task("y", fail))["error"]["message"] == "Mute"


@pytest.mark.parametrize("exit_", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_an_exit_of_a_task_does_not_end_the_worker(client, exit_):
    def leave():
        raise exit_

    error = client.run(Task("y", leave))["error"]
    assert error["kind"] == "exception"
    assert type(exception_of(error)) is type(exit_)
    assert client.result(Task("z", inc, 1)) == 2


def test_a_huge_exception_is_cut_so_that_the_reply_fits(client):
    def fail():
        raise ValueError("x" * 3_000_000)

    said = client.run(Task("y", fail))
    assert len(json.dumps(said)) < 200_000
    assert said["error"]["message"].startswith("ValueError: xxx")


def test_a_missing_module_is_named(client):
    def load():
        import package_that_nobody_has  # noqa: F401

    assert client.run(Task("y", load))["error"]["module"] == "package_that_nobody_has"


class OfNoModule:
    def __reduce__(self):
        return __import__, ("package_that_nobody_has",)


def test_it_is_told_whether_a_module_was_missed_before_the_task_could_begin(client):
    def load():
        import package_that_nobody_has  # noqa: F401

    stored = client.put("stored", OfNoModule())
    reference = Reference(stored.name, stored.size)
    told = [
        client.run(Task("y", load)),
        client.run(Task("y", inc, OfNoModule())),
        client.run(Task("y", inc, TaskRef("x")), inputs={"x": client.inline("x", OfNoModule())}),
        client.run(Task("y", load_reference, reference)),
    ]
    assert [said["error"]["loading"] for said in told] == [False, True, True, True]


class FailsToLoad:
    def __reduce__(self):
        return _fail_to_load, ()


def _fail_to_load():
    raise OSError("not here")


def test_a_task_that_fails_to_unpickle_is_told_as_such(client):
    error = client.run(Task("y", inc, FailsToLoad()))["error"]
    assert error["kind"] == "exception"
    assert error["message"] == "unpickling the task: OSError: not here"
    assert type(exception_of(error)) is OSError


def test_an_input_that_fails_to_unpickle_is_told_with_its_name(client):
    inputs = {"x": client.inline("x", FailsToLoad())}
    error = client.run(Task("y", inc, TaskRef("x")), inputs=inputs)["error"]
    assert error["message"] == "unpickling its input 'x': OSError: not here"
    assert error["key"] == "'y'"


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: (i for i in range(3)), "generator"),
        (threading.Lock, "lock"),
        (lambda: [1, (i for i in "ab")], "list"),
    ],
)
def test_a_result_that_cannot_be_pickled_is_told_with_its_type_and_key(client, make, kind):
    error = client.run(Task("y", make))["error"]
    assert error["kind"] == "unserializable"
    assert f"a {kind}, cannot be pickled" in error["message"]
    assert error["key"] == "'y'"
    assert client.objects() == set()


def test_a_result_whose_pickling_raises_something_odd_is_told_too(client):
    class Stubborn:
        def __reduce__(self):
            raise ZeroDivisionError("never")

    error = client.run(Task("y", Stubborn))["error"]
    assert error["kind"] == "unserializable"
    assert "ZeroDivisionError: never" in error["message"]


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        Task("y", np.ones, 2**55),  # numpy's own subclass
        Task("y", bytearray, 2**62),
    ],
)
def test_a_lack_of_memory_is_marked(client, task):
    error = client.run(task)["error"]
    assert error["memory"] is True
    assert error["kind"] == "exception"
    assert "MemoryError" in error["type"]


class Swelling:
    """A result that needs more memory to be packed than there is."""

    def __reduce__(self):
        raise MemoryError


def test_a_lack_of_memory_while_the_result_is_packed_is_marked(client):
    error = client.run(Task("y", Swelling))["error"]
    assert error["memory"] is True
    assert error["key"] == "'y'"
    assert "packing its result" in error["message"]


def test_other_errors_are_not_marked(client):
    assert "memory" not in client.run(Task("y", inc, "text"))["error"]
