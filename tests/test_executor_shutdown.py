"""The end of executors: what stays, what is given up, and that nothing is left."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import dask
import pytest

from dask_lambda import LambdaExecutor, last_report
from dask_lambda.errors import DaskLambdaError, InvocationError
from tests.executor_helpers import (
    LARGE,
    WAIT,
    _keys,
    double,
    executor,
    gate,
    make,
    marks,
    ones,
)
from tests.helpers import eventually

__all__ = ["_keys", "executor", "gate", "make", "marks"]

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("without_lease")]
uses_bucket = True


# -- the end -----------------------------------------------------------------------------------


def threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name.startswith("dask-lambda")}


def test_shutdown_waits_for_all_calls_and_small_results_stay(make, gate):
    before = threads()
    with make(1) as executor:
        futures = [executor.submit(gate, i) for i in range(3)]
        gate.open()
    assert all(future.done() for future in futures)
    assert [future.result() for future in futures] == [0, 1, 2]
    assert threads() == before
    for call in (executor.submit, executor.map):
        with pytest.raises(RuntimeError, match="after shutdown"):
            call(double, [1])
    for late in (
        lambda: executor.scatter(1),
        lambda: executor.iterate(double, 1, [1]),
        lambda: dask.delayed(double)(1).compute(scheduler=executor),
    ):
        with pytest.raises(RuntimeError, match="after shutdown"):
            late()
    report = last_report()
    assert report is not None
    assert report.tasks == executor.report.tasks == 3


def test_large_results_stay_until_their_futures_go(make, bucket_names):
    with make() as executor:
        future = executor.submit(ones, LARGE)
    assert future.result().sum() == LARGE
    before = threads()
    assert bucket_names()
    del future
    assert eventually(lambda: bucket_names() == [])
    assert eventually(lambda: len(threads()) < len(before))


def test_shutdown_without_waiting_lets_the_calls_end(make, gate):
    executor = make()
    future = executor.submit(gate, 5)
    executor.shutdown(wait=False)
    assert not future.done()
    gate.open()
    assert future.result(WAIT) == 5


def test_shutdown_may_give_up_what_was_not_sent(make, gate, marks):
    executor = make(1)
    running = executor.submit(gate, 5)
    assert eventually(running.running)
    queued = [executor.submit(marks, i) for i in range(3)]
    executor.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in queued)
    gate.open()
    assert running.result(WAIT) == 5
    executor.shutdown()
    assert marks.names() == set()


def test_ctrl_c_in_the_block_gives_up_everything(make, gate):
    executor = make(1)
    futures = [executor.submit(gate), executor.submit(double, 1)]
    assert eventually(futures[0].running)
    with pytest.raises(KeyboardInterrupt), executor:
        raise KeyboardInterrupt
    for future in futures:
        with pytest.raises(InvocationError, match="given up"):
            future.result(WAIT)


def test_an_executor_that_nobody_holds_ends_with_its_last_call(make, aws_settings):
    before = threads()
    future = LambdaExecutor(1, **aws_settings).submit(double, 4)
    gc.collect()
    assert future.result(WAIT) == 8
    assert eventually(lambda: threads() == before)


LEFT_OPEN = """
import time
from dask_lambda import LambdaExecutor
import numpy as np

executor = LambdaExecutor({settings})
large = executor.submit(np.ones, 100_000)
large.result()
waiting = [executor.submit(time.sleep, 30) for _ in range(3)]
while not waiting[0].running():
    time.sleep(0.01)
print("over")
"""


def test_an_executor_left_open_at_exit_hangs_nothing_and_leaves_nothing(aws_settings, credentials):
    text = ", ".join(f"{name}={value!r}" for name, value in aws_settings.items())
    script = LEFT_OPEN.format(settings=f"2, {text}")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | credentials,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout == "over\n"
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told_that_it_cannot_call(executor):
    executor.submit(double, 1).result(WAIT)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            executor.submit(double, 2)
        except DaskLambdaError as error:
            code = 0 if "forked" in str(error) else 2
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert executor.submit(double, 3).result(WAIT) == 6
