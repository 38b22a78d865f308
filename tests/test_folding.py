"""Long sums that are cut: which ones, into what, and that no bit is different."""

from __future__ import annotations

import operator
import pickle
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask._task_spec import DataNode, List, Task, TaskRef

from dask_lambda.cost_model import CostModel
from dask_lambda.estimates import guess
from dask_lambda.folding import MAX_TERMS, MIN_TERMS, cut_folds
from dask_lambda.graph import Graph, materialise, normalise
from dask_lambda.plan import make_plan, topological
from lambda_worker.folds import find_folds
from tests.helpers import check_plan, graph_of, run_plan

MODEL = CostModel(fold_seconds=0.0, fold_bytes=0)


def cut(graph: Graph, model: CostModel = MODEL) -> Graph:
    order = topological(graph, set())
    keep = frozenset(map(graph.resolve, graph.outputs))
    return cut_folds(graph, order, keep, guess(graph, order, model.speed), model)[0]


def added(graph: Graph) -> set[Any]:
    return cut(graph).tasks.keys() - graph.tasks.keys()


def positive_definite(tiles: int, size: int = 3) -> Any:
    rng = np.random.default_rng(0)
    n = tiles * size
    x = rng.standard_normal((n, n))
    return da.from_array(x @ x.T + n * np.eye(n), chunks=size, name="a")


def same_bits(graph: Graph, model: CostModel, window: int = 1000) -> bool:
    """Whether a plan with cut sums gives what the graph gives; whether there was any cut."""
    plan = make_plan(graph, mode="auto", model=model)
    check_plan(graph, plan)
    got = run_plan(plan)
    expected = dask.get(graph.source, list(graph.outputs))
    for key, value in zip(graph.outputs, expected, strict=True):
        assert pickle.dumps(got[key]) == pickle.dumps(value)
    return plan.graph.tasks.keys() != graph.tasks.keys()


@pytest.mark.parametrize("name", ["cholesky", "lu", "solve", "inv"])
@pytest.mark.parametrize("optimised", [True, False], ids=["fused", "as it was made"])
def test_a_factorisation_with_cut_sums_has_the_same_bits(name: str, optimised: bool) -> None:
    a = positive_definite(8)
    collection = {
        "cholesky": lambda: da.linalg.cholesky(a, lower=True),
        "lu": lambda: da.linalg.lu(a)[2],
        "solve": lambda: da.linalg.solve(a, a[:, :3]),
        "inv": lambda: da.linalg.inv(a),
    }[name]()
    if optimised:
        graph = graph_of(collection)
    else:
        graph = normalise(materialise(collection.__dask_graph__()), collection.__dask_keys__())
    assert same_bits(graph, MODEL)


def chained(i: int, *before: Any) -> Any:
    return np.full((2, 2), 0.1 * (i + 1))


def staircase(terms: int, *, function: Any = sum, flat: bool = False) -> dict[Any, Any]:
    """A sum whose terms come one after the other: step by step, or all at once if ``flat``."""
    dsk: dict[Any, Any] = {("step", 0): Task(("step", 0), chained, 0)}
    for i in range(1, terms):
        dsk["step", i] = Task(("step", i), chained, i, TaskRef(("step", 0 if flat else i - 1)))
    for i in range(terms):
        source = ("step", min(i, 1)) if flat else ("step", i)
        dsk["term", i] = Task(("term", i), np.multiply, TaskRef(source), 0.7)
    listed = List(*(TaskRef(("term", i)) for i in range(terms)))
    dsk["end", 0] = Task(("end", 0), operator.neg, Task(None, function, listed))
    return dsk


def test_a_sum_is_cut_into_prefixes_that_end_with_one_term_alone() -> None:
    graph = normalise(staircase(20), [("end", 0)])
    whole = cut(graph)
    lengths = []
    key: Any = ("end", 0)
    while True:
        (fold,) = find_folds(whole.tasks[key])
        prefix, *rest = fold.terms
        if prefix not in added(graph):
            lengths.append(len(fold.terms))
            break
        lengths.append(len(rest))
        key = prefix
    assert sum(lengths) == 20
    assert lengths == [1, 2, 4, 8, 5]
    assert max(lengths) <= MAX_TERMS
    assert same_bits(graph, MODEL)


def test_the_prefixes_have_keys_near_those_of_their_sum() -> None:
    names = added(normalise(staircase(8), [("end", 0)]))
    assert names == {("end-prefix", 0, number) for number in range(len(names))}


