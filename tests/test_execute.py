"""Running the tasks of one group."""

from __future__ import annotations

import asyncio
import json
import sys
import weakref
from operator import add

import numpy as np
import pytest
from dask._task_spec import Alias, Task, TaskRef

from lambda_worker.execute import GroupRun, TaskError
from lambda_worker.protocol import Body


def inc(x):
    return x + 1


def body(tasks, outputs, inputs=()) -> Body:
    return Body(tasks, list(inputs), list(range(len(inputs))), outputs)


def run_group(body: Body, inputs: dict):
    """Run a group, yielding place and value of each output."""
    for output in GroupRun(body, lambda name, _: inputs[name]).outputs():
        place, value = output.place, output.value
        del output
        yield place, value
        del value


def test_one_task_runs_on_its_inputs():
    one = body([Task("z", add, TaskRef("x"), TaskRef("y"))], ["z"], ["x", "y"])
    assert list(run_group(one, {"x": 1, "y": 2})) == [(0, 3)]


def test_what_a_coroutine_function_returns_is_the_result():
    async def later(x):
        await asyncio.sleep(0)
        return x + 1

    chain = [Task("a", later, TaskRef("x")), Task("b", inc, TaskRef("a"))]
    assert list(run_group(body(chain, ["b"], ["x"]), {"x": 0})) == [(0, 2)]


def test_tasks_of_a_group_pass_values_to_each_other():
    chain = [Task("a", inc, TaskRef("x")), Task("b", inc, TaskRef("a"))]
    assert list(run_group(body(chain, ["b"], ["x"]), {"x": 0})) == [(0, 2)]


def test_each_output_is_told_by_its_place_as_soon_as_it_is_there():
    ran = []

    def note(x):
        ran.append(x)
        return x

    steps = run_group(body([Task("a", note, 1), Task("b", note, 2)], ["b", "a"]), {})
    assert next(steps) == (1, 1)
    assert ran == [1]
    assert next(steps) == (0, 2)
    assert list(steps) == []


def test_an_output_that_is_asked_for_twice_is_made_once_and_told_twice():
    steps = run_group(body([Task("a", inc, 1)], ["a", "a"]), {})
    assert list(steps) == [(0, 2), (1, 2)]


def test_an_output_may_also_be_read_by_a_later_task():
    chain = [Task("a", inc, 0), Task("b", inc, TaskRef("a"))]
    assert list(run_group(body(chain, ["a", "b"]), {})) == [(0, 1), (1, 2)]


class Block:
    """Something that a weak reference can watch."""


def test_a_value_is_dropped_when_its_last_reader_has_run():
    watched = {}

    def make():
        block = Block()
        watched["a"] = weakref.ref(block)
        return block

    def alive(*_):
        return watched["a"]() is not None

    tasks = [
        Task("a", make),
        Task("b", alive, TaskRef("a")),
        Task("c", alive, TaskRef("a")),
        Task("d", alive),
    ]
    values = [value for _, value in run_group(body(tasks, ["b", "c", "d"]), {})]
    assert values == [True, True, False]


def test_an_output_is_not_held_while_the_next_task_runs():
    watched = {}

    def make():
        block = Block()
        watched["a"] = weakref.ref(block)
        return block

    steps = run_group(body([Task("a", make), Task("b", lambda: watched["a"]())], ["a", "b"]), {})
    _, block = next(steps)
    assert isinstance(block, Block)
    del block
    assert next(steps) == (1, None)


def test_an_input_is_loaded_at_its_first_use_and_dropped_after_its_last():
    log = []
    watched = {}

    def load(name, reader):
        log.append(("load", name, reader))
        block = Block()
        watched[name] = weakref.ref(block)
        return block

    def look(*_):
        return sorted(name for name, block in watched.items() if block() is not None)

    tasks = [
        Task("a", look),
        Task("b", look, TaskRef("x")),
        Task("c", look, TaskRef("y")),
        Task("d", look, TaskRef("x")),
        Task("e", look),
    ]
    run = GroupRun(body(tasks, list("abcde"), ["y", "x"]), load)
    assert run.needs == ["x", "y"]
    assert [output.value for output in run.outputs()] == [[], ["x"], ["x", "y"], ["x"], []]
    assert log == [("load", "x", "b"), ("load", "y", "c")]


