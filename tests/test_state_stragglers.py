"""Duplicates of what takes conspicuously long, as lists of events."""

from __future__ import annotations

from typing import Any

import pytest

from dask_lambda.events import Done, RunEnded
from dask_lambda.pace import Pace
from dask_lambda.policy import Policy
from tests.state_script import DEATH, FATAL, TASK, THROTTLED, Script, group

# -- what is conspicuous -------------------------------------------------------------------------


def pace_of(*walls: float, in_flight: int = 1) -> Pace:
    pace = Pace()
    for wall in walls:
        pace.done(wall, 0.0, wall)
    pace.in_flight = in_flight
    return pace


POLICY = Policy(straggler_seconds=0.0)


def test_a_few_samples_say_nothing():
    assert pace_of(*[1.0] * 4).patience(POLICY) == float("inf")
    assert pace_of(*[1.0] * 5).patience(POLICY) < float("inf")


def test_the_fewer_samples_the_more_patience():
    bounds = [pace_of(*[1.0] * count).patience(POLICY) for count in (5, 10, 20, 64)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] == pytest.approx(4.0)  # twice the median, twice for being so few
    assert bounds[-1] < 2.2


def test_when_durations_vary_much_only_what_is_far_out_is_conspicuous():
    even = pace_of(*[10.0] * 40)
    uneven = pace_of(*range(1, 41))
    assert uneven.patience(POLICY) > 4 * even.patience(POLICY)


def test_one_very_slow_one_does_not_make_the_next_one_inconspicuous():
    usual = pace_of(*[1.0] * 20)
    after = pace_of(*[1.0] * 20, 1000.0)
    assert after.patience(POLICY) == pytest.approx(usual.patience(POLICY), rel=0.05)


def test_the_first_ones_of_a_wave_are_the_quick_ones_and_say_nothing():
    assert pace_of(*[1.0] * 30, in_flight=31).patience(POLICY) == float("inf")
    assert pace_of(*[1.0] * 30, in_flight=30).patience(POLICY) < float("inf")


def test_nothing_short_is_conspicuous():
    assert pace_of(*[0.01] * 50).patience(Policy(straggler_seconds=2.0)) == 2.0


def test_old_durations_are_forgotten():
    pace = pace_of(*[100.0] * 200, *[1.0] * 64)
    assert pace.patience(POLICY) < 3.0


# -- duplicates ----------------------------------------------------------------------------------


def wave(count: int = 20, policy: Policy | None = None, **more: Any) -> Script:
    """A run of which all groups but the last are done after a second."""
    script = Script(policy=policy)
    groups = [group(f"g{i}", kind="k", priority=i) for i in range(count)]
    script.add("r", *groups, speculate=True, keep={f"g{i}" for i in range(count)}, **more)
    script.now = 1.0
    for i in range(count - 1):
        script.end(f"g{i}", usd=1.0)
    return script


def wait(script: Script, seconds: float) -> None:
    """Let time pass as the machine asks to be woken."""
    until = script.now + seconds
    while script.timers and min(script.timers) <= until:
        script.wake()
    script.now = until


def duplicates(script: Script) -> list[str]:
    return [i.groups[0].outputs[0] for i in script.flying.values() if i.speculative]


def test_what_takes_conspicuously_long_is_sent_once_more_and_not_again():
    script = wave()
    wait(script, 0.9)
    assert duplicates(script) == []
    wait(script, 600)
    assert duplicates(script) == ["g19"]
    assert script.in_flight() == ["g19", "g19"]


@pytest.mark.parametrize("duplicate", [True, False])
def test_the_first_result_is_accepted_and_the_other_one_discarded(duplicate):
    script = wave()
    wait(script, 10)
    script.accepted.clear()
    script.end("g19", Done(result="first"), duplicate=duplicate)
    assert script.accepted == ["first"]
    assert script.ended() == [RunEnded("r", None)]
    assert script.drained() == []
    script.end("g19", Done(result="second"), duplicate=not duplicate)
    assert script.accepted == ["first"]
    assert script.discarded == ["second"]
    assert script.drained() == ["r"]


