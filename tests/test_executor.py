"""Calls of an executor, and their arguments: over the embedded AWS."""

from __future__ import annotations

import os
import pickle
import threading
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
import pytest
from dask._task_spec import TaskRef

from dask_lambda import LambdaExecutor, LambdaFuture
from dask_lambda.errors import (
    ConfigurationError,
    FunctionTimeoutError,
    OutOfMemoryError,
    UnserializableError,
)
from lambda_worker import codec
from tests.executor_helpers import (
    LARGE,
    WAIT,
    _keys,
    add,
    client_gets,
    double,
    executor,
    fail,
    gate,
    make,
    marks,
    ones,
)
from tests.helpers import eventually, notes

__all__ = ["_keys", "executor", "gate", "make", "marks"]

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("without_lease")]
uses_bucket = True


def speak(x: Any) -> Any:
    print("the function says", x)
    if x == "no":
        raise ValueError(x)
    return x


# -- one call ----------------------------------------------------------------------------------


def test_a_call_returns_what_its_function_returns(executor):
    future = executor.submit(add, 1, b=2)
    assert isinstance(future, LambdaFuture)
    assert isinstance(future, Future)
    assert future.result(WAIT) == 3
    assert future.exception() is None
    assert (future.done(), future.running(), future.cancelled()) == (True, False, False)
    assert future.key.startswith("add-")
    assert "finished builtins.int" in repr(future)


def test_an_exception_keeps_its_type_and_has_the_remote_traceback(executor):
    future = executor.submit(fail, 7)
    with pytest.raises(ValueError, match="no 7") as caught:
        future.result(WAIT)
    assert "in fail" in notes(caught.value)
    assert future.key in notes(caught.value)
    assert future.exception() is caught.value
    assert future.report is None


def test_a_future_tells_what_its_call_did(executor):
    future = executor.submit(speak, "hello")
    assert future.logs() == "" or future.done()
    future.result(WAIT)
    report = future.report
    assert report is not None
    assert report.seconds > 0
    assert report.peak_memory_mb > 1
    assert report.cost_usd > 0
    assert report.invocations == 1
    assert report.kind == "builtins.str"
    assert isinstance(report.cold_start, bool)


@pytest.mark.parametrize("said", ["yes", "no"])
def test_the_log_shows_what_the_function_printed_also_when_it_failed(executor, said):
    future = executor.submit(speak, said)
    wait([future], WAIT)
    assert f"the function says {said}" in future.logs()


def test_waiting_ends_with_the_timeout(executor, gate):
    future = executor.submit(gate)
    with pytest.raises(TimeoutError):
        future.result(0.01)
    with pytest.raises(TimeoutError):
        future.exception(0.01)
    gate.open()
    assert future.result(WAIT) is None


def test_what_takes_too_long_is_interrupted(executor, gate):
    future = executor.options(timeout=0.3).submit(gate)
    with pytest.raises(FunctionTimeoutError, match=r"Gate.*0\.3"):
        future.result(WAIT)


def count_to(path: str, enough: int) -> int:
    with open(path, "a+") as file:
        file.write("x")
        file.flush()
        tries = file.tell()
    if tries < enough:
        raise OSError(tries)
    return tries


def test_a_call_that_raises_is_tried_again_as_often_as_it_says(executor, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    assert executor.submit(count_to, first, 3, retries=2).result(WAIT) == 3
    with pytest.raises(OSError, match="2"):
        executor.options(retries=1).submit(count_to, second, 3).result(WAIT)


def environment() -> dict[str, str]:
    return dict(os.environ)


def where(*_: Any) -> str:
    return os.environ["AWS_LAMBDA_FUNCTION_NAME"]


def test_calls_that_need_more_memory_all_go_to_a_larger_function(make, deploy):
    larger = deploy(memory=3008)
    executor = make(larger_functions={3008: larger})
    assert executor.submit(where).result(WAIT) != larger
    assert set(executor.options(memory="2 GB").map(where, range(30))) == {larger}


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory": "3 GB"}, OutOfMemoryError),
        ({"memory": "3000 TB"}, OutOfMemoryError),
        ({"memory": 2048}, ConfigurationError),
        ({"memory": "much"}, ConfigurationError),
        ({"timeout": -1}, ConfigurationError),
        ({"timeout": 0}, ConfigurationError),
        ({"timeout": float("nan")}, ConfigurationError),
        ({"retries": -1}, ConfigurationError),
        ({"retries": True}, ConfigurationError),
        ({"where": "here"}, ConfigurationError),
    ],
)
def test_limits_that_no_function_has_are_refused_at_once(executor, options, error):
    before = executor.report.invocations
    with pytest.raises(error, match="memory|timeout|retries|where"):
        executor.submit(double, 1, **options)
    assert executor.report.invocations == before


def test_a_call_cannot_have_more_time_than_its_function(make):
    executor = make(timeout=60)
    with pytest.raises(ConfigurationError, match=r"100.*60 seconds"):
        executor.submit(double, 1, timeout=100)
    with pytest.raises(ConfigurationError, match=r"100.*60 seconds"):
        executor.options(timeout=100).map(double, [1])


def test_calls_may_run_on_the_users_own_machine(executor):
    local = executor.options(where="local")
    large = local.submit(ones, LARGE)
    assert local.submit(os.getpid).result(WAIT) != os.getpid()
    assert executor.submit(np.sum, large).result(WAIT) == LARGE
    assert local.submit(environment).result(WAIT).get("AWS_LAMBDA_FUNCTION_NAME") is None
    assert executor.submit(environment).result(WAIT)["AWS_LAMBDA_FUNCTION_NAME"]


