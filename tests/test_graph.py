"""From what Dask hands a scheduler to a sorted, culled graph."""

from __future__ import annotations

from operator import add

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask._task_spec import Alias, DataNode, List, Task, TaskRef
from dask.delayed import delayed
from dask.highlevelgraph import HighLevelGraph

from dask_lambda.errors import CyclicGraphError, DaskLambdaError, MissingKeyError
from dask_lambda.graph import Graph, is_finaliser, materialise, normalise, short
from lambda_worker.protocol import Reference, load_reference


def inc(x):
    return x + 1


def sort(dsk, keys) -> Graph:
    return normalise(materialise(dsk), keys)


def handed_to_scheduler(collection):
    """What Dask calls a scheduler with: the graph and the keys."""
    seen = []

    def scheduler(dsk, keys, **kwargs):
        seen.append((dsk, keys))
        return dask.get(dsk, keys)

    collection.compute(scheduler=scheduler)
    return seen[0]


# -- what comes in -------------------------------------------------------------------------------


def test_legacy_tuples_become_tasks():
    graph = sort({"x": (inc, 1), "y": (add, "x", 10)}, "y")
    assert graph.tasks.keys() == {"x", "y"}
    assert graph.dependencies("y") == {"x"}
    assert graph.tasks["y"]({"x": 2}) == 12


def test_task_specifications_are_taken_as_they_are():
    task = Task("x", inc, 1)
    assert sort({"x": task}, "x").tasks["x"] is task


@pytest.mark.parametrize(
    "collection",
    [
        pytest.param(delayed(inc)(1), id="delayed"),
        pytest.param(da.ones((4, 4), chunks=2) + 1, id="array"),
        pytest.param(db.from_sequence(range(4), npartitions=2).map(inc), id="bag"),
    ],
)
def test_what_dask_hands_a_scheduler_is_understood(collection):
    dsk, keys = handed_to_scheduler(collection)
    graph = sort(dsk, keys)
    assert graph.tasks
    for key in graph.tasks:
        assert graph.dependencies(key) <= graph.tasks.keys() | graph.literals.keys()


def test_a_high_level_graph_is_flattened():
    layers = {"a": {"x": Task("x", inc, 1)}, "b": {"y": Task("y", inc, TaskRef("x"))}}
    graph = sort(HighLevelGraph(layers, {"a": set(), "b": {"a"}}), "y")
    assert graph.tasks.keys() == {"x", "y"}


def test_the_callers_graph_is_not_changed():
    dsk = {"x": (inc, 1), "y": "x", "unused": 5}
    before = dict(dsk)
    sort(dsk, ["y"])
    assert dsk == before


def test_an_empty_graph_is_nothing_to_do():
    graph = sort({}, [])
    assert graph == Graph({}, {}, {}, {}, frozenset(), {})


# -- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", ["x", ["x"], [["x"]], [["x", "x"], []]])
def test_requested_keys_may_be_bare_or_nested(keys):
    assert sort({"x": (inc, 1)}, keys).outputs == {"x"}


def test_a_tuple_is_one_key_and_a_list_is_many():
    graph = sort({("x", 0): (inc, 1), ("x", 1): (inc, 2)}, [[("x", 0)], [("x", 1)]])
    assert graph.outputs == {("x", 0), ("x", 1)}


@pytest.mark.parametrize("key", [3, 2.5, b"bytes", ("x", 0, (1, 2)), "ü" * 3000, "\udc80"])
def test_keys_need_not_be_short_strings(key):
    graph = sort({key: (inc, 1), "y": Task("y", inc, TaskRef(key))}, ["y", key])
    assert graph.dependencies("y") == {key}
    assert key in graph.tasks


def test_what_nobody_needs_is_dropped():
    graph = sort({"x": (inc, 1), "y": (inc, "x"), "z": (inc, "x"), "w": 5}, "y")
    assert graph.tasks.keys() == {"x", "y"}
    assert graph.source.keys() == {"x", "y"}


def test_a_chain_of_ten_thousand_tasks_does_not_recurse():
    dsk = {i: Task(i, inc, TaskRef(i - 1)) for i in range(1, 10_000)}
    dsk[0] = Task(0, inc, 0)
    assert len(sort(dsk, 9_999).tasks) == 10_000


def test_a_requested_key_that_is_missing_is_named():
    with pytest.raises(MissingKeyError, match="'z' was requested") as info:
        sort({"x": (inc, 1)}, ["x", "z"])
    assert isinstance(info.value, KeyError)
    assert isinstance(info.value, DaskLambdaError)
    assert not str(info.value).startswith('"')


def test_a_dependency_that_is_missing_is_named_with_its_reader():
    with pytest.raises(MissingKeyError, match="'z' is read by task 'x'"):
        sort({"x": Task("x", inc, TaskRef("z"))}, "x")


def test_the_target_of_an_alias_that_is_missing_is_named():
    with pytest.raises(MissingKeyError, match="'z' is read by task 'x'"):
        sort({"x": Alias("x", "z")}, "x")


