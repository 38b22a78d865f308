"""Running the tasks of one group."""

from __future__ import annotations

import weakref
from operator import add

import pytest
from dask._task_spec import Task, TaskRef

from lambda_worker.execute import TaskError, run_group
from lambda_worker.protocol import Body


def inc(x):
    return x + 1


def body(tasks, outputs, inputs=()) -> Body:
    return Body(tasks, list(inputs), list(range(len(inputs))), outputs)


def test_one_task_runs_on_its_inputs():
    one = body([Task("z", add, TaskRef("x"), TaskRef("y"))], ["z"], ["x", "y"])
    assert list(run_group(one, {"x": 1, "y": 2})) == [(0, 3)]


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


def test_inputs_are_dropped_too():
    values = {"x": 1, "y": 2}
    tasks = [Task("a", inc, TaskRef("x")), Task("b", inc, TaskRef("y"))]
    steps = run_group(body(tasks, ["a", "b"], ["x", "y"]), values)
    next(steps)
    assert set(values) == {"y"}
    next(steps)
    assert values == {}


def test_a_value_that_nobody_reads_is_not_held():
    values = {}
    list(run_group(body([Task("a", inc, 1), Task("b", inc, 2)], ["b"]), values))
    assert values == {}


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
