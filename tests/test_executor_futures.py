"""Futures of an executor as ``concurrent.futures`` has them, here and in other processes."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, Future, as_completed, wait
from operator import truediv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dask_lambda import LambdaExecutor, LambdaFuture
from dask_lambda.errors import LostDataError, RemoteError
from tests.executor_helpers import (
    LARGE,
    WAIT,
    Gate,
    _keys,
    add,
    double,
    executor,
    fail,
    gate,
    make,
    marks,
    ones,
)
from tests.helpers import eventually

__all__ = ["_keys", "executor", "gate", "make", "marks"]

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("without_lease")]
uses_bucket = True


# -- states ------------------------------------------------------------------------------------


def test_only_what_was_not_sent_can_be_cancelled(make, gate, marks):
    executor = make(1)
    running = executor.submit(gate, "done")
    assert eventually(running.running)
    queued = executor.submit(marks, "queued")
    reader = executor.submit(double, queued)
    other = executor.submit(marks, "other")
    assert not running.cancel()
    assert queued.cancel()
    assert queued.cancel()
    assert queued.cancelled()
    assert wait([queued, reader], WAIT).not_done == set()
    assert reader.cancelled()
    with pytest.raises(CancelledError):
        queued.result()
    gate.open()
    assert running.result(WAIT) == "done"
    assert other.result(WAIT) == "other"
    assert not other.cancel()
    assert marks.names() == {"other"}


def test_a_call_either_runs_or_is_cancelled(make, marks):
    executor = make(2)
    futures = {str(i): executor.submit(marks, i) for i in range(300)}
    cancelled = {name for name, future in reversed(futures.items()) if future.cancel()}
    ran = {name for name, future in futures.items() if name not in cancelled}
    wait([futures[name] for name in ran], WAIT)
    executor.shutdown()
    assert marks.names() == ran


def test_futures_complete_in_wait_and_as_completed(executor, gate):
    last, first = executor.submit(gate, "last"), executor.submit(double, 1)
    finished = as_completed([last, first], WAIT)
    assert next(finished) is first
    assert wait([last], timeout=0).not_done == {last}
    gate.open()
    assert next(finished) is last


def test_callbacks_are_not_called_in_the_engines_thread_and_may_use_the_result(executor, gate):
    heard: Future[tuple[Any, str]] = Future()
    future = executor.submit(gate, np.ones(LARGE))

    def callback(done: Future) -> None:
        heard.set_result((done.result().sum(), threading.current_thread().name))

    future.add_done_callback(callback)
    gate.open()
    assert heard.result(WAIT) == (LARGE, "dask-lambda-futures")


class Poison:
    """Can be pickled, and not unpickled."""

    def __reduce__(self) -> Any:
        return int, ("poison",)


def test_callbacks_may_make_calls_and_wait_for_them(executor):
    def four_times(future: LambdaFuture) -> None:
        twice = executor.submit(double, future)
        twice.add_done_callback(lambda _: seen.append(executor.submit(double, twice).result()))
        seen.append(twice.result())
        seen.append(type(executor.submit(truediv, 1, 0).exception()))
        done.set()

    seen: list[Any] = []
    done = threading.Event()
    executor.submit(double, 1).add_done_callback(four_times)
    assert done.wait(60)
    assert seen == [8, 4, ZeroDivisionError]


def test_waiting_in_a_callback_ends_with_the_timeout(executor, gate):
    def wait_for(_: LambdaFuture) -> None:
        try:
            executor.submit(gate, 2).result(0.1)
        except TimeoutError as error:
            seen.append(error)
        done.set()

    seen: list[Any] = []
    done = threading.Event()
    executor.submit(double, 1).add_done_callback(wait_for)
    assert done.wait(60)
    gate.open()
    assert len(seen) == 1


def test_asyncio_waits_for_futures(executor, gate):
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        done = executor.submit(ones, LARGE)
        await asyncio.to_thread(done.result)
        later = executor.submit(gate, np.ones(LARGE))
        waiting = asyncio.gather(
            loop.run_in_executor(executor, double, 4),
            loop.run_in_executor(executor, fail, 5),
            asyncio.wrap_future(done),
            asyncio.wrap_future(later),
            asyncio.wrap_future(executor.submit(Poison)),
            return_exceptions=True,
        )
        gate.open()
        return await asyncio.wait_for(waiting, WAIT)

    eight, no, large, later, poison = asyncio.run(main())
    assert eight == 8
    assert str(no) == "no 5"
    assert large.sum() == later.sum() == LARGE
    assert "poison" in str(poison)


def test_a_future_that_asyncio_has_read_holds_no_large_value(executor):
    future = executor.submit(ones, LARGE)

    async def main() -> Any:
        return weakref.ref(await asyncio.wrap_future(future))

    value = asyncio.run(main())
    gc.collect()
    assert value() is None
    assert future.result().sum() == LARGE


def test_snapshots_have_the_value_itself(executor, gate):
    """What asyncio looks at from Python 3.14 on, in place of the public methods."""
    small, failed, pending = (executor.submit(f, 1) for f in (double, fail, gate))
    wait([small, failed], WAIT)
    assert pending._get_snapshot() == (False, False, None, None)
    assert small._get_snapshot() == (True, False, 2, None)
    assert failed._get_snapshot() == (True, False, None, failed.exception())
    gate.open()
    poison = executor.submit(Poison)
    wait([poison], WAIT)
    assert isinstance(poison._get_snapshot()[3], ValueError)


def test_a_result_that_cannot_be_unpickled_is_an_error(executor):
    with pytest.raises(ValueError, match="poison"):
        executor.submit(Poison).result(WAIT)


# -- results and memory ------------------------------------------------------------------------


def test_the_same_result_is_returned_while_somebody_holds_it_and_no_memory_is_kept(executor):
    future = executor.submit(ones, LARGE)
    value = future.result(WAIT)
    assert future.result() is value
    watch = weakref.ref(value)
    del value
    gc.collect()
    assert watch() is None
    assert future.result().sum() == LARGE
    small = executor.submit(add, [1], [])
    assert small.result(WAIT) is small.result()


def test_an_object_lives_as_long_as_its_future_or_a_reader(executor, bucket_names, gate):
    future = executor.submit(ones, LARGE)
    wait([future], WAIT)
    assert len(bucket_names()) == 1
    reader = executor.submit(gate, future)
    del future
    gc.collect()
    gate.open()
    assert reader.result(WAIT).sum() == LARGE
    del reader
    assert eventually(lambda: bucket_names() == [])


def test_a_dropped_future_still_runs(executor, marks):
    executor.submit(marks, "ran")
    assert eventually(lambda: marks.names() == {"ran"})


def test_scattered_data_are_stored_once(executor, bucket_names):
    data = executor.scatter(np.ones(LARGE))
    assert data.done()
    assert data.result().sum() == LARGE
    before = executor.report.s3_puts
    sums = [executor.submit(add, executor.submit(np.sum, data), i) for i in range(5)]
    assert [each.result(WAIT) for each in sums] == [LARGE + i for i in range(5)]
    assert executor.report.s3_puts == before
    assert len(bucket_names()) == 1


# -- other processes ---------------------------------------------------------------------------

READER = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    futures = pickle.load(file)
print([f.done() for f in futures])
open(sys.argv[2], "w").close()
small, large, failed, pending = futures
print(small.result(), large.result(60).sum(), repr(failed.exception()), pending.result(60).sum())
print(pending.report.kind, pending)
"""


