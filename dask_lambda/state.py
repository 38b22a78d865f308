"""Who runs when: the engine's decisions, as a pure state machine.

May import: events, policy, plan.

Events go in, instructions come out; there is no clock, no socket, no thread and no randomness
but a seeded one.  Time is an argument.  So every rule about order, concurrency, retries,
throttling and release can be tested with a list of events, and driven in virtual time.

Theory of operation
-------------------
A *run* is one graph being computed.  Its *groups* (see :mod:`dask_lambda.plan`) are in exactly
one of these states::

    waiting --> ready --> in flight --> done (forgotten)
                  ^           |
                  +- delayed <+

A group waits for its inputs, is ready when they are all there, and is in flight while an
invocation runs it.  A failure that is worth another try delays it until some later time.  Groups
that are done are forgotten, and more groups may be added to a run at any time, so the machine
never needs the whole graph at once.  A group that was too large for an execution environment is
replaced by smaller ones, for which the run brings a function (``GroupsAdded.split``).

The *window* is how many invocations may be in flight, over all runs.  Below it the machine keeps
a *limit* of its own, which shrinks by a factor when Lambda throttles and grows by one for each
limit's worth of successes (additive increase, multiplicative decrease, as TCP does).  Runs take
turns; within a run the smallest priority goes first.

Small groups travel together (:meth:`State._batch_size`): several of them in one invocation, when
more are ready than the window takes, or when sending them one by one would take longer than
running them.  Each still succeeds or fails by itself; if the invocation as a whole fails, in a way
of which one of them may be guilty, each is tried again alone.

Two rules hold for whoever executes the instructions:

1. Every ``Invoke`` is answered by exactly one ``InvocationEnded``, whatever happened.
2. Instructions are carried out in the order in which they are returned.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from dask_lambda.events import (
    Done,
    Event,
    Failure,
    FailureKind,
    GroupsAdded,
    Instruction,
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
from dask_lambda.plan import Group
from dask_lambda.policy import Policy
from lambda_worker.protocol import Key

#: Failures of a whole invocation for which one of its groups may be the reason.
_ONE_IS_GUILTY = frozenset({FailureKind.RESOURCES, FailureKind.DEATH})
#: How many groups of a kind the mean of their durations remembers.
PACE_SAMPLES = 16
#: Batches of a kind that was never seen before this run hold at most so many for each one done.
PACE_TRUST = 4
#: What a group takes at least on a worker: fetching, unpickling, sealing.
MIN_SECONDS = 1e-4


@dataclass(slots=True)
class _Group:
    spec: Group
    run: _Run
    missing: int  # inputs that are not there yet
    tries: int = 0
    failures: dict[FailureKind, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Datum:
    readers: int = 0  # groups that are not done
    waiting: list[_Group] = field(default_factory=list)
    available: bool = False
    keep: bool = False


@dataclass(slots=True)
class _Run:
    name: str
    data: dict[Key, _Datum] = field(default_factory=dict)
    ready: list[tuple[int, int, _Group]] = field(default_factory=list)  # a heap
    queued: bool = False  # whether it is in the rotation
    unfinished: int = 0
    in_flight: int = 0
    last: bool = False
    ended: bool = False
    split: Callable[[Group], Sequence[Group]] | None = None
    batch: bool = False
    pace: dict[str, tuple[int, float]] = field(default_factory=dict)  # kind -> samples, seconds
    throttled_since: float = float("-inf")  # the first time after the last success of any run


class State:
    """The state machine of one engine.

    Parameters
    ----------
    window : int
        Invocations in flight at the most.
    policy : Policy, optional
    seed : int, optional
        Of the jitter.
    """

    def __init__(self, window: int, policy: Policy | None = None, seed: int = 0):
        self.window = window
        self.policy = policy or Policy()
        self.limit = float(window)
        self.in_flight: dict[int, tuple[_Group, ...]] = {}
        self._runs: dict[str, _Run] = {}
        self._rotation: deque[_Run] = deque()
        self._delayed: list[tuple[float, int, _Group]] = []  # a heap
        self._random = random.Random(seed)
        self._counter = 0
        self._wake: float | None = None
        self._last_decrease = float("-inf")
        self._last_success = float("-inf")

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take note of an event and decide what to do.

        Parameters
        ----------
        event : Event
        now : float
            Seconds since any fixed moment; never decreases.
        """
        out: list[Instruction] = []
        match event:
            case InvocationEnded():
                self._invocation_ended(event, now, out)
            case GroupsAdded():
                self._add(event, out)
            case RunCancelled(name):
                run = self._runs.get(name)
                if run is not None and not run.ended:
                    self._end(run, None, None, out, cancelled=True)
            case WindowChanged(window):
                self.window = window
                self.limit = float(window)
            case TimePassed(at):
                if at == self._wake:  # else an earlier one has overtaken it
                    self._wake = None
        self._undelay(now)
        self._dispatch(out)
        if self._delayed and (self._wake is None or self._delayed[0][0] < self._wake):
            self._wake = self._delayed[0][0]
            out.append(Wake(self._wake))
        return out

    # -- events --------------------------------------------------------------------------------

    def _add(self, event: GroupsAdded, out: list[Instruction]) -> None:
        run = self._runs.get(event.run)
        if run is None:
            run = self._runs[event.run] = _Run(event.run)
        if run.ended:
            return
        closing = event.last and not run.last
        run.last = event.last
        run.split, run.batch = event.split, event.batch
        data = run.data
        self._enter(run, event.groups)
        for key in event.keep & data.keys():
            data[key].keep = True
        if closing:  # until now somebody might still have come to read these
            idle = [k for k, d in data.items() if d.available and not d.readers and not d.keep]
            for key in idle:
                del data[key]
            if idle:
                out.append(Release(run.name, tuple(idle)))
        self._end_if_done(run, out)

    def _enter(self, run: _Run, groups: Sequence[Group]) -> None:
        data = run.data
        for spec in groups:
            for key in spec.outputs:
                data.setdefault(key, _Datum())
        run.unfinished += len(groups)
        for spec in groups:
            group = _Group(spec, run, 0)
            for key in spec.inputs:
                datum = data[key]
                datum.readers += 1
                if not datum.available:
                    datum.waiting.append(group)
                    group.missing += 1
            if not group.missing:
                self._make_ready(group)

    def _invocation_ended(self, event: InvocationEnded, now: float, out: list[Instruction]) -> None:
        groups = self.in_flight.pop(event.invocation)
        run = groups[0].run
        run.in_flight -= 1
        released: list[Key] = []
        success = False
        for group, outcome in zip(groups, event.outcomes, strict=True):
            if isinstance(outcome, Done):
                success = True
            if run.ended:
                continue
            if isinstance(outcome, Done):
                self._done(group, outcome.seconds, released)
            elif event.as_a_whole and len(groups) > 1 and outcome.kind in _ONE_IS_GUILTY:
                self._make_ready(group)
            elif outcome.kind is FailureKind.RESOURCES and self._split(group):
                pass
            else:
                self._failed(group, outcome, now, out)
        if success:
            self._last_success = now
            self.limit = min(float(self.window), self.limit + 1.0 / self.limit)
        if released and not run.ended:
            out.append(Release(run.name, tuple(released)))
        self._end_if_done(run, out)
        if run.ended and not run.in_flight and run.name in self._runs:
            self._forget(run, out)

    def _done(self, group: _Group, seconds: float, released: list[Key]) -> None:
        run, spec = group.run, group.spec
        run.unfinished -= 1
        samples, mean = run.pace.get(spec.kind, (0, 0.0))
        weight = 1 / min(samples + 1, PACE_SAMPLES)
        run.pace[spec.kind] = samples + 1, mean + weight * (seconds - mean)
        data = run.data
        for key in spec.outputs:
            datum = data[key]
            datum.available = True
            for reader in datum.waiting:
                reader.missing -= 1
                if not reader.missing:
                    self._make_ready(reader)
            datum.waiting.clear()
            if not datum.readers and not datum.keep and run.last:
                released.append(key)
                del data[key]
        for key in spec.inputs:
            datum = data[key]
            datum.readers -= 1
            if not datum.readers and not datum.keep and run.last:
                released.append(key)
                del data[key]

    def _split(self, group: _Group) -> bool:
        """Replace a group by smaller ones; tell whether that is possible."""
        run, spec = group.run, group.spec
        smaller = run.split(spec) if run.split is not None else ()
        if not smaller:
            return False
        self._enter(run, smaller)  # before the group lets go of its inputs
        run.unfinished -= 1
        for key in spec.inputs:
            run.data[key].readers -= 1
        return True

    def _failed(self, group: _Group, failure: Failure, now: float, out: list[Instruction]) -> None:
        policy, kind = self.policy, failure.kind
        if kind is FailureKind.RESOURCES:
            kind = FailureKind.TASK
        count = group.failures[kind] = group.failures.get(kind, 0) + 1
        match kind:
            case FailureKind.TASK:
                again = count <= group.spec.retries
            case FailureKind.DEATH:
                again = count <= policy.deaths + group.spec.retries
            case FailureKind.TRANSIENT:
                again = count < policy.transient_tries
            case FailureKind.THROTTLED:
                self._throttled(now)
                if group.run.throttled_since <= self._last_success:
                    group.run.throttled_since = now
                again = now - group.run.throttled_since < policy.throttle_patience
            case FailureKind.FATAL:
                again = False
        if not again:
            self._end(group.run, failure, group.spec, out)
            return
        # "Full jitter": anywhere between 0 and the exponentially growing bound
        # (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
        bound = min(policy.max_backoff, policy.backoff * 2.0 ** min(count - 1, 60))
        self._counter += 1
        at = now + self._random.uniform(0, bound)
        heapq.heappush(self._delayed, (at, self._counter, group))

    def _throttled(self, now: float) -> None:
        if now - self._last_decrease >= self.policy.decrease_interval:
            self._last_decrease = now
            self.limit = max(1.0, min(self.limit, len(self.in_flight) + 1) * self.policy.decrease)

    # -- transitions ---------------------------------------------------------------------------

    def _make_ready(self, group: _Group) -> None:
        run = group.run
        self._counter += 1
        heapq.heappush(run.ready, (group.spec.priority, self._counter, group))
        if not run.queued:
            run.queued = True
            self._rotation.append(run)

    def _undelay(self, now: float) -> None:
        while self._delayed and self._delayed[0][0] <= now:
            group = heapq.heappop(self._delayed)[2]
            if not group.run.ended:
                self._make_ready(group)

    def _dispatch(self, out: list[Instruction]) -> None:
        limit = min(self.window, max(1, int(self.limit)))
        rotation, in_flight = self._rotation, self.in_flight
        while rotation and len(in_flight) < limit:
            run = rotation.popleft()
            if run.ended or not run.ready:
                run.queued = False
                continue
            groups = self._next_groups(run, limit)
            rotation.append(run)
            self._counter += 1
            invocation = self._counter
            in_flight[invocation] = groups
            run.in_flight += 1
            specs = tuple(group.spec for group in groups)
            out.append(Invoke(invocation, run.name, specs, groups[0].tries))
            for group in groups:
                group.tries += 1

    def _next_groups(self, run: _Run, limit: int) -> tuple[_Group, ...]:
        """Take the groups of the next invocation from those that are ready."""
        ready = run.ready
        first = heapq.heappop(ready)[2]
        if not run.batch or not ready or first.tries:  # who was tried before goes alone
            return (first,)
        size = self._batch_size(first, len(ready) + 1, limit)
        groups = [first]
        while len(groups) < size and ready:
            other = ready[0][2]
            if other.tries or other.spec.kind != first.spec.kind:
                break
            groups.append(heapq.heappop(ready)[2])
        return tuple(groups)

    def _batch_size(self, group: _Group, ready: int, limit: int) -> int:
        """Decide how many groups like this one share an invocation.

        If each takes ``d`` seconds, ``n`` of them in ``m`` invocations take ``c m + n d / m``
        seconds with unlimited concurrency, where ``c`` is the client's time for an invocation:
        least for ``m = sqrt(n d / c)``.  If that is more than the window, the ready ones are
        divided by the window, which leaves smaller and smaller batches to the end, so that all
        end together (guided self-scheduling: Polychronopoulos and Kuck, IEEE Transactions on
        Computers C-36, 1987).
        """
        policy = self.policy
        samples, seconds = group.run.pace.get(group.spec.kind, (0, 0.0))
        bound = policy.batch_groups
        if group.spec.seconds is not None:
            if not samples:
                seconds = group.spec.seconds
        elif samples:
            bound = min(bound, PACE_TRUST * samples)
        else:  # nobody knows how long they take
            return 1
        seconds = max(seconds, MIN_SECONDS)
        size = max(math.sqrt(ready * policy.dispatch_seconds / seconds), ready / limit)
        return max(1, min(bound, int(size), int(policy.batch_seconds / seconds)))

    def _end_if_done(self, run: _Run, out: list[Instruction]) -> None:
        if run.last and not run.unfinished and not run.ended:
            self._end(run, None, None, out)

    def _end(
        self,
        run: _Run,
        failure: Failure | None,
        group: Group | None,
        out: list[Instruction],
        *,
        cancelled: bool = False,
    ) -> None:
        run.ended = True
        run.ready.clear()
        run.data.clear()
        if not cancelled:
            out.append(RunEnded(run.name, failure, group))
        if not run.in_flight:
            self._forget(run, out)

    def _forget(self, run: _Run, out: list[Instruction]) -> None:
        del self._runs[run.name]
        out.append(RunDrained(run.name))

    # -- for observers and tests -----------------------------------------------------------------

    @property
    def runs(self) -> Iterable[str]:
        """Names of the runs that are not drained."""
        return self._runs.keys()

    def validate(self) -> None:
        """Check what must hold after every event; for tests.

        Raises
        ------
        AssertionError
        """
        assert len(self.in_flight) <= self.window or self.limit <= self.window
        flying: dict[str, int] = {}
        for groups in self.in_flight.values():
            for group in groups:
                assert group.missing == 0, "a group is in flight before its inputs"
            flying[groups[0].run.name] = flying.get(groups[0].run.name, 0) + 1
        for run in self._runs.values():
            assert run.in_flight == flying.get(run.name, 0)
            if run.ended:
                assert run.in_flight, "an ended run without invocations was not forgotten"
                continue
            for key, datum in run.data.items():
                assert datum.readers >= len(datum.waiting), key
                assert not (datum.available and datum.waiting), key
            assert all(not g.missing for _, _, g in run.ready)
            assert run.queued or not run.ready
