"""Runs that may not spend more than so much, as lists of events."""

from __future__ import annotations

import pytest

from dask_lambda.events import Budget, FailureKind
from dask_lambda.policy import Policy
from tests.state_script import TASK, TRANSIENT, Script, group

#: A cent a second.
CENT = (0.01,)


def start(script: Script, count: int, usd: float, seconds: float | None = None) -> None:
    groups = [group(f"g{i}", kind="k", priority=i, seconds=seconds) for i in range(count)]
    script.add("r", *groups, budget=Budget(usd, usd_second=CENT), keep={"g0"})


def failure(script: Script) -> FailureKind | None:
    (ended,) = script.ended()
    return ended.failure and ended.failure.kind


def test_a_run_ends_well_when_the_money_is_enough():
    script = Script(window=2)
    start(script, 10, usd=1.0)
    for i in range(10):
        script.end(f"g{i}", usd=0.1)
    assert failure(script) is None


def test_nothing_is_started_that_cannot_be_paid_and_what_is_in_flight_comes_to_its_end():
    script = Script(window=2)
    start(script, 10, usd=0.35)
    script.end("g0", usd=0.1)
    assert script.in_flight() == ["g1", "g2"]
    script.end("g1", usd=0.1)
    assert script.in_flight() == ["g2"]
    assert not script.ended()
    script.end("g2", usd=0.1)
    assert failure(script) is FailureKind.BUDGET
    assert len(script.accepted) == 3
    assert script.drained() == ["r"]


def test_what_turns_out_cheaper_lets_the_run_go_on():
    script = Script(window=2)
    start(script, 4, usd=0.35)
    script.end("g0", usd=0.1)
    script.end("g1", usd=0.1)
    assert script.in_flight() == ["g2"]
    script.end("g2", usd=0.01)
    assert script.in_flight() == ["g3"]
    script.end("g3", usd=0.01)
    assert failure(script) is None


def test_of_what_nobody_knows_a_few_are_tried_first():
    script = Script(window=100)
    start(script, 100, usd=1.0)
    assert len(script.flying) == 4
    script.end("g0", usd=0.01)
    assert len(script.flying) == 8
    for i in range(1, 99):
        script.end(f"g{i}", usd=0.01)
    assert not script.ended()
    script.end("g99", usd=0.01)
    assert failure(script) is None


def test_what_is_expected_to_cost_too_much_is_not_even_tried():
    script = Script()
    start(script, 1, usd=0.5, seconds=100.0)
    assert failure(script) is FailureKind.BUDGET
    assert script.flying == {}


def test_a_run_that_takes_far_longer_than_expected_is_stopped_when_the_money_is_spent():
    script = Script(window=2)
    start(script, 2, usd=0.1)
    while not script.ended():
        script.wake()
    assert 5.0 <= script.now <= 6.1  # two of them, a cent a second each
    assert failure(script) is FailureKind.BUDGET
    assert script.drained() == []
    script.end("g0")
    script.end("g1")
    assert script.drained() == ["r"]
    assert script.accepted == []


def test_failures_cost_money_too():
    script = Script(window=1)
    script.add("r", group("a", retries=100), budget=Budget(0.25, usd_second=CENT))
    tries = 0
    while not script.ended():
        script.end("a", TASK, usd=0.1)
        tries += 1
        if not script.ended():
            script.wake_until_flying_or_ended("a")
    assert tries == 3
    assert failure(script) is FailureKind.BUDGET


def test_a_run_ends_at_its_time():
    script = Script()
    script.add("r", group("a"), group("b", "a"), budget=Budget(until=100.0))
    while not script.ended():
        script.wake()
    assert 100.0 <= script.now <= 101.1
    assert failure(script) is FailureKind.BUDGET


def test_a_run_ends_at_its_time_also_while_it_waits_to_try_again():
    script = Script(policy=Policy(backoff=1000.0, max_backoff=1000.0), seed=1)
    script.add("r", group("a"), budget=Budget(until=10.0))
    script.end("a", TRANSIENT)
    assert not script.flying
    while not script.ended():
        script.wake()
    assert 10.0 <= script.now <= 11.1
    assert failure(script) is FailureKind.BUDGET
    assert script.drained() == ["r"]


@pytest.mark.parametrize("kind", ["usd", "until"])
def test_other_runs_are_not_concerned(kind):
    script = Script()
    script.add("r", group("a"), budget=Budget(**{kind: 0.01}, usd_second=CENT))
    script.add("s", group("b"), group("c", "b"))
    while not script.ended():
        script.wake()
    script.end("a")
    script.end("b", run="s")
    script.end("c", run="s")
    assert failure(script) is None


def test_a_function_costs_what_it_does_as_soon_as_its_memory_is_known():
    script = Script(window=2)
    groups = [group(f"g{i}", kind="k", priority=i) for i in range(3)]
    script.add("r", *groups, budget=Budget(0.1, usd_second=(0.05,)))  # more than it is
    script.end("g0", usd=0.01, usd_second=0.01)
    while script.now < 4:
        script.wake()
    assert not script.ended()  # at the first price it would be: two for four seconds
    while not script.ended():
        script.wake()
    assert failure(script) is FailureKind.BUDGET
