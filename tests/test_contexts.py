"""From wherever it is called, a run works, ends, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import psutil
import pytest
from dask import delayed

import dask_lambda
from dask_lambda import LambdaScheduler, lambda_get
from dask_lambda.local import LocalAWS
from tests.faults.proxy import Proxy, Request, Stall
from tests.helpers import eventually

pytestmark = pytest.mark.local
uses_bucket = True
ROOT = Path(dask_lambda.__file__).parents[1]


def inc(x: Any) -> Any:
    return x + 1


def small_graph(offset: int = 0) -> Any:
    return delayed(sum)([delayed(inc)(i + offset) for i in range(4)])


def test_inside_a_running_event_loop_as_in_a_notebook() -> None:
    async def cell() -> Any:
        return small_graph().compute(scheduler=lambda_get)

    assert asyncio.run(cell()) == 10

    async def beside_other_work() -> Any:
        ticks = 0
        running = asyncio.create_task(
            asyncio.to_thread(small_graph().compute, scheduler=lambda_get)
        )
        while not running.done():
            ticks += 1
            await asyncio.sleep(0)
        return await running, ticks

    value, ticks = asyncio.run(beside_other_work())
    assert value == 10
    assert ticks > 1


def test_several_threads_share_a_scheduler_and_not_their_failures() -> None:
    def work(number: int) -> Any:
        if number % 3 == 2:
            with pytest.raises(ValueError, match=f"number {number}"):
                delayed(fail)(number).compute(scheduler=scheduler)
            return None
        x = da.full((4, 4), number, chunks=2)
        return sum(dask.compute(x.sum(), small_graph(number), scheduler=scheduler))

    def fail(number: int) -> None:
        raise ValueError(f"number {number}")

    with LambdaScheduler() as scheduler, ThreadPoolExecutor(6) as threads:
        found = list(threads.map(work, range(12)))
    assert found == [None if n % 3 == 2 else 20 * n + 10 for n in range(12)]


def test_inside_a_task_of_another_scheduler() -> None:
    def outer(number: int) -> Any:
        return small_graph(number).compute(scheduler=lambda_get)

    tasks = [delayed(outer)(n) for n in range(4)]
    assert dask.compute(*tasks, scheduler="threads") == (10, 14, 18, 22)


def test_a_task_on_lambda_may_compute_itself() -> None:
    @delayed
    def outer(n: int) -> float:
        # With the workers' default scheduler and with a given one.
        x = da.ones((n, n), chunks=2)
        return float(x.sum().compute(scheduler="sync") + x.sum().compute())

    assert outer(4).compute(scheduler=lambda_get) == 32.0


def test_it_can_be_pickled() -> None:
    get = pickle.loads(pickle.dumps(lambda_get))
    assert small_graph().compute(scheduler=get) == 10
    get.__self__.close()
    again = pickle.loads(pickle.dumps(LambdaScheduler(concurrency=1, inline_bytes=0)))
    assert repr(again) == "LambdaScheduler(concurrency=1, inline_bytes=0)"


def in_forked_child(work: Callable[[], Any]) -> Any:
    """Return the result of a call in a forked child, or what it raised as text."""

    def send(connection: Any) -> None:
        try:
            found: Any = work()
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        connection.send(found)

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=send, args=(theirs,))
    child.start()
    try:
        assert ours.poll(30), "the child hangs"
        found = ours.recv()
        child.join(20)
        assert child.exitcode == 0
        return found
    finally:
        child.kill()
        child.join()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_that_it_cannot_use_the_parents_engine() -> None:
    kept = delayed(inc)(1).persist(scheduler=lambda_get)
    for work in (
        lambda: small_graph().compute(scheduler=lambda_get),
        lambda: kept.compute(scheduler=lambda_get),
        lambda: kept.compute(scheduler="sync"),
    ):
        found = in_forked_child(work)
        assert found.startswith("DaskLambdaError: this process was forked")
        assert "spawn" in found
    assert in_forked_child(lambda: small_graph().compute(scheduler="sync")) == 10
    assert (kept + 1).compute(scheduler=lambda_get) == 3


FORKS = """
import multiprocessing, os, sys
from dask import delayed
from dask_lambda import LambdaScheduler

scheduler = LambdaScheduler(backend="aws", function=sys.argv[1], bucket=sys.argv[2],
                            region="us-east-1", endpoint_url=sys.argv[3], concurrency=1)

def work():
    print(delayed(lambda: 5)().compute(scheduler=scheduler), flush=True)

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
work()
"""


def test_a_process_may_fork_before_its_first_computation(
    aws: LocalAWS, credentials: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    process = run_python(FORKS, aws.function, aws.bucket, aws.endpoint_url, temporary=tmp_path)
    try:
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert (out, errors) == ("5\n5\n", "")


def run_python(
    program: str, *arguments: str, temporary: Path, **options: Any
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
        **options,
    )


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


INTERRUPTED = """
import signal, sys, time
from dask import delayed
from dask_lambda import lambda_get

signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it

