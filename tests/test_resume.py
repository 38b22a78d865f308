"""What a computation has left under a name is used by the next one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask import delayed
from dask.diagnostics import Profiler

import dask_lambda
from dask_lambda import kept_runs, lambda_get
from dask_lambda.errors import BudgetExceededError, ConfigurationError
from tests.faults.proxy import Delay, Proxy, Request
from tests.helpers import eventually, report
from tests.resume_helpers import Marks, Names, _own_records_and_empty_bucket, marks

__all__ = ["_own_records_and_empty_bucket", "marks"]

pytestmark = pytest.mark.local
ROOT = Path(dask_lambda.__file__).parents[1]

Connect = Callable[..., dask_lambda.LambdaScheduler]


def labels(names: list[str]) -> set[str]:
    return {name.rpartition("/")[2] for name in names} - {"manifest"}


def marked(path: Path, name: str, value: Any) -> Any:
    with open(path, "a") as file:
        file.write(f"{name}\n")
    return value


def chain(marks: Marks, length: int = 5) -> Any:
    path = marks.path

    @delayed
    def step(number: int, x: Any = 0) -> Any:
        return marked(path, f"step-{number}", x + number)

    x = step(0)
    for number in range(1, length):
        x = step(number, x)
    return x


def test_a_computation_that_was_finished_is_not_done_again(
    connect: Connect, marks: Marks, bucket_names: Names
) -> None:
    scheduler = connect(resume="sums")
    assert chain(marks).compute(scheduler=scheduler) == 10
    assert report().reused == 0
    assert len(labels(bucket_names())) == 1  # the result alone

    # Other keys, the same tasks; and another process would find the same.
    assert chain(marks).compute(scheduler=connect(resume="sums")) == 10

    assert report().reused == 5
    assert report().invocations == 0
    assert set(marks.counts().values()) == {1}


def test_what_ran_outside_of_lambda_is_not_done_again_either(
    connect: Connect, marks: Marks
) -> None:
    first = delayed(marked)(marks.path, "first", 1)
    with dask.annotate(where="local"):
        second = delayed(marked)(marks.path, "second", first)
    last = delayed(marked)(marks.path, "last", second)
    assert second.compute(scheduler=connect(resume="mixed", keep=True)) == 1
    assert last.compute(scheduler=connect(resume="mixed", keep=True)) == 1
    assert report().reused == 2
    assert report().local_tasks == 0
    assert marks.counts() == {"first": 1, "second": 1, "last": 1}


def test_without_a_name_nothing_stays(connect: Connect, marks: Marks, bucket_names: Names) -> None:
    assert chain(marks).compute(scheduler=connect()) == 10
    assert not bucket_names()
    assert not kept_runs.names()


def test_names_do_not_see_each_other(connect: Connect, marks: Marks) -> None:
    scheduler = connect()
    for name in ("one", "two"):
        assert chain(marks).compute(scheduler=scheduler, resume=name) == 10
        assert report().reused == 0
    assert set(marks.counts().values()) == {2}
    one, two = map(kept_runs.read, ("one", "two"))
    assert one is not None
    assert two is not None
    assert one.run != two.run
    assert one.secret != two.secret


def test_a_changed_function_is_computed_again_and_what_depends_on_it(
    connect: Connect, marks: Marks
) -> None:
    path = marks.path

    def graph(factor: int) -> Any:
        first = delayed(lambda: marked(path, "first", 1))()
        second = delayed(lambda x: marked(path, "second", x * factor))(first)
        return delayed(lambda x: marked(path, "third", x + 1))(second)

    scheduler = connect(resume="it", keep=True, plan="none")
    assert graph(2).compute(scheduler=scheduler, optimize_graph=False) == 3
    marks.clear()
    assert graph(5).compute(scheduler=scheduler, optimize_graph=False) == 6
    assert marks.counts() == {"second": 1, "third": 1}


def test_keep_keeps_all_intermediate_results(
    connect: Connect, marks: Marks, bucket_names: Names
) -> None:
    x = chain(marks)
    keys = len(x.__dask_graph__())
    settings = {"plan": "none", "resume": "all", "keep": True}
    scheduler = connect(**settings)
    assert x.compute(scheduler=scheduler, optimize_graph=False) == 10
    assert len(labels(bucket_names())) == keys
    # A later computation of the name that does not keep leaves the results.
    assert x.compute(scheduler=scheduler, keep=False, optimize_graph=False) == 10
    assert len(labels(bucket_names())) == 1


def test_keep_keeps_what_is_read_inside_its_own_group_only(
    connect: Connect, marks: Marks, bucket_names: Names
) -> None:
    path = marks.path

    def simulate(number: int) -> int:
        return marked(path, "simulate", number)

    def analyse(x: int, offset: int) -> int:
        return marked(path, "analyse", x + offset)

    def analysed(offset: int) -> Any:
        return [delayed(analyse)(delayed(simulate)(n), offset) for n in range(3)]

    scheduler = connect(resume="all", keep=True, plan="auto")
    assert dask.compute(*analysed(1), scheduler=scheduler) == (1, 2, 3)
    assert len(labels(bucket_names())) == 6
    marks.clear()
    assert dask.compute(*analysed(2), scheduler=scheduler) == (2, 3, 4)
    assert marks.counts() == {"analyse": 3}


def test_who_is_interrupted_is_told_how_to_go_on(connect: Connect, marks: Marks) -> None:
    @delayed
    def broken() -> None:
        raise ValueError("as it should")

    with pytest.raises(ValueError, match="as it should") as info:
        broken().compute(scheduler=connect(resume="mine"))
    assert "resume='mine'" in info.value.__notes__[-1]


def test_keep_without_a_name_says_the_name_it_chose(
    connect: Connect, marks: Marks, caplog: pytest.LogCaptureFixture
) -> None:
    assert chain(marks).compute(scheduler=connect(keep=True)) == 10
    (name,) = kept_runs.names()
    assert f"dask-lambda runs delete {name}" in caplog.text
    assert chain(marks).compute(scheduler=connect(resume=name)) == 10
    assert report().invocations == 0


def test_results_of_earlier_computations_of_the_name_stay(
    connect: Connect, marks: Marks, bucket_names: Names
) -> None:
    scheduler = connect(resume="name", plan="none")
    three = chain(marks, 3)
    assert three.compute(scheduler=scheduler, optimize_graph=False) == 3
    assert chain(marks, 5).compute(scheduler=scheduler, optimize_graph=False) == 10
    assert set(marks.counts().values()) == {1}
    assert len(labels(bucket_names())) == 2


def test_what_failed_goes_on_where_it_failed(
    connect: Connect, marks: Marks, tmp_path: Path, bucket_names: Names
) -> None:
    path, switch = marks.path, tmp_path / "switch"

    @delayed
    def first(number: int) -> int:
        return marked(path, f"first-{number}", number)

    @delayed
    def last(numbers: list[int]) -> int:
        if not switch.exists():
            raise ValueError("not yet")
        return marked(path, "last", sum(numbers))

    x = last([first(number) for number in range(4)])
    scheduler = connect(resume="later", plan="none")
    with pytest.raises(ValueError, match="not yet"):
        x.compute(scheduler=scheduler)
    record = kept_runs.read("later")
    assert record is not None
    assert record.status == "failed"
    assert len(labels(bucket_names())) == 4
    switch.touch()
    assert x.compute(scheduler=scheduler) == 6
    assert report().reused == 4
    assert set(marks.counts().values()) == {1}
    assert len(labels(bucket_names())) == 1


def test_a_budget_that_is_spent_says_how_to_go_on(connect: Connect, marks: Marks) -> None:
    @delayed
    def slow(x: int) -> int:
        time.sleep(3)
        return x

    scheduler = connect(plan="none")
    slowly = slow(chain(marks, 2))
    with pytest.raises(BudgetExceededError, match=r"What is done is kept.*resume='survey'"):
        slowly.compute(scheduler=scheduler, resume="survey", max_seconds=1)
    assert slowly.compute(scheduler=scheduler, resume="survey", max_seconds=60) == 1
    assert set(marks.counts().values()) == {1}


def test_data_that_is_there_is_not_uploaded_again(connect: Connect, bucket_names: Names) -> None:
    data = np.arange(160_000.0).reshape(4, 40_000)
    x = da.from_array(data, chunks=(1, -1))
    scheduler = connect(resume="data", keep=True)
    for number in range(2):
        total = (x + number).sum().compute(scheduler=scheduler)
        assert total == data.sum() + number * data.size
        frames = {label for label in labels(bucket_names()) if label.startswith("frame-")}
        assert len(frames) == 4
        assert (report().bytes_written > data.nbytes) == (number == 0)


# -- objects that are not what they should be -----------------------------------------------------


@pytest.mark.parametrize("way", ["corrupt", "swapped", "truncated"])
def test_a_damaged_result_is_computed_again(
    connect: Connect,
    marks: Marks,
    aws: Any,
    bucket_names: Names,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    path = marks.path

    @delayed
    def block(number: int) -> np.ndarray:
        return marked(path, f"block-{number}", np.full(100, number))

    blocks = [block(number) for number in range(3)]
    scheduler = connect(resume="it", plan="none")
    expected = [[n] * 100 for n in range(3)]
    found = dask.compute(*blocks, scheduler=scheduler)
    assert [x.tolist() for x in found] == expected
    marks.clear()
    s3 = aws.client("s3")
    names = [name for name in bucket_names() if not name.endswith("manifest")]
    body = s3.get_object(Bucket=aws.bucket, Key=names[0])["Body"].read()
    if way == "corrupt":
        body = body[:-1] + bytes([body[-1] ^ 1])
    elif way == "truncated":
        body = body[: len(body) // 2]
    else:
        body = s3.get_object(Bucket=aws.bucket, Key=names[1])["Body"].read()
    s3.put_object(Bucket=aws.bucket, Key=names[0], Body=body)

    total = delayed(lambda xs: int(sum(x.sum() for x in xs)))(blocks)
    assert total.compute(scheduler=scheduler) == 300  # on the worker

    assert sum(marks.counts().values()) == 1
    assert "goes on without what is damaged" in caplog.text
    assert [x.tolist() for x in dask.compute(*blocks, scheduler=scheduler)] == expected
    assert report().invocations == 0


def test_results_that_were_deleted_are_computed_again(
    connect: Connect, marks: Marks, aws: Any, bucket_names: Names
) -> None:
    scheduler = connect(resume="it")
    for _ in range(2):
        marks.clear()
        assert chain(marks).compute(scheduler=scheduler) == 10
        assert set(marks.counts().values()) == {1}
        for name in bucket_names():
            aws.client("s3").delete_object(Bucket=aws.bucket, Key=name)


def test_nothing_made_from_a_lost_draw_is_used_beside_a_new_one(
    connect: Connect, aws: Any, bucket_names: Names
) -> None:
    """The draw itself is no result: it was deleted when its first reader was done."""

    def draw() -> float:
        return random.SystemRandom().random()

    one = delayed(draw)()
    plus, minus = one + 1, delayed(lambda x: x - 1)(one)
    scheduler = connect(resume="draws", plan="none")
    first = plus.compute(scheduler=scheduler, optimize_graph=False)
    assert plus.compute(scheduler=scheduler, optimize_graph=False) == first
    a, b = dask.compute(plus, minus, scheduler=scheduler, optimize_graph=False)
    assert a - b == pytest.approx(2)
    assert a != first
    assert dask.compute(plus, minus, scheduler=scheduler, optimize_graph=False) == (a, b)


def test_large_results_are_found_through_their_pointers(
    connect: Connect, marks: Marks, aws: Any, deploy: Any, bucket_names: Names
) -> None:
    small_parts = """