def test_what_cannot_be_called_is_refused(executor):
    for call in (executor.submit, executor.map):
        with pytest.raises(TypeError, match="not callable"):
            call(3, [1])
    with pytest.raises(TypeError, match="not callable"):
        executor.iterate(3, 1, [1])
    with pytest.raises(TypeError, match="speed"):
        executor.options(speed=3)
    with pytest.raises(ConfigurationError, match="colour"):
        LambdaExecutor(colour="red")
    with pytest.raises(ConfigurationError, match="max_workers"):
        LambdaExecutor(3, concurrency=4)


def test_an_argument_that_cannot_be_pickled_fails_its_own_call_only(executor):
    lock = threading.Lock()
    futures = [executor.submit(add, [lock] if i == 12 else [i], []) for i in range(24)]
    with pytest.raises(UnserializableError, match=futures[12].key):
        futures[12].result(WAIT)
    assert [f.result(WAIT) for f in futures if f is not futures[12]] == [
        [i] for i in range(24) if i != 12
    ]


def test_futures_of_others_are_refused(executor, make):
    other = make()
    theirs = other.submit(double, 1)
    with pytest.raises(ValueError, match="another executor"):
        executor.submit(double, [theirs])
    for foreign in (Future(), TaskRef("x"), pickle.loads(pickle.dumps(theirs))):
        with pytest.raises(TypeError, match="give its result"):
            executor.submit(double, {"a": foreign})


def test_an_executor_is_no_argument(executor):
    with pytest.raises(TypeError, match="from here"):
        pickle.dumps(executor)


# -- futures as arguments ----------------------------------------------------------------------

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Model:
    weights: Any
    name: str


def same(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def test_futures_become_values_wherever_they_stand(executor):
    one, two = executor.submit(add, 0, 1), executor.submit(add, 1, 1)
    arguments = ([one, 5], (two, [one]), {one, 7}, {"a": two, "b": [one]})
    future = executor.submit(same, one, *arguments, Pair(one, 2), Model([two], "m"), key=two)
    args, kwargs = future.result(WAIT)
    assert args[:5] == (1, [1, 5], (2, [1]), {1, 7}, {"a": 2, "b": [1]})
    assert args[5] == Pair(1, 2)
    assert args[6] == Model([2], "m")
    assert kwargs == {"key": 2}


def test_data_between_calls_never_pass_through_the_client(executor):
    large = executor.submit(ones, LARGE)
    total = executor.submit(np.sum, executor.submit(double, large))
    before = client_gets(executor)
    assert total.result(WAIT) == 2 * LARGE
    assert client_gets(executor) == before
    assert large.result(WAIT).shape == (LARGE,)
    assert client_gets(executor) == before + 1


def test_a_call_fails_as_its_input_did(executor):
    future = executor.submit(double, [executor.submit(double, executor.submit(fail, 1))])
    with pytest.raises(ValueError, match="no 1") as caught:
        future.result(WAIT)
    assert "fail-" in notes(caught.value)


class Box:
    def __init__(self, content: Any):
        self.content = content


def opened(box: Box) -> Any:
    future = box.content
    assert future.done()
    assert not future.running()
    assert not future.cancelled()
    return future.result()


def test_a_hidden_future_whose_call_has_ended_works_in_the_task(executor):
    small, large = executor.submit(double, 4), executor.submit(ones, LARGE)
    failed = executor.submit(fail, 2)
    wait([small, large, failed], WAIT)
    assert executor.submit(opened, Box(small)).result(WAIT) == 8
    assert executor.submit(opened, Box(large)).result(WAIT).sum() == LARGE
    with pytest.raises(ValueError, match="no 2"):
        executor.submit(opened, Box(failed)).result(WAIT)


def total_of(future: Any) -> Callable[[], Any]:
    return lambda: future.result().sum()


def test_a_function_that_refers_to_a_future_does_not_keep_it(executor, bucket_names):
    large = executor.submit(ones, LARGE)
    wait([large], WAIT)
    assert executor.submit(total_of(large)).result(WAIT) == LARGE
    del large
    assert eventually(lambda: bucket_names() == [])


def test_a_hidden_future_whose_call_goes_on_is_refused(executor, gate):
    pending = executor.submit(gate)
    with pytest.raises(UnserializableError, match=f"{pending.key} is hidden.*argument"):
        executor.submit(opened, Box(pending)).result(WAIT)


def test_the_secret_is_in_nothing_that_is_pickled_for_lambda_or_s3(executor, gate):
    large = executor.submit(ones, LARGE)
    large.result(WAIT)
    secret = executor._calling.session().secret
    assert secret in pickle.dumps(large)
    pending = executor.submit(gate)
    for hidden in (large, pending):
        with pytest.raises(TypeError, match="cannot be stored inside other data"):
            codec.serialize(Box(hidden))
        with pytest.raises(UnserializableError, match=hidden.key):
            executor.scatter([hidden])
        with pytest.raises(TypeError, match="cannot be given to a call"):
            codec.serialize(pickle.loads(pickle.dumps(hidden)))
    with pytest.raises(UnserializableError, match=pending.key):
        dask.delayed(opened)(Box(pending)).compute(scheduler=executor)
    assert dask.delayed(opened)(Box(large)).compute(scheduler=executor).sum() == LARGE


# -- Dask --------------------------------------------------------------------------------------


def test_dask_computes_graphs_on_an_executor(executor):
    total = dask.delayed(sum)([dask.delayed(double)(i) for i in range(10)])
    assert total.compute(scheduler=executor) == 90
    with dask.config.set(scheduler=executor):
        assert dask.compute(total, total + 1) == (90, 91)
    (kept,) = dask.persist(total, scheduler=executor)
    assert kept.compute(scheduler=executor) == 90
