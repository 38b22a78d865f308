"""What the state machine remembers: runs, their groups and data, invocations in flight.  Pure.

May import: events, pace, policy, plan, the ground.  The records know their own sums; what to do is
decided in :mod:`dask_lambda.state`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from dask_lambda.events import PATIENCE, Budget, Failure, FailureKind
from dask_lambda.pace import TRUST, Pace, batch_size
from dask_lambda.plan import Group, Priority, Where
from dask_lambda.policy import Policy
from lambda_worker.protocol import Key

#: Sums of dollars are exact up to so much of them.
ROUNDING = 1e-9


@dataclass(slots=True)
class Job:
    """A group on its way."""

    spec: Group
    run: RunBook
    missing: int  #: inputs that are not there yet
    rung: int = 0  #: which function it is sent to
    tries: int = 0
    failures: dict[FailureKind, int] = field(default_factory=dict)
    failing_since: float | None = None  #: for reasons outside of it, without another in between
    due: float = 0.0  #: when it was to be tried again
    in_flight: int = 0  #: invocations
    done: bool = False


@dataclass(slots=True)
class Datum:
    """An output of a group."""

    readers: int = 0  #: groups that are not done
    waiting: list[Job] = field(default_factory=list)
    available: bool = False
    keep: bool = False
    failed: tuple[Failure, Group] | None = None  #: why it will never be there, and whose fault


@dataclass(slots=True)
class Flight:
    """One invocation in flight."""

    run: RunBook
    jobs: tuple[Job, ...]
    rung: int
    started: float
    pace: Pace  #: of its kind of group
    reserved: float  #: US dollars that it is expected to cost
    speculative: bool = False
    duplicated: bool = False

    @property
    def is_local(self) -> bool:
        """Whether it is outside of Lambda."""
        return self.jobs[0].spec.is_local


@dataclass(slots=True)
class LocalRoom:
    """What may run outside of Lambda at the same time.

    Attributes
    ----------
    slots : int
        Groups.
    memory : float
        Bytes that all of them together are said to need; one may be alone with more.
    """

    slots: int
    memory: float = math.inf
    used: int = 0
    memory_used: int = 0

    def fits(self, spec: Group) -> bool:
        """Whether one more may start."""
        if self.used >= self.slots:
            return False
        return not self.used or self.memory_used + spec.memory <= self.memory

    def take(self, spec: Group) -> None:
        """Take note that one starts."""
        self.used += 1
        self.memory_used += spec.memory

    def give(self, spec: Group) -> None:
        """Take note that one has ended."""
        self.used -= 1
        self.memory_used -= spec.memory


@dataclass(slots=True)
class RunBook:
    """One run."""

    name: str
    data: dict[Key, Datum] = field(default_factory=dict)
    jobs: dict[Key, Job] = field(default_factory=dict)  #: if it is isolated: output -> group
    ready: list[tuple[Priority, int, Job]] = field(default_factory=list)  #: a heap
    local: list[tuple[Priority, int, Job]] = field(default_factory=list)  #: ready, outside Lambda
    queued: bool = False  #: whether it is in the rotation
    local_queued: bool = False  #: whether it is in that of what runs outside of Lambda
    starved: bool = False  #: it is not, since it cannot pay for what is ready
    unfinished: int = 0
    in_flight: int = 0
    last: bool = False
    ended: bool = False
    isolated: bool = False  #: a group that fails does not end it
    split: Callable[[Group], Sequence[Group]] | None = None
    batch: bool = False
    speculate: bool = False
    patience: float = PATIENCE
    budget: Budget | None = None
    usd: float = 0.0  #: spent
    reserved: float = 0.0  #: for what is in flight
    speculative_usd: float = 0.0  #: spent on duplicates or reserved for them
    pace: dict[tuple[Where, str], Pace] = field(default_factory=dict)  #: by place and kind
    refused_since: float = -math.inf  #: the first time after the last success of any run
    noticed: float = -math.inf

    @property
    def releases(self) -> bool:
        """Whether nobody can come any more to read what has no reader and is not kept."""
        return self.last or self.isolated

    def has_ready(self) -> bool:
        """Whether a group could be sent; those that were cancelled meanwhile are dropped."""
        return _has_any(self.ready)

    def has_local(self) -> bool:
        """Whether one could be started outside of Lambda."""
        return _has_any(self.local)

    def next_jobs(self, limit: int, policy: Policy) -> tuple[Job, ...]:
        """Take the groups of the next invocation from those that are ready.

        Parameters
        ----------
        limit : int
            Invocations that may be in flight.
        policy : Policy
        """
        ready = self.ready
        first = heapq.heappop(ready)[2]
        if not self.batch or not ready or first.tries:  # who was tried before goes alone
            return (first,)
        spec = first.spec
        size = batch_size(self.pace_of(spec), spec.seconds, len(ready) + 1, limit, policy)
        jobs = [first]
        while len(jobs) < size and self.has_ready():
            other = ready[0][2]
            if other.tries or other.spec.kind != spec.kind or other.rung != first.rung:
                break
            jobs.append(heapq.heappop(ready)[2])
        return tuple(jobs)

    def pace_of(self, spec: Group) -> Pace:
        """Return what is known of groups of the same kind in the same place."""
        alike = spec.where, spec.kind
        pace = self.pace.get(alike)
        if pace is None:
            pace = self.pace[alike] = Pace()
        return pace

    def started(self, flight: Flight) -> None:
        """Take note of an invocation."""
        self.in_flight += 1
        self.reserved += flight.reserved
        flight.pace.in_flight += len(flight.jobs)
        if flight.speculative:
            self.speculative_usd += flight.reserved

    def ended_one(self, flight: Flight, usd: float) -> None:
        """Take note of the end of an invocation, and of what it cost."""
        self.in_flight -= 1
        self.usd += usd
        self.reserved -= flight.reserved
        flight.pace.in_flight -= len(flight.jobs)
        if flight.speculative:
            self.speculative_usd += usd - flight.reserved

    # -- money ---------------------------------------------------------------------------------

    def priced(self, rung: int, usd_second: float) -> None:
        """Take note of what a second of a function costs."""
        if self.budget is not None and rung < len(self.budget.usd_second):
            known = list(self.budget.usd_second)
            known[rung] = usd_second
            self.budget = replace(self.budget, usd_second=tuple(known))

    def expected_usd(self, jobs: Sequence[Job], pace: Pace) -> float:
        """Return what an invocation is expected to cost, as far as the run has seen it."""
        spec = jobs[0].spec
        if spec.is_local:
            return 0.0
        if pace.groups:
            return pace.usd * len(jobs)
        if self.budget is not None and spec.seconds is not None:
            return spec.seconds * len(jobs) * _price(self.budget, jobs[0].rung)
        return 0.0

    def can_pay(self, jobs: Sequence[Job], now: float) -> bool:
        """Whether an invocation may be started on the budget, if there is one.

        Of a kind of which nothing is known, only a few are tried.
        """
        if self.budget is None:
            return True
        pace = self.pace_of(jobs[0].spec)
        if pace.in_flight >= TRUST * (pace.groups + 1):
            return False
        expected = self.usd + self.reserved + self.expected_usd(jobs, pace)
        return now < self.budget.until and expected <= self.budget.usd * (1 + ROUNDING)

    def is_spent(self, in_flight: Iterable[Flight], now: float) -> bool:
        """Whether the budget is used up, with what is in flight counted up to now."""
        budget = self.budget
        if budget is None:
            return False
        if now >= budget.until:
            return True
        accrued = self.usd
        for flight in in_flight:
            if flight.run is self and not flight.is_local:
                elapsed = (now - flight.started) * _price(budget, flight.rung)
                accrued += max(flight.reserved, elapsed)
        return accrued > budget.usd


def _has_any(ready: list[tuple[Priority, int, Job]]) -> bool:
    while ready and ready[0][2].done:
        heapq.heappop(ready)
    return bool(ready)


def _price(budget: Budget, rung: int) -> float:
    return budget.usd_second[min(rung, len(budget.usd_second) - 1)]