from lambda_worker import store
store.Parts.__init__.__defaults__ = (8 * 2**20, 8 * 2**20, 1000, 5 * 2**20)
from lambda_worker.handler import handler
"""
    function = deploy({"parts.py": small_parts}, "parts.handler")
    path = marks.path
    x = delayed(lambda: marked(path, "large", np.arange(5000)))()
    scheduler = connect(resume="large", function=function)
    for _ in range(2):
        assert x.compute(scheduler=scheduler).sum() == np.arange(5000).sum()
    assert marks.counts() == {"large": 1}
    (attempt,) = [name for name in bucket_names() if "~/" in name]
    aws.client("s3").delete_object(Bucket=aws.bucket, Key=attempt)
    assert x.compute(scheduler=scheduler).sum() == np.arange(5000).sum()
    assert marks.counts() == {"large": 2}


# -- names, locks, records ------------------------------------------------------------------------


def test_a_name_is_one_computation_at_a_time(
    connect: Connect, marks: Marks, tmp_path: Path
) -> None:
    gate, seen = tmp_path / "gate", tmp_path / "seen"

    @delayed
    def wait() -> int:
        seen.touch()
        deadline = time.monotonic() + 30
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return gate.exists()

    scheduler = connect(resume="one")
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(wait().compute(scheduler=scheduler)))
    thread.start()
    try:
        assert eventually(seen.exists, 30)
        with pytest.raises(ConfigurationError, match="another thread of this process"):
            chain(marks).compute(scheduler=scheduler)
        program = "from dask_lambda import kept_runs\nwith kept_runs.locked('one'): pass"
        other = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert f"used by process {os.getpid()}" in other.stderr
    finally:
        gate.touch()
        thread.join()
    assert found == [True]
    assert chain(marks).compute(scheduler=scheduler) == 10


@pytest.mark.usefixtures("interruptible")
def test_a_computation_that_was_given_up_deletes_nothing_of_the_next_one(
    connect: Connect, aws: Any, bucket_names: Names, marks: Marks, tmp_path: Path
) -> None:
    """Ctrl-C while results are fetched, and something else under the same name at once."""

    def decide(request: Request) -> Delay | None:
        if request.kind != "get" or proxy.seen["get"] > 1:
            return None
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        return Delay(2.0)

    def wait(x: Any) -> Any:
        deadline = time.monotonic() + 60
        while not (tmp_path / "gate").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return x

    with Proxy(aws.endpoint_url, decide) as proxy:
        scheduler = connect(endpoint_url=proxy.url, plan="none")
        with pytest.raises(KeyboardInterrupt):
            chain(marks).compute(scheduler=scheduler, resume="survey")
        before = set(bucket_names())
        first = delayed(sum)([1, 2, 3])
        both = delayed(sum)([delayed(wait)(first), first])
        lost: list[str] = []

        def watch() -> None:
            """Let the next one go on when nothing of the first goes on any more."""
            eventually(lambda: set(bucket_names()) - before, 60)
            made = set(bucket_names()) - before
            eventually(lambda: proxy.in_flight == 1, 60)
            eventually(lambda: made - set(bucket_names()), 2)
            lost.extend(made - set(bucket_names()))
            (tmp_path / "gate").touch()

        thread = threading.Thread(target=watch)
        thread.start()
        assert both.compute(scheduler=scheduler, resume="survey") == 12
        thread.join()
    assert lost == []


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "x" * 101, "ä"])
def test_names_that_cannot_be_file_names(connect: Connect, marks: Marks, name: str) -> None:
    with pytest.raises(ConfigurationError, match="name"):
        chain(marks).compute(scheduler=connect(), resume=name)


def test_records_are_for_their_owner_only(connect: Connect, marks: Marks) -> None:
    chain(marks).compute(scheduler=connect(resume="mine"))
    directory = kept_runs.runs_directory()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}


def test_s3_holds_no_secret(connect: Connect, aws: Any, bucket_names: Names, marks: Marks) -> None:
    chain(marks).compute(scheduler=connect(resume="mine", keep=True))
    text = (kept_runs.runs_directory() / "mine.json").read_text()
    secret = json.loads(text)["secret"]
    record = kept_runs.read("mine")
    assert record is not None
    for name in bucket_names():
        body = aws.client("s3").get_object(Bucket=aws.bucket, Key=name)["Body"].read()
        assert record.secret not in body
        assert secret.encode() not in body


def test_a_name_belongs_to_one_bucket(connect: Connect, marks: Marks, aws: Any) -> None:
    chain(marks).compute(scheduler=connect(resume="here"))
    with pytest.raises(ConfigurationError, match="choose another name"):
        chain(marks).compute(scheduler=connect(resume="here", prefix="elsewhere"))


# -- other ways to compute ------------------------------------------------------------------------


def test_what_is_persisted_under_a_name_stays(
    connect: Connect, marks: Marks, bucket_names: Names
) -> None:
    scheduler = connect(resume="blocks")
    kept = chain(marks).persist(scheduler=scheduler)
    assert kept.compute(scheduler=scheduler) == 10
    del kept
    scheduler.close()
    assert len(labels(bucket_names())) == 1
    again = chain(marks).persist(scheduler=connect(resume="blocks"))
    assert report().invocations == 0
    assert (again + 1).compute(scheduler=connect(resume="blocks")) == 11
    assert set(marks.counts().values()) == {1}


def test_what_could_not_be_found_again_is_not_persisted(connect: Connect) -> None:
    lock = threading.Lock()
    x = delayed(lambda: lock.acquire())()
    with pytest.raises(ConfigurationError, match="persist without resume"):
        x.persist(scheduler=connect(resume="blocks"))


def test_tasks_without_a_fingerprint_run_each_time(
    connect: Connect, marks: Marks, caplog: pytest.LogCaptureFixture, bucket_names: Names
) -> None:
    path = marks.path

    class Moody:
        """Can be pickled, and taken apart only now and then."""

        def __reduce_ex__(self, protocol: Any) -> Any:
            import sys

            if "dask_lambda.digest" in sys._getframe(1).f_globals.get("__name__", ""):
                raise TypeError("not today")
            return Moody, ()

    @delayed
    def moody(x: Any, mood: Any) -> int:
        return marked(path, "moody", x + 1)

    before = delayed(lambda: marked(path, "before", 1))()
    x = moody(before, Moody())
    scheduler = connect(resume="it", keep=True, plan="none")
    assert x.compute(scheduler=scheduler, optimize_graph=False) == 2
    assert x.compute(scheduler=scheduler, optimize_graph=False) == 2
    assert marks.counts() == {"before": 1, "moody": 2}
    assert "1 tasks of 'moody' cannot be resumed" in caplog.text
    assert "not today" in caplog.text


def test_progress_bars_see_what_is_reused_as_done(connect: Connect, marks: Marks) -> None:
    scheduler = connect(resume="it", plan="none", keep=True)
    chain(marks, 3).compute(scheduler=scheduler, optimize_graph=False)
    with Profiler() as profiler:
        x = chain(marks, 5)
        assert x.compute(scheduler=scheduler, optimize_graph=False) == 10
    assert len(profiler.results) == len(x.__dask_graph__())
    assert set(marks.counts().values()) == {1}


def test_a_callback_that_looks_at_values_sees_all_of_them(connect: Connect, marks: Marks) -> None:
    from dask.callbacks import Callback

    scheduler = connect(resume="it", keep=True)
    chain(marks, 4).compute(scheduler=scheduler)
    seen = []
    with Callback(posttask=lambda key, value, *rest: seen.append(value)):
        assert chain(marks, 4).compute(scheduler=scheduler, optimize_graph=False) == 6
    assert {0, 1, 3, 6} <= set(seen)


def test_what_the_money_sufficed_for_is_kept() -> None:
    wait = delayed(lambda i: time.sleep(0.2) or i)
    settings = {"scheduler": lambda_get, "plan": "none"}
    dask.compute(*(wait(i) for i in range(12)), **settings)  # no cold start below
    tasks = [wait(i) for i in range(100)]
    with pytest.raises(BudgetExceededError, match="What is done is kept.*resume='cheap'"):
        dask.compute(*tasks, **settings, resume="cheap", max_cost_usd=0.0005)
    done = report().tasks
    assert done
    assert dask.compute(*tasks, **settings, resume="cheap") == tuple(range(100))
    assert report().reused == done
