"""Sums of blocks: found in Dask's graphs, split, and accumulated without a bit's difference."""

from __future__ import annotations

import operator
import pickle
from functools import partial
from typing import Any

import dask.array as da
import numpy as np
import pytest
from dask._task_spec import Alias, GraphNode, List, Task, TaskRef
from dask.array.routines import _chunk_sum
from dask.base import collections_to_expr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from lambda_worker.execute import GroupRun
from lambda_worker.folds import find_folds, replace_fold, split_fold
from lambda_worker.protocol import Body


def graph_of(collection: Any) -> dict[Any, Any]:
    return dict(collections_to_expr([collection], True).optimize().__dask_graph__())


def chunk_sum(key: Any, terms: list[Any], dtype: Any = "f8", keepdims: bool = True) -> Task:
    function = partial(_chunk_sum, dtype=np.dtype(dtype), axis=(0,), keepdims=keepdims)
    return Task(key, function, List(*map(TaskRef, terms)))


def nested_sum(key: Any, terms: list[Any]) -> Task:
    return Task(key, operator.neg, Task(None, sum, List(*map(TaskRef, terms))))


def same_bits(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (got.dtype, got.shape, got.strides) == (
            expected.dtype,
            expected.shape,
            expected.strides,
        )
    assert pickle.dumps(got) == pickle.dumps(expected)


# -- finding -------------------------------------------------------------------------------------


def test_the_folds_of_a_matrix_product_are_found_at_each_level():
    x = da.ones((20, 800), chunks=(20, 20))
    found = {}
    for key, task in graph_of(x @ x.T).items():
        for fold in find_folds(task):
            assert set(fold.terms) == task.dependencies
            found.setdefault(key[0].rpartition("-")[0], []).append(len(fold.terms))
    assert {name: sorted(lengths) for name, lengths in found.items()} == {
        "_chunk_sum-partial": [2] + [4] * 12,
        "_chunk_sum-aggregate": [3],
    }


@pytest.mark.parametrize("name", ["cholesky", "lu", "solve", "solve_triangular"])
def test_the_folds_of_factorisations_are_found_in_nested_and_fused_tasks(name):
    a = da.from_array(np.eye(80) * 9 + 1, chunks=20)
    collection = {
        "cholesky": lambda: da.linalg.cholesky(a),
        "lu": lambda: da.linalg.lu(a)[2],
        "solve": lambda: da.linalg.solve(a, a[:, :20]),
        "solve_triangular": lambda: da.linalg.solve_triangular(a, a, lower=True),
    }[name]()
    folds = [fold for task in graph_of(collection).values() for fold in find_folds(task)]
    assert any(len(fold.path) > 1 for fold in folds)
    assert all("dot" in key[0] for fold in folds for key in fold.terms)
    assert max(len(fold.terms) for fold in folds) == 3


@pytest.mark.parametrize(
    "task",
    [
        Task("y", sum, TaskRef("x")),  # of what is not a list of keys
        Task("y", sum, List(TaskRef("x"))),  # of one term
        Task("y", sum, List(TaskRef("x"), 1)),
        Task("y", sum, List(TaskRef("x"), Task(None, abs, TaskRef("z")))),
        Task("y", max, List(TaskRef("x"), TaskRef("z"))),
        Task("y", partial(_chunk_sum, axis=(0,)), List(TaskRef("x"), TaskRef("z"))),  # no dtype
        Alias("y", "x"),
    ],
)
def test_other_tasks_have_no_folds(task):
    assert find_folds(task) == []


# -- splitting -----------------------------------------------------------------------------------


def blocks(dtype: Any, shape: tuple[int, ...] = (1, 3)) -> st.SearchStrategy[np.ndarray]:
    elements: dict[str, Any] = {}
    if np.dtype(dtype).kind in "fc":
        elements = {"allow_nan": False}
    return npst.arrays(dtype, shape, elements=elements)


KINDS = ["f8", "f4", "i8", "i2", "u1", "c16", "c8", "?", ">f8"]
ORDERS = [np.ascontiguousarray, np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]]


@st.composite
def terms(draw: Any) -> list[Any]:
    """Lists of arrays, mostly alike, with what Dask's sums may meet besides."""
    shape = draw(st.sampled_from([(1, 3), (1, 2, 2), (1,), (1, 0), (1, 40)]))
    dtype = draw(st.sampled_from(KINDS))
    found = draw(st.lists(blocks(dtype, shape), min_size=2, max_size=6))
    found = [draw(st.sampled_from(ORDERS))(each) for each in found]
    odd = draw(st.sampled_from(["", "", "dtype", "object", "number", "scalar", "layout"]))
    place = draw(st.integers(0, len(found) - 1))
    if odd == "dtype":
        found[place] = draw(blocks(draw(st.sampled_from(KINDS)), shape))
    elif odd == "object":
        found[place] = np.full(shape, 10**30, dtype=object)
    elif odd == "number":
        found[place] = draw(st.integers(-5, 5))
    elif odd == "scalar":
        found = [each.ravel()[0] if each.size else each for each in found]
    elif odd == "layout":
        found = [np.swapaxes(each, 0, -1) for each in found]
    return found


