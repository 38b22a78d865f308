"""``map``, reductions and iterations of an executor, over the embedded AWS."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from itertools import count, islice, repeat
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from dask_lambda.errors import InvocationError
from tests.executor_helpers import (
    LARGE,
    WAIT,
    _keys,
    add,
    client_gets,
    double,
    executor,
    gate,
    joined,
    make,
    marks,
    ones,
)
from tests.helpers import eventually

__all__ = ["_keys", "executor", "gate", "make", "marks"]

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("without_lease")]
uses_bucket = True
settings_of_hypothesis = hypothesis.settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


# -- map ---------------------------------------------------------------------------------------


def test_map_returns_results_in_order(executor):
    assert list(executor.map(double, range(100))) == [2 * i for i in range(100)]
    assert list(executor.map(pow, [2, 3, 4], repeat(2))) == [4, 9, 16]
    assert list(executor.map(add, range(7), range(7), chunksize=3)) == [2 * i for i in range(7)]
    assert list(executor.starmap(pow, [(2, 5), [3, 2]])) == [32, 9]
    assert list(executor.map(double, [])) == []


def test_map_takes_futures(executor):
    futures = [executor.submit(double, i) for i in range(4)]
    assert list(executor.map(double, futures)) == [0, 4, 8, 12]
    assert list(executor.map(double, futures, chunksize=2)) == [0, 4, 8, 12]


def test_map_reads_endless_iterables_only_so_far_ahead(executor):
    taken = count()
    results = executor.map(double, taken, buffersize=10)
    assert next(taken) == 10
    assert list(islice(results, 25)) == [2 * i for i in [*range(10), *range(11, 26)]]
    assert next(taken) <= 25 + 10 + 2
    results.close()
    assert list(results) == []


def test_map_in_chunks_reads_so_many_of_them_ahead(executor):
    taken = count()
    results = executor.map(double, taken, buffersize=3, chunksize=4)
    assert next(taken) == 12
    assert next(results) == 0


def test_maps_timeout_counts_from_the_call(executor, gate):
    results = executor.map(gate, [1, 2], timeout=0.2)
    with pytest.raises(TimeoutError):
        next(results)
    gate.open()
    with pytest.raises(StopIteration):
        next(results)


def test_an_exception_in_map_gives_up_the_rest(make, marks):
    executor = make(1)

    def call(i: int) -> int:
        marks(i)
        return 1 // (i - 1)

    results = executor.map(call, count(), buffersize=400)
    assert next(results) == -1
    with pytest.raises(ZeroDivisionError):
        next(results)
    executor.shutdown()
    assert len(marks.names()) < 400
    assert list(results) == []


def test_a_call_that_raises_stopiteration_does_not_look_like_the_end_of_the_results(executor):
    def first(items: list[int]) -> int:
        return next(iter(items))

    results = executor.map(first, [[1], [], [3]])
    assert next(results) == 1
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        next(results)


def test_an_exception_of_the_iterable_reaches_who_reads(executor):
    def broken() -> Iterator[int]:
        yield 1
        raise LookupError("broken")

    with pytest.raises(LookupError, match="broken"):
        executor.map(double, broken())


def test_dropping_the_iterator_gives_up_the_rest(make, gate, marks):
    executor = make(1)

    def call(i: int) -> None:
        marks(i)
        if i:
            gate()

    results = executor.map(call, range(50), buffersize=50)
    next(results)
    del results
    gate.open()
    executor.shutdown()
    assert len(marks.names()) < 50


def test_map_whose_calls_are_all_made_needs_no_reader(executor, caplog, marks):
    executor.map(marks, range(3), buffersize=3)
    assert not caplog.text
    assert eventually(lambda: marks.names() == {"0", "1", "2"})


def test_map_says_that_nobody_reads_its_results(executor, caplog, marks):
    executor.map(marks, range(10), buffersize=3)
    assert "the first 3 calls are made" in caplog.text
    assert eventually(lambda: marks.names() == {"0", "1", "2"})


@pytest.mark.parametrize("wrong", [{"chunksize": 0}, {"buffersize": 0}, {"chunksize": 1.5}])
def test_map_refuses_sizes_that_are_none(executor, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        executor.map(double, [1], **wrong)


# -- PyWren's vocabulary -----------------------------------------------------------------------


def widest(parts: list[Any]) -> Any:
    """Join lists; tell the length of the longest list of parts that there was, too."""
    width = max([len(parts), *(part[1] for part in parts)])
    return joined([part[0] for part in parts]), width


@settings_of_hypothesis
@given(st.integers(0, 40), st.one_of(st.none(), st.integers(2, 9)))
def test_a_reduction_keeps_the_order_whatever_its_tree_is(executor, leaves, split_every):
    values = [([i], 1) for i in range(leaves)]
    if not leaves:
        assert executor.reduce(joined, [], split_every=split_every).result(WAIT) == []
        return
    result, width = executor.reduce(widest, values, split_every=split_every).result(WAIT)
    assert result == list(range(leaves))
    assert width <= (split_every or leaves)


def test_a_reduction_takes_futures_and_starts_where_its_inputs_are_done(executor, gate, marks):
    def noted(parts: list[int]) -> int:
        marks(min(parts))
        return sum(parts)

    futures = [executor.submit(double, i) for i in range(2)] + [executor.submit(gate, 10)]
    total = executor.reduce(noted, [*futures, 7], split_every=2)
    assert eventually(lambda: marks.names() == {"0"})
    assert not total.done()
    gate.open()
    assert total.result(WAIT) == 19


def test_map_reduce_leaves_everything_but_the_result_on_lambda(executor):
    before = client_gets(executor)
    total = executor.map_reduce(ones, repeat(LARGE, 5), sum, split_every=2)
    assert total.result(WAIT).sum() == 5 * LARGE
    assert client_gets(executor) == before + 1


@pytest.mark.parametrize("wrong", [1, 0, 2.5, True])
def test_a_reduction_refuses_lists_that_are_too_short(executor, wrong):
    with pytest.raises(ValueError, match="split_every"):
        executor.reduce(sum, [1], split_every=wrong)


def counted(k: int, x: Any, offset: Any) -> Any:
    if k == offset:
        raise LookupError(f"at {k}")
    return (0 if x is None else x) + 1


def test_iterations_go_on_by_themselves_and_end_by_themselves(executor):
    chains = executor.iterate(counted, 6, [100, 3, 0, 5])
    assert chains[0].result(WAIT) == 6
    for chain, k in zip(chains[1:], [3, 0, 5], strict=True):
        with pytest.raises(LookupError, match=f"at {k}"):
            chain.result(WAIT)
    assert [chain.k for chain in chains] == [6, 3, 0, 5]


def told(k: int, x: Any, arg: Any) -> Any:
    return [*(x or []), (k, arg)]


def test_each_step_gets_its_number_the_last_state_and_the_argument(executor):
    arg = executor.submit(double, 2)
    (chain,) = executor.iterate(told, 3, [arg], history=True)
    assert chain.result(WAIT) == [(0, 4), (1, 4), (2, 4)]
    assert [each.result(WAIT) for each in chain.history] == [
        [(0, 4)],
        [(0, 4), (1, 4)],
        [(0, 4), (1, 4), (2, 4)],
    ]
    (single,) = executor.iterate(told, 1, ["a"])
    assert single.result(WAIT) == [(0, "a")]
    with pytest.raises(ValueError, match="history=True"):
        _ = single.history


def grown(k: int, x: Any, data: Any) -> Any:
    return data if x is None else x + data


def test_states_of_iterations_stay_in_s3_and_arguments_go_there_once(executor, bucket_names):
    gets, puts = client_gets(executor), executor.report.s3_puts
    (chain,) = executor.iterate(grown, 4, [np.ones(LARGE)])
    wait([chain], WAIT)
    assert client_gets(executor) == gets
    assert executor.report.s3_puts == puts + 1 + 4
    assert eventually(lambda: len(bucket_names()) == 1)
    assert chain.result().sum() == 4 * LARGE


def test_endless_iterations_need_few_tasks_and_can_be_given_up(executor, gate):
    (chain,) = executor.iterate(counted, 10**9, [-1])
    reader = executor.submit(double, chain)
    assert eventually(lambda: chain.k > 10)
    assert chain.running()
    assert len(executor._calling._delivery.pending) < 10
    assert chain.cancel()
    assert wait([chain, reader], WAIT).not_done == set()
    assert reader.cancelled()
    assert eventually(lambda: not executor._calling._delivery.pending)


def test_results_of_iterations_are_arguments_like_any_other(executor):
    chains = executor.iterate(counted, 9, [100, 200, 4])
    total = executor.reduce(sum, chains[:2])
    failed = executor.submit(double, chains[2])
    assert total.result(WAIT) == 18
    with pytest.raises(LookupError, match="at 4"):
        failed.result(WAIT)


def test_calls_and_iterations_wait_for_what_itself_waits_for_iterations(executor):
    chains = executor.iterate(counted, 5, repeat(100, 7))
    total = executor.reduce(sum, chains, split_every=2)
    (again,) = executor.iterate(told, 3, [executor.submit(double, total)])
    third = executor.submit(double, executor.iterate(counted, 3, [again])[0])
    assert total.result(WAIT) == 35
    assert again.result(WAIT) == [(0, 70), (1, 70), (2, 70)]
    assert third.result(WAIT) == 6


def test_any_number_of_calls_waits_for_an_iteration_in_turn(executor, gate):
    def stopped(k: int, x: Any, arg: Any) -> None:
        raise LookupError(gate("it goes on"))

    (last,) = executor.iterate(stopped, 3, [1])
    for _ in range(1500):
        last = executor.submit(double, last)
    gate.open()
    with pytest.raises(LookupError):
        last.result(WAIT)


def test_what_waits_for_an_iteration_can_be_given_up_with_all_that_waits_for_it(executor, gate):
    (chain,) = executor.iterate(counted, 10**9, [-1])
    reader = executor.submit(double, chain)
    second = executor.submit(double, reader)
    (further,) = executor.iterate(told, 2, [second])
    assert reader.cancel()
    assert further.cancel()
    assert not chain.done()
    assert chain.cancel()
    assert wait([chain, reader, second, further], WAIT).not_done == set()
    assert second.cancelled()
    assert eventually(lambda: not executor._calling._delivery.pending)


def test_shutdown_waits_for_iterations(make):
    with make() as executor:
        (chain,) = executor.iterate(counted, 7, [100])
    assert chain.result() == 7


def test_an_iteration_ends_with_its_session(make):
    executor = make()
    (chain,) = executor.iterate(counted, 10**9, [-1])
    reader = executor.submit(double, chain)
    assert eventually(lambda: chain.k > 2)
    executor._calling.abandon()
    for future in (chain, reader):
        with pytest.raises(InvocationError, match="given up"):
            future.result(WAIT)


@pytest.mark.parametrize("wrong", [0, 1.5, True])
def test_iterations_are_a_number(executor, wrong):
    with pytest.raises(ValueError, match="iterations"):
        executor.iterate(counted, wrong, [1])
