"""Tasks that do not run on Lambda: in processes of this machine, and on the user's executors."""

from __future__ import annotations

import base64
import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask import delayed
from dask._task_spec import Task, TaskRef

from dask_lambda import LambdaScheduler
from dask_lambda.errors import (
    BudgetExceededError,
    ConfigurationError,
    InvocationError,
    OutOfMemoryError,
    WorkerDiedError,
)
from dask_lambda.local import LocalAWS
from dask_lambda.report import CallReport
from lambda_worker import protocol
from lambda_worker.standalone import Errand
from tests.helpers import eventually, notes, report

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]


@pytest.fixture(scope="module")
def scheduler() -> Iterator[LambdaScheduler]:
    """One whose processes all tests share that do not kill them."""
    with LambdaScheduler() as made:
        pass
    yield made
    made.close()


def here() -> Any:
    return dask.annotate(where="local")


def whereabouts(*inputs: Any) -> tuple[bool, int, int]:
    """Whether this runs on Lambda, in which process, and who has started that."""
    return "AWS_LAMBDA_FUNCTION_NAME" in os.environ, os.getpid(), os.getppid()


def is_running(pid: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- in processes of this machine ------------------------------------------------------------------


def test_a_local_task_runs_in_a_process_of_this_machine(scheduler: LambdaScheduler) -> None:
    with here():
        on_lambda, pid, parent = delayed(whereabouts)().compute(scheduler=scheduler)
    assert not on_lambda
    assert pid != os.getpid()
    assert parent == os.getpid()
    done = report()
    assert (done.tasks, done.local_tasks, done.invocations) == (1, 1, 0)
    assert done.cost_usd == 0
    assert done.billed_gb_seconds == 0


def test_a_process_is_used_again(scheduler: LambdaScheduler) -> None:
    with here():
        first = delayed(whereabouts)().compute(scheduler=scheduler)
        assert delayed(whereabouts)().compute(scheduler=scheduler) == first


def test_tasks_read_what_was_made_elsewhere_large_or_small(scheduler: LambdaScheduler) -> None:
    parts = [delayed(np.full)(20_000, i, dask_key_name=f"part-{i}") for i in range(3)]
    with here():  # each as an argument: of a list, Dask would annotate what is in it as well
        total = delayed(lambda *x: (whereabouts(), sum(x)))(*parts, dask_key_name="total")
    checked = delayed(lambda t: (t[0], whereabouts(), float(t[1].sum())))(total)
    there, back, value = checked.compute(scheduler=scheduler, plan="none")
    assert not there[0]
    assert back[0]
    assert value == 60_000
    done = report()
    assert (done.tasks, done.local_tasks, done.invocations) == (5, 1, 4)
    assert done.s3_puts >= 4


def test_a_whole_computation_runs_without_lambda(scheduler: LambdaScheduler) -> None:
    x = da.arange(400, chunks=100).reshape(20, 20)
    with here():
        value = (x @ x.T).sum().compute(scheduler=scheduler)
    assert value == (x @ x.T).sum().compute(scheduler="sync")
    assert report().invocations == 0


def test_a_hash_is_what_it_is_on_lambda(scheduler: LambdaScheduler) -> None:
    on_lambda = delayed(hash)("text", pure=False)
    with here():
        locally = delayed(hash)("text", pure=False)
    assert len(set(dask.compute(on_lambda, locally, scheduler=scheduler, plan="none"))) == 1


def waits_for(path: Path) -> bool:
    deadline = time.monotonic() + 30
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(path)
        time.sleep(0.01)
    return True


def test_a_full_window_does_not_hold_up_local_tasks(connect: Connect, tmp_path: Path) -> None:
    waiting = delayed(waits_for)(tmp_path / "there", dask_key_name="a")
    with here():
        touching = delayed(Path.touch)(tmp_path / "there", dask_key_name="b")
    with connect(concurrency=1, plan="none") as one:
        assert dask.compute(waiting, touching, scheduler=one) == (True, None)


def raises(message: str) -> None:
    raise LookupError(message)


def test_an_exception_is_the_task_s_own(scheduler: LambdaScheduler) -> None:
    with here(), pytest.raises(LookupError, match="gone") as info:
        delayed(raises)("gone", dask_key_name="seeker").compute(scheduler=scheduler)
    assert "task 'seeker' outside of Lambda" in notes(info.value)
    assert "in raises" in notes(info.value)


def fails_once(directory: Path, end: Callable[[int], Any] | None = None) -> int:
    attempt = len(list(directory.iterdir()))
    (directory / str(attempt)).touch()
    if not attempt:
        if end is not None:
            end(9)
        raise ValueError("the first time")
    return attempt


def test_a_task_is_tried_as_often_as_it_says(scheduler: LambdaScheduler, tmp_path: Path) -> None:
    with dask.annotate(where="local", retries=1):
        assert delayed(fails_once)(tmp_path).compute(scheduler=scheduler) == 1
    assert report().retries == 1


def test_what_a_dead_process_was_doing_is_done_by_another(
    scheduler: LambdaScheduler, tmp_path: Path
) -> None:
    with here():
        assert delayed(fails_once)(tmp_path, os._exit).compute(scheduler=scheduler) == 1


def kills_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_kills_its_process_is_named_and_others_go_on(
    scheduler: LambdaScheduler,
) -> None:
    with here(), pytest.raises(WorkerDiedError, match=r"'killer'.*local process died.*signal 9"):
        delayed(kills_itself)(dask_key_name="killer").compute(scheduler=scheduler)
    with here():
        assert delayed(abs)(-1).compute(scheduler=scheduler) == 1


def sleeps(path: Path) -> None:
    (path / "pid").write_text(str(os.getpid()))
    time.sleep(600)


def test_a_run_that_ends_ends_its_processes(tmp_path: Path) -> None:
    with (
        LambdaScheduler() as own,
        here(),
        pytest.raises(BudgetExceededError),
    ):
        delayed(sleeps)(tmp_path).compute(scheduler=own, max_seconds=2)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_nothing_is_left_of_a_scheduler_that_was_closed() -> None:
    with LambdaScheduler() as own, here():
        _, pid, _ = delayed(whereabouts)().compute(scheduler=own)
        assert is_running(pid)
    assert not is_running(pid)


def test_local_modules_are_there_and_no_temporary_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "of_mine_alone.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    double = importlib.import_module("of_mine_alone").double
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    spawn = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(1, spawn) as processes:
        for executor in ("auto", threads, processes):
            with LambdaScheduler(local_executor=executor) as own, here():
                assert delayed(double)(21).compute(scheduler=own) == 42
                if executor == "auto":
                    with pytest.raises(WorkerDiedError):
                        delayed(kills_itself)().compute(scheduler=own)
            assert sys.modules["of_mine_alone"].double is double
    assert not list(temporary.glob("lambda_worker-*"))


SCRIPT = """
import os, time
import dask
from dask import delayed
from dask_lambda import lambda_get

# As a script for beginners is: nothing keeps what follows from running when it is imported.
with dask.annotate(where="local"):
    print(delayed(os.getpid)().compute(scheduler=lambda_get), flush=True)
time.sleep(600)
"""


def test_a_plain_script_works_and_its_processes_end_when_it_is_killed(
    aws: LocalAWS, credentials: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = {
        "DASK_DASK_LAMBDA__BACKEND": "aws",
        "DASK_DASK_LAMBDA__FUNCTION": aws.function,
        "DASK_DASK_LAMBDA__BUCKET": aws.bucket,
        "DASK_DASK_LAMBDA__REGION": aws.region,
        "DASK_DASK_LAMBDA__ENDPOINT_URL": aws.endpoint_url,
    }
    script = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, **credentials, **settings},
        stdout=subprocess.PIPE,
        text=True,
    )
    with script:
        assert script.stdout is not None
        pid = int(script.stdout.readline())
        assert is_running(pid)
        script.kill()
    assert eventually(lambda: not is_running(pid))