@pytest.mark.parametrize("terms", range(2, MIN_TERMS + 1))
def test_short_sums_stay_whole(terms: int) -> None:
    assert not added(normalise(staircase(terms), [("end", 0)]))


def test_a_sum_just_long_enough_is_cut() -> None:
    graph = normalise(staircase(MIN_TERMS + 1), [("end", 0)])
    assert added(graph)
    assert same_bits(graph, MODEL)


def test_sums_whose_terms_take_no_time_stay_whole() -> None:
    graph = normalise(staircase(20), [("end", 0)])
    assert cut(graph, CostModel()) is graph


def test_sums_whose_terms_all_come_at_once_stay_whole() -> None:
    a = positive_definite(8)
    assert not added(graph_of(a @ a))
    dsk = staircase(10)
    for i in range(10):
        dsk["term", i] = Task(("term", i), np.multiply, TaskRef(("step", 3)), i)
    assert not added(normalise(dsk, [("end", 0)]))


def test_sums_whose_terms_come_in_another_order_stay_whole() -> None:
    dsk = staircase(10)
    terms = [TaskRef(("term", i)) for i in reversed(range(10))]
    dsk["end", 0] = Task(("end", 0), sum, List(*terms))
    assert not added(normalise(dsk, [("end", 0)]))


def test_a_sum_stays_whole_if_a_term_is_read_elsewhere() -> None:
    dsk = staircase(10)
    dsk["other"] = Task("other", operator.neg, TaskRef(("term", 4)))
    assert added(normalise(dsk, [("end", 0)]))
    assert not added(normalise(dsk, [("end", 0), "other"]))


def test_a_sum_stays_whole_if_a_term_is_wanted() -> None:
    assert not added(normalise(staircase(10), [("end", 0), ("term", 4)]))


def test_a_sum_stays_whole_if_a_term_is_in_it_twice() -> None:
    dsk = staircase(10)
    terms = [TaskRef(("term", min(i, 8))) for i in range(10)]
    dsk["end", 0] = Task(("end", 0), sum, List(*terms))
    assert not added(normalise(dsk, [("end", 0)]))


def test_a_sum_of_data_stays_whole() -> None:
    dsk: dict[Any, Any] = {("term", i): DataNode(("term", i), np.ones(3)) for i in range(10)}
    dsk["end"] = Task("end", sum, List(*map(TaskRef, list(dsk))))
    assert not added(normalise(dsk, "end"))


def test_the_graph_that_was_given_stays_as_it_is() -> None:
    graph = normalise(staircase(20), [("end", 0)])
    before = dict(graph.tasks)
    assert cut(graph) is not graph
    assert graph.tasks == before


def test_what_is_expected_of_prefixes_is_known() -> None:
    graph = normalise(staircase(20), [("end", 0)])
    order = topological(graph, set())
    guessed = guess(graph, order, MODEL.speed)
    whole, expected = cut_folds(graph, order, frozenset([("end", 0)]), guessed, MODEL)
    assert expected.seconds.keys() >= whole.tasks.keys()
    for key in whole.tasks.keys() - graph.tasks.keys():
        assert expected.nbytes[key] == expected.nbytes["term", 0]
        assert expected.seconds[key] > 0
        assert key not in expected.unknown
    topological(whole, set())  # which raises if there is a cycle


def test_a_sum_in_a_legacy_tuple_is_cut() -> None:
    dsk: dict[Any, Any] = staircase(10)
    dsk["end", 0] = (operator.sub, 1.0, (sum, [("term", i) for i in range(10)]))
    graph = normalise(materialise(dsk), [("end", 0)])
    assert added(graph)
    assert same_bits(graph, MODEL)


def test_the_last_term_alone_stays_with_the_reader_of_the_sum() -> None:
    plan = make_plan(normalise(staircase(20), [("end", 0)]), mode="auto", model=MODEL)
    end = plan.graph.tasks["end", 0]
    assert end.dependencies == {("term", 19), ("end-prefix", 0, 0)}


def test_sums_of_numbers_stay_whole() -> None:
    """From Python 3.12 on, the sum of floats is not the sum of its parts."""
    dsk: dict[Any, Any] = {("x", 0): (float, 1)}
    for i in range(1, 8):
        dsk["x", i] = (np.add, ("x", i - 1), 0.1)
    dsk |= {("y", i): (np.multiply, ("x", i), 0.1) for i in range(8)}
    dsk["sum"] = (sum, [("y", i) for i in range(8)])
    graph = normalise(materialise(dsk), "sum")
    assert cut(graph, CostModel(fold_seconds=0.0)) is graph
    assert cut(graph) is not graph  # for nothing but their size
