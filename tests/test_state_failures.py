"""Failures, retries and throttling, as lists of events."""

from __future__ import annotations

import pytest

from dask_lambda.events import Failure, FailureKind, RunEnded, TimePassed, Wake, WindowChanged
from dask_lambda.plan import Group
from dask_lambda.policy import Policy
from tests.state_script import (
    DEATH,
    FATAL,
    TASK,
    THROTTLED,
    TRANSIENT,
    Script,
    group,
)

# -- failures ------------------------------------------------------------------------------------


def fail_until_ended(script: Script, failure: Failure, groups: Group) -> int:
    """Let one group fail in the same way till its run ends; how often it was started."""
    script.add("r", groups)
    started = 1
    while True:
        script.end("a", failure)
        if script.ended():
            return started
        script.wake_until_flying("a")
        started += 1


@pytest.mark.parametrize(
    ("failure", "retries", "starts"),
    [
        (TASK, 0, 1),
        (TASK, 1, 2),
        (TASK, 3, 4),
        (DEATH, 0, 1 + Policy().deaths),
        (DEATH, 2, 1 + Policy().deaths + 2),
        (TRANSIENT, 0, Policy().transient_tries),
        (TRANSIENT, 5, Policy().transient_tries),
        (FATAL, 0, 1),
        (FATAL, 5, 1),
    ],
)
def test_how_often_a_group_is_started_depends_on_why_it_failed(failure, retries, starts):
    script = Script()
    it = group("a", retries=retries)
    assert fail_until_ended(script, failure, it) == starts
    assert script.ended() == [RunEnded("r", failure, it)]
    assert script.drained() == ["r"]


def test_each_kind_of_failure_is_counted_by_itself():
    script = Script(policy=Policy(deaths=1, transient_tries=2))
    script.add("r", group("a", retries=1))
    for failure in (TASK, DEATH, TRANSIENT, DEATH):
        script.end("a", failure)
        assert not script.ended(), failure
        script.wake_until_flying("a")
    script.end("a", TRANSIENT)
    assert script.ended()


def test_one_groups_failures_are_not_held_against_another():
    script = Script()
    script.add("r", *(group(key, retries=1) for key in "abcd"))
    for key in "abcd":
        script.end(key, TASK)
    assert not script.ended()


def test_the_failure_that_ends_a_run_is_the_last_one_with_its_detail():
    script = Script()
    script.add("r", group("a", retries=1))
    script.end("a", Failure(FailureKind.TASK, "first"))
    script.wake_until_flying("a")
    script.end("a", Failure(FailureKind.TASK, "second"))
    assert script.ended()[0].failure.detail == "second"


def delays(kind: Failure, times: int, policy: Policy, seed: int = 0) -> list[float]:
    """How long a group waits after each failure of a row."""
    script = Script(policy=policy, seed=seed)
    script.add("r", group("a", retries=times))
    waits = []
    for _ in range(times):
        script.end("a", kind)
        failed_at = script.now
        script.wake_until_flying("a")
        waits.append(script.now - failed_at)
    return waits


