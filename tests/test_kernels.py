"""What is known of the functions in a task, and how much they make of what they read."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import dask.array as da
import dask.bag as db
import numpy as np
import pytest
import toolz
from dask._task_spec import List, Task, TaskRef

from dask_lambda.kernels import Catalogue, Family, Speed, kernel_of, size_of
from tests.helpers import graph_of, shown

SPEED = Speed(flops=1e9, bytes=1e9)


def mine(*args: Any, **kwargs: Any) -> Any:
    return args


def task(function: Any, *args: Any, **kwargs: Any) -> Task:
    return Task("t", function, *args, **kwargs)


def kernels_of(collection: Any) -> dict[str, bool]:
    """For each layer of a collection whether it is known."""
    return {str(key): kernel_of(node).known for key, node in graph_of(collection).tasks.items()}


# -- whose functions they are --------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        np.add,
        np.linalg.cholesky,
        np.concatenate,
        np.dot,
        operator.getitem,
        operator.add,
        sum,
        len,
        functools.partial(np.sum, axis=0),
        toolz.compose(np.sqrt, np.sum),
        toolz.first,
    ],
    ids=shown,
)
def test_functions_of_numpy_python_and_toolz_are_known(function: Callable[..., Any]) -> None:
    assert kernel_of(task(function, TaskRef("x"))).known


class Method:
    def method(self, x: Any) -> Any:
        return x

    def __call__(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    "function",
    [
        mine,
        lambda x: x,
        Method(),
        Method().method,
        Method,
        functools.partial(mine, 1),
        functools.partial(np.apply_along_axis, mine, 0),
        functools.partial(np.piecewise, funclist=mine),
        toolz.compose(np.sqrt, mine),
        toolz.curry(mine),
        np.vectorize(mine),
        np.frompyfunc(mine, 1, 1),
        operator.methodcaller("sample"),
        operator.attrgetter("property"),
        getattr,
        open,
        eval,
        map,
    ],
    ids=shown,
)
def test_what_runs_the_users_code_or_reads_files_is_not_known(
    function: Callable[..., Any],
) -> None:
    assert not kernel_of(task(function, TaskRef("x"))).known


def test_a_function_among_the_arguments_counts() -> None:
    assert not kernel_of(task(np.apply_along_axis, mine, 0, TaskRef("x"))).known
    assert not kernel_of(task(np.apply_along_axis, func1d=mine, arr=TaskRef("x"))).known
    assert not kernel_of(task(toolz.pipe, TaskRef("x"), np.sqrt, mine)).known
    assert not kernel_of(task(np.add, 1, task(mine, TaskRef("x")))).known
    assert not kernel_of(task(sum, List(task(mine, TaskRef("x"))))).known
    assert kernel_of(task(toolz.pipe, TaskRef("x"), np.sqrt)).known


@pytest.mark.parametrize("name", ["normal", "random", "shuffle", "rand"])
def test_random_numbers_without_a_seed_in_the_graph_are_not_known(name: str) -> None:
    source = np.random if name in ("shuffle", "rand") else np.random.default_rng(0)
    assert not kernel_of(task(getattr(source, name), 3)).known


def test_random_arrays_hold_their_seed_and_are_known() -> None:
    x = da.random.default_rng(1).normal(size=(100, 100), chunks=50)
    assert set(kernels_of(x).values()) == {True}
    x = da.random.RandomState(1).normal(size=(100, 100), chunks=50)
    assert set(kernels_of(x).values()) == {True}


def test_bags_are_not_known() -> None:
    bag = db.from_sequence(range(10), npartitions=2).map(mine)
    assert not any(kernels_of(bag).values())


def test_blocks_that_the_users_function_makes_are_not_known() -> None:
    x = da.ones((4, 4), chunks=2)
    for found in (
        x.map_blocks(mine, dtype=float),
        x.map_overlap(mine, depth=1, dtype=float),
        da.blockwise(mine, "ij", x, "ij", dtype=float),
        da.apply_along_axis(mine, 0, x, dtype=float, shape=()),
        da.fromfunction(mine, shape=(4, 4), chunks=2, dtype=float),
    ):
        assert False in kernels_of(found).values()


class Foreign:
    """An array in a file, say."""

    shape, dtype, ndim = (4, 4), np.dtype(float), 2

    def __getitem__(self, index: Any) -> Any:
        return np.ones((4, 4))[index]


def test_reading_a_foreign_array_is_not_known() -> None:
    x = da.from_array(Foreign(), chunks=2)
    assert False in kernels_of(x).values()
    assert False in kernels_of(x + 1).values()
    assert False in kernels_of(x[:1, 2:]).values()


def test_dasks_linear_algebra_is_known() -> None:
    a = da.from_array(np.eye(40), chunks=20)
    for found in (a @ a, da.linalg.cholesky(a), da.linalg.lu(a)[2], a.T + 1, a.sum(), a.std()):
        assert set(kernels_of(found).values()) == {True}
    q, r = da.linalg.qr(a.rechunk((20, 40)))
    assert set(kernels_of(q).values()) == set(kernels_of(r).values()) == {True}


def test_a_kernel_is_found_once_for_each_layer() -> None:
    catalogue = Catalogue()
    x = task(np.add, TaskRef("x"), 1)
    assert catalogue.kernel(("a", 0), x) is catalogue.kernel(("a", 1), x)
    assert catalogue.kernel(("b", 0), x) is not catalogue.kernel(("a", 0), x)


# -- families, sizes and seconds -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "family"),
    [
        (np.transpose, Family.VIEW),
        (np.add, Family.ELEMENTWISE),
        (np.sum, Family.REDUCE),
        (np.concatenate, Family.JOIN),
        (np.dot, Family.PRODUCT),
        (np.linalg.qr, Family.FACTOR),
        (np.zeros, Family.CREATE),
    ],
)
def test_functions_have_families(function: Any, family: Family) -> None:
    assert kernel_of(task(function, TaskRef("x"))).families == (family,)


def test_an_item_of_a_tuple_is_told_from_a_slice() -> None:
    assert kernel_of(task(operator.getitem, TaskRef("x"), 1)).is_item
    assert not kernel_of(task(operator.getitem, TaskRef("x"), (slice(1),))).is_item


@pytest.mark.parametrize(
    ("collection", "nbytes"),
    [
        (da.random.default_rng(0).random((100, 200), chunks=(100, 200)), 160_000),
        (da.arange(1000, chunks=1000), 8_000),
        (da.linspace(0, 1, 1000, chunks=1000), 8_000),
        (da.eye(100, chunks=100), 80_000),
        (da.zeros((100, 200), chunks=(100, 200)), 160_000),
        (da.full((100, 200), 3.0, chunks=(100, 200)) + 1, 160_000),
    ],
    ids=["random", "arange", "linspace", "eye", "zeros", "full"],
)
def test_the_size_of_what_is_made_of_nothing_is_known(collection: Any, nbytes: int) -> None:
    (made,) = graph_of(collection).tasks.values()
    assert kernel_of(made).output_bytes(made, []) == nbytes


def test_sizes_follow_from_what_is_read() -> None:
    def size(function: Any, *reads: int) -> int | None:
        it = task(function, *(TaskRef(f"x{i}") for i in range(len(reads))))
        return kernel_of(it).output_bytes(it, list(reads))

    assert size(np.add, 800, 8) == 800
    assert size(np.concatenate, 800, 200) == 1000
    assert size(np.sum, 800) == 800
    assert size(np.sum, 2**24) == 2**16
    assert size(np.add) is None


def test_what_follows_the_first_item_of_a_tuple_is_smaller() -> None:
    first, second = (task(operator.getitem, TaskRef("x"), i) for i in (0, 1))
    assert kernel_of(first).output_bytes(first, [6400]) == 6400
    assert kernel_of(second).output_bytes(second, [6400]) == 100


def test_a_product_takes_the_cube_of_the_side_and_a_sum_its_square() -> None:
    product, addition = kernel_of(task(np.dot, TaskRef("x"))), kernel_of(task(np.add, TaskRef("x")))
    small, large = 8 * 1000**2, 8 * 2000**2
    assert product.seconds([small, small], small, SPEED) == pytest.approx(2.0, rel=1e-3)
    assert product.seconds([large, large], large, SPEED) == pytest.approx(16.0, rel=1e-3)
    assert addition.seconds([small, small], small, SPEED) == pytest.approx(0.024, rel=1e-2)
    assert addition.seconds([large, large], large, SPEED) == pytest.approx(0.096, rel=1e-2)


def test_more_memory_is_more_speed() -> None:
    assert Speed.of(1769).flops == Speed.of(512).flops == Speed().flops
    assert Speed.of(3538).flops == pytest.approx(2 * Speed().flops)


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [(np.zeros(100), 800), (b"12345", 5), ("12345", 5), (np.float64(1), 8)],
)
def test_the_size_of_data_is_read_off_it(value: Any, nbytes: int) -> None:
    assert size_of(value) == nbytes


def test_the_size_of_data_of_any_kind_is_small() -> None:
    assert size_of(object()) == size_of([np.zeros(1000)]) < 1000


class Odd:
    nbytes = "many"


def test_a_size_that_is_not_a_number_is_ignored() -> None:
    assert size_of(Odd()) < 1000