def test_the_credentials_are_in_no_command_line_environment_or_log(
    aws: LocalAWS, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), LambdaScheduler() as own, here():
        _, pid, _ = delayed(whereabouts)().compute(scheduler=own)
        seen = [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
    assert not any(aws.secret_access_key.encode() in text for text in seen)
    assert aws.secret_access_key not in caplog.text


def test_an_executor_that_logs_what_it_runs_logs_no_secret() -> None:
    errand = Errand(b'{"secrets": {"run": "hidden"}}', "bucket", lambda: "hidden", "hidden")
    assert "hidden" not in f"{errand!r} {errand}"


# -- what is configured ----------------------------------------------------------------------------


def test_credentials_are_found_where_boto3_finds_them(connect: Connect) -> None:
    with here(), connect() as found:
        assert not delayed(whereabouts)().compute(scheduler=found)[0]


def test_what_declares_more_time_than_lambda_has_runs_here_and_says_so(
    scheduler: LambdaScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    with dask.annotate(seconds=3600):
        long = delayed(whereabouts)(dask_key_name="long")
    with caplog.at_level(logging.INFO, "dask_lambda"):
        assert not long.compute(scheduler=scheduler)[0]
    assert "'long' (it declares 3,600 s)" in caplog.text


def test_what_fits_nowhere_is_refused_before_anything_is_sent(scheduler: LambdaScheduler) -> None:
    first = delayed(whereabouts)()
    with dask.annotate(memory="900 TB"):
        huge = delayed(whereabouts)(first, dask_key_name="huge")
    before = report()
    with pytest.raises(OutOfMemoryError, match=r"'huge' fits nowhere.*1,769 MB.*this machine"):
        huge.compute(scheduler=scheduler)
    assert report() is before or not report().invocations


def test_where_nothing_runs_locally_the_error_says_which_setting_it_is() -> None:
    with (
        LambdaScheduler(local_executor="none") as nowhere,
        here(),
        pytest.raises(ConfigurationError, match="local-executor is 'none'"),
    ):
        delayed(whereabouts)().compute(scheduler=nowhere)


# -- the user's executors --------------------------------------------------------------------------


def test_threads_of_this_process_may_be_the_executor(scheduler: LambdaScheduler) -> None:
    names = []

    def named(x: Any) -> tuple[Any, int, str]:
        return x.sum(), os.getpid(), threading.current_thread().name

    parts = [delayed(np.ones)(20_000) for _ in range(6)]
    with here():
        found = [delayed(named)(part) for part in parts]
    with (
        ThreadPoolExecutor(3, "mine") as pool,
        LambdaScheduler(local_executor=pool, plan="none") as threads,
    ):
        for total, pid, name in dask.compute(*found, scheduler=threads):
            assert total == 20_000
            assert pid == os.getpid()
            names.append(name)
        assert report().local_tasks == 6
    assert all(name.startswith("mine") for name in names)


def test_persisted_blocks_are_loaded_by_threads_and_still_there_afterwards() -> None:
    x = da.ones(60_000, chunks=20_000)
    with ThreadPoolExecutor(3) as pool, LambdaScheduler(local_executor=pool) as threads:
        kept = x.persist(scheduler=threads)
        for _ in range(2):
            with here():
                assert kept.sum().compute(scheduler=threads) == 60_000
            assert not protocol.serving
        assert kept.sum().compute(scheduler=threads) == 60_000
        del kept


def test_a_pool_of_processes_may_be_the_executor() -> None:
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn) as pool,
        LambdaScheduler(local_executor=pool) as processes,
        here(),
    ):
        on_lambda, pid, _ = delayed(whereabouts)().compute(scheduler=processes)
        assert not on_lambda
        assert pid == pool.submit(os.getpid).result()
        with pytest.raises(WorkerDiedError, match=r"'killer'.*ProcessPoolExecutor"):
            delayed(kills_itself)(dask_key_name="killer").compute(scheduler=processes)