def slow(mark):
    open(mark, "w").close()
    time.sleep(30)

delayed(slow)(sys.argv[1]).compute(scheduler=lambda_get)
"""


def test_ctrl_c_ends_the_program_at_once_with_all_its_processes(tmp_path: Path) -> None:
    mark, temporary = tmp_path / "mark", tmp_path / "temporary"
    temporary.mkdir()
    process = run_python(INTERRUPTED, str(mark), temporary=temporary)
    try:
        assert eventually(mark.exists, 60)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        seconds = time.monotonic() - started
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in errors
    assert seconds < 3
    assert eventually(lambda: all(map(gone, family)))
    assert eventually(lambda: not list(temporary.iterdir()))


@pytest.mark.usefixtures("interruptible")
def test_after_ctrl_c_the_next_run_works(
    tmp_path: Path, bucket_names: Callable[[], list[str]]
) -> None:
    mark, gate = tmp_path / "mark", tmp_path / "gate"

    @delayed
    def slow(x: np.ndarray) -> np.ndarray:
        mark.touch()
        deadline = time.monotonic() + 30
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return x + 1

    def interrupt() -> None:
        eventually(mark.exists, 30)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        slow(delayed(np.ones)(30_000)).compute(scheduler=lambda_get, optimize_graph=False)
    thread.join()
    assert eventually(lambda: not bucket_names(), 5)
    assert small_graph().compute(scheduler=lambda_get) == 10
    gate.touch()  # what is written now is deleted as well: checked after each test
    assert small_graph().compute(scheduler=lambda_get) == 10


ENDS = """
import logging, sys
import dask.array as da
from dask_lambda import lambda_get
if sys.argv[1] == "logged":
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
print(da.ones(4, chunks=2).sum().compute(scheduler=lambda_get))
kept = (da.ones(40_000, chunks=20_000) + 1).persist(scheduler=lambda_get)
if sys.argv[1] == "failed":
    raise ValueError("at the end")
"""


@pytest.mark.parametrize("way", ["logged", "failed"])
def test_the_end_of_the_program_leaves_no_process_and_no_file(tmp_path: Path, way: str) -> None:
    before = {process.pid for process in psutil.process_iter()}
    process = run_python(ENDS, way, temporary=tmp_path)
    try:
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == (way == "failed"), errors
    assert out == "4.0\n"
    assert eventually(lambda: not list(tmp_path.iterdir()))

    def left() -> list[psutil.Process]:
        found = []
        for other in psutil.process_iter():
            if other.pid not in before:
                try:
                    if other.environ().get("TMPDIR", "").startswith(str(tmp_path)):
                        found.append(other)
                except psutil.Error:
                    continue
        return found

    assert eventually(lambda: not left()), left()
    lines = [line for line in errors.splitlines() if line]
    if way == "logged":
        assert len([line for line in lines if "embedded AWS" in line]) == 1
        assert len(lines) == 1
    else:
        assert lines[-1] == "ValueError: at the end"


def test_a_run_says_nothing_once_it_is_connected(
    aws: LocalAWS, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert small_graph().compute(scheduler=lambda_get) == 10
    assert not [record for record in caplog.records if record.levelno >= logging.INFO]


def test_closing_ends_a_run_in_another_thread(tmp_path: Path) -> None:
    mark, gate = tmp_path / "mark", tmp_path / "gate"

    @delayed
    def slow() -> None:
        mark.touch()
        deadline = time.monotonic() + 30
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    scheduler = LambdaScheduler()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(slow().compute, scheduler=scheduler)
        try:
            assert eventually(mark.exists, 30)
            scheduler.close()
            with pytest.raises(dask_lambda.errors.InvocationError, match="closed"):
                running.result(20)
        finally:
            gate.touch()
    assert small_graph().compute(scheduler=scheduler) == 10
    scheduler.close()


@pytest.mark.parametrize("kind", ["get", "list"])
def test_closing_ends_whoever_waits_for_s3(
    aws: Any, connect: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """While results are fetched, and while a kept run is looked at."""
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path / "state"))
    asked = threading.Event()

    def decide(request: Request) -> Stall | None:
        if request.kind != kind or not request.run:
            return None
        asked.set()
        return Stall(60.0, forwarded=False)

    with Proxy(aws.endpoint_url, decide) as proxy, ThreadPoolExecutor(1) as threads:
        scheduler = connect(endpoint_url=proxy.url, inline_bytes=0)
        resume = "survey" if kind == "list" else None
        running = threads.submit(small_graph().compute, scheduler=scheduler, resume=resume)
        assert asked.wait(60)
        scheduler.close()
        with pytest.raises(dask_lambda.errors.InvocationError, match="closed"):
            running.result(20)


def test_threads_end_with_their_schedulers() -> None:
    def engines() -> int:
        return sum(thread.name.startswith("dask-lambda") for thread in threading.enumerate())

    before = engines()
    for _ in range(3):
        with LambdaScheduler():
            small_graph().compute()
            assert engines() == before + 1
        assert engines() == before
