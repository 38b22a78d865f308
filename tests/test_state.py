"""The engine's decisions as lists of events: no AWS, no clock, no threads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from dask_lambda.plan import Group
from dask_lambda.state import (
    Done,
    Event,
    Failure,
    FailureKind,
    GroupsAdded,
    Instruction,
    InvocationEnded,
    Invoke,
    Policy,
    Release,
    RunCancelled,
    RunDrained,
    RunEnded,
    State,
    TimePassed,
    Wake,
    WindowChanged,
)

TASK, RESOURCES, DEATH, TRANSIENT, THROTTLED, FATAL = (
    Failure(FailureKind.TASK),
    Failure(FailureKind.RESOURCES),
    Failure(FailureKind.DEATH),
    Failure(FailureKind.TRANSIENT),
    Failure(FailureKind.THROTTLED),
    Failure(FailureKind.FATAL),
)
DONE = Done()


def group(
    outputs: str,
    inputs: str = "",
    *,
    priority: int = 0,
    retries: int = 0,
    kind: str = "",
    seconds: float | None = None,
) -> Group:
    """``group("a b", "c")`` makes a and b from c."""
    keys = tuple(outputs.split())
    return Group(keys, tuple(inputs.split()), keys, priority, retries, kind, seconds)


class Script:
    """A machine that is told events by hand, checked after each, at a time that is set by hand."""

    def __init__(self, window: int = 100, policy: Policy | None = None, seed: int = 0):
        self.state = State(window, policy, seed)
        self.now = 0.0
        self.flying: dict[int, Invoke] = {}
        self.timers: list[float] = []
        self.out: list[Instruction] = []

    def tell(self, event: Event) -> list[Instruction]:
        self.out = self.state.handle(event, self.now)
        self.state.validate()
        for instruction in self.out:
            if isinstance(instruction, Invoke):
                self.flying[instruction.invocation] = instruction
            elif isinstance(instruction, Wake):
                self.timers.append(instruction.at)
        return self.out

    def add(
        self, run: str, *groups: Group, keep: Iterable[str] = (), last: bool = True, **more: Any
    ) -> None:
        self.tell(GroupsAdded(run, groups, frozenset(keep), last, **more))

    def end(self, key: str, *outcomes: Done | Failure, run: str = "r", whole: bool = False) -> None:
        """End the invocation in flight that makes a key, well if nothing is said."""
        invocation = next(
            i
            for i, invoke in self.flying.items()
            if invoke.run == run and any(key in group.outputs for group in invoke.groups)
        )
        groups = self.flying.pop(invocation).groups
        if len(outcomes) < 2:
            outcomes = (outcomes or (DONE,)) * len(groups)
        self.tell(InvocationEnded(invocation, outcomes, whole))

    def wake(self) -> None:
        """Let the time of the earliest timer come."""
        at = min(self.timers)
        self.timers.remove(at)
        self.now = max(self.now, at)
        self.tell(TimePassed(at))

    def wake_until_flying(self, key: str) -> None:
        while key not in self.in_flight():
            self.wake()

    def batches(self) -> list[list[str]]:
        """The first outputs of the groups of each invocation in flight."""
        return [[group.outputs[0] for group in invoke.groups] for invoke in self.flying.values()]

    def in_flight(self) -> list[str]:
        return [key for i in self.flying.values() for g in i.groups for key in g.outputs]

    def said(self, kind: type) -> list[Any]:
        return [instruction for instruction in self.out if isinstance(instruction, kind)]

    def released(self) -> set[Any]:
        return {key for release in self.said(Release) for key in release.keys}

    def ended(self) -> list[RunEnded]:
        return self.said(RunEnded)

    def drained(self) -> list[str]:
        return [drained.run for drained in self.said(RunDrained)]


# -- order ---------------------------------------------------------------------------------------


def test_groups_without_inputs_start_at_once_in_the_order_of_their_priority():
    script = Script()
    script.add("r", group("a", priority=2), group("b", priority=0), group("c", priority=1))
    assert script.in_flight() == ["b", "c", "a"]


def test_a_group_starts_when_the_last_of_its_inputs_is_there():
    script = Script()
    script.add("r", group("a"), group("b"), group("c", "a b"))
    script.end("b")
    assert script.in_flight() == ["a"]
    script.end("a")
    assert script.in_flight() == ["c"]


def test_a_sooner_priority_that_becomes_ready_later_overtakes_what_waits():
    script = Script(window=1)
    script.add("r", group("a"), group("late", priority=9), group("soon", "a", priority=1))
    script.end("a")
    assert script.in_flight() == ["soon"]


def test_equal_priorities_start_in_the_order_in_which_they_became_ready():
    script = Script(window=1)
    script.add("r", *(group(key) for key in "abcd"))
    order = []
    while script.flying:
        order += script.in_flight()
        script.end(order[-1])
    assert order == list("abcd")


def test_an_invocation_has_a_number_of_its_own_and_tells_how_often_it_was_tried():
    script = Script()
    script.add("r", group("a", retries=2), group("b"))
    first, _ = script.said(Invoke)
    script.end("a", TASK)
    script.wake_until_flying("a")
    (second,) = script.said(Invoke)
    assert (first.tries, second.tries) == (0, 1)
    assert second.invocation != first.invocation
    assert second.groups == first.groups


def test_an_empty_run_ends_at_once_and_leaves_nothing():
    script = Script()
    script.add("r")
    assert script.out == [RunEnded("r", None), RunDrained("r")]
    assert list(script.state.runs) == []


def test_a_run_ends_with_its_last_group_and_is_forgotten():
    script = Script()
    script.add("r", group("a"), group("b", "a"), keep="b")
    script.end("a")
    assert not script.ended()
    script.end("b")
    assert script.out == [Release("r", ("a",)), RunEnded("r", None), RunDrained("r")]
    assert list(script.state.runs) == []
    assert not script.state.in_flight


# -- the window ----------------------------------------------------------------------------------


def test_no_more_are_in_flight_than_the_window_allows():
    script = Script(window=2)
    script.add("r", *(group(key) for key in "abc"))
    assert script.in_flight() == ["a", "b"]
    script.end("a")
    assert script.in_flight() == ["b", "c"]


def test_the_window_is_one_for_all_runs():
    script = Script(window=2)
    script.add("r", group("a"))
    script.add("s", group("b"), group("c"))
    assert script.in_flight() == ["a", "b"]


def test_runs_take_turns_however_many_groups_each_has():
    script = Script(window=1)
    script.add("r", *(group(f"r{i}") for i in range(6)))
    script.add("s", *(group(f"s{i}") for i in range(2)))
    order = []
    while script.flying:
        invoke = next(iter(script.flying.values()))
        order.append(invoke.run)
        script.end(invoke.groups[0].outputs[0], run=invoke.run)
    assert "".join(order) == "rrsrsrrr"  # s comes while the second of r is next in turn


def test_a_wider_window_takes_effect_at_once():
    script = Script(window=1)
    script.add("r", *(group(key) for key in "abc"))
    script.tell(WindowChanged(3))
    assert script.in_flight() == ["a", "b", "c"]


def test_a_narrower_window_lets_what_is_in_flight_end_and_starts_nothing_above_it():
    script = Script(window=3)
    script.add("r", *(group(key) for key in "abcde"))
    script.tell(WindowChanged(1))
    script.end("a")
    script.end("b")
    assert script.in_flight() == ["c"]
    script.end("c")
    assert script.in_flight() == ["d"]


# -- release -------------------------------------------------------------------------------------


def test_a_value_is_released_when_its_last_reader_is_done_and_not_before():
    script = Script()
    script.add("r", group("a"), group("b", "a"), group("c", "a"), keep="bc")
    script.end("a")
    script.end("c")
    assert script.released() == set()
    script.end("b")
    assert script.released() == {"a"}


def test_a_value_that_is_to_be_kept_is_never_released():
    script = Script()
    script.add("r", group("a"), group("b", "a"), keep="ab")
    script.end("a")
    assert script.released() == set()
    script.end("b")
    assert script.released() == set()


def test_a_value_that_nobody_reads_is_released_when_it_is_there():
    script = Script()
    script.add("r", group("a"), group("b"), keep="b")
    script.end("a")
    assert script.released() == {"a"}


def test_a_reader_that_failed_and_is_tried_again_still_needs_its_inputs():
    script = Script()
    script.add("r", group("a"), group("b", "a", retries=1), keep="b")
    script.end("a")
    script.end("b", TASK)
    assert script.released() == set()
    script.wake_until_flying("b")
    script.end("b")
    assert script.released() == {"a"}


def test_the_outputs_of_one_group_are_released_each_at_its_own_time():
    script = Script()
    script.add("r", group("a b c"), group("d", "a"), group("e", "b d"), keep="e")
    script.end("a")
    assert script.released() == {"c"}
    script.end("d")
    assert script.released() == {"a"}
    script.end("e")
    assert script.released() == {"b", "d"}


def test_a_group_with_several_outputs_makes_the_readers_of_each_ready():
    script = Script()
    script.add("r", group("a b"), group("c", "a"), group("d", "b"), group("e", "a b"))
    script.end("a")
    assert sorted(script.in_flight()) == ["c", "d", "e"]


def test_a_run_that_fails_releases_nothing_more():
    script = Script()
    script.add("r", group("a"), group("b", "a"), group("c", "a"), keep="bc")
    script.end("a")
    script.end("b", FATAL)
    script.end("c")
    assert script.released() == set()


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


# -- runs that end early -------------------------------------------------------------------------


def test_a_cancelled_run_starts_nothing_more_and_is_forgotten_when_it_is_drained():
    script = Script(window=2)
    script.add("r", *(group(key) for key in "abcd"))
    script.tell(RunCancelled("r"))
    assert script.out == []
    script.end("a")
    assert script.out == []
    script.end("b", TASK)
    assert script.out == [RunDrained("r")]
    assert list(script.state.runs) == []


def test_a_cancelled_run_with_nothing_in_flight_is_drained_at_once():
    script = Script()
    script.add("r", group("a"), last=False)
    script.end("a")
    script.tell(RunCancelled("r"))
    assert script.out == [RunDrained("r")]


def test_cancelling_twice_or_after_the_end_does_nothing():
    script = Script()
    script.add("r", group("a"), group("b"))
    script.tell(RunCancelled("r"))
    script.tell(RunCancelled("r"))
    assert script.out == []
    script.tell(RunCancelled("never heard of"))
    assert script.out == []


def test_a_failed_run_tells_so_at_once_and_is_drained_later():
    script = Script()
    script.add("r", group("a"), group("b"))
    script.end("a", FATAL)
    assert [type(instruction) for instruction in script.out] == [RunEnded]
    script.end("b")
    assert script.out == [RunDrained("r")]


def test_a_run_fails_once_however_many_of_its_groups_do():
    script = Script()
    script.add("r", group("a"), group("b"), group("c"))
    ended = []
    for key in "abc":
        script.end(key, FATAL)
        ended += script.ended()
    assert [end.group.outputs for end in ended] == [("a",)]


def test_delayed_groups_of_an_ended_run_are_not_started():
    script = Script()
    script.add("r", group("a", retries=5), group("b"))
    script.end("a", TASK)
    script.end("b", FATAL)
    assert script.drained() == ["r"]
    while script.timers:
        script.wake()
    assert script.in_flight() == []


def test_the_slots_of_a_cancelled_run_go_to_the_others():
    script = Script(window=2)
    script.add("r", *(group(key) for key in "abcd"))
    script.add("s", group("e"), group("f"))
    script.tell(RunCancelled("r"))
    script.end("a")
    script.end("b")
    assert script.in_flight() == ["e", "f"]


def test_one_run_fails_and_the_other_is_not_touched():
    script = Script()
    script.add("r", group("a"))
    script.add("s", group("a"), group("b", "a"), keep="b")
    script.end("a", FATAL, run="r")
    script.end("a", run="s")
    script.end("b", run="s")
    assert script.ended() == [RunEnded("s", None)]


def test_late_successes_of_an_ended_run_still_count_as_movement():
    script = Script(window=10, policy=Policy(throttle_patience=60, decrease=1.0))
    script.add("r", group("a"))
    script.add("s", group("b"))
    script.end("b", THROTTLED, run="s")
    script.tell(RunCancelled("r"))
    script.wake_until_flying("b")
    script.now = 50.0
    script.end("a")
    script.now = 100.0
    script.end("b", THROTTLED, run="s")
    assert not script.ended()


# -- groups that are added later -----------------------------------------------------------------


def test_an_open_run_does_not_end_when_all_its_groups_are_done():
    script = Script()
    script.add("r", group("a"), last=False)
    script.end("a")
    assert script.out == []
    script.add("r")
    assert RunEnded("r", None) in script.out


def test_groups_that_are_added_later_read_what_earlier_ones_have_made():
    script = Script()
    script.add("r", group("a"), last=False)
    script.end("a")
    script.add("r", group("b", "a"), last=False)
    assert script.in_flight() == ["b"]
    script.end("b")
    script.add("r", group("c", "a b"), keep="c")
    script.end("c")
    assert script.released() == {"a", "b"}
    assert script.ended()


def test_groups_that_are_added_later_wait_for_what_earlier_ones_are_still_making():
    script = Script()
    script.add("r", group("a"), last=False)
    script.add("r", group("b", "a"))
    assert script.in_flight() == ["a"]
    script.end("a")
    assert script.in_flight() == ["b"]


def test_nothing_is_released_while_more_groups_may_come_that_read_it():
    script = Script()
    script.add("r", group("a"), group("b", "a"), last=False)
    script.end("a")
    script.end("b")
    assert script.released() == set()


def test_what_nobody_reads_is_released_when_no_more_groups_can_come():
    script = Script()
    script.add("r", group("a"), group("b", "a"), group("slow"), last=False)
    script.end("a")
    script.end("b")
    script.add("r", group("c", "b"), keep="c")
    assert script.released() == {"a"}


def test_a_later_event_may_ask_to_keep_what_an_earlier_one_added():
    script = Script()
    script.add("r", group("a"), group("b", "a"), last=False)
    script.end("a")
    script.add("r", keep="ab")
    script.end("b")
    assert script.released() == set()
    assert script.ended()


def test_groups_for_a_run_that_has_failed_are_ignored():
    script = Script()
    script.add("r", group("a"), group("b"), last=False)
    script.end("a", FATAL)
    script.add("r", group("c"))
    assert script.out == []
    assert script.in_flight() == ["b"]


# -- groups that share an invocation -------------------------------------------------------------


def many(count: int, kind: str = "k", seconds: float | None = 0.0, **more: Any) -> list[Group]:
    return [group(f"{kind}{i}", kind=kind, seconds=seconds, **more) for i in range(count)]


def sizes(script: Script) -> list[int]:
    return [len(invoke.groups) for invoke in script.flying.values()]


def test_each_group_has_an_invocation_of_its_own_if_the_run_does_not_say_otherwise():
    script = Script(window=2)
    script.add("r", *many(100))
    assert sizes(script) == [1, 1]


def test_groups_that_take_no_time_share_invocations():
    script = Script(window=10)
    script.add("r", *many(100), batch=True)
    assert sum(sizes(script)) == 100
    assert len(script.flying) <= 10


def test_long_groups_go_alone_however_many_wait():
    script = Script(window=2)
    script.add("r", *many(100, seconds=Policy().batch_seconds), batch=True)
    assert sizes(script) == [1, 1]


def test_a_batch_takes_no_longer_than_the_bound():
    script = Script(window=1, policy=Policy(batch_seconds=1.0))
    script.add("r", *many(1000, seconds=0.125), batch=True)
    assert sizes(script) == [8]


def test_a_batch_has_no_more_groups_than_the_bound():
    script = Script(window=1, policy=Policy(batch_groups=7))
    script.add("r", *many(1000), batch=True)
    assert sizes(script) == [7]


def test_with_room_for_all_groups_that_take_long_for_the_client_none_waits_for_another():
    script = Script(window=1000, policy=Policy(dispatch_seconds=0.001))
    script.add("r", *many(100, seconds=0.5), batch=True)
    assert sizes(script) == [1] * 100


def test_the_groups_of_the_last_batches_end_together():
    script = Script(window=4, policy=Policy(dispatch_seconds=0.0, batch_groups=10**6))
    script.add("r", *many(64, seconds=1e-4), batch=True)
    assert sizes(script) == [16, 12, 9, 6]  # of 64, 48, 36 and 27, a quarter each


def test_only_groups_of_one_kind_share_an_invocation():
    script = Script(window=10)
    mixed = [each for pair in zip(many(20, "a"), many(20, "b"), strict=True) for each in pair]
    script.add("r", *mixed, batch=True)
    assert script.batches()[:2] == [["a0"], ["b0"]]  # neighbours in their order
    script = Script(window=10)
    script.add("r", *many(20, "a"), *many(20, "b"), batch=True)
    for batch in script.batches():
        assert len({name[0] for name in batch}) == 1


def test_only_groups_of_one_run_share_an_invocation():
    script = Script(window=1)
    for run in "rs":
        groups = [group(f"{run}{i}", kind="k", seconds=0.0) for i in range(3)]
        script.add(run, *groups, batch=True)
    while script.flying:
        ((invoke, batch),) = zip(script.flying.values(), script.batches(), strict=True)
        assert {name[0] for name in batch} == {invoke.run}
        script.end(batch[0], run=invoke.run)


def test_groups_of_which_nothing_is_known_go_alone_until_some_are_done():
    script = Script(window=2)
    script.add("r", *many(100, seconds=None), batch=True)
    assert sizes(script) == [1, 1]
    script.end("k0")
    assert sizes(script) == [1, 4]  # as many as trust allows for each that is done
    script.end("k1")
    assert sizes(script) == [4, 8]


def test_what_groups_took_bounds_the_next_batch_of_their_kind():
    script = Script(window=1, policy=Policy(batch_seconds=1.0))
    script.add("r", *many(100, seconds=None), batch=True)
    script.end("k0", Done(0.5))
    assert sizes(script) == [2]


def test_what_groups_took_counts_for_more_than_what_was_expected():
    script = Script(window=1, policy=Policy(batch_seconds=1.0))
    script.add("r", *many(100, seconds=0.25), batch=True)
    assert sizes(script) == [4]
    script.end("k0", Done(2.0))
    assert sizes(script) == [1]


def test_each_group_of_a_batch_ends_by_itself():
    script = Script(window=1, policy=Policy(batch_groups=3))
    script.add("r", *many(3, retries=1), group("end", "k0 k2"), keep=["end"], batch=True)
    assert script.batches() == [["k0", "k1", "k2"]]
    script.end("k0", DONE, TASK, DONE)
    assert not script.ended()
    assert script.released() == set()
    assert script.batches() == [["end"]]
    script.end("end")
    assert script.released() == {"k0", "k2"}
    script.wake_until_flying("k1")
    script.end("k1")
    assert script.ended() == [RunEnded("r", None)]


def test_a_group_of_a_batch_that_fails_for_good_ends_the_run_with_its_own_name():
    script = Script(window=1, policy=Policy(batch_groups=3))
    script.add("r", *many(3), batch=True)
    script.end("k0", DONE, FATAL, TASK)
    (ended,) = script.ended()
    assert (ended.failure, ended.group.outputs) == (FATAL, ("k1",))
    assert script.drained() == ["r"]


def test_a_group_that_is_tried_again_travels_alone():
    script = Script(window=1, policy=Policy(batch_groups=4))
    script.add("r", *many(4, retries=1), batch=True)
    script.end("k0", TASK)
    tried = []
    while not script.ended():
        if not script.flying:
            script.wake()
            continue
        assert sizes(script) == [1]
        tried += script.in_flight()
        script.end(tried[-1])
    assert sorted(tried) == ["k0", "k1", "k2", "k3"]


@pytest.mark.parametrize("failure", [DEATH, RESOURCES])
def test_when_an_invocation_is_lost_each_of_its_groups_is_tried_alone_at_no_cost(failure):
    script = Script(window=1, policy=Policy(batch_groups=4, deaths=0))
    script.add("r", *many(4), batch=True)  # no retries, no deaths: one failure of its own ends it
    script.end("k0", failure, whole=True)
    assert not script.ended()
    for i in range(4):
        assert script.batches() == [[f"k{i}"]]  # at once, in their order
        script.end(f"k{i}")
    assert script.ended() == [RunEnded("r", None)]


def test_the_group_that_is_guilty_of_losing_an_invocation_is_found():
    script = Script(window=1, policy=Policy(batch_groups=4, deaths=0))
    script.add("r", *many(4), batch=True)
    script.end("k0", DEATH, whole=True)
    script.end("k0")
    script.end("k1", DEATH, whole=True)
    assert script.ended()[0].group.outputs == ("k1",)


def test_when_nobody_is_guilty_every_group_of_an_invocation_counts_the_failure():
    script = Script(window=1, policy=Policy(batch_groups=4, transient_tries=2))
    script.add("r", *many(4), batch=True)
    script.end("k0", TRANSIENT, whole=True)
    assert not script.ended()
    while not script.flying:
        script.wake()
    (again,) = script.in_flight()
    script.end(again, TRANSIENT, whole=True)
    assert script.ended()


def test_an_error_of_one_group_that_is_about_resources_is_its_own():
    script = Script(window=1, policy=Policy(batch_groups=2))
    script.add("r", *many(2), batch=True)
    script.end("k0", DONE, RESOURCES)
    assert script.ended()[0].group.outputs == ("k1",)


# -- groups that are replaced by smaller ones ----------------------------------------------------


def halve(it: Group) -> list[Group]:
    """Two groups, the second of which reads what the first makes for it."""
    tasks = it.tasks
    if len(tasks) < 2:
        return []
    middle = len(tasks) // 2
    crossing = tasks[middle - 1]
    first, rest = tasks[:middle], tasks[middle:]
    written = dict.fromkeys([crossing, *(key for key in it.outputs if key in first)])
    return [
        Group(first, it.inputs, tuple(written), it.priority, it.retries, it.kind),
        Group(
            rest,
            (*it.inputs, crossing),
            tuple(key for key in it.outputs if key in rest),
            it.priority,
            it.retries,
            it.kind,
        ),
    ]


def long(outputs: str, tasks: str, inputs: str = "", **more: Any) -> Group:
    """``long("c", "a b c", "x")`` runs a, b and c, and commits c."""
    return replace(group(outputs, inputs, **more), tasks=tuple(tasks.split()))


def test_a_group_that_was_too_large_is_replaced_by_smaller_ones():
    script = Script()
    script.add("r", long("b", "a b"), keep="b", split=halve)
    script.end("b", RESOURCES)
    assert script.in_flight() == ["a"]  # at once: it cannot fail in the same way
    script.end("a")
    assert script.in_flight() == ["b"]
    script.end("b")
    assert script.out == [Release("r", ("a",)), RunEnded("r", None), RunDrained("r")]


def test_a_group_is_split_as_often_as_it_takes():
    script = Script()
    script.add("r", long("h", "a b c d e f g h"), keep="h", split=halve)
    invocations = 0
    while not script.ended():
        invoke = next(iter(script.flying.values()))
        (it,) = invoke.groups
        script.end(it.outputs[0], RESOURCES if len(it.tasks) > 1 else DONE)
        invocations += 1
    assert script.ended() == [RunEnded("r", None)]
    assert invocations == 8 + 7


def test_a_single_task_that_is_too_large_fails_as_often_as_it_may():
    script = Script()
    script.add("r", long("b", "a b", retries=1), split=halve)
    script.end("b", RESOURCES)
    script.end("a", RESOURCES)
    assert not script.ended()
    script.wake_until_flying("a")
    script.end("a", RESOURCES)
    assert script.ended()[0].group.outputs == ("a",)
    assert script.ended()[0].failure is RESOURCES


def test_without_a_way_to_split_a_group_that_is_too_large_fails():
    script = Script()
    script.add("r", long("b", "a b"))
    script.end("b", RESOURCES)
    assert script.ended()[0].group.tasks == ("a", "b")


@pytest.mark.parametrize("failure", [TASK, DEATH, TRANSIENT, THROTTLED])
def test_only_what_was_too_large_is_split(failure):
    script = Script()
    script.add("r", long("b", "a b", retries=5), split=halve)
    script.end("b", failure)
    assert script.in_flight() == []
    script.wake_until_flying("b")
    assert next(iter(script.flying.values())).groups[0].tasks == ("a", "b")


def test_the_inputs_of_a_group_that_is_split_stay_until_both_parts_are_done():
    script = Script()
    script.add("r", group("x"), long("b", "a b", "x"), keep="b", split=halve)
    script.end("x")
    script.end("b", RESOURCES)
    assert script.released() == set()
    script.end("a")
    assert script.released() == set()
    script.end("b")
    assert script.released() == {"a", "x"}


def test_the_readers_of_a_group_that_is_split_wait_for_the_parts():
    script = Script()
    parts = long("a b", "a b")
    script.add("r", parts, group("c", "a"), group("d", "b"), keep="cd", split=halve)
    script.end("b", RESOURCES)
    assert script.in_flight() == ["a"]
    script.end("a")
    assert sorted(script.in_flight()) == ["b", "c"]
    script.end("c")
    assert script.released() == set()  # the second part reads it
    script.end("b")
    assert script.released() == {"a"}
    assert script.in_flight() == ["d"]
    script.end("d")
    assert script.released() == {"b"}
    assert script.ended() == [RunEnded("r", None)]


def test_what_is_kept_is_kept_when_its_group_is_split():
    script = Script()
    script.add("r", long("a b", "a b"), group("c", "a b"), keep="abc", split=halve)
    script.end("b", RESOURCES)
    for key in "abc":
        script.end(key)
        assert script.released() == set()
    assert script.ended() == [RunEnded("r", None)]


def test_a_batch_that_is_too_large_is_first_taken_apart_and_then_split():
    script = Script(window=1, policy=Policy(batch_groups=2))
    groups = [long(f"b{i}", f"a{i} b{i}", kind="k", seconds=0.0) for i in range(2)]
    script.add("r", *groups, batch=True, split=halve)
    assert script.batches() == [["b0", "b1"]]
    script.end("b0", RESOURCES, whole=True)
    assert script.batches() == [["b0"]]
    script.end("b0")
    assert script.batches() == [["b1"]]
    script.end("b1", RESOURCES, whole=True)
    assert script.batches() == [["a1"]]
    script.end("a1")
    script.end("b1")
    assert script.ended() == [RunEnded("r", None)]


def test_a_group_of_a_run_that_has_ended_is_not_split():
    script = Script()
    script.add("r", long("b", "a b"), group("c"), split=halve)
    script.end("c", FATAL)
    script.end("b", RESOURCES)
    assert script.in_flight() == []
    assert script.drained() == ["r"]


@pytest.mark.parametrize(("priority", "batches"), [(0, ["k0"]), (9, ["new0", "new1"])])
def test_what_was_tried_before_and_what_is_new_are_apart(priority, batches):
    script = Script(window=1, policy=Policy(batch_groups=4))
    script.add("r", group("k0", kind="k", seconds=0.0, priority=priority, retries=1), last=False)
    script.end("k0", TASK)
    script.add("r", group("long", kind="z", priority=5), last=False)
    new = [group(f"new{i}", kind="k", seconds=0.0, priority=6) for i in range(2)]
    script.add("r", *new, batch=True)
    script.wake()  # all three are ready, and wait for the long one
    script.end("long")
    assert script.batches() == [batches]