def test_a_pool_of_forked_processes_is_refused_since_s3_does_not_survive_it() -> None:
    fork = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(1, fork) as pool,
        LambdaScheduler(local_executor=pool) as processes,
        here(),
        pytest.raises(InvocationError, match=r"get_context\('spawn'\)"),
    ):
        delayed(whereabouts)().compute(scheduler=processes)


def slowly(path: Path) -> np.ndarray:
    waits_for(path)
    return np.ones(50_000)


def test_what_a_thread_writes_after_the_end_of_its_run_is_deleted(
    tmp_path: Path, bucket_names: Callable[[], list[str]]
) -> None:
    with ThreadPoolExecutor(1) as pool, LambdaScheduler(local_executor=pool) as threads:
        with here(), pytest.raises(BudgetExceededError):
            delayed(slowly)(tmp_path / "go").compute(scheduler=threads, max_seconds=1)
        (tmp_path / "go").touch()
        pool.submit(int).result()  # after which nothing is left to do for the thread
        assert eventually(lambda: not bucket_names())


def test_an_executor_that_was_shut_down_is_named() -> None:
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with (
        LambdaScheduler(local_executor=pool) as closed,
        here(),
        pytest.raises(InvocationError, match=r"ThreadPoolExecutor could not run it.*shutdown"),
    ):
        delayed(whereabouts)().compute(scheduler=closed)


