"""The executor as ``concurrent.futures`` has it, and what Lambda adds: over the embedded AWS."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, as_completed, wait
from dataclasses import dataclass
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any

import dask
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from dask._task_spec import TaskRef
from hypothesis import given

from dask_lambda import LambdaExecutor, LambdaFuture, last_report
from dask_lambda.errors import (
    ConfigurationError,
    DaskLambdaError,
    FunctionTimeoutError,
    InvocationError,
    LostDataError,
    OutOfMemoryError,
    RemoteError,
    UnserializableError,
)
from dask_lambda.local import LocalAWS
from lambda_worker import codec
from tests.helpers import eventually, notes

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("without_lease")]
uses_bucket = True
settings_of_hypothesis = hypothesis.settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
WAIT = 60  # seconds, for what takes some milliseconds
LARGE = 100_000  # float64 numbers: too many to travel in a reply


@pytest.fixture(scope="module")
def settings(aws: LocalAWS) -> dict[str, Any]:
    return {
        "backend": "aws",
        "function": aws.function,
        "bucket": aws.bucket,
        "region": aws.region,
        "endpoint_url": aws.endpoint_url,
    }


@pytest.fixture(scope="module")
def _keys(credentials: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def executor(settings: dict[str, Any], _keys: None) -> Iterator[LambdaExecutor]:
    with LambdaExecutor(4, **settings) as shared:
        yield shared


@pytest.fixture
def make(settings: dict[str, Any], _keys: None) -> Iterator[Callable[..., LambdaExecutor]]:
    """``make(max_workers)``: an executor of the test's own."""
    made: list[LambdaExecutor] = []

    def make(max_workers: int = 2, **others: Any) -> LambdaExecutor:
        made.append(LambdaExecutor(max_workers, **{**settings, **others}))
        return made[-1]

    yield make
    for each in made:
        each.shutdown(wait=True, cancel_futures=True)


class Gate:
    """Lets calls wait until it is opened; workers are processes of this machine."""

    def __init__(self, path: Path):
        self.path = path

    def open(self) -> None:
        self.path.touch()

    def __call__(self, value: Any = None, *others: Any) -> Any:
        while not self.path.exists():
            time.sleep(0.01)
        return value


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "open")
    yield gate
    gate.open()


class Marks:
    """Files that calls leave, to tell that they ran."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def __call__(self, name: Any) -> Any:
        (self.folder / str(name)).touch()
        return name

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path / "marks")


def double(x: Any) -> Any:
    return 2 * x


def add(a: Any, b: Any = 0) -> Any:
    return a + b


def fail(x: Any) -> Any:
    raise ValueError(f"no {x}")


def speak(x: Any) -> Any:
    print("the function says", x)
    if x == "no":
        raise ValueError(x)
    return x


def ones(size: int) -> Any:
    return np.ones(size)


def joined(parts: list[list[int]]) -> list[int]:
    return [x for part in parts for x in part]


def client_gets(executor: LambdaExecutor) -> int:
    """How many objects this process has read."""
    gets: int = executor._calling.session()._run.store.counts.gets
    return gets


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


# -- Dask --------------------------------------------------------------------------------------


def test_dask_computes_graphs_on_an_executor(executor):
    total = dask.delayed(sum)([dask.delayed(double)(i) for i in range(10)])
    assert total.compute(scheduler=executor) == 90
    with dask.config.set(scheduler=executor):
        assert dask.compute(total, total + 1) == (90, 91)
    (kept,) = dask.persist(total, scheduler=executor)
    assert kept.compute(scheduler=executor) == 90


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


def test_an_executor_that_nobody_holds_ends_with_its_last_call(make, settings):
    before = threads()
    future = LambdaExecutor(1, **settings).submit(double, 4)
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


def test_an_executor_left_open_at_exit_hangs_nothing_and_leaves_nothing(settings, credentials):
    text = ", ".join(f"{name}={value!r}" for name, value in settings.items())
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
