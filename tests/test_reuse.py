"""Which results stand for tasks: the frontier, and one version of what may come out differently."""

from __future__ import annotations

from operator import add, neg
from typing import Any

import hypothesis.strategies as st
from dask._task_spec import Task, TaskRef
from hypothesis import given

from dask_lambda.entangled import entangled
from dask_lambda.graph import Graph, normalise
from dask_lambda.plan import Group
from dask_lambda.reuse import apart, reuse
from lambda_worker.protocol import Reference
from tests.helpers import check_plan, graph_of


def own(*values: Any) -> Any:
    """Do what nobody knows, and perhaps never the same."""
    return sum(values)


def graph(edges: dict[str, str], outputs: str, known: str = "") -> Graph:
    """Make a graph of one-letter tasks, each with what it reads."""
    nodes: dict[Any, Any] = {}
    for key, reads in edges.items():
        function = (neg if len(reads) < 2 else add) if key in known else own
        nodes[key] = Task(key, function, *map(TaskRef, reads))
    return normalise(nodes, list(outputs))


def there(keys: str) -> dict[str, Reference]:
    return {f"label-{key}": Reference(f"0/p/{'0' * 32}/label-{key}", 1) for key in keys}


def labels(graph: Graph) -> dict[Any, str]:
    return {key: f"label-{key}" for key in graph.tasks}


CHAIN = {"a": "", "b": "a", "c": "b", "d": "c"}


def test_what_only_reused_results_need_does_not_run() -> None:
    chain = graph(CHAIN, "d")
    left = reuse(chain, labels(chain), there("b"))
    assert left.graph.tasks.keys() == {"c", "d"}
    assert left.graph.stored.keys() == {"b"}
    assert left.skipped == ("a", "b")
    assert not left.stale


def test_a_result_that_was_asked_for_is_all_that_is_needed() -> None:
    chain = graph(CHAIN, "d")
    left = reuse(chain, labels(chain), there("abcd"))
    assert not left.graph.tasks
    assert left.reused == {"d": "label-d"}
    assert left.skipped == tuple("abcd")


def test_without_results_the_graph_is_as_it_was() -> None:
    chain = graph(CHAIN, "d")
    left = reuse(chain, labels(chain), there("xyz"))
    assert left.graph is chain
    assert not left.skipped


def test_what_has_no_label_runs() -> None:
    chain = graph(CHAIN, "d")
    known = labels(chain)
    del known["c"], known["d"]
    left = reuse(chain, known, there("abcd"))
    assert left.graph.tasks.keys() == {"c", "d"}


FORK = {"a": "", "b": "a", "c": "a", "d": "bc"}


def test_what_was_made_from_another_version_is_not_used() -> None:
    """``a`` is gone, and has to be made again for ``c``: then ``b`` is of another ``a``."""
    fork = graph(FORK, "d")
    left = reuse(fork, labels(fork), there("b"))
    assert left.graph.tasks.keys() == set("abcd")
    assert left.stale == {"label-b"}


def test_functions_that_are_known_make_the_same_again() -> None:
    fork = graph(FORK, "d", known="a")
    left = reuse(fork, labels(fork), there("b"))
    assert left.graph.tasks.keys() == set("acd")
    assert not left.stale


def test_what_falls_away_takes_with_it_what_was_made_of_it() -> None:
    """Dropping ``c`` needs ``x`` anew, of which ``y`` was made as well."""
    edges = {"a": "", "x": "", "c": "ax", "y": "x", "e": "a", "z": "cye"}
    all_of_it = graph(edges, "z")
    left = reuse(all_of_it, labels(all_of_it), there("cy"))
    assert left.stale == {"label-c", "label-y"}
    assert left.graph.tasks.keys() == set(edges)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Graph, str]:
    """Random graphs of up to ten tasks, and results that are there."""
    keys = "abcdefghij"[: draw(st.integers(1, 10))]
    edges = {
        key: "".join(draw(st.sets(st.sampled_from(keys[:place]), max_size=2))) if place else ""
        for place, key in enumerate(keys)
    }
    outputs = draw(st.sets(st.sampled_from(keys), min_size=1))
    known = draw(st.sets(st.sampled_from(keys)))
    found = draw(st.sets(st.sampled_from(keys)))
    return graph(edges, "".join(sorted(outputs)), "".join(known)), "".join(found)


@given(graphs())
def test_every_reader_sees_one_version(made: tuple[Graph, str]) -> None:
    whole, found = made
    left = reuse(whole, labels(whole), there(found))
    run, used = left.graph.tasks.keys(), left.reused.keys()
    # All that is needed is there or is made.
    for key in run:
        assert whole.dependencies(key) <= run | used
    assert {whole.resolve(key) for key in whole.outputs} <= run | used
    assert set(left.skipped) == whole.tasks.keys() - run
    # Nothing that is used or stays was made from what is made again and may be different.
    for key in set(found) & whole.tasks.keys():
        above, stack = set[Any](), [key]
        while stack:
            for read in whole.dependencies(stack.pop()) - above:
                above.add(read)
                stack.append(read)
        changed = any(whole.tasks[each].func is own for each in above & run)
        assert changed <= (f"label-{key}" in left.stale)
        assert not (changed and key in used)


def test_entangled_groups_are_split_until_none_is() -> None:
    edges = {"a": "", "b": "a", "c": "a", "d": "b", "e": "c"}
    whole = graph(edges, "de")
    group = Group(tuple("abcde"), (), tuple("de"))
    assert entangled(whole, group)
    parts = apart(whole, frozenset(), [group])
    assert len(parts) > 1
    assert not any(entangled(whole, part) for part in parts)
    assert sorted(key for part in parts for key in part.tasks) == list("abcde")
    written = set()
    for part in parts:
        assert set(part.inputs) <= written
        written |= set(part.outputs)
    assert {"d", "e"} <= written


def test_groups_that_are_not_entangled_stay_as_they_are() -> None:
    import dask.array as da

    from dask_lambda.plan import make_plan

    x = da.ones((40, 40), chunks=10)
    product = graph_of((x @ x.T).sum(axis=0))
    plan = make_plan(product, mode="auto")
    assert apart(plan.graph, plan.repeated, plan.groups) == list(plan.groups)
    check_plan(product, plan)