@pytest.mark.parametrize("duplicate", [True, False])
@pytest.mark.parametrize("failure", [TASK, DEATH, THROTTLED])
def test_a_failure_does_not_matter_while_the_other_one_is_in_flight(failure, duplicate):
    script = wave()
    wait(script, 10)
    script.end("g19", failure, duplicate=duplicate)
    assert not script.ended()
    script.end("g19", duplicate=not duplicate)
    assert script.ended() == [RunEnded("r", None)]


def test_it_matters_if_the_other_one_fails_too():
    script = wave()
    wait(script, 10)
    script.end("g19", TASK, duplicate=True)
    script.end("g19", TASK)
    assert script.ended()[0].failure is TASK


def test_what_nothing_can_mend_ends_the_run_at_once():
    script = wave()
    wait(script, 10)
    script.end("g19", FATAL, duplicate=True)
    assert script.ended()[0].failure is FATAL


def test_a_late_failure_of_the_slower_one_is_nothing_to_anybody():
    script = wave(more_groups := 20)
    script.add("s", group("other"))
    wait(script, 10)
    script.end(f"g{more_groups - 1}", duplicate=True)
    script.end(f"g{more_groups - 1}", TASK)
    assert script.drained() == ["r"]
    assert script.in_flight() == ["other"]


def test_without_leave_nothing_is_duplicated():
    script = Script()
    script.add("r", *(group(f"g{i}", kind="k") for i in range(20)))
    script.now = 1.0
    for i in range(19):
        script.end(f"g{i}")
    assert script.timers == []
    wait(script, 600)
    assert duplicates(script) == []


def test_work_that_is_ready_goes_first():
    script = Script(window=20)
    script.add("r", *(group(f"g{i}", kind="k", priority=i) for i in range(60)), speculate=True)
    script.now = 1.0
    for i in range(19):
        script.end(f"g{i}", usd=1.0)
    assert len(script.flying) == 20
    script.now = 1.5
    for i in range(20, 39):
        script.end(f"g{i}", usd=1.0)
    wait(script, 0.4)
    assert duplicates(script) == []
    assert "g19" in script.in_flight()


def test_duplicates_take_a_tenth_of_the_window():
    script = Script(window=50)
    script.add("r", *(group(f"g{i}", kind="k", priority=i) for i in range(140)), speculate=True)
    script.now = 1.0
    for i in range(100):
        script.end(f"g{i}", usd=1.0)
    assert len(script.flying) == 40
    wait(script, 100)
    assert len(duplicates(script)) == 5


def test_duplicates_cost_a_tenth_of_what_the_run_has_cost_at_the_most():
    script = Script()
    few = [group(f"g{i}", kind="cheap", priority=i) for i in range(12)]
    script.add("r", *few, speculate=True)
    script.now = 1.0
    for i in range(6):
        script.end(f"g{i}", usd=1.0)
    wait(script, 100)
    assert duplicates(script) == []  # 10 % of 6 dollars do not pay for one more
    script = wave(12)  # of 11 dollars they do
    wait(script, 100)
    assert duplicates(script) == ["g11"]


def test_groups_of_a_batch_are_duplicated_together():
    script = Script(window=1, policy=Policy(batch_groups=10))
    groups = [group(f"g{i}", kind="k", priority=i, seconds=0.01) for i in range(130)]
    script.add("r", *groups, speculate=True, batch=True)
    for i in range(12):
        script.now += 0.1
        script.end(f"g{10 * i}", usd=1.0)
    before = script.in_flight()
    wait(script, 5)
    assert duplicates(script) == []  # no room
    script.tell_window(5)
    wait(script, 5)
    assert duplicates(script) == [before[0]]
    assert sorted(script.in_flight()) == sorted(2 * before)
