"""Single calls of an open run: results, failures, limits, and what is left in the bucket."""

from __future__ import annotations

import base64
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from dask._task_spec import Task

from dask_lambda import LambdaScheduler
from dask_lambda.errors import (
    BudgetExceededError,
    FunctionTimeoutError,
    InvocationError,
    OutOfMemoryError,
    UnserializableError,
)
from tests.helpers import eventually, notes
from tests.session_calls import Calls, Heard, value

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("without_lease")]
uses_bucket = True


@pytest.fixture(scope="module")
def scheduler() -> Iterator[LambdaScheduler]:
    with LambdaScheduler() as scheduler:
        yield scheduler


@pytest.fixture
def call(scheduler: LambdaScheduler) -> Iterator[Calls]:
    session = scheduler.session()
    yield Calls(session)
    session.close()


def double(x: Any) -> Any:
    return x * 2


def fail(x: Any) -> Any:
    raise ArithmeticError(f"no {x}")


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


# -- results -------------------------------------------------------------------------------------


def test_a_call_returns_its_value(call: Calls) -> None:
    assert value(call(double, 21)) == 42


def test_a_call_reads_the_results_of_others_before_they_are_there(call: Calls) -> None:
    first, _ = call(double, 1)
    second, _ = call(double, first)
    assert value(call(double, second)) == 8


def test_a_report_says_what_a_call_took(call: Calls) -> None:
    stored, heard = call(double, np.ones(1000))
    report = heard.end.result(60)
    assert report.invocations == 1
    assert report.nbytes == stored.nbytes == 8000
    assert report.kind == stored.kind == "numpy.ndarray"
    assert report.cost_usd > 0
    assert report.peak_memory_mb > 1


def test_what_a_call_prints_is_in_the_log_of_its_invocation(call: Calls) -> None:
    def talk() -> None:
        print("so it is said")

    _, heard = call(talk)
    assert b"so it is said" in base64.b64decode(heard.end.result(60).log)


def test_data_is_stored_once_and_read_by_many(call: Calls, bucket_names: Any) -> None:
    data = np.arange(100_000.0)
    stored = call.session.put("data", data).result(60)
    assert len(bucket_names()) == 1
    sums = [call(np.dot, stored, stored) for _ in range(5)]
    assert [value(each) for each in sums] == [float(data @ data)] * 5
    assert len(bucket_names()) == 1


def test_what_tasks_hold_is_uploaded_once_while_they_wait_and_then_deleted(
    call: Calls, bucket_names: Any
) -> None:
    data = np.arange(100_000.0)
    first = [call(np.sum, data) for _ in range(8)]
    assert [value(each) for each in first] == [data.sum()] * 8
    assert call.session.report().bytes_written < 4 * data.nbytes  # some may be done already
    assert eventually(lambda: not bucket_names())
    assert value(call(np.sum, data)) == data.sum()


def test_a_result_goes_when_nobody_holds_it(call: Calls, bucket_names: Any) -> None:
    stored, heard = call(np.ones, 100_000)
    heard.end.result(60)
    assert len(bucket_names()) == 1
    reader = call(np.sum, stored)
    del stored
    gc.collect()
    assert value(reader) == 100_000
    assert eventually(lambda: not bucket_names())