def test_a_future_works_in_another_process(executor, gate, tmp_path, credentials):
    small, large = executor.submit(double, 2), executor.submit(ones, LARGE)
    failed, pending = executor.submit(fail, 3), executor.submit(gate, np.ones(LARGE))
    wait([small, large, failed], WAIT)
    (tmp_path / "futures").write_bytes(pickle.dumps([small, large, failed, pending]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | credentials
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(tmp_path / "futures"), str(gate.path)],
        env=environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = reader.communicate(timeout=WAIT)
    assert out.splitlines() == [
        "[True, True, True, False]",
        f"4 {LARGE}.0 ValueError('no 3') {LARGE}.0",
        f"numpy.ndarray <DistantFuture {pending.key} done>",
    ]


def test_a_future_of_the_embedded_aws_needs_no_credentials_in_another_process(tmp_path, aws):
    with LambdaExecutor(backend="local") as executor:
        future = executor.submit(ones, LARGE)
        wait([future], WAIT)
        (tmp_path / "future").write_bytes(pickle.dumps(future))
    script = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).result().sum())"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "future")],
        env={k: v for k, v in os.environ.items() if not k.startswith("AWS_")},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=True,
    )
    assert done.stdout == f"{LARGE}.0\n"


def test_the_pickle_of_a_small_result_needs_nobody(make):
    executor = make()
    future = executor.submit(add, "a", "b")
    future.result(WAIT)
    pickled = pickle.dumps(future)
    assert executor._calling.session().secret not in pickled
    executor.shutdown()
    assert pickle.loads(pickled).result() == "ab"


def test_a_pickled_future_that_waits_hears_of_failures_and_of_cancelling(make, gate):
    executor = make(1)
    running = executor.submit(gate, np.ones(LARGE))
    queued = [executor.submit(fail, 1), executor.submit(double, 1)]
    elsewhere = pickle.loads(pickle.dumps([running, *queued]))
    assert elsewhere[0].running()
    with pytest.raises(TimeoutError):
        elsewhere[0].result(0.2)
    assert queued[1].cancel()
    assert eventually(elsewhere[2].cancelled)
    gate.open()
    assert elsewhere[0].exception(WAIT) is None
    assert pickle.loads(pickle.dumps(elsewhere[0])).result(WAIT).sum() == LARGE
    with pytest.raises(ValueError, match="no 1"):
        elsewhere[1].result(WAIT)


class OnlyHere(Exception):
    """Cannot be pickled by whoever got it."""

    def __reduce__(self) -> Any:
        if "AWS_LAMBDA_FUNCTION_NAME" in os.environ:
            return OnlyHere, self.args
        raise AttributeError("it stays here")


def refuse(gate: Gate) -> None:
    gate()
    raise OnlyHere("whatever it is")


def test_an_exception_that_cannot_be_pickled_is_told_elsewhere_as_text(executor, gate):
    future = executor.submit(refuse, gate)
    elsewhere = pickle.loads(pickle.dumps(future))
    gate.open()
    with pytest.raises(OnlyHere):
        future.result(WAIT)
    with pytest.raises(RemoteError, match="OnlyHere: whatever it is"):
        elsewhere.result(WAIT)


def test_a_future_elsewhere_says_that_its_owner_has_let_go(executor, gate, bucket_names):
    large, pending = executor.submit(ones, LARGE), executor.submit(gate, 1)
    wait([large], WAIT)
    elsewhere = pickle.loads(pickle.dumps([large, pending]))
    assert bucket_names()
    del large, pending
    gate.open()
    assert eventually(lambda: bucket_names() == [])
    for each in elsewhere:
        with pytest.raises(LostDataError, match=f"{each.key}.*let go"):
            each.result(WAIT)