def test_retries_wait_at_most_twice_as_long_each_time_up_to_a_bound():
    policy = Policy(backoff=0.5, max_backoff=6.0)
    bounds = [0.5, 1.0, 2.0, 4.0, 6.0, 6.0]
    longest = [0.0] * len(bounds)
    for seed in range(200):
        waits = delays(TASK, len(bounds), policy, seed)
        assert all(0 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
        longest = [max(pair) for pair in zip(longest, waits, strict=True)]
    assert all(most > 0.9 * bound for most, bound in zip(longest, bounds, strict=True))


def test_the_jitter_follows_from_the_seed():
    assert delays(TASK, 5, Policy(), seed=1) == delays(TASK, 5, Policy(), seed=1)
    assert delays(TASK, 5, Policy(), seed=1) != delays(TASK, 5, Policy(), seed=2)


def test_a_group_may_be_throttled_thousands_of_times_if_others_get_done_meanwhile():
    script = Script(window=2, policy=Policy(throttle_patience=1e9))
    script.add("r", group("a"))
    for _ in range(1500):  # 2.0**1024 is more than a float holds
        script.end("a", THROTTLED)
        script.wake_until_flying("a")
    script.end("a")
    assert script.ended() == [RunEnded("r", None)]


def test_a_delayed_group_is_started_at_its_time_and_not_before():
    script = Script()
    script.add("r", group("a", retries=1))
    script.end("a", TASK)
    (wake,) = script.said(Wake)
    script.now = wake.at - 1e-6
    script.tell(WindowChanged(100))
    assert script.in_flight() == []
    script.wake()
    assert script.now == wake.at
    assert script.in_flight() == ["a"]


def test_a_timer_that_fires_a_little_early_is_asked_for_again():
    script = Script()
    script.add("r", group("a", retries=1))
    script.end("a", TASK)
    (wake,) = script.said(Wake)
    script.now = wake.at - 1e-9
    script.tell(TimePassed(wake.at))
    assert script.out == [Wake(wake.at)]


def test_the_timers_of_a_long_throttle_do_not_multiply():
    script = Script(window=50, policy=Policy(throttle_patience=1e9), seed=5)
    script.add("r", *(group(f"g{i}") for i in range(50)))
    for _ in range(2000):
        while script.flying:
            script.end(script.in_flight()[0], THROTTLED)
        script.wake()
    # A timer may be overtaken by an earlier one, but it must not beget another of its own.
    assert len(script.timers) < 100
    assert len(set(script.timers)) > 0.5 * len(script.timers)


# -- throttling ----------------------------------------------------------------------------------


def flood(script: Script, count: int) -> None:
    script.add("r", *(group(f"g{i}") for i in range(count)))


def test_a_throttle_shrinks_the_limit_by_a_factor():
    script = Script(window=100)
    flood(script, 300)
    script.end("g0", THROTTLED)
    assert script.state.limit == pytest.approx(70)
    assert len(script.flying) == 99  # what is in flight stays


def test_nothing_is_started_while_more_are_in_flight_than_the_limit():
    script = Script(window=100)
    flood(script, 300)
    script.end("g0", THROTTLED)
    for i in range(1, 29):
        script.end(f"g{i}")
    assert len(script.flying) == 71
    for i in range(29, 40):
        script.end(f"g{i}")
    assert len(script.flying) == int(script.state.limit) == 70


def test_a_burst_of_throttles_shrinks_the_limit_once_an_interval():
    script = Script(window=100, policy=Policy(decrease=0.5, decrease_interval=1.0))
    flood(script, 100)
    for i in range(20):
        script.end(f"g{i}", THROTTLED)
    assert script.state.limit == pytest.approx(50)
    script.now += 0.999
    script.end("g20", THROTTLED)
    assert script.state.limit == pytest.approx(50)
    script.now += 0.002
    script.end("g21", THROTTLED)
    assert script.state.limit == pytest.approx(25)


def test_the_limit_shrinks_from_what_was_in_flight_if_that_is_less():
    script = Script(window=1000)
    flood(script, 10)
    script.end("g0", THROTTLED)
    assert script.state.limit == pytest.approx(7)


def test_the_limit_never_falls_below_one():
    script = Script(window=4)
    flood(script, 4)
    for _ in range(30):
        script.end(script.in_flight()[0], THROTTLED)
        script.now += 2
        while not script.flying:
            script.wake()
    assert script.state.limit == 1.0
    assert len(script.flying) == 1


def test_the_limit_grows_by_about_one_for_each_limits_worth_of_successes():
    script = Script(window=20)
    flood(script, 500)
    script.end("g0", THROTTLED)
    before = script.state.limit
    for _ in range(int(before)):
        script.end(script.in_flight()[0])
    assert before + 0.9 < script.state.limit < before + 1.1
    while len(script.flying) < 20:
        script.end(script.in_flight()[0])
    for _ in range(100):
        script.end(script.in_flight()[0])
    assert script.state.limit == 20  # never above the window


def test_throttles_end_a_run_when_nothing_got_done_for_as_long_as_the_patience():
    script = Script(policy=Policy(throttle_patience=60))
    script.add("r", group("a"))
    script.end("a", THROTTLED)
    first = script.now
    while not script.ended():
        script.wake_until_flying("a")
        script.end("a", THROTTLED)
        assert script.now < first + 60 + Policy().max_backoff
    assert script.now >= first + 60
    assert script.ended()[0].failure is THROTTLED


def test_a_success_renews_the_patience():
    script = Script(window=2, policy=Policy(throttle_patience=60))
    script.add("r", *(group(f"g{i}", priority=i) for i in range(50)))
    throttled = "g49"
    for i in range(48):
        script.now += 10
        script.end(f"g{i}")
        if throttled in script.in_flight():
            script.end(throttled, THROTTLED)
        assert not script.ended()
    assert script.now > 400


def test_the_first_throttle_after_a_long_invocation_does_not_end_the_run():
    script = Script(policy=Policy(throttle_patience=60))
    script.add("r", group("long"), group("b", "long"))
    script.now = 800.0  # nothing got done meanwhile, but nothing was throttled either
    script.add("s", group("c"))
    script.end("c", THROTTLED, run="s")
    assert not script.ended()