def outcome(task: GraphNode, values: dict[Any, Any]) -> Any:
    with np.errstate(all="ignore"):
        try:
            return task(values)
        except Exception as error:
            return type(error).__name__


@settings(max_examples=300, deadline=None, derandomize=True)
@given(terms(), st.integers(1, 6), st.sampled_from([chunk_sum, nested_sum]))
def test_a_split_sum_has_the_same_bits(values, count, make):
    there = dict(enumerate(values))
    task = make("y", list(there))
    (fold,) = find_folds(task)
    expected = outcome(task, there)
    if isinstance(expected, str):
        return  # what cannot be added up needs no splitting
    first, rest = split_fold(task, fold, "prefix", min(count, len(values)))
    there["prefix"] = outcome(first, there)
    same_bits(outcome(rest, there), expected)


@pytest.mark.parametrize("make", [chunk_sum, nested_sum])
def test_a_split_sum_can_be_split_again_at_either_end(make):
    there: dict[Any, Any] = {i: np.full((1, 3), 0.1 * i - 0.3) for i in range(6)}
    task = make("y", list(range(6)))
    expected = task(there)
    first, rest = split_fold(task, find_folds(task)[0], "p1", 4)
    assert find_folds(rest)[0].terms == ("p1", 4, 5)
    assert find_folds(first)[0].terms == (0, 1, 2, 3)
    second, rest = split_fold(rest, find_folds(rest)[0], "p2", 2)
    zeroth, first = split_fold(first, find_folds(first)[0], "p0", 2)
    for each in (zeroth, first, second):
        there[each.key] = each(there)
    same_bits(rest(there), expected)
    assert rest.key == "y"


def test_the_dimensions_of_a_partial_sum_are_kept():
    task = chunk_sum("y", ["a", "b", "c"], keepdims=False)
    first, rest = split_fold(task, find_folds(task)[0], "p", 2)
    values: dict[Any, Any] = dict.fromkeys("abc", np.ones((1, 3)))
    values["p"] = first(values)
    assert values["p"].shape == (1, 3)
    assert rest(values).shape == (3,)


@pytest.mark.parametrize("count", [0, 3])
def test_only_some_of_the_terms_can_be_split_off(count):
    task = chunk_sum("y", ["a", "b"])
    with pytest.raises(ValueError, match=f"{count} of 2 terms"):
        split_fold(task, find_folds(task)[0], "p", count)


def compute(graph: dict[Any, Any], key: Any) -> Any:
    values: dict[Any, Any] = {}

    def get(key: Any) -> Any:
        if key not in values:
            node = graph[key]
            values[key] = node({d: get(d) for d in node.dependencies})
        return values[key]

    return get(key)


@pytest.mark.parametrize("name", ["cholesky", "lu", "matmul"])
def test_whole_graphs_with_all_folds_split_have_the_same_bits(name):
    random = np.random.default_rng(7).random((80, 80)) + 80 * np.eye(80)
    a = da.from_array(random @ random.T, chunks=10)
    result = {
        "cholesky": lambda: da.linalg.cholesky(a),
        "lu": lambda: da.linalg.lu(a)[2],
        "matmul": lambda: (a @ a).sum(axis=0),
    }[name]()
    graph = graph_of(result)
    split = {}
    for key, task in graph.items():
        for number, fold in enumerate(find_folds(task)):
            if len(fold.terms) > 2:
                prefix_key = ("prefix", key, number)
                split[prefix_key], task = split_fold(task, fold, prefix_key, 2)
        split[key] = task
    assert len(split) > len(graph)
    for key in graph:
        if key[0] == result.name or "finalize" in str(key):
            expected = compute(graph, key)
            same_bits(compute(split, key), expected)


# -- accumulating --------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(terms(), st.sampled_from([chunk_sum, nested_sum]))
def test_a_running_sum_has_the_same_bits_and_leaves_its_terms_alone(values, make):
    task = make("y", list(range(len(values))))
    expected = outcome(task, dict(enumerate(values)))
    before = pickle.dumps(values)
    running, changed = replace_fold(task, find_folds(task)[0], "total")
    with np.errstate(all="ignore"):
        for value in values:
            running.add(value)
    same_bits(outcome(changed, {"total": running}), expected)
    assert pickle.dumps(values) == before


