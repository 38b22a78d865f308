"""Runs whose groups are somebody's single calls: each has an end of its own."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dask_lambda.events import (
    Accept,
    Budget,
    Discard,
    Failure,
    FailureKind,
    GroupFailed,
    GroupsAdded,
    GroupsCancelled,
    InvocationEnded,
    Invoke,
    KeysReleased,
    Release,
    RunCancelled,
    RunDrained,
    RunEnded,
    TimePassed,
    Wake,
)
from dask_lambda.plan import Group
from dask_lambda.policy import Policy
from dask_lambda.state import State
from tests.state_invariants import check
from tests.state_script import DEATH, DONE, FATAL, TASK, THROTTLED, Script, group

CANCELLED = Failure(FailureKind.CANCELLED)
UNSENDABLE = Failure(FailureKind.UNSENDABLE)


class Calls(Script):
    """A script with one open run, ``r``, whose outputs are kept until they are let go."""

    def call(self, *groups: Group, given: tuple[str, ...] = (), **more: object) -> None:
        keep = [key for each in groups for key in each.outputs]
        self.add("r", *groups, keep=keep, last=False, isolated=True, given=given, **more)

    def let_go(self, *keys: str) -> None:
        self.tell(KeysReleased("r", keys))

    def cancel(self, *keys: str, in_flight: bool = False) -> None:
        self.tell(GroupsCancelled("r", keys, in_flight))

    def failed(self) -> dict[str, tuple[Failure, str]]:
        """Of what was said last: output -> failure, and whose fault it was."""
        return {
            each.group.outputs[0]: (each.failure, each.origin.outputs[0])
            for each in self.said(GroupFailed)
        }


# -- failures ------------------------------------------------------------------------------------


def test_a_group_that_fails_takes_those_with_it_that_wait_for_it_and_no_other():
    script = Calls()
    script.call(group("a"), group("b", "a"), group("c", "b"), group("other"))
    script.end("a", TASK)
    assert script.failed() == {"a": (TASK, "a"), "b": (TASK, "a"), "c": (TASK, "a")}
    assert script.in_flight() == ["other"]
    assert not script.ended()


def test_the_run_stays_open_for_more_after_a_failure():
    script = Calls()
    script.call(group("a"))
    script.end("a", FATAL)
    script.call(group("b"))
    assert script.in_flight() == ["b"]


def test_what_is_added_later_to_read_something_that_failed_fails_at_once():
    script = Calls()
    script.call(group("a"))
    script.end("a", TASK)
    script.call(group("b", "a"))
    assert script.failed() == {"b": (TASK, "a")}
    assert not script.flying


def test_a_group_with_two_inputs_of_which_one_fails_fails_once():
    script = Calls()
    script.call(group("a"), group("b"), group("c", "a b"))
    script.end("a", TASK)
    assert script.failed().keys() == {"a", "c"}
    script.end("b", TASK)
    assert script.failed().keys() == {"b"}


def test_retries_come_before_a_group_is_given_up():
    script = Calls()
    script.call(group("a", retries=1), group("b", "a"))
    script.end("a", TASK)
    assert not script.failed()
    script.wake_until_flying("a")
    script.end("a", TASK)
    assert script.failed().keys() == {"a", "b"}


def test_a_group_that_cannot_be_sent_fails_alone_and_not_with_those_that_would_travel_with_it():
    script = Calls(window=1)
    script.call(*(group(f"g{i}", seconds=1e-4) for i in range(9)), batch=True)
    (batch,) = script.batches()
    assert len(batch) > 3
    script.end(batch[1], UNSENDABLE, whole=True)
    assert not script.failed()
    failed = {}
    while script.flying:
        (together,) = script.batches()
        guilty = batch[1] in together
        assert not guilty or together == [batch[1]]
        script.end(together[0], UNSENDABLE if guilty else DONE, whole=True)
        failed |= script.failed()
    assert failed == {batch[1]: (UNSENDABLE, batch[1])}


def test_a_graph_with_a_group_that_cannot_be_sent_ends_at_once():
    script = Calls(window=1)
    script.add("r", *(group(f"g{i}", seconds=1e-4) for i in range(9)), batch=True)
    script.end("g0", UNSENDABLE, whole=True)
    assert script.ended()


def test_deaths_are_forgiven_a_few_times():
    script = Calls(policy=Policy(deaths=1))
    script.call(group("a"))
    script.end("a", DEATH)
    script.wake_until_flying("a")
    script.end("a", DEATH)
    assert script.failed() == {"a": (DEATH, "a")}


def test_throttling_without_end_fails_the_call_and_leaves_the_run_open():
    script = Calls(policy=Policy(throttle_patience=10.0))
    script.call(group("a"))
    script.end("a", THROTTLED)
    script.wake_until_flying("a")
    script.now += 11
    script.end("a", THROTTLED)
    assert script.failed() == {"a": (THROTTLED, "a")}
    assert not script.ended()


def test_a_spent_budget_ends_the_run_with_all_its_calls():
    script = Calls()
    script.call(group("a"), budget=Budget(usd=1.0))
    script.end("a", usd=2.0)
    script.call(group("b"), budget=Budget(usd=1.0))
    (ended,) = script.ended()
    assert ended.failure == Failure(FailureKind.BUDGET)


# -- results -------------------------------------------------------------------------------------


def test_results_stay_as_long_as_they_are_held_however_often_they_were_read():
    script = Calls()
    script.call(group("a"), group("b", "a"))
    script.end("a")
    script.end("b")
    assert not script.released()
    script.call(group("c", "a"))
    script.end("c")
    assert not script.released()


def test_a_result_that_is_let_go_is_released_when_its_last_reader_is_done():
    script = Calls()
    script.call(group("a"), group("b", "a"))
    script.end("a")
    script.let_go("a")
    assert not script.released()
    script.end("b")
    assert script.released() == {"a"}


def test_a_result_that_is_let_go_before_it_is_there_is_released_when_it_comes():
    script = Calls()
    script.call(group("a"))
    script.let_go("a")
    assert script.in_flight() == ["a"], "nobody cancelled it"
    script.end("a")
    assert script.accepted == [None]
    assert script.released() == {"a"}


def test_what_a_failed_reader_was_to_read_is_released_with_it():
    script = Calls()
    script.call(group("a"), group("b"), group("c", "a b"))
    script.end("a")
    script.let_go("a")
    script.end("b", TASK)
    assert script.released() == {"a"}


def test_nothing_is_released_of_what_failed():
    script = Calls()
    script.call(group("a"), group("b", "a"))
    script.end("a", TASK)
    script.let_go("a", "b")
    assert not script.released()


def test_a_given_value_is_read_and_released_like_a_result():
    script = Calls()
    script.call(given=("data",))
    script.call(group("a", "data"))
    assert script.in_flight() == ["a"]
    script.let_go("data")
    assert not script.released()
    script.end("a")
    assert script.released() == {"data"}


def test_to_let_go_of_what_nobody_knows_does_nothing():
    script = Calls()
    script.let_go("a")
    script.call()
    script.let_go("a")
    assert not script.out


# -- cancelling ----------------------------------------------------------------------------------


def test_a_group_that_waits_is_given_up_with_those_that_wait_for_it():
    script = Calls(window=1)
    script.call(group("a"), group("b"), group("c", "b"))
    script.cancel("b")
    assert script.failed() == {"b": (CANCELLED, "b"), "c": (CANCELLED, "b")}
    script.end("a")
    assert not script.flying


def test_a_group_in_flight_goes_on_unless_that_is_meant():
    script = Calls()
    script.call(group("a"))
    script.cancel("a")
    assert not script.failed()
    script.cancel("a", in_flight=True)
    assert script.failed() == {"a": (CANCELLED, "a")}
    script.end("a")
    assert script.discarded == [None]
    assert not script.accepted


def test_a_group_that_is_to_be_tried_again_is_given_up_and_not_tried():
    script = Calls()
    script.call(group("a", retries=5))
    script.end("a", TASK)
    script.cancel("a")
    assert script.failed().keys() == {"a"}
    while script.timers:
        script.wake()
    assert not script.flying


def test_a_group_that_is_done_is_not_cancelled():
    script = Calls()
    script.call(group("a"))
    script.end("a")
    script.cancel("a", in_flight=True)
    assert not script.failed()


def test_cancelled_groups_take_no_room_in_an_invocation_with_others():
    script = Calls(window=1)
    script.call(*(group(key, kind="k", seconds=0.0) for key in "abcd"), batch=True)
    first = script.batches()[0]
    left = [key for key in "abcd" if key not in first]
    if left:
        script.cancel(left[0])
    script.end(first[0])
    assert [key for batch in script.batches() for key in batch] == left[1:]


# -- the end -------------------------------------------------------------------------------------


def test_an_open_run_ends_when_nothing_more_is_to_come_and_all_is_done():
    script = Calls()
    script.call(group("a"), group("b"))
    script.end("a", TASK)
    script.add("r", last=True, isolated=True)
    assert not script.ended()
    script.end("b")
    assert script.ended() == [RunEnded("r", None)]


def test_a_cancelled_run_forgets_its_calls():
    script = Calls()
    script.call(group("a"), group("b", "a"))
    script.tell(RunCancelled("r"))
    script.end("a")
    assert script.discarded == [None]
    assert script.drained() == ["r"]


# -- whatever happens ----------------------------------------------------------------------------

OUTCOMES = [DONE] * 4 + [Failure(kind) for kind in FailureKind if kind is not FailureKind.BUDGET]


class Client:
    """Calls, holds and gives up at random, and knows what must become of each call."""

    def __init__(self, window: int, batch: bool, speculate: bool):
        policy = Policy(deaths=1, transient_tries=1, throttle_patience=1e9, backoff=0.1)
        self.state = State(window, policy)
        self.options = {"batch": batch, "speculate": speculate, "patience": 0.0, "isolated": True}
        self.now = 0.0
        self.flying: dict[int, Invoke] = {}
        self.timers: list[float] = []
        self.groups: dict[str, Group] = {}
        self.ends: Counter[str] = Counter()
        self.good: set[str] = set()
        self.released: set[str] = set()
        self.held: set[str] = set()

    def tell(self, event: object) -> None:
        for said in self.state.handle(event, self.now):
            match said:
                case Invoke():
                    self.flying[said.invocation] = said
                    for each in said.groups:
                        assert not self.ends[each.outputs[0]], "it has ended already"
                        assert set(each.inputs) <= self.good - self.released
                case Accept(_, each, _):
                    self.ends[each.outputs[0]] += 1
                    self.good.add(each.outputs[0])
                case GroupFailed(_, each, failure, origin):
                    self.ends[each.outputs[0]] += 1
                    assert failure.kind is not FailureKind.BUDGET
                    assert self.ends[origin.outputs[0]], "the fault of one that goes on"
                case Discard(_, each, _):
                    assert self.ends[each.outputs[0]]
                case Release(_, keys):
                    for key in keys:
                        assert key in self.good - self.released
                        assert key not in self.held
                        self.released.add(key)
                case Wake(at):
                    self.timers.append(at)
                case RunEnded() | RunDrained():
                    raise AssertionError("the run is open")
        check(self.state)

    def call(self, key: str, inputs: list[str], retries: int) -> None:
        self.groups[key] = Group((key,), tuple(inputs), (key,), 0, retries, "k", 0.0)
        self.held.add(key)
        self.tell(
            GroupsAdded("r", [self.groups[key]], frozenset({key}), last=False, **self.options)
        )

    def let_go(self, key: str) -> None:
        self.held.discard(key)
        self.tell(KeysReleased("r", (key,)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_call_ends_once_and_nothing_stays_that_nobody_holds(data):
    draw = data.draw
    client = Client(draw(st.integers(1, 4)), draw(st.booleans()), draw(st.booleans()))
    for number in range(draw(st.integers(1, 25))):
        match draw(st.sampled_from(["call", "call", "end", "end", "let go", "cancel", "time"])):
            case "call":
                held = sorted(client.held)
                some = st.lists(st.sampled_from(held or [""]), unique=True, max_size=3)
                client.call(f"k{number}", draw(some) if held else [], draw(st.integers(0, 1)))
            case "end" if client.flying:
                which = draw(st.sampled_from(sorted(client.flying)))
                count = len(client.flying.pop(which).groups)
                if draw(st.booleans()):
                    outcomes = tuple(draw(st.sampled_from(OUTCOMES)) for _ in range(count))
                    client.tell(InvocationEnded(which, outcomes))
                else:
                    whole = draw(st.sampled_from(OUTCOMES[4:]))
                    client.tell(InvocationEnded(which, (whole,) * count, True))
            case "let go" if client.held:
                client.let_go(draw(st.sampled_from(sorted(client.held))))
            case "cancel" if client.groups:
                key = draw(st.sampled_from(sorted(client.groups)))
                client.tell(GroupsCancelled("r", (key,), draw(st.booleans())))
            case "time":
                client.now += draw(st.sampled_from([0.01, 1.0, 30.0]))
                for at in [at for at in client.timers if at <= client.now]:
                    client.timers.remove(at)
                    client.tell(TimePassed(at))
    for _ in range(1000):
        if client.flying:
            which, invoke = next(iter(client.flying.items()))
            del client.flying[which]
            client.tell(InvocationEnded(which, (DONE,) * len(invoke.groups)))
        elif client.timers and client.ends.keys() != client.groups.keys():
            at = min(client.timers)
            client.timers.remove(at)
            client.now = max(client.now, at)
            client.tell(TimePassed(at))
        else:
            break
    assert client.ends == Counter(dict.fromkeys(client.groups, 1))
    for key in sorted(client.held):
        client.let_go(key)
    assert client.released == client.good
