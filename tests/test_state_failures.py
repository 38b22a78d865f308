"""Failures, retries and throttling, as lists of events."""

from __future__ import annotations

import itertools

import pytest

from dask_lambda.events import (
    Failure,
    FailureKind,
    RunEnded,
    Stalled,
    TimePassed,
    Wake,
    WindowChanged,
)
from dask_lambda.plan import Group
from dask_lambda.policy import Policy
from tests.state_script import (
    DEATH,
    DONE,
    EXPIRED,
    FATAL,
    MEMORY,
    NOT_READY,
    RATE_LIMITED,
    TASK,
    THROTTLED,
    TIMEOUT,
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
    script = Script(policy=Policy(deaths=1))
    script.add("r", group("a", retries=1))
    for failure in (TASK, DEATH, TRANSIENT, DEATH):
        script.end("a", failure)
        assert not script.ended(), failure
        script.wake_until_flying("a")
    script.end("a", TASK)
    assert script.ended()


# -- for some time -------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [TRANSIENT, EXPIRED])
def test_what_is_not_the_groups_fault_is_tried_for_as_long_as_the_patience(failure):
    script = Script(policy=Policy(max_backoff=5.0))
    script.add("r", group("a"), patience=100.0)
    while not script.ended():
        script.end("a", failure)
        if script.now < 100.0:
            script.wake_until_flying("a")
    assert 100.0 <= script.now < 105.0
    assert script.ended() == [RunEnded("r", failure, group("a"))]


def test_it_is_tried_some_times_however_long_each_takes():
    script = Script(policy=Policy(transient_tries=3))
    script.add("r", group("a"), patience=10.0)
    for _ in range(2):
        script.now += 800.0
        script.end("a", TRANSIENT)
        script.wake_until_flying("a")
    script.now += 800.0
    script.end("a", TRANSIENT)
    assert script.ended()


def test_another_failure_in_between_renews_the_patience():
    script = Script(policy=Policy(transient_tries=1))
    script.add("r", group("a", retries=9), patience=10.0)
    for failure in (TRANSIENT, TASK, TRANSIENT, TASK, TRANSIENT):
        script.end("a", failure)
        assert not script.ended()
        script.now += 8.0
        script.wake_until_flying("a")


def test_waiting_for_room_does_not_cost_patience():
    script = Script(window=1, policy=Policy(transient_tries=1))
    script.add("r", group("a"), group("long", priority=-1), patience=10.0)
    script.end("long")
    script.end("a", TRANSIENT)
    script.add("s", group("longer"))
    script.now = 100.0
    script.end("longer", run="s")
    script.end("a", TRANSIENT)
    assert not script.ended()


def test_the_user_hears_now_and_then_of_what_is_tried_in_vain():
    script = Script(policy=Policy(notice_after=20.0, notice_every=60.0, max_backoff=5.0))
    script.add("r", group("a"), patience=300.0)
    notices = []
    while not script.ended():
        script.end("a", TRANSIENT)
        notices += [(script.now, said) for said in script.said(Stalled)]
        if not script.ended():
            script.wake_until_flying("a")
    times = [at for at, _ in notices]
    assert times[0] >= 20.0
    assert 4 <= len(times) <= 5
    assert all(later - sooner >= 60.0 for sooner, later in itertools.pairwise(times))
    assert notices[0][1] == Stalled("r", TRANSIENT, 0.0, 300.0)


# -- more memory, smaller parts ------------------------------------------------------------------


def halved(it):
    """Two groups with an output each."""
    return [group(key) for key in it.outputs] if len(it.outputs) > 1 else []


def rungs(script):
    return {invoke.groups[0].outputs: invoke.rung for invoke in script.flying.values()}


def test_out_of_memory_a_group_climbs_the_ladder_at_once_and_is_then_split():
    script = Script(rungs=3)
    script.add("r", group("a b"), keep="ab", split=halved)
    for rung in range(3):
        assert rungs(script) == {("a", "b"): rung}
        script.end("a", MEMORY)
    assert rungs(script) == {("a",): 2, ("b",): 2}  # what was learnt is not forgotten
    script.end("a")
    script.end("b", MEMORY)
    assert script.ended() == [RunEnded("r", MEMORY, group("b"))]


def test_a_time_out_is_no_reason_for_more_memory():
    script = Script(rungs=3)
    script.add("r", group("a b"), keep="ab", split=halved)
    script.end("a", TIMEOUT)
    assert rungs(script) == {("a",): 0, ("b",): 0}


def test_with_one_function_memory_is_a_failure_of_the_task():
    script = Script()
    it = group("a", retries=1)
    assert fail_until_ended(script, MEMORY, it) == 2


def test_a_group_that_kills_its_workers_is_divided_until_the_culprit_is_found():
    script = Script(policy=Policy(deaths=1))
    script.add("r", group("a b"), keep="ab", split=halved)
    script.end("a", DEATH)
    script.wake_until_flying("a")
    assert rungs(script) == {("a", "b"): 0}
    script.end("a", DEATH)
    assert rungs(script) == {("a",): 0, ("b",): 0}
    script.end("a")
    script.end("b", DEATH)
    script.wake_until_flying("b")
    script.end("b", DEATH)
    assert script.ended() == [RunEnded("r", DEATH, group("b"))]


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


def test_a_refusal_shrinks_the_limit_to_what_was_not_refused():
    """Nothing is started, and nothing is lost, while the burst of refusals comes in."""
    script = Script(window=100, policy=Policy(decrease=1.0))
    flood(script, 300)
    for i in range(90):
        script.end(f"g{i}", THROTTLED)
    assert len(script.flying) == 10
    assert script.state.window.limit == pytest.approx(10)
    script.end("g90")
    assert len(script.flying) == 10


def test_it_shrinks_by_a_factor_besides_once_an_interval():
    script = Script(window=100, policy=Policy(decrease=0.5, decrease_interval=1.0))
    flood(script, 100)
    for i in range(20):
        script.end(f"g{i}", THROTTLED)
    assert script.state.window.limit == pytest.approx(99 * 0.5)
    script.now += 0.999
    script.end("g20", THROTTLED)
    assert script.state.window.limit >= 99 * 0.5
    script.now += 0.002
    script.end("g21", THROTTLED)
    assert script.state.window.limit <= 99 * 0.3


def test_nothing_is_started_while_more_are_in_flight_than_the_limit():
    script = Script(window=100, policy=Policy(decrease=0.7))
    flood(script, 300)
    script.end("g0", THROTTLED)
    for i in range(1, 29):
        script.end(f"g{i}")
    assert len(script.flying) == 71
    for i in range(29, 40):
        script.end(f"g{i}")
    assert len(script.flying) == script.state.window.allowed < 71


def test_a_storm_of_refusals_leaves_nine_tenths_of_what_is_allowed():
    """The account takes ten invocations at a time, the window is a hundred."""
    script = Script(window=100)
    flood(script, 2000)
    ends: list[tuple[float, str]] = []
    known: set[int] = set()
    busy = 0.0
    while len(script.accepted) < 2000:
        for number, invoke in list(script.flying.items()):
            if number not in known:
                known.add(number)
                if len(ends) < 10:
                    ends.append((script.now + 0.2, invoke.groups[0].outputs[0]))
                else:
                    script.end(invoke.groups[0].outputs[0], THROTTLED)
        at = min([end for end, _ in ends] + [t for t in script.timers if t > script.now])
        busy += len(ends) * (at - script.now)
        script.now = at
        for end in sorted(ends):
            if end[0] <= at:
                ends.remove(end)
                script.end(end[1])
        script.tell(TimePassed(at))
    assert busy / script.now >= 0.9 * 10


def test_a_refusal_for_the_rate_leaves_the_concurrency_alone():
    script = Script(window=100)
    flood(script, 300)
    script.end("g0", RATE_LIMITED)
    assert script.state.window.limit == 100
    assert script.state.window.rate <= 100 * Policy().decrease


def serve_at(script: Script, rate: float, seconds: float, run: str = "r") -> int:
    """Let Lambda accept so many invocations a second, which take no time; how many it refused."""
    until = script.now + seconds
    accepted, refused = 0, 0
    second = script.now
    while script.now < until and not script.ended():
        if script.now - second >= 1:
            second, accepted = second + 1, 0
        for number in list(script.flying):
            key = script.flying[number].groups[0].outputs[0]
            accepted += 1
            refused += accepted > rate
            script.end(key, DONE if accepted <= rate else RATE_LIMITED, run=run)
        if script.ended():
            break
        script.timers = [at for at in script.timers if at > script.now]
        script.now = min([*script.timers, until])
        script.tell(TimePassed(script.now))
    return refused


def test_what_lambda_accepts_in_a_second_is_what_is_sent():
    script = Script(window=1000)
    flood(script, 3000)
    serve_at(script, 100, 3)  # it learns
    done = len(script.accepted)
    refused = serve_at(script, 100, 10)
    assert len(script.accepted) - done > 0.9 * 1000
    assert refused < 300


def test_a_refusal_now_and_then_does_not_bring_the_rate_down():
    """Others in the account may have been the reason."""
    script = Script(window=100)
    flood(script, 1000)
    for _ in range(20):
        script.end(script.in_flight()[0], RATE_LIMITED)
        for key in script.in_flight()[:40]:
            script.end(key)
        script.now += 1.0
        script.tell(TimePassed(script.now))
    assert script.state.window.rate > 36


def test_the_rate_grows_again():
    script = Script(window=10)
    flood(script, 10)
    script.end("g0", RATE_LIMITED)
    slow = script.state.window.rate
    script.now += 40.0
    script.wake_until_flying("g0")
    assert script.state.window.rate > 2 * slow


def test_a_rate_is_forgotten_in_a_long_break():
    """A notebook computes in the morning, is refused, and computes again in the afternoon."""
    script = Script(window=1000)
    script.add("r", *(group(f"g{i}") for i in range(50)))
    script.end("g0", RATE_LIMITED)
    script.wake_until_flying_or_ended("g0")
    for i in range(50):
        script.end(f"g{i}")
    script.now += 4 * 3600.0
    script.add("s", *(group(f"h{i}") for i in range(500)))
    assert len(script.flying) == 500


def test_the_limit_never_falls_below_one():
    script = Script(window=4)
    flood(script, 4)
    for _ in range(30):
        while script.flying:
            script.end(script.in_flight()[0], THROTTLED)
        assert script.state.window.limit == 1.0
        script.now += 2
        while not script.flying:
            script.wake()


def test_the_limit_grows_with_time_while_what_is_in_flight_takes_long():
    """Somebody else may have taken the room that Lambda refused, for a moment only."""
    script = Script(window=100)
    script.add("r", group("long", priority=-1), *(group(f"g{i}") for i in range(30)))
    for i in range(30):
        script.end(f"g{i}", THROTTLED)
    assert script.state.window.limit < 2
    while len(script.flying) < 31:
        script.wake()
    assert script.now < 60


def test_the_limit_grows_by_about_one_for_each_limits_worth_of_successes():
    script = Script(window=20)
    flood(script, 500)
    script.end("g0", THROTTLED)
    before = script.state.window.limit
    for _ in range(int(before) + 1):
        script.end(script.in_flight()[0])
    assert before + 0.9 < script.state.window.limit < before + 1.2
    while len(script.flying) < 20:
        script.end(script.in_flight()[0])
    for _ in range(100):
        script.end(script.in_flight()[0])
    assert script.state.window.limit == 20  # never above the window


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


# -- a function that is not ready ----------------------------------------------------------------


def test_one_invocation_at_a_time_asks_whether_the_function_is_ready():
    script = Script(window=100)
    flood(script, 300)
    while script.flying:
        script.end(script.in_flight()[0], NOT_READY)
    asked = []
    while script.now < 300:
        script.wake()
        assert len(script.flying) <= 1
        for key in script.in_flight():
            asked.append(script.now)
            script.end(key, NOT_READY)
    waits = [after - before for before, after in itertools.pairwise([0.0, *asked])]
    assert waits[:4] == pytest.approx([1, 2, 4, 8])
    assert all(wait >= 20 - 1e-6 for wait in waits[5:])
    assert len(asked) < 20
    assert not script.ended()


def test_as_soon_as_one_succeeds_all_goes_on_as_it_was():
    script = Script(window=100)
    flood(script, 300)
    for key in script.in_flight()[1:]:
        script.end(key, NOT_READY)
    assert len(script.flying) == 1
    script.end(script.in_flight()[0])
    assert len(script.flying) == 100
    assert script.state.window.limit == 100


def test_one_that_is_not_refused_for_as_long_as_the_pause_shows_that_it_is_ready():
    """It may run for minutes: the others do not wait for its end."""
    script = Script(window=100)
    flood(script, 300)
    while script.flying:
        script.end(script.in_flight()[0], NOT_READY)
    while not script.flying:
        script.wake()
    begun = script.now
    while len(script.flying) < 100:
        script.wake()
    assert script.now - begun == pytest.approx(1.0)


def test_what_was_in_flight_already_is_not_disturbed_by_a_function_that_is_not_ready():
    """A larger function may be made anew while the usual one runs."""
    script = Script(window=2)
    script.add("r", group("long"), group("b"), group("c"))
    script.end("b", NOT_READY)
    assert script.in_flight() == ["long"]
    script.wake_until_flying("c")
    script.end("c")
    script.wake_until_flying("b")
    script.end("b")
    script.end("long")
    assert script.ended() == [RunEnded("r", None)]


def test_a_function_that_does_not_get_ready_ends_the_run_after_the_patience_of_throttles():
    script = Script(policy=Policy(throttle_patience=60))
    script.add("r", group("a"))
    warned = []
    while not script.ended():
        script.wake_until_flying("a")
        script.end("a", NOT_READY)
        warned += script.said(Stalled)
        assert script.now < 60 + 2 * Policy().max_backoff
    assert script.now >= 60
    assert script.ended()[0].failure is NOT_READY
    assert warned
    assert {each.failure for each in warned} == {NOT_READY}


def test_the_refusals_of_one_burst_are_one_refusal():
    script = Script(window=100)
    flood(script, 100)
    for key in script.in_flight():
        script.end(key, NOT_READY)
    assert script.state.window.refusals == 1
