"""The engine's decisions under whatever may happen, in whatever order."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_lambda.events import (
    Accept,
    Budget,
    Discard,
    Done,
    Event,
    Failure,
    FailureKind,
    GroupsAdded,
    InvocationEnded,
    Invoke,
    Release,
    RunCancelled,
    RunDrained,
    RunEnded,
    TimePassed,
    Wake,
    WindowChanged,
)
from dask_lambda.pace import TRUST
from dask_lambda.plan import Group
from dask_lambda.policy import Policy
from dask_lambda.state import State
from tests.state_invariants import check


@dataclass
class Model:
    """What must hold for one run, told by the test and not by the machine."""

    name: str
    batches: list[list[Group]]  # to be added, in this order
    keep: frozenset[str]
    added: list[Group] = field(default_factory=list)
    available: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)
    done: set[Group] = field(default_factory=set)
    flying: Counter = field(default_factory=Counter)  # invocations of each group
    delayed: dict[Group, float] = field(default_factory=dict)  # until then at the latest
    failures: dict[Group, Counter] = field(default_factory=lambda: defaultdict(Counter))
    starts: Counter = field(default_factory=Counter)
    opened: bool = False
    last: bool = False
    outcome: str = ""  # "done", "failed", "cancelled"
    drained: bool = False
    batch: bool = False
    splits: bool = False
    speculate: bool = False
    budget: Budget | None = None
    usd: float = 0.0
    rungs: Counter = field(default_factory=Counter)
    since: dict[Group, float] = field(default_factory=dict)  # it fails for reasons outside of it
    lost: Counter = field(default_factory=Counter)  # starts that nobody was guilty of

    def readers(self, key: str) -> list[Group]:
        return [g for g in self.added if key in g.inputs and g not in self.done]


@st.composite
def models(draw, name: str) -> Model:
    count = draw(st.integers(0, 9))
    priorities = draw(st.permutations(range(count)))
    groups: list[Group] = []
    keys: list[str] = []
    expected = draw(st.sampled_from([[None], [0.0], [None, 0.0, 0.3, 5.0]]))
    for i in range(count):
        inputs = draw(st.lists(st.sampled_from(keys), unique=True, max_size=4)) if keys else []
        outputs = [f"{i}{letter}" for letter in "xyz"[: draw(st.integers(1, 3))]]
        inner = [f"{i}{letter}" for letter in "abc"[: draw(st.integers(0, 3))]]
        groups.append(
            Group(
                (*inner, *outputs),
                tuple(inputs),
                tuple(outputs),
                priorities[i],
                draw(st.integers(0, 2)),
                draw(st.sampled_from(["k", "k", "k", "l"])),
                draw(st.sampled_from(expected)),
                memory=draw(st.sampled_from([0, 0, 1, 2])),
                where=draw(st.sampled_from(["lambda", "lambda", "local"])),
            )
        )
        keys += outputs
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=2)))
    bounds = [0, *cuts, count]
    batches = [groups[a:b] for a, b in itertools.pairwise(bounds)]
    for batch in batches:  # within one event any order will do
        batch[:] = draw(st.permutations(batch))
    keep = draw(st.frozensets(st.sampled_from(keys))) if keys else frozenset()
    return Model(
        name,
        batches,
        keep,
        batch=draw(st.booleans()),
        splits=draw(st.booleans()),
        speculate=draw(st.booleans()),
        budget=draw(st.sampled_from([None, None, None, Budget(2.0, usd_second=(0.1,))])),
    )


@st.composite
def waves(draw, name: str) -> Model:
    """A run of groups of one kind that can all start at once, of which some take long."""
    count = draw(st.integers(4, 9))
    groups = [Group((f"{i}x",), (), (f"{i}x",), i, 1, "k") for i in range(count)]
    keep = draw(st.frozensets(st.sampled_from([f"{i}x" for i in range(count)])))
    return Model(name, [groups], keep, speculate=True)


def halves(it: Group) -> list[Group]:
    """Two groups with half of the tasks each; the second reads the last value of the first."""
    middle = len(it.tasks) // 2
    if not middle:
        return []
    first, rest = it.tasks[:middle], it.tasks[middle:]
    crossing = first[-1]
    written = tuple(dict.fromkeys([*(key for key in it.outputs if key in first), crossing]))
    return [
        replace(it, tasks=first, outputs=written),
        replace(
            it,
            tasks=rest,
            inputs=(*it.inputs, crossing),
            outputs=tuple(key for key in it.outputs if key in rest),
        ),
    ]


DONE = Done()
OUTCOMES = [Done(seconds) for seconds in (0.0, 0.0, 0.0, 0.1, 0.1, 2.0)]
OUTCOMES += [Failure(kind) for kind in FailureKind if kind is not FailureKind.BUDGET]
FAILURES = [outcome for outcome in OUTCOMES if isinstance(outcome, Failure)]
POLICY = Policy(
    deaths=1,
    transient_tries=2,
    backoff=0.5,
    max_backoff=4.0,
    throttle_patience=1e9,
    straggler_samples=2,
    straggler_seconds=0.5,
    speculative_share=1.0,
)
PATIENCE = 3.0
RUNGS = 2
#: Outside of Lambda.
SLOTS, MEMORY = 2, 2
#: Failures of an invocation of which one of several groups may be the reason.
GUILTY = {FailureKind.MEMORY, FailureKind.TIMEOUT, FailureKind.DEATH}
#: Failures that no other invocation can make good.
FINAL = {FailureKind.FATAL, FailureKind.UNSENDABLE}
REFUSED = {FailureKind.THROTTLED, FailureKind.RATE_LIMITED, FailureKind.NOT_READY}


class Play:
    """Drives the machine with whatever hypothesis chooses and checks all that is known."""

    def __init__(self, runs: list[Model], window: int, seed: int):
        self.state = State(window, POLICY, seed, rungs=RUNGS, slots=SLOTS, memory=MEMORY)
        self.window = window
        self.runs = {run.name: run for run in runs}
        self.now = 0.0
        self.flying: dict[int, Invoke] = {}
        self.answered: set[int] = set()
        self.timers: list[float] = []
        self.expected_failure: tuple[str, Group, Failure] | None = None
        self.expected_results: list[tuple[type, Group, object]] = []

    def handle(self, event: Event) -> None:
        room = self.on_lambda()
        seen_end = {run.name for run in self.runs.values() if run.outcome}
        results: list[tuple[type, Group, object]] = []
        for instruction in self.state.handle(event, self.now):
            match instruction:
                case Invoke(invocation, name, groups, tries, rung, speculative, local):
                    run = self.runs[name]
                    assert not run.outcome, "nothing is started for an ended run"
                    assert invocation not in self.flying
                    assert invocation not in self.answered
                    assert tries == run.starts[groups[0]]
                    assert run.budget is None or run.usd <= run.budget.usd + 1e-6
                    self.check_batch(run, groups, speculative)
                    if local:
                        assert len(groups) == 1
                        assert not speculative
                    for it in groups:
                        assert it.is_local == local
                        assert it in run.added
                        assert it not in run.done
                        assert run.flying[it] == speculative
                        assert set(it.inputs) <= run.available - run.released
                        assert rung == run.rungs[it]
                        run.starts[it] += not speculative
                        run.flying[it] += 1
                        run.delayed.pop(it, None)
                    if not speculative:
                        for job in self.state.in_flight[invocation].jobs:
                            if job.spec in run.since:  # the machine alone knows what it drew
                                run.since[job.spec] += self.now - job.due
                    self.flying[invocation] = instruction
                    room += not local
                    assert room <= self.window
                    assert len(self.flying) - room <= SLOTS
                case Accept(name, it, result) | Discard(name, it, result):
                    results.append((type(instruction), it, result))
                case Release(name, keys):
                    run = self.runs[name]
                    assert run.last
                    assert name not in seen_end
                    for key in keys:
                        assert key in run.available - run.released
                        assert key not in run.keep
                        assert not run.readers(key)
                        run.released.add(key)
                case RunEnded(name, failure, which):
                    run = self.runs[name]
                    assert not run.outcome, "a run ends once"
                    if failure is None:
                        assert run.last
                        assert run.done == set(run.added)
                        run.outcome = "done"
                    elif failure.kind is FailureKind.BUDGET:
                        assert run.budget is not None
                        run.outcome = "broke"
                    else:
                        assert self.expected_failure == (name, which, failure)
                        self.expected_failure = None
                        run.outcome = "failed"
                case RunDrained(name):
                    run = self.runs[name]
                    assert run.outcome
                    assert not run.drained, "a run is drained once"
                    assert not any(invoke.run == name for invoke in self.flying.values())
                    run.drained = True
                case Wake(at):
                    self.timers.append(at)
        assert results == self.expected_results, "the first result of a group is the only one"
        self.expected_results = []
        self.check()

    def on_lambda(self) -> int:
        return sum(not invoke.local for invoke in self.flying.values())

    def check_local(self, ready: list[Group]) -> None:
        """What could start outside of Lambda waits for one that does not fit, if it waits."""
        flying = [invoke.groups[0] for invoke in self.flying.values() if invoke.local]
        if ready and len(flying) < SLOTS:
            assert flying, "nothing is there that it could wait for"
            assert any(it.memory + sum(f.memory for f in flying) > MEMORY for it in ready)

    def check_batch(self, run: Model, groups: tuple[Group, ...], speculative: bool) -> None:
        if speculative:
            assert run.speculate
            return
        if len(groups) == 1:
            return
        assert run.batch
        assert len({it.kind for it in groups}) == 1
        assert not any(run.starts[it] for it in groups), "what was tried before goes alone"
        if groups[0].seconds is None:
            done = sum(it.kind == groups[0].kind for it in run.done)
            assert len(groups) <= TRUST * done
        assert len(groups) <= POLICY.batch_groups

    def check(self) -> None:
        check(self.state)
        assert self.expected_failure is None, "a failure that nothing can mend ends the run"
        assert set(self.state.in_flight) == set(self.flying)
        known = {run.name for run in self.runs.values() if run.opened}
        drained = {run.name for run in self.runs.values() if run.drained}
        assert set(self.state.runs) <= known - drained
        startable = 0
        local: list[Group] = []
        for run in self.runs.values():
            flying = any(invoke.run == run.name for invoke in self.flying.values())
            if run.outcome:
                assert run.drained == (not flying)
                continue
            if run.last:
                assert run.done != set(run.added), "a run with nothing left to do has not ended"
                for key in run.available - run.released - run.keep:
                    assert run.readers(key), f"{key} is not needed and was not released"
            for it in run.added:
                idle = it not in run.done and not run.flying[it]
                if idle and set(it.inputs) <= run.available:
                    if run.delayed.get(it, 0.0) > self.now:
                        assert self.timers or self.flying, "nobody will wake it"
                    elif it.is_local:
                        local.append(it)
                    elif run.budget is None:
                        startable += 1
                    else:
                        assert flying or self.timers, "nothing will come that it could pay with"
        self.check_local(local)
        if startable:
            full = not self.state.window.room(self.on_lambda(), self.now)
            assert full, "there is room, and a group that is ready"
            assert self.flying or self.timers, "nobody will start it"

    # -- what may happen ---------------------------------------------------------------------

    def add(self, run: Model) -> None:
        batch = run.batches.pop(0)
        run.added += batch
        run.opened, run.last = True, not run.batches
        keep = run.keep & {key for it in batch for key in it.outputs}
        split = halves if run.splits else None
        self.handle(
            GroupsAdded(
                run.name,
                batch,
                keep,
                run.last,
                split,
                run.batch,
                run.speculate,
                PATIENCE,
                run.budget,
            )
        )

    def end(
        self,
        invocation: int,
        outcomes: list[Done | Failure],
        whole: bool = False,
        usd: float = 0.0,
    ) -> None:
        invoke = self.flying.pop(invocation)
        self.answered.add(invocation)
        run, groups = self.runs[invoke.run], invoke.groups
        run.flying.subtract(groups)
        run.usd += usd
        told: list[Done | Failure] = []
        for it, outcome in zip(groups, outcomes, strict=True):
            over = run.outcome or self.expected_failure
            if isinstance(outcome, Done):
                outcome = replace(outcome, result=(invocation, it.outputs))
                late = over or it in run.done
                kind = Discard if late else Accept
                self.expected_results.append((kind, it, outcome.result))
                if not late:
                    run.done.add(it)
                    run.available.update(it.outputs)
            elif not over and it not in run.done:
                self.fail(run, it, outcome, whole and len(groups) > 1)
            told.append(outcome)
        self.handle(InvocationEnded(invocation, tuple(told), whole, usd))

    def fail(self, run: Model, it: Group, outcome: Failure, whole: bool) -> None:
        kind = outcome.kind
        if run.flying[it] and kind not in FINAL:
            return  # the other invocation may do it
        if kind in REFUSED:
            run.lost[it] += 1
            run.delayed[it] = self.now + POLICY.max_backoff
            return
        if whole and kind in GUILTY:
            run.lost[it] += 1
            return
        if kind is FailureKind.MEMORY and run.rungs[it] + 1 < RUNGS and not it.is_local:
            run.rungs[it] += 1
            run.lost[it] += 1
            return
        if kind in (FailureKind.MEMORY, FailureKind.TIMEOUT):
            if self.split(run, it):
                return
            kind = FailureKind.TASK
        counts = run.failures[it]
        counts[kind] += 1
        count = counts[kind]
        outside = kind in (FailureKind.TRANSIENT, FailureKind.EXPIRED)
        if not outside:
            run.since.pop(it, None)
        match kind:
            case FailureKind.TASK:
                again = count <= it.retries
            case FailureKind.DEATH:
                again = count <= POLICY.deaths + it.retries
                if not again and self.split(run, it):
                    return
            case FailureKind.TRANSIENT | FailureKind.EXPIRED:
                since = run.since.setdefault(it, self.now)
                again = self.now - since < PATIENCE or count < POLICY.transient_tries
            case _:
                again = False
        if not again:
            self.expected_failure = (run.name, it, outcome)
        else:
            bound = min(POLICY.max_backoff, POLICY.backoff * 2.0 ** min(count - 1, 50))
            run.delayed[it] = self.now + bound

    def split(self, run: Model, it: Group) -> bool:
        parts = halves(it) if run.splits else []
        if parts:
            run.added.remove(it)
            run.added += parts
            for part in parts:
                run.rungs[part] = run.rungs[it]
        return bool(parts)

    def wake(self) -> None:
        at = min(self.timers)
        self.timers.remove(at)
        self.now = max(self.now, at)
        self.handle(TimePassed(at))

    def cancel(self, run: Model) -> None:
        if run.opened and not run.outcome:
            run.outcome = "cancelled"
        self.handle(RunCancelled(run.name))

    def change_window(self, window: int) -> None:
        self.window = max(window, self.on_lambda())  # for what is in flight already
        self.handle(WindowChanged(window))
        self.window = window


def _is_refusal(outcome: Done | Failure) -> bool:
    return isinstance(outcome, Failure) and outcome.kind in REFUSED


def play_on(play: Play, draw, outcomes: list[Done | Failure]) -> None:
    """Let anything happen for a while."""
    runs = list(play.runs.values())
    for _ in range(draw(st.integers(0, 40))):
        actions = []
        actions += [("add", run) for run in runs if run.batches and not run.outcome]
        actions += [("end", invocation) for invocation in play.flying] * 3
        actions += [("wake", None)] if play.timers else []
        actions += [("step", None), ("window", None)]
        actions += [("cancel", run) for run in runs] if draw(st.integers(0, 9)) == 9 else []
        action, what = draw(st.sampled_from(actions))
        match action:
            case "add":
                play.add(what)
            case "end":
                count = len(play.flying[what].groups)
                usd = draw(st.sampled_from([0.0, 0.1, 0.7]))
                possible = outcomes
                if play.flying[what].local:  # which nobody refuses
                    possible = [each for each in outcomes if not _is_refusal(each)]
                if draw(st.integers(0, 3)) == 0:  # it is lost as a whole
                    failures = [each for each in possible if isinstance(each, Failure)]
                    play.end(what, [draw(st.sampled_from(failures))] * count, True, usd)
                else:
                    ends = [draw(st.sampled_from(possible)) for _ in range(count)]
                    play.end(what, ends, False, usd)
            case "wake":
                play.wake()
            case "step":
                play.now += draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
            case "window":
                if draw(st.booleans()) and play.on_lambda() <= play.window:
                    play.change_window(draw(st.integers(1, 5)))
            case "cancel":
                play.cancel(what)


def play_to_the_end(play: Play) -> None:
    """Let all go well; then every run must come to its end."""
    runs = list(play.runs.values())
    for _ in range(1000):
        waiting = [run for run in runs if run.batches and not run.outcome]
        if waiting:
            play.add(waiting[0])
        elif play.flying:
            invocation, invoke = next(iter(play.flying.items()))
            play.end(invocation, [DONE] * len(invoke.groups))
        elif all(run.drained for run in runs):
            break
        else:
            assert play.timers, "a run that nothing moves any more"
            play.wake()
    else:
        pytest.fail("the runs do not end")
    while play.timers:
        play.wake()
    for run in runs:
        if run.outcome == "done":
            assert run.done == set(run.added)
            assert run.available - run.released == run.keep & run.available
            assert run.starts == Counter(
                {it: 1 + sum(run.failures[it].values()) + run.lost[it] for it in run.added}
                | {it: run.starts[it] for it in run.starts if it not in run.added}  # split
            )
    assert list(play.state.runs) == []
    assert not play.state.in_flight


ANYTHING = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@ANYTHING
@given(data=st.data())
def test_whatever_happens_in_whatever_order_the_rules_hold(data):
    draw = data.draw
    runs = [draw(models(name)) for name in "rst"[: draw(st.integers(1, 3))]]
    play = Play(runs, draw(st.integers(1, 5)), draw(st.integers(0, 3)))
    play_on(play, draw, OUTCOMES)
    play_to_the_end(play)


@ANYTHING
@given(data=st.data())
def test_the_rules_hold_with_duplicates_too(data):
    """As above, with room for duplicates and reasons for them."""
    draw = data.draw
    run = draw(waves("r"))
    play = Play([run], 20, draw(st.integers(0, 3)))
    play.add(run)
    play.now = 1.0
    for invocation in list(play.flying)[: len(play.flying) // 2 + 1]:
        play.end(invocation, [DONE], usd=1.0)
    play.now = 20.0
    play.wake()
    assert any(invoke.speculative for invoke in play.flying.values())
    play_on(play, draw, OUTCOMES)
    play_to_the_end(play)