def test_negative_zeros_keep_their_sign_as_in_the_task():
    minus = [np.full((1, 2), -0.0)] * 3
    for make, sign in ((chunk_sum, True), (nested_sum, True)):
        task = make("y", [0, 1, 2])
        running, changed = replace_fold(task, find_folds(task)[0], "total")
        for term in minus:
            running.add(term)
        found = changed({"total": running})
        same_bits(found, task(dict(enumerate(minus))))
        assert np.signbit(found).all() == sign


def test_plain_blocks_are_added_into_one_array():
    running, changed = replace_fold(
        task := chunk_sum("y", list("abcd")), find_folds(task)[0], "total"
    )
    places = set()
    for _ in range(4):
        running.add(np.ones((1, 3)))
        places.add(id(running._head))
    assert len(places) == 2  # the first term, and the sum
    assert (changed({"total": running}) == 4).all()


# -- in a group ----------------------------------------------------------------------------------


class Counted(np.ndarray):
    """Not a plain array."""


def run_group(tasks: list[Any], outputs: list[Any], inputs: dict[Any, Any]) -> list[Any]:
    body = Body(tasks, list(inputs), list(range(len(inputs))), outputs)
    run = GroupRun(body, lambda name, _: inputs[name])
    return [output.value for output in run.outputs()]


def peak_of_terms(make_term: Any, outputs: list[str], *more: Task) -> int:
    """How many terms are alive at once while eight of them are added up in a group."""
    import weakref

    alive: list[Any] = []
    counts = []

    def term(i: int) -> Any:
        value = make_term(i)
        alive.append(weakref.ref(value))
        counts.append(sum(ref() is not None for ref in alive))
        return value

    tasks = [Task(f"t{i}", term, i) for i in range(8)]
    tasks += [chunk_sum("y", [f"t{i}" for i in range(8)]), *more]
    values = run_group(tasks, outputs, {})
    assert values
    return max(counts)


def test_one_term_at_a_time_is_alive_while_a_group_adds_them_up():
    assert peak_of_terms(lambda i: np.full((1, 100), float(i)), ["y"]) <= 2


def test_terms_that_somebody_else_reads_are_all_kept():
    other = Task("z", lambda x: x, TaskRef("t0"))
    assert peak_of_terms(lambda i: np.full((1, 9), float(i)), ["y", "z"], other) == 8


def test_terms_that_are_outputs_are_not_accumulated():
    assert peak_of_terms(lambda i: np.full((1, 9), float(i)), ["t7", "y"]) == 8


def test_unusual_terms_are_all_kept_for_the_task():
    assert peak_of_terms(lambda i: np.full((1, 9), float(i)).view(Counted), ["y"]) == 8


def test_sums_of_sums_have_the_same_bits_in_a_group():
    random = np.random.default_rng(3)
    values = {i: random.random((1, 50)) for i in range(16)}
    make = [Task(f"t{i}", np.copy, TaskRef(i)) for i in range(16)]
    sums = [chunk_sum(f"s{j}", [f"t{4 * j + i}" for i in range(4)]) for j in range(4)]
    top = chunk_sum("y", [f"s{j}" for j in range(4)], keepdims=False)
    tasks = [*make, *sums, top]
    expected: dict[Any, Any] = dict(values)
    for task in tasks:
        expected[task.key] = task(expected)
    (found,) = run_group(tasks, ["y"], values)
    same_bits(found, expected["y"])


def test_inputs_and_terms_of_the_group_are_added_in_their_order_as_they_are_needed():
    values = {"p": np.full((1, 2), 0.1), "q": np.full((1, 2), 1.7), "r": np.ones((1, 2))}
    log = []

    def load(name, reader):
        log.append((name, reader))
        return values[name]

    def make():
        log.append("made")
        return np.full((1, 2), 0.3)

    terms = ["p", "t", "q", "r", "t"]
    tasks = [Task("t", make), chunk_sum("y", terms)]
    run = GroupRun(Body(list(tasks), ["r", "p", "q"], [0, 1, 2], ["y"]), load)
    assert run.needs == ["p", "q", "r"]
    (output,) = run.outputs()
    assert log == ["made", ("p", "y"), ("q", "y"), ("r", "y")]
    same_bits(output.value, tasks[1]({**values, "t": np.full((1, 2), 0.3)}))


def test_an_error_in_a_sum_is_that_of_the_task_that_adds_up():
    from lambda_worker.execute import TaskError

    shapes = {"t0": (1, 2), "t1": (1, 3)}
    tasks = [Task(key, np.zeros, shape) for key, shape in shapes.items()]
    with pytest.raises(TaskError) as info:
        run_group([*tasks, chunk_sum("y", ["t0", "t1"])], ["y"], {})
    assert info.value.key == "y"
    assert isinstance(info.value.__cause__, ValueError)