def test_what_a_task_holds_is_dropped_when_it_has_run():
    literal = Block()
    watched = weakref.ref(literal)
    tasks = [Task("a", id, literal), Task("b", lambda: watched() is None)]
    del literal
    group = body(tasks, ["a", "b"])
    del tasks
    assert [value for _, value in run_group(group, {})][1] is True


def test_a_value_that_nobody_reads_is_not_held():
    watched = {}

    def make():
        block = Block()
        watched["a"] = weakref.ref(block)
        return block

    tasks = [Task("a", make), Task("b", lambda: watched["a"]() is None)]
    assert list(run_group(body(tasks, ["b"]), {})) == [(0, True)]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt()])
def test_whatever_a_task_raises_is_told_with_its_key(error):
    def fail(x):
        raise error

    tasks = [Task("a", inc, 1), Task("b", fail, TaskRef("a")), Task("c", inc, TaskRef("b"))]
    steps = run_group(body(tasks, ["a", "c"]), {})
    assert next(steps) == (0, 2)
    with pytest.raises(TaskError) as info:
        next(steps)
    assert info.value.key == "b"
    assert info.value.__cause__ is error


def test_tasks_are_counted_by_prefix_with_the_bytes_of_their_results():
    tasks = [
        Task(("make-0123456789abcdef0123456789abcdef", 0), np.zeros, 10),
        Task(("make-0123456789abcdef0123456789abcdef", 1), np.zeros, 20),
        Task("text", str, 5),
        Task("output", str, 5),
    ]
    run = GroupRun(body(tasks, ["output"]), lambda *_: None)
    for output in run.outputs():
        output.size = 1000
    assert {name: (count, size) for name, (count, _, size) in run.tasks.items()} == {
        "make": (2, 240),
        "text": (1, sys.getsizeof("5")),
        "output": (1, 1000),
    }
    assert run.seconds == pytest.approx(sum(seconds for _, seconds, _ in run.tasks.values()))


def test_another_name_of_a_value_is_no_task():
    tasks = [Task("a", inc, 1), Alias("b", "a"), Task("c", inc, TaskRef("b"))]
    run = GroupRun(body(tasks, ["c"]), lambda *_: None)
    assert [output.value for output in run.outputs()] == [3]
    assert set(run.tasks) == {"a", "c"}


def test_what_is_told_of_tasks_is_small_and_text_whatever_their_keys_are():
    keys = [f"name{i}" for i in range(100)] + ["x" * 10_000, "\ud800", ("a", 1), b"bytes", 3.5]
    tasks = [Task(key, inc, 0) for key in keys[::-1]]
    run = GroupRun(body(tasks, [keys[0]]), lambda *_: None)
    assert len(list(run.outputs())) == 1
    assert "\\ud800" in run.tasks
    assert len(json.dumps(run.tasks, ensure_ascii=False).encode()) < 10_000
    assert sum(count for count, _, _ in run.tasks.values()) == len(keys)


def test_a_result_that_lies_about_its_size_does_no_harm():
    class Odd:
        @property
        def nbytes(self):
            raise ValueError("no idea")

    run = GroupRun(body([Task("a", Odd), Task("b", inc, 1)], ["b"]), lambda *_: None)
    assert [output.value for output in run.outputs()] == [2]
    assert run.tasks["a"][2] == 0


def test_when_a_task_has_raised_nothing_is_held():
    inputs = {"x": Block()}
    watched = weakref.ref(inputs["x"])

    def fail():
        raise ValueError("no")

    tasks = [Task("a", id, TaskRef("x")), Task("b", fail), Task("c", id, TaskRef("x"))]
    run = GroupRun(body(tasks, ["c"], ["x"]), lambda name, _: inputs.pop(name))
    with pytest.raises(TaskError):
        list(run.outputs())
    assert watched() is None
