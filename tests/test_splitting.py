"""What becomes of a group that was too large for an execution environment."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from dask._task_spec import DataNode, List, Task, TaskRef

from dask_lambda.graph import Graph, normalise
from dask_lambda.plan import Group
from dask_lambda.splitting import split


def graph_of(reads: dict[str, str]) -> Graph:
    """``graph_of({"b": "a a2"})``: b reads a and a2; each task is an output."""
    dsk: dict[Any, Any] = {
        key: Task(key, max, List(0, *map(TaskRef, names.split()))) for key, names in reads.items()
    }
    return normalise(dsk, list(dsk))


def parts(graph: Graph, group: Group, *repeated: str) -> list[tuple[str, str, str]]:
    """Tasks, inputs and outputs of what a group is replaced by, as text."""
    found = split(graph, frozenset(repeated), group)
    return [
        (" ".join(p.tasks), " ".join(sorted(p.inputs)), " ".join(sorted(p.outputs))) for p in found
    ]


def group(tasks: str, outputs: str, inputs: str = "") -> Group:
    return Group(tuple(tasks.split()), tuple(inputs.split()), tuple(outputs.split()), 7, 3, "k", 9)


def test_a_single_task_is_not_split() -> None:
    assert parts(graph_of({"a": ""}), group("a", "a")) == []


def test_two_tasks_are_run_one_by_one() -> None:
    graph = graph_of({"x": "", "a": "x", "b": "a"})
    assert parts(graph, group("a b", "b", "x")) == [("a", "x", "a"), ("b", "a", "b")]


def test_tasks_with_outputs_that_have_nothing_in_common_are_divided_by_outputs() -> None:
    graph = graph_of({"x": "", "a": "x", "b": "x", "c": "a", "d": "b"})
    found = parts(graph, group("a b c d", "c d", "x"))
    assert found == [("a c", "x", "c"), ("b d", "x", "d")]


def test_outputs_with_tasks_in_common_are_not_made_twice() -> None:
    graph = graph_of({"a": "", "b": "a", "c": "a"})
    found = parts(graph, group("a b c", "b c"))
    made = [task for tasks, _, _ in found for task in tasks.split()]
    assert sorted(made) == ["a", "b", "c"]


def test_a_group_is_cut_where_the_least_is_passed_on() -> None:
    wide = {f"w{i}": "" for i in range(4)}
    graph = graph_of({**wide, "sum": " ".join(wide), "next": "sum", "last": "next"})
    first, second = parts(graph, group("w0 w1 w2 w3 sum next last", "last"))
    assert first[2] == "sum"
    assert second == ("next last", "sum", "last")


def test_an_output_of_the_first_part_that_the_second_reads_is_passed_on_once() -> None:
    graph = graph_of({"a": "", "b": "a"})
    assert parts(graph, group("a b", "a b")) == [("a", "", "a"), ("b", "a", "b")]


def test_what_other_groups_run_as_well_is_run_by_both_parts_and_not_passed_on() -> None:
    graph = graph_of({"r": "", "a": "r", "b": "r a"})
    assert parts(graph, group("r a b", "b"), "r") == [("r a", "", "a"), ("r b", "a", "b")]


def test_a_task_with_what_other_groups_run_as_well_cannot_be_split() -> None:
    graph = graph_of({"r": "", "s": "r", "a": "s"})
    assert parts(graph, group("r s a", "a"), "r", "s") == []


def test_what_repeated_tasks_read_is_there_in_both_parts() -> None:
    graph = graph_of({"x": "", "a": "x", "view": "a", "b": "view", "c": "view b"})
    found = parts(graph, group("a view b c", "c", "x"), "view")
    assert found[1][0].split()[0] == "view"
    assert "a" in found[1][1].split()
    assert all("view" not in outputs.split() for _, _, outputs in found)


def test_the_parts_are_to_be_run_as_the_group_was() -> None:
    graph = graph_of({"a": "", "b": "a"})
    for part in split(graph, frozenset(), group("a b", "b")):
        assert (part.priority, part.retries) == (7, 3)
        assert part.seconds is None  # which was wrong


def test_data_of_the_graph_is_no_input_of_a_part() -> None:
    dsk: dict[Any, Any] = {
        "d": DataNode("d", np.zeros(3)),
        "a": Task("a", operator.neg, TaskRef("d")),
        "b": Task("b", operator.add, TaskRef("a"), TaskRef("d")),
    }
    graph = normalise(dsk, "b")
    assert parts(graph, group("a b", "b")) == [("a", "", "a"), ("b", "a", "b")]
