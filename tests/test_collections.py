"""Every collection computes on Lambda what it computes with Dask's own schedulers."""

from __future__ import annotations

import operator
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from pandas.testing import assert_frame_equal, assert_index_equal, assert_series_equal

from dask_lambda import LambdaScheduler, lambda_get

pytestmark = pytest.mark.local
uses_bucket = True

Point = namedtuple("Point", "x y")


@dataclass
class Record:
    name: str
    value: Any


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    elif isinstance(expected, pd.DataFrame):
        assert_frame_equal(found, expected)
    elif isinstance(expected, pd.Series):
        assert_series_equal(found, expected)
    elif isinstance(expected, pd.Index):
        assert_index_equal(found, expected)
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (float, np.floating)):
        assert found == pytest.approx(expected, rel=1e-12)
    else:
        assert found == expected


def check(make: Callable[[], Any], **kwargs: Any) -> None:
    expected = make().compute(scheduler="sync")
    assert_same(make().compute(scheduler=lambda_get, **kwargs), expected)


def parametrize(cases: dict[str, Callable[[], Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("make", cases.values(), ids=list(cases))


# -- delayed -------------------------------------------------------------------------------------


def inc(x: Any) -> Any:
    return x + 1


def add(x: Any, y: Any = 10, *, scale: int = 1) -> Any:
    return (x + y) * scale


def total(values: Any) -> Any:
    if isinstance(values, dict):
        return total(list(values.values()))
    return sum(total(v) if isinstance(v, (list, dict, tuple, set)) else v for v in values)


@delayed(nout=2)
def both(x: int) -> tuple[int, int]:
    return x, -x


def pair_sum(x: int) -> Any:
    first, second = both(x)
    return first + second * 3


one, two = delayed(inc)(0), delayed(inc)(1)


@parametrize(
    {
        "a call": lambda: delayed(add)(1, 2),
        "keywords": lambda: delayed(add)(one, y=two, scale=delayed(3)),
        "a chain": lambda: delayed(inc)(delayed(inc)(one)),
        "a diamond": lambda: delayed(add)(delayed(inc)(one), delayed(add)(one, two)),
        "operators": lambda: (one + two) * 4 - one**2,
        "items and attributes": lambda: delayed({"a": 3 + 4j})["a"].imag,
        "methods": lambda: delayed("a-b").replace("-", "+").upper(),
        "several outputs": lambda: pair_sum(5),
        "a list of delayed": lambda: delayed(total)([one, [two, [one, 5]]]),
        "a dict of delayed": lambda: delayed(total)({"a": one, "b": {"c": two}}),
        "a tuple and a set": lambda: delayed(total)((one, {two, 7})),
        "a container as the result": lambda: delayed({"x": [one, (two, 3)], "y": {one}}),
        "a named tuple": lambda: delayed(Point(one, [two])),
        "a dataclass": lambda: delayed(Record("r", [one, two])),
        "a slice": lambda: delayed(list(range(9)))[one : delayed(8) : two],
        "containers left alone": lambda: delayed([1, [2, {"k": 3}]], traverse=False),
        "a pure function": lambda: delayed(inc, pure=True)(1) + delayed(inc, pure=True)(1),
        "a lambda": lambda: delayed(lambda x, *rest, **more: (x, rest, more))(1, two, z=one),
        "None": lambda: delayed(print)(end=""),
        "a function as the result": lambda: delayed(delayed(lambda: operator.mul)())(6, 7),
        "a class": lambda: delayed(complex)(one, two).conjugate(),
        "an array": lambda: delayed(da.arange(6, chunks=2)).reshape(2, 3),
        "a dataframe": lambda: delayed(len)(dd.from_dict({"a": range(5)}, npartitions=2)),
    }
)
def test_delayed(make: Callable[[], Any]) -> None:
    check(make)


def test_a_function_that_is_defined_inside_a_function_keeps_its_closure() -> None:
    offset = np.arange(3)

    def shift(x: Any) -> Any:
        return x + offset

    assert delayed(shift)(10).compute(scheduler=lambda_get).tolist() == [10, 11, 12]


# -- bag -----------------------------------------------------------------------------------------

numbers = db.from_sequence(range(20), npartitions=4)
words = db.from_sequence(
    ["the", "quick", "fox", "and", "the", "lazy", "dog", "and", "the", "end"], npartitions=3
)


@parametrize(
    {
        "map": lambda: numbers.map(inc),
        "map with a broadcast argument": lambda: numbers.map(add, y=numbers.sum()),
        "filter": lambda: numbers.filter(lambda x: x % 3 == 0),
        "map_partitions": lambda: numbers.map_partitions(lambda part: [sum(part)]),
        "fold": lambda: numbers.fold(operator.add, initial=0),
        "reduction": lambda: numbers.reduction(max, max, split_every=2),
        "statistics": lambda: numbers.std(),
        "frequencies": lambda: words.frequencies(sort=True),
        "topk": lambda: words.topk(3, key=len),
        "distinct": lambda: words.distinct().map(str.upper).count(),
        "groupby": lambda: numbers.groupby(lambda x: x % 3, shuffle="tasks").map(
            lambda group: (group[0], sorted(group[1]))
        ),
        "foldby": lambda: words.foldby(len, lambda n, _: n + 1, 0, operator.add, 0),
        "join": lambda: numbers.join([(1, 2), (4, 8)], lambda x: x, lambda y: y[0]),
        "product": lambda: numbers.filter(lambda x: x < 2).product(words),
        "zip": lambda: db.zip(numbers, numbers.map(inc)),
        "concat": lambda: db.concat([numbers, numbers]).repartition(2),
        "accumulate": lambda: numbers.accumulate(operator.add),
        "to_dataframe": lambda: numbers.map(lambda x: {"a": x}).to_dataframe(meta={"a": "i8"}),
        "an empty partition": lambda: numbers.filter(lambda x: x > 15),
    }
)
def test_bag(make: Callable[[], Any]) -> None:
    check(make)


# -- array ---------------------------------------------------------------------------------------


def random(*shape: int, chunks: Any = 4) -> da.Array:
    return da.random.default_rng(7).random(shape, chunks=chunks)


def definite(n: int) -> da.Array:
    x = np.random.default_rng(3).random((n, n))
    return da.from_array(x @ x.T + n * np.eye(n), chunks=n // 2)


def triangular(n: int) -> da.Array:
    return da.from_array(np.tril(np.ones((n, n))) + n * np.eye(n), chunks=n // 2)


@parametrize(
    {
        "elementwise": lambda: da.sqrt(random(8, 8)) + 2 * random(8) - 1,
        "comparison and where": lambda: da.where(random(8, 8) > 0.5, 1, -1),
        "a sum": lambda: random(8, 8).sum(),
        "reductions over an axis": lambda: random(8, 8).mean(axis=0) + random(8, 8).std(axis=1),
        "argmax": lambda: random(8, 8).argmax(axis=1),
        "cumsum": lambda: random(8, 8).cumsum(axis=0),
        "matmul": lambda: random(8, 8) @ random(8, 8).T,
        "tensordot": lambda: da.tensordot(random(4, 4, 4), random(4, 4, 4), axes=2),
        "einsum": lambda: da.einsum("ij,jk->ik", random(8, 8), random(8, 8)),
        "cholesky": lambda: da.linalg.cholesky(definite(8), lower=True),
        "qr": lambda: da.linalg.qr(random(12, 3, chunks=(4, 3)))[1],
        "svd": lambda: da.linalg.svd(random(12, 3, chunks=(4, 3)))[1],
        "solve": lambda: da.linalg.solve(definite(8), random(8), assume_a="pos"),
        "solve_triangular": lambda: da.linalg.solve_triangular(
            triangular(8), random(8), lower=True
        ),
        "lu": lambda: da.linalg.lu(definite(8))[2],
        "norm": lambda: da.linalg.norm(random(8, 8)),
        "rechunk": lambda: random(8, 8).rechunk((3, 5)),
        "slices": lambda: random(8, 8)[1:7:2, ::-1][[0, 2, 1]],
        "a boolean index": lambda: random(8)[random(8) > 0.3],
        "reshape and transpose": lambda: da.arange(16, chunks=4).reshape(4, 4).T,
        "concatenate and stack": lambda: da.stack([da.concatenate([random(4), random(6)])] * 2),
        "from_array": lambda: da.from_array(np.arange(30).reshape(5, 6), chunks=(2, 4)) * 2,
        "random": lambda: da.random.RandomState(5).normal(size=(6, 6), chunks=3),
        "fft": lambda: da.fft.fft(random(4, 8, chunks=(2, 8))),
        "gufunc": lambda: da.apply_gufunc(
            lambda x: x.max(axis=-1), "(i)->()", random(6, 4, chunks=(2, 4))
        ),
        "map_blocks": lambda: random(8).map_blocks(
            lambda b, block_id: b + block_id[0], dtype=float
        ),
        "map_overlap": lambda: random(12).map_overlap(lambda b: b[1:-1], depth=1, trim=False),
        "histogram": lambda: da.histogram(random(20), bins=4, range=(0, 1))[0],
        "unique": lambda: da.unique(da.from_array(np.arange(20) % 7, chunks=6)),
        "structured": lambda: da.from_array(np.array([(1, 2.0)] * 4, "i4,f8"), chunks=2)["f1"],
        "one number": lambda: da.from_array(np.float64(3)) + 1,
        "an empty array": lambda: da.zeros((0, 3), chunks=2).sum(axis=0),
    }
)
def test_array(make: Callable[[], Any]) -> None:
    check(make)


# -- dataframe -----------------------------------------------------------------------------------

table = pd.DataFrame(
    {
        "key": [3, 1, 2, 3, 1, 2, 3, 1, 2, 0, 5, 4],
        "name": list("abcabcabcxyz"),
        "value": np.linspace(0, 1, 12),
    }
)
other = pd.DataFrame({"key": [1, 2, 3, 7], "extra": [10.0, 20.0, 30.0, 70.0]})


def frame() -> Any:
    return dd.from_pandas(table, npartitions=3)


def sorted_rows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values(["key", "value"], ignore_index=True)


@parametrize(
    {
        "elementwise": lambda: frame().assign(twice=lambda t: t.value * 2),
        "a filter": lambda: frame()[frame().value > 0.4],
        "a reduction": lambda: frame().value.sum(),
        "the length": lambda: frame().map_partitions(len),
        "describe": lambda: frame().value.describe(),
        "groupby": lambda: frame().groupby("key").value.mean(),
        "groupby with several outputs": lambda: (
            frame().groupby("name").agg({"value": ["sum", "max"], "key": "count"}, split_out=2)
        ),
        "groupby with apply": lambda: (
            frame().groupby("key").value.apply(lambda v: v.max() - v.min(), meta=("value", "f8"))
        ),
        "merge": lambda: frame().merge(
            dd.from_pandas(other, npartitions=2), on="key", shuffle_method="tasks"
        ),
        "set_index": lambda: frame().set_index("key").value.cumsum(),
        "sort_values": lambda: frame().sort_values("value", ascending=False),
        "drop_duplicates": lambda: frame()[["key"]].drop_duplicates(),
        "value_counts": lambda: frame().name.value_counts(sort=True),
        "repartition": lambda: frame().repartition(npartitions=5),
        "nlargest": lambda: frame().nlargest(3, "value"),
        "to an array": lambda: frame()[["key", "value"]].to_dask_array(lengths=True),
        "strings": lambda: frame().name.str.upper(),
        "its index": lambda: frame().index,
    }
)
def test_dataframe(make: Callable[[], Any]) -> None:
    check(make)


# -- ways to ask ---------------------------------------------------------------------------------


def everything() -> list[Any]:
    # In the order array, bag, delayed, dataframe: Dask 2026.8 itself mixes the results up in any
    # other one, with every scheduler.
    return [
        random(8, 8).sum(axis=0),
        {"nested": [random(4).sum(), 5]},
        numbers.map(inc),
        delayed(inc)(one),
        frame().groupby("key").value.sum(),
    ]


@pytest.mark.filterwarnings("ignore:Computing mixed collections")
@pytest.mark.parametrize("optimize_graph", [True, False])
def test_collections_of_all_kinds_are_computed_at_once(optimize_graph: bool) -> None:
    expected = dask.compute(*everything(), scheduler="sync")
    found = dask.compute(*everything(), scheduler=lambda_get, optimize_graph=optimize_graph)
    assert isinstance(expected[-1], pd.Series)
    assert_same(found, expected)


@pytest.mark.parametrize(
    "make", [lambda: random(8, 8) @ random(8, 8), lambda: words.frequencies(), frame]
)
def test_a_graph_that_is_not_optimised_gives_the_same(make: Callable[[], Any]) -> None:
    check(make, optimize_graph=False)


def test_the_name_and_the_settings_choose_the_scheduler() -> None:
    assert one.compute(scheduler="lambda") == 1
    with dask.config.set(scheduler="lambda"):
        assert dask.base.get_scheduler() == lambda_get
        assert one.compute() == 1
        assert_same(random(4).compute(), random(4).compute(scheduler="sync"))
    with dask.config.set(scheduler=lambda_get):
        assert two.compute() == 2


def test_a_scheduler_is_a_context_manager_and_may_be_used_again() -> None:
    scheduler = LambdaScheduler(concurrency=None)
    for _ in range(2):
        with scheduler as inside:
            assert inside is scheduler
            assert one.compute() == 1
            assert scheduler.last_report is not None
            assert scheduler.last_report.invocations == 1
        assert dask.config.get("scheduler") is None
    assert two.compute(scheduler=scheduler) == 2
    assert two.compute(scheduler=scheduler.get) == 2
    scheduler.close()


def test_keywords_of_other_schedulers_are_ignored() -> None:
    assert one.compute(scheduler=lambda_get, num_workers=3, rerun_exceptions_locally=True) == 1


GRAPH = {
    "a": 1,
    ("b", 0): (inc, "a"),
    "c": (total, ["a", ("b", 0), ["a", "a"]]),
    "d": "c",
    "e": [("b", 0), "d", ["a"]],
}


@pytest.mark.parametrize(
    "keys",
    ["c", "a", "d", "e", ("b", 0), ["c"], [["a", "c"], [["d"], []]], ["c", "c"], [[[]]]],
    ids=repr,
)
def test_results_are_nested_as_the_keys_are(keys: Any) -> None:
    assert lambda_get(GRAPH, keys) == dask.get(GRAPH, keys)


# -- what tasks may do to their data -------------------------------------------------------------


def fill(x: np.ndarray, value: float) -> tuple[float, bool]:
    seen = float(x[0])
    x[:] = value
    return seen, bool((x == value).all())


SIZES = {"inline": 10, "through S3": 20_000, "uploaded": 100_000}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_task_may_change_its_input_without_another_one_seeing_it(size: int) -> None:
    made = delayed(np.zeros)(size)
    literal = np.zeros(size)
    shared = delayed(np.zeros(size))
    blocks = da.from_array(np.zeros(size), chunks=-1).to_delayed()[0]
    inputs = [made] * 3 + [literal] * 3 + [shared] * 3 + [blocks] * 3
    outcomes = dask.compute(
        *[delayed(fill)(x, number + 1) for number, x in enumerate(inputs)], scheduler=lambda_get
    )
    assert outcomes == ((0.0, True),) * len(inputs)
    assert not literal.any()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_results_are_writable_and_the_callers_own(size: int) -> None:
    x = da.ones(size, chunks=-1)
    y = delayed(np.ones)(size)
    first, second, third = dask.compute(x, y, y, scheduler=lambda_get)
    for found in (first, second):
        found[:] = 5
        assert found.sum() == 5 * size
    assert third is second  # as with Dask's own schedulers
    again = y.compute(scheduler=lambda_get)
    assert again.sum() == size
