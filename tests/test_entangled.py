"""Which groups must commit all their outputs as one."""

from __future__ import annotations

import operator
import uuid
from typing import Any

import numpy as np
import pytest
from dask._task_spec import Task, TaskRef

from dask_lambda.entangled import entangled
from dask_lambda.graph import Graph, normalise
from dask_lambda.plan import Group

KNOWN = operator.neg


def draw(*read: Any) -> str:
    return uuid.uuid4().hex


def graph_of(**tasks: Any) -> Graph:
    """A graph in which each task is ``(function, *names of what it reads)``."""
    nodes = {
        key: Task(key, function, *(TaskRef(name) for name in reads))
        for key, (function, *reads) in tasks.items()
    }
    return normalise(nodes, list(nodes))


def group_of(graph: Graph, tasks: str, outputs: str) -> Group:
    return Group(tuple(tasks), (), tuple(outputs))


@pytest.mark.parametrize(
    ("tasks", "outputs", "expected"),
    [
        ({"a": (draw,)}, "a", False),
        ({"a": (draw,), "b": (draw, "a")}, "b", False),  # one output: the first attempt wins it
        ({"a": (draw,), "b": (draw,)}, "ab", False),  # that have nothing to do with each other
        ({"a": (draw,), "b": (KNOWN, "a")}, "ab", True),  # an output that makes another one
        ({"a": (draw,), "b": (KNOWN, "a"), "c": (KNOWN, "a")}, "bc", True),
        ({"a": (draw,), "b": (KNOWN, "a"), "c": (KNOWN, "b"), "d": (KNOWN, "b")}, "cd", True),
        ({"a": (KNOWN,), "b": (draw, "a"), "c": (draw, "a")}, "bc", False),
        ({"a": (KNOWN,), "b": (draw, "a"), "c": (KNOWN, "b")}, "ac", False),
        ({"a": (KNOWN,), "b": (KNOWN, "a"), "c": (KNOWN, "a")}, "abc", False),
        ({"a": (np.linalg.qr,), "b": (KNOWN, "a"), "c": (KNOWN, "a")}, "bc", False),
    ],
)
def test_what_may_not_be_repeatable_reaches_several_outputs(
    tasks: dict[str, Any], outputs: str, expected: bool
) -> None:
    graph = graph_of(**tasks)
    assert entangled(graph, group_of(graph, "".join(tasks), outputs)) is expected


def test_what_is_read_from_other_groups_is_one_value_already() -> None:
    graph = graph_of(a=(draw,), b=(KNOWN, "a"), c=(KNOWN, "a"))
    assert not entangled(graph, Group(("b", "c"), ("a",), ("b", "c")))