def test_a_huge_key_is_abridged_in_messages():
    with pytest.raises(MissingKeyError) as info:
        sort({}, "k" * 100_000)
    assert len(str(info.value)) < 500
    assert short("k" * 1000, 20) == "'kkkkkkkkkkkkkkkk..."
    assert short(("x", 0)) == "('x', 0)"


# -- sorting -------------------------------------------------------------------------------------


def test_data_in_the_graph_is_literal():
    array = np.arange(3)
    graph = sort({"x": array, "n": DataNode("n", 7), "y": (add, "x", "n")}, "y")
    assert graph.literals["x"] is array
    assert graph.literals["n"] == 7
    assert graph.tasks.keys() == {"y"}


def test_a_chain_of_aliases_is_resolved_to_its_end():
    graph = sort({"a": "b", "b": "c", "c": (inc, 1), "d": (inc, "a")}, ["d", "b"])
    assert graph.aliases == {"a": "c", "b": "c"}
    assert graph.dependencies("d") == {"c"}
    assert graph.resolve("b") == "c"
    assert graph.resolve("d") == "d"
    assert graph.outputs == {"d", "b"}


def test_an_alias_of_data_leads_to_the_data():
    graph = sort({"a": Alias("a", "x"), "x": DataNode("x", 1), "y": (inc, "a")}, "y")
    assert graph.dependencies("y") == {"x"}


def test_aliases_in_a_circle_are_refused():
    with pytest.raises(CyclicGraphError, match="'a' -> 'b' -> 'a'"):
        sort({"a": Alias("a", "b"), "b": Alias("b", "a")}, "a")


def test_an_alias_that_leads_into_a_circle_is_refused():
    with pytest.raises(CyclicGraphError):
        sort({"x": Alias("x", "a"), "a": Alias("a", "b"), "b": Alias("b", "a")}, "x")


def test_results_that_are_stored_are_no_tasks():
    reference = Reference("0/prefix/run/x", 100)
    graph = sort({"x": Task("x", load_reference, reference), "y": (inc, "x")}, "y")
    assert graph.stored == {"x": reference}
    assert graph.tasks.keys() == {"y"}


def test_a_load_that_was_fused_into_its_reader_stays_inside_the_task():
    load = Task("x", load_reference, Reference("0/prefix/run/x", 100))
    fused = Task.fuse(load, Task("y", inc, TaskRef("x")), key="y")
    graph = sort({"y": fused}, "y")
    assert not graph.stored
    assert graph.tasks.keys() == {"y"}


# -- finalisers ----------------------------------------------------------------------------------


def test_a_list_of_results_only_puts_them_together():
    assert is_finaliser(List(TaskRef("x"), List(TaskRef("y"), 1)))


def test_a_list_that_holds_a_task_does_work():
    graph = sort({"x": 1, "y": [(inc, "x"), (inc, 2)], "z": [["x", [(inc, "x")]]]}, ["y", "z"])
    assert not is_finaliser(graph.tasks["y"])
    assert not is_finaliser(graph.tasks["z"])


def test_the_list_of_blocks_inside_a_finaliser_may_be_a_task():
    blocks = pd.DataFrame({"x": range(6)})
    table = dd.from_pandas(blocks, npartitions=3)
    with dask.config.set(scheduler="sync"):
        dsk, keys = handed_to_scheduler(table.persist())
    graph = sort(dsk, keys)
    ((key, task),) = graph.tasks.items()
    assert task.func.__name__ == "_concat"
    assert is_finaliser(task)
    assert not is_finaliser(Task(key, task.func, List(Task(None, inc, TaskRef("x")))))


def test_a_users_function_is_no_finaliser_whatever_it_is_called():
    def finalize(x):
        return x

    assert not is_finaliser(Task("x", finalize, TaskRef("y")))
    assert not is_finaliser(DataNode("x", 1))


@pytest.mark.parametrize(
    "collection",
    [
        pytest.param(da.ones((4, 4), chunks=2) + 1, id="array"),
        pytest.param(db.from_sequence(range(4), npartitions=2).map(inc), id="bag"),
        pytest.param(delayed([delayed(inc)(1), delayed(inc)(2)]), id="delayed"),
    ],
)
def test_what_dask_puts_at_the_end_of_a_collection_is_a_finaliser(collection):
    dsk, keys = handed_to_scheduler(collection)
    graph = sort(dsk, keys)
    (output,) = graph.outputs
    assert is_finaliser(graph.tasks[graph.resolve(output)])
    inner = graph.tasks.keys() - {graph.resolve(output)}
    assert inner
    assert not any(is_finaliser(graph.tasks[key]) for key in inner)


def test_a_task_without_a_key_of_its_own_has_the_one_of_the_graph():
    nodes = {"x": Task("x", abs, 1), "l": List(TaskRef("x")), "y": Task("other", len, TaskRef("l"))}
    graph = normalise(materialise(nodes), ["l", "y"])
    assert {key: task.key for key, task in graph.tasks.items()} == {"x": "x", "l": "l", "y": "y"}
    assert graph.tasks["l"]({"x": 1}) == [1]
    assert (nodes["l"].key, nodes["y"].key) == (None, "other")  # the caller's stay as they are