def test_a_client_of_distributed_may_be_the_executor(caplog: pytest.LogCaptureFixture) -> None:
    from distributed import Client, LocalCluster, get_worker

    def worker() -> str:
        return str(get_worker().name)

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address=":0"
        ) as cluster,
        Client(cluster) as client,
        LambdaScheduler(local_executor=client) as own,
        here(),
    ):
        assert delayed(worker)().compute(scheduler=own) == "0"
        with pytest.raises(LookupError):
            delayed(raises)("gone").compute(scheduler=own)
    assert "secrets" not in caplog.text


# -- calls -----------------------------------------------------------------------------------------


class Call:
    """Hears what becomes of one call."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.report: CallReport | None = None
        self.exception: BaseException | None = None

    def started(self) -> None:
        pass

    def finished(self, report: CallReport) -> None:
        self.report = report
        self.ended.set()

    def failed(self, exception: BaseException, log: str) -> None:
        self.exception = exception
        self.ended.set()


def prints(x: Any) -> tuple[Any, bool]:
    print("a word on the way")
    return x, whereabouts()[0]


def test_a_call_of_a_session_may_be_local(scheduler: LambdaScheduler) -> None:
    session = scheduler.session()
    calls = [Call() for _ in range(4)]
    stored = session.submit(Task("a", prints, 1), calls[0], where="local")
    other = session.submit(Task("b", prints, TaskRef("a")), calls[1], inputs=["a"])
    long = session.submit(Task("c", prints, 2), calls[2], timeout=3600)
    session.submit(Task("d", prints, 3), calls[3], memory=2**50)
    assert all(call.ended.wait(30) for call in calls)
    assert stored.load() == (1, False)
    assert other.load() == ((1, False), True)
    assert long.load() == (2, False)
    assert calls[0].report is not None
    assert b"a word on the way" in base64.b64decode(calls[0].report.log)
    assert calls[0].report.cost_usd == 0
    assert isinstance(calls[3].exception, OutOfMemoryError)
    with pytest.raises(ConfigurationError, match="moon"):
        session.submit(Task("e", prints, 4), Call(), where="moon")  # type: ignore[arg-type]
    session.close()


def test_a_call_that_takes_too_long_is_interrupted(scheduler: LambdaScheduler) -> None:
    session = scheduler.session()
    call = Call()
    held = session.submit(Task("a", time.sleep, 600), call, where="local", timeout=0.2)
    assert call.ended.wait(30)
    assert isinstance(call.exception, TimeoutError)
    session.close()
    del held