def test_who_lets_go_of_a_result_right_after_its_reader_was_added_may_do_so(
    call: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = list(call(double, 5))
    held.pop().end.result(60)
    readers = []
    engine, add = call.session.engine, call.session.engine.add

    def add_while_another_thread_is_quick(*arguments: Any) -> None:
        if held:
            readers.append(call(double, held[0]))
            held.clear()
        add(*arguments)

    monkeypatch.setattr(engine, "add", add_while_another_thread_is_quick)
    assert value(call(double, 1)) == 2
    assert value(readers[0]) == 20


def test_a_result_that_nobody_waits_for_is_made_and_deleted(call: Calls, bucket_names: Any) -> None:
    heard = call(np.ones, 100_000)[1]
    assert heard.end.result(60).nbytes == 800_000
    assert eventually(lambda: not bucket_names())


def test_a_small_result_moves_to_s3_when_it_is_shared(call: Calls, bucket_names: Any) -> None:
    stored, heard = call(double, 4)
    heard.end.result(60)
    assert not bucket_names()
    reference = call.session.share(stored).result(60)
    assert bucket_names() == [reference.name]
    assert stored.load() == 8
    assert value(call(double, stored)) == 16


def test_thousands_of_calls_share_invocations(call: Calls) -> None:
    results = [call(double, number) for number in range(2000)]
    assert [value(each) for each in results] == [2 * number for number in range(2000)]
    assert call.session.report().invocations < 1000


# -- failures ------------------------------------------------------------------------------------


def test_a_failure_is_that_of_the_call_and_of_those_that_read_it_alone(call: Calls) -> None:
    bad, heard = call(fail, "way")
    reader = call(double, bad)[1]
    good = call(double, 3)
    for each in (heard, reader):
        with pytest.raises(ArithmeticError, match="no way") as caught:
            each.end.result(60)
        assert "fail-1" in notes(caught.value)
    assert value(good) == 6
    with pytest.raises(ArithmeticError, match="no way"):
        value(call(double, bad))


def test_a_call_that_fits_nowhere_fails_with_those_that_wait_for_it(call: Calls) -> None:
    bad, heard = call(double, 1, memory=2**60)
    reader = call(double, bad)[1]
    for each in (heard, reader):
        with pytest.raises(OutOfMemoryError, match="double-1"):
            each.end.result(60)
    assert call.session.report().invocations == 0
    assert value(call(double, 2)) == 4


def test_the_log_of_a_call_that_failed_is_there(call: Calls) -> None:
    def talk() -> None:
        print("last words")
        raise ValueError

    _, heard = call(talk)
    assert isinstance(heard.end.exception(60), ValueError)
    assert b"last words" in base64.b64decode(heard.log)


def test_a_call_is_tried_as_often_as_it_may_be(call: Calls) -> None:
    _, heard = call(fail, "luck", retries=2)
    assert isinstance(heard.end.exception(60), ArithmeticError)
    assert heard.starts == 3


def test_a_call_is_interrupted_after_its_own_time_limit(call: Calls) -> None:
    def forever() -> None:
        while True:
            with suppress(Exception):  # which does not hold up the interruption
                time.sleep(0.01)

    _, heard = call(forever, timeout=0.3)
    with pytest.raises(FunctionTimeoutError, match=r"forever-1.*0\.3"):
        heard.end.result(60)


def test_a_call_within_its_time_limit_leaves_no_alarm_behind(call: Calls) -> None:
    assert value(call(double, 2, timeout=0.5)) == 4
    assert value(call(sleep, 0.7)) == 0.7


def test_a_result_that_cannot_be_pickled_fails_its_call(call: Calls) -> None:
    _, heard = call(threading.Lock)
    with pytest.raises(UnserializableError, match="lock"):
        heard.end.result(60)


def test_an_argument_that_cannot_be_pickled_fails_its_call(call: Calls) -> None:
    _, heard = call(double, threading.Lock())
    with pytest.raises(UnserializableError, match="double-1"):
        heard.end.result(60)
    with pytest.raises(UnserializableError, match="'data'"):
        call.session.put("data", threading.Lock())


def test_a_cancelled_call_and_those_that_wait_for_it_end(call: Calls) -> None:
    slow, heard = call(sleep, 2.0)
    waiting = call(double, slow)[1]
    last = call(double, slow)[1]
    call.session.cancel([slow.key, "double-2"])
    assert isinstance(waiting.end.exception(60), CancelledError)
    call.session.cancel([slow.key], in_flight=True)
    assert isinstance(heard.end.exception(60), CancelledError)
    assert isinstance(last.end.exception(60), CancelledError)


def test_a_call_may_be_declined_when_it_is_about_to_be_sent(call: Calls) -> None:
    class Declined(Heard):
        def started(self) -> bool:
            return False

    heard = Declined()
    session = call.session
    stored = session.submit(Task("declined", double, 1), heard)
    reader = call(double, stored)[1]
    assert isinstance(heard.end.exception(60), CancelledError)
    assert isinstance(reader.end.exception(60), CancelledError)
    assert session.report().invocations == 0


def test_a_cancelled_result_that_comes_nevertheless_is_deleted(
    call: Calls, bucket_names: Any
) -> None:
    def late() -> Any:
        time.sleep(0.3)
        return np.ones(100_000)

    kept, heard = call(late)
    assert eventually(lambda: heard.starts)
    call.session.cancel([kept.key], in_flight=True)
    assert isinstance(heard.end.exception(60), CancelledError)
    engine = call.session.engine
    assert eventually(lambda: not engine.state.in_flight)
    assert eventually(lambda: not bucket_names())


# -- the end -------------------------------------------------------------------------------------


def test_notes_are_there_until_they_are_erased_or_the_session_is_closed(
    call: Calls, bucket_names: Any
) -> None:
    session = call.session
    first, second = session.new_note(), session.new_note()
    for name in (first, second):
        session.write_note(name, "so it is").result(60)
    assert set(bucket_names()) == {first, second}
    assert not session.is_unused()
    session.erase_notes([first])
    assert eventually(lambda: bucket_names() == [second])
    session.close()
    assert bucket_names() == []
    assert session.is_unused()
    with pytest.raises(InvocationError, match="closed"):
        session.write_note(first, "too late").result(60)
    assert bucket_names() == []


def test_somebody_hears_when_nobody_holds_anything_in_s3(call: Calls) -> None:
    stored, heard = call(np.ones, 100_000)
    heard.end.result(60)
    unused = threading.Event()
    call.session.when_unused(unused.set)
    assert not call.session.is_unused()
    assert not unused.is_set()
    del stored
    assert unused.wait(60)
    assert call.session.is_unused()


def test_closing_ends_all_calls_and_deletes_all_results(
    scheduler: LambdaScheduler, bucket_names: Any
) -> None:
    session = scheduler.session()
    call = Calls(session)
    stored, heard = call(np.ones, 100_000)
    heard.end.result(60)
    pending = call(sleep, 1.0)[1]
    session.close()
    session.close()
    assert isinstance(pending.end.exception(60), InvocationError)
    assert not bucket_names()
    with pytest.raises(InvocationError, match="closed"):
        call(double, 1)
    with pytest.raises(InvocationError):
        stored.load()


def test_a_spent_budget_ends_all_calls_and_says_why() -> None:
    with LambdaScheduler(max_cost_usd=1e-9) as scheduler:
        call = Calls(scheduler.session())
        call(double, 1)[1].end.exception(60)
        with pytest.raises(BudgetExceededError, match="max_cost_usd"):
            call(double, 2)[1].end.result(60)
        assert eventually(lambda: call.session._end is not None)
        with pytest.raises(BudgetExceededError, match="max_cost_usd"):
            call(double, 3)


def test_closing_the_scheduler_ends_the_calls_of_its_sessions() -> None:
    scheduler = LambdaScheduler()
    call = Calls(scheduler.session())
    value(call(double, 1))
    pending = call(sleep, 1.0)[1]
    scheduler.close()
    assert isinstance(pending.end.exception(60), InvocationError)
    call.session.close()


def test_a_session_and_graphs_share_one_engine(scheduler: LambdaScheduler, call: Calls) -> None:
    import dask

    stored, heard = call(double, 1)
    assert dask.delayed(double)(2).compute(scheduler=scheduler) == 4
    heard.end.result(60)
    assert stored.load() == 2
    assert scheduler.session().engine is call.session.engine


def test_the_client_remembers_nothing_of_calls_whose_results_were_let_go(call: Calls) -> None:
    held = [call(double, np.arange(50_000.0) + n) for n in range(10)]
    for each in held:
        value(each)
    run = call.session._run
    del held, each
    gc.collect()
    assert eventually(lambda: not run.values)
    assert not run.calls
    assert not run.graph.tasks
    assert not run.spending
    assert eventually(lambda: not run.encoder._frames)
    assert not run.encoder._uploads
    assert not run.encoder.written
