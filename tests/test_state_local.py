"""What runs outside of Lambda: a room of its own, and none of Lambda's rules."""

from __future__ import annotations

from functools import partial

from dask_lambda.events import Budget, FailureKind, Invoke, RunCancelled, Stalled
from tests.state_script import (
    DEATH,
    DONE,
    MEMORY,
    TASK,
    THROTTLED,
    TRANSIENT,
    Script,
    group,
)

here = partial(group, where="local")


def test_a_full_window_does_not_hold_up_what_runs_elsewhere():
    script = Script(window=1, slots=1)
    script.add("r", group("a"), group("b"), here("c"))
    assert script.in_flight() == ["a", "c"]
    assert [i.local for i in script.flying.values()] == [False, True]


def test_what_runs_elsewhere_takes_no_room_in_the_window():
    script = Script(window=1, slots=1)
    script.add("r", here("a"), here("b"), group("c"))
    assert sorted(script.in_flight()) == ["a", "c"]
    script.end("a")
    assert sorted(script.in_flight()) == ["b", "c"]


def test_values_go_from_one_place_to_the_other_and_back():
    script = Script(slots=1)
    script.add("r", group("a"), here("b", "a"), group("c", "b"), keep="c")
    for key in "abc":
        assert script.in_flight() == [key]
        script.end(key)
    assert script.ended()


def test_there_are_as_many_at_a_time_as_there_are_slots_those_first_that_come_first():
    script = Script(slots=2)
    script.add("r", *(here(key, priority=9 - i) for i, key in enumerate("abcd")))
    assert script.in_flight() == ["d", "c"]
    script.end("c")
    assert script.in_flight() == ["d", "b"]


def test_runs_take_turns_in_the_slots():
    script = Script(slots=1)
    script.add("r", *(here(f"r{i}", priority=i) for i in range(3)))
    script.add("s", *(here(f"s{i}", priority=i) for i in range(2)))
    order: list[str] = []
    while script.flying:
        (invoke,) = script.flying.values()
        order.append(*script.in_flight())
        script.end(order[-1], run=invoke.run)
    assert order == ["r0", "r1", "s0", "r2", "s1"]


def test_together_they_take_no_more_memory_than_there_is():
    script = Script(slots=3, memory=10)
    script.add("r", here("a", memory=6), here("b", memory=6, priority=1), here("c", priority=2))
    assert script.in_flight() == ["a"], "b is next in turn, and must not be overtaken for ever"
    script.end("a")
    assert script.in_flight() == ["b", "c"]


def test_what_says_it_needs_more_than_there_is_runs_alone():
    script = Script(slots=3, memory=10)
    script.add("r", here("a", memory=60), here("b", memory=1, priority=1))
    assert script.in_flight() == ["a"]


def test_they_are_never_sent_together():
    script = Script(window=1, slots=1)
    script.add(
        "r", *(here(f"a{i}", kind="k", seconds=1e-3, priority=i) for i in range(9)), batch=True
    )
    assert script.batches() == [["a0"]]


def test_none_is_sent_twice_however_long_it_takes():
    script = Script(slots=20)
    script.add("r", *(here(f"a{i}", kind="k") for i in range(20)), speculate=True)
    script.now = 1.0
    for i in range(19):
        script.end(f"a{i}")
    script.now = 1e4
    script.wake()
    assert not script.said(Invoke)


def test_how_long_they_take_says_nothing_of_lambda():
    script = Script(slots=20)
    groups = [here(f"a{i}", kind="k") for i in range(19)]
    script.add("r", *groups, group("b", kind="k"), speculate=True)
    script.now = 1.0
    for i in range(19):
        script.end(f"a{i}")
    script.now = 1e4
    script.wake()
    assert not script.said(Invoke), "nobody knows what is usual on Lambda"


def test_their_success_does_not_open_the_window_that_lambda_has_closed():
    script = Script(window=10, slots=1)
    script.add("r", *(group(f"a{i}") for i in range(4)), here("b"), here("c"))
    for i in range(3):
        script.end(f"a{i}", THROTTLED)
    limit = script.state.window.limit
    script.end("b")
    assert script.state.window.limit == limit
    assert limit < 4


def test_a_death_is_tried_again_and_then_reported():
    script = Script(slots=1)
    script.add("r", here("a"))
    for _ in range(script.state.policy.deaths):
        script.end("a", DEATH)
        script.wake_until_flying("a")
    script.end("a", DEATH)
    (ended,) = script.ended()
    assert ended.failure == DEATH


def test_what_raises_is_tried_as_often_as_was_asked_for():
    script = Script(slots=1)
    script.add("r", here("a", retries=1))
    script.end("a", TASK)
    script.wake_until_flying("a")
    script.end("a", TASK)
    assert script.ended()[0].failure == TASK


def test_there_is_no_larger_function_for_what_runs_out_of_memory():
    script = Script(slots=1, rungs=3)
    script.add("r", here("a"))
    script.end("a", MEMORY)
    assert script.ended()[0].failure == MEMORY


def test_parts_of_what_was_too_large_run_in_the_same_place():
    script = Script(slots=2)
    whole = here("a b")

    def halves(spec):
        return [here("a"), here("b")] if spec == whole else []

    script.add("r", whole, split=halves)
    script.end("a", MEMORY)
    assert [i.local for i in script.flying.values()] == [True, True]
    script.end("a")
    script.end("b")
    assert script.ended()[0].failure is None


def test_trouble_with_s3_is_waited_out():
    script = Script(slots=1)
    script.add("r", here("a"), patience=100.0)
    stalled = []
    while not script.ended():
        if "a" in script.in_flight():
            script.end("a", TRANSIENT)
            stalled += script.said(Stalled)
        else:
            script.wake()
    assert script.now >= 90
    assert stalled


def test_a_budget_of_dollars_does_not_count_their_time():
    script = Script(slots=1)
    script.add("r", here("a", seconds=1e6), budget=Budget(0.01, usd_second=(1.0,)))
    assert script.in_flight() == ["a"]
    script.now = 1e6
    script.wake()
    assert not script.ended()
    script.end("a")
    assert script.ended()[0].failure is None


def test_a_budget_of_time_ends_them():
    script = Script(slots=1)
    script.add("r", here("a"), here("b"), budget=Budget(until=10.0))
    script.now = 11.0
    script.end("a")
    (ended,) = script.ended()
    assert ended.failure is not None
    assert ended.failure.kind is FailureKind.BUDGET
    assert not script.flying


def test_who_cannot_pay_for_lambda_waits_for_what_costs_nothing():
    script = Script(slots=1)
    budget = Budget(1.0, usd_second=(1.0,))
    groups = here("a"), group("b", seconds=0.5), group("c", "b", kind="k", seconds=0.7)
    script.add("r", *groups, budget=budget)
    assert sorted(script.in_flight()) == ["a", "b"]
    script.end("b", usd=0.5)
    assert script.in_flight() == ["a"]
    assert not script.ended()
    script.end("a")
    assert script.ended()[0].failure is not None


def test_a_cancelled_run_starts_nothing_more_anywhere():
    script = Script(slots=1)
    script.add("r", here("a"), here("b"))
    script.tell(RunCancelled("r"))
    script.end("a", DONE)
    assert not script.flying
    assert script.drained() == ["r"]
