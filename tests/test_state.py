"""Order, the window, release and the ends of runs, as lists of events: no AWS, no clock."""

from __future__ import annotations

from dask_lambda.events import Invoke, Release, RunCancelled, RunDrained, RunEnded, WindowChanged
from dask_lambda.policy import Policy
from tests.state_script import (
    FATAL,
    TASK,
    THROTTLED,
    Script,
    group,
)

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
