"""What tasks are expected to take: who knows it, and who wins."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, Task, TaskRef

from dask_lambda.estimates import (
    UNKNOWN_BYTES,
    UNKNOWN_SECONDS,
    Estimates,
    estimate,
    guess,
)
from dask_lambda.graph import Graph, normalise
from dask_lambda.kernels import Speed
from dask_lambda.plan import topological
from lambda_worker.protocol import Reference, load_reference
from tests.helpers import graph_of


def mine(*args: Any) -> Any:
    return args


def guessed(graph: Graph) -> Estimates:
    return guess(graph, topological(graph, set()), Speed())


def two_layers() -> Graph:
    dsk = {
        ("mine-1", 0): Task(("mine-1", 0), mine, 1),
        ("add-1", 0): Task(("add-1", 0), np.add, TaskRef(("mine-1", 0)), 1),
    }
    return normalise(dsk, [("add-1", 0)])


MINE, ADD = ("mine-1", 0), ("add-1", 0)


def test_of_the_users_functions_nothing_is_known() -> None:
    found = guessed(two_layers())
    assert found.unknown == {MINE}
    assert (found.seconds[MINE], found.nbytes[MINE]) == (UNKNOWN_SECONDS, UNKNOWN_BYTES)
    assert found.seconds[ADD] < 1e-3


def test_each_task_and_all_data_have_an_estimate() -> None:
    dsk = {
        "d": DataNode("d", np.zeros(100)),
        "s": Task("s", load_reference, Reference("0/p/run/s", 12_345)),
        "a": Alias("a", "d"),
        "y": Task("y", np.add, TaskRef("a"), TaskRef("s")),
    }
    found = guessed(normalise(dsk, ["y"]))
    assert found.nbytes == {"d": 800, "s": 12_345, "y": 12_345}
    assert found.seconds.keys() == {"y"}


def test_guesses_follow_the_blocks_through_the_graph() -> None:
    def seconds(side: int) -> float:
        x = da.random.default_rng(0).random((2 * side, 2 * side), chunks=side)
        graph = graph_of(x @ x.T)
        return sum(guessed(graph).seconds.values())

    assert seconds(4000) > 6 * seconds(2000)


def test_who_says_how_long_a_task_takes_wins_over_who_has_seen_it_and_who_has_not() -> None:
    graph = two_layers()
    first = guessed(graph)

    def seconds(**more: Any) -> float:
        return estimate(first, graph, **more).seconds[MINE]

    ratio = lambda prefix: (10.0, 1.0) if prefix == "mine" else None  # noqa: E731
    default = {"mine": 7.0}
    said = lambda key: 3.0 if key == MINE else None  # noqa: E731
    assert seconds() == UNKNOWN_SECONDS
    assert seconds(ratio=ratio) == 10 * UNKNOWN_SECONDS
    assert seconds(ratio=ratio, default_seconds=default) == 7.0
    assert seconds(ratio=ratio, default_seconds=default, said_seconds=said) == 3.0


@pytest.mark.parametrize(
    "more",
    [
        {"ratio": lambda prefix: (1.0, 1.0)},
        {"default_seconds": {"mine": 0.5}},
        {"said_seconds": lambda key: 0.5},
    ],
    ids=["seen", "default", "said"],
)
def test_whoever_knows_it_the_task_is_not_unknown_any_more(more: dict[str, Any]) -> None:
    graph = two_layers()
    assert estimate(guessed(graph), graph, **more).unknown == frozenset()


def test_what_is_said_of_other_tasks_changes_nothing() -> None:
    graph = two_layers()
    first = guessed(graph)
    found = estimate(
        first,
        graph,
        ratio=lambda prefix: None,
        default_seconds={"min": 1.0, "mine-1": 1.0},
        said_seconds=lambda key: None,
        said_nbytes=lambda key: None,
    )
    assert (found.seconds, found.nbytes, found.unknown) == (
        first.seconds,
        first.nbytes,
        first.unknown,
    )


def test_a_ratio_scales_with_the_blocks() -> None:
    def sums(side: int) -> tuple[float, float, int, int]:
        x = da.from_array(np.broadcast_to(1.0, (side, side)), chunks=side, name=f"x-{side}")
        graph = graph_of(x + 1)
        first = guessed(graph)
        (key,) = graph.tasks
        found = estimate(first, graph, ratio=lambda prefix: (3.0, 0.5))
        return first.seconds[key], found.seconds[key], first.nbytes[key], found.nbytes[key]

    for side in (100, 1000):
        before, after, size, smaller = sums(side)
        assert after == pytest.approx(3 * before)
        assert smaller == size // 2
    assert sums(1000)[1] > 50 * sums(100)[1]


def test_bytes_that_are_said_win_over_those_that_were_seen() -> None:
    graph = two_layers()
    found = estimate(
        guessed(graph),
        graph,
        ratio=lambda prefix: (1.0, 100.0),
        said_nbytes=lambda key: 123 if key == ADD else None,
    )
    assert found.nbytes[ADD] == 123
    assert found.nbytes[MINE] == 100 * UNKNOWN_BYTES


def test_a_guess_is_not_changed_by_its_correction() -> None:
    graph = two_layers()
    first = guessed(graph)
    before = dict(first.seconds)
    estimate(first, graph, said_seconds=lambda key: 9.0)
    assert first.seconds == before


def test_keys_of_any_kind_have_estimates() -> None:
    dsk = {key: Task(key, mine, 1) for key in ("name", 7, 1.5, ("t", 0), (0, "t"), b"bytes")}
    graph = normalise(dsk, list(dsk))
    found = estimate(guessed(graph), graph, default_seconds={"name": 1.0})
    assert found.seconds.keys() == dsk.keys()
    assert found.seconds["name"] == 1.0
