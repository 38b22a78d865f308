"""Groups that share an invocation, and groups that are split, as lists of events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dask_lambda.events import Done, Release, RunDrained, RunEnded
from dask_lambda.plan import Group
from dask_lambda.policy import Policy
from tests.state_script import (
    DEATH,
    DONE,
    FATAL,
    TASK,
    THROTTLED,
    TIMEOUT,
    TRANSIENT,
    Script,
    group,
)

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


@pytest.mark.parametrize("failure", [DEATH, TIMEOUT])
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
    script.add("r", *many(4), batch=True, patience=0.0)
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
    script.end("k0", DONE, TIMEOUT)
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
    script.end("b", TIMEOUT)
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
        script.end(it.outputs[0], TIMEOUT if len(it.tasks) > 1 else DONE)
        invocations += 1
    assert script.ended() == [RunEnded("r", None)]
    assert invocations == 8 + 7


def test_a_single_task_that_is_too_large_fails_as_often_as_it_may():
    script = Script()
    script.add("r", long("b", "a b", retries=1), split=halve)
    script.end("b", TIMEOUT)
    script.end("a", TIMEOUT)
    assert not script.ended()
    script.wake_until_flying("a")
    script.end("a", TIMEOUT)
    assert script.ended()[0].group.outputs == ("a",)
    assert script.ended()[0].failure is TIMEOUT


def test_without_a_way_to_split_a_group_that_is_too_large_fails():
    script = Script()
    script.add("r", long("b", "a b"))
    script.end("b", TIMEOUT)
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
    script.end("b", TIMEOUT)
    assert script.released() == set()
    script.end("a")
    assert script.released() == set()
    script.end("b")
    assert script.released() == {"a", "x"}


def test_the_readers_of_a_group_that_is_split_wait_for_the_parts():
    script = Script()
    parts = long("a b", "a b")
    script.add("r", parts, group("c", "a"), group("d", "b"), keep="cd", split=halve)
    script.end("b", TIMEOUT)
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
    script.end("b", TIMEOUT)
    for key in "abc":
        script.end(key)
        assert script.released() == set()
    assert script.ended() == [RunEnded("r", None)]


def test_a_batch_that_is_too_large_is_first_taken_apart_and_then_split():
    script = Script(window=1, policy=Policy(batch_groups=2))
    groups = [long(f"b{i}", f"a{i} b{i}", kind="k", seconds=0.0) for i in range(2)]
    script.add("r", *groups, batch=True, split=halve)
    assert script.batches() == [["b0", "b1"]]
    script.end("b0", TIMEOUT, whole=True)
    assert script.batches() == [["b0"]]
    script.end("b0")
    assert script.batches() == [["b1"]]
    script.end("b1", TIMEOUT, whole=True)
    assert script.batches() == [["a1"]]
    script.end("a1")
    script.end("b1")
    assert script.ended() == [RunEnded("r", None)]


def test_a_group_of_a_run_that_has_ended_is_not_split():
    script = Script()
    script.add("r", long("b", "a b"), group("c"), split=halve)
    script.end("c", FATAL)
    script.end("b", TIMEOUT)
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
