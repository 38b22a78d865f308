"""Who runs when: the engine's decisions, as a pure state machine.

May import: books, outputs, events, window, policy, plan.

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
sent to a function with more memory, if there is one, and else replaced by smaller ones, for which
the run brings a function (``GroupsAdded.split``).

How many invocations may be in flight, over all runs, is known to :mod:`dask_lambda.window`.  Runs
take turns; within a run the smallest priority goes first.

Small groups travel together (:func:`dask_lambda.pace.batch_size`): several of them in one
invocation, when more are ready than the window takes, or when sending them one by one would take
longer than running them.  Each still succeeds or fails by itself; if the invocation as a whole
fails, in a way of which one of them may be guilty, each is tried again alone.

An invocation that takes conspicuously long (:meth:`dask_lambda.pace.Pace.patience`) is sent once
more, while there is room that nobody else needs.  The first result of a group that comes is
accepted, whatever comes later is discarded, and a failure counts only if no other invocation with
the group is in flight.

Groups whose place is outside of Lambda (``Group.where``) take no room in the window, and are not
refused, batched, duplicated or paid for.  They have a room of their own
(:class:`dask_lambda.books.LocalRoom`), for which runs take turns as well; what is first in turn and
does not fit yet holds up the others, or it would never start.

A run with a budget starts nothing that it is not expected to be able to pay, and ends when
nothing of it is in flight any more.

In an *isolated* run the groups are somebody's single calls.  One that fails, or is cancelled, takes
only those with it that read its outputs, and the run stays open for more.

Two rules hold for whoever executes the instructions:

1. Every ``Invoke`` is answered by exactly one ``InvocationEnded``, whatever happened.
2. Instructions are carried out in the order in which they are returned.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Iterable, Sequence

from dask_lambda import outputs
from dask_lambda.books import Datum, Flight, Job, LocalRoom, RunBook
from dask_lambda.events import (
    Accept,
    Discard,
    Done,
    Event,
    Failure,
    FailureKind,
    GroupFailed,
    GroupsAdded,
    GroupsCancelled,
    Instruction,
    InvocationEnded,
    Invoke,
    KeysReleased,
    Release,
    RunCancelled,
    RunDrained,
    RunEnded,
    Stalled,
    TimePassed,
    Wake,
    WindowChanged,
)
from dask_lambda.plan import Group
from dask_lambda.policy import Policy
from dask_lambda.window import Window
from lambda_worker.protocol import Key

#: Failures of a whole invocation for which one of its groups may be the reason.
_ONE_IS_GUILTY = frozenset({FailureKind.MEMORY, FailureKind.TIMEOUT, FailureKind.DEATH})
#: Failures that a group with fewer tasks may be spared.
_TOO_LARGE = frozenset({FailureKind.MEMORY, FailureKind.TIMEOUT})
#: Failures that end with the patience of the run.
_OUTSIDE = frozenset({FailureKind.TRANSIENT, FailureKind.EXPIRED})
_REFUSED = frozenset({FailureKind.THROTTLED, FailureKind.RATE_LIMITED, FailureKind.NOT_READY})
#: Failures that end a run whatever else is in flight.
_FINAL = frozenset({FailureKind.FATAL, FailureKind.UNSENDABLE, FailureKind.BUDGET})


class State:
    """The state machine of one engine.

    Parameters
    ----------
    window : int
        Invocations in flight at the most.
    policy : Policy, optional
    seed : int, optional
        Of the jitter.
    rungs : int
        Functions with different memory, from the usual one upwards.
    slots : int
        Groups that may run outside of Lambda at the same time.
    memory : float
        Bytes that those together may be said to need.
    """

    def __init__(
        self,
        window: int,
        policy: Policy | None = None,
        seed: int = 0,
        *,
        rungs: int = 1,
        slots: int = 0,
        memory: float = math.inf,
    ):
        self.policy = policy or Policy()
        self.window = Window(window, self.policy)
        self.rungs = rungs
        self.local = LocalRoom(slots, memory)
        self.in_flight: dict[int, Flight] = {}
        self._runs: dict[str, RunBook] = {}
        self._rotation: deque[RunBook] = deque()
        self._local_rotation: deque[RunBook] = deque()
        self._delayed: list[tuple[float, int, Job]] = []  # a heap
        self._random = random.Random(seed)
        self._counter = 0
        self._wake: float | None = None
        self._last_success = -math.inf
        self._watching = False  # whether stragglers or budgets have to be looked at
        self._next_check = -math.inf
        self._speculating = 0  # duplicates in flight

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
            case GroupsCancelled():
                self._cancel_groups(event, out)
            case KeysReleased(name, keys):
                self._let_go(name, keys, out)
            case RunCancelled(name):
                run = self._runs.get(name)
                if run is not None and not run.ended:
                    self._end(run, None, None, out, cancelled=True)
            case WindowChanged(window):
                self.window.resize(window)
            case TimePassed(at):
                if at == self._wake:  # else an earlier one has overtaken it
                    self._wake = None
        self._undelay(now)
        self._dispatch(now, out)
        self._dispatch_local(now, out)
        if self._watching and now >= self._next_check:
            self._check(now, out)
        self._set_alarm(now, out)
        return out

    def _set_alarm(self, now: float, out: list[Instruction]) -> None:
        """Ask to be woken when there is something to do, if nothing happens before."""
        at = self._delayed[0][0] if self._delayed else math.inf
        if self._watching and (self.in_flight or self._delayed):
            at = min(at, self._next_check)
        if self._rotation and (opens := self.window.opens(self._on_lambda, now)) is not None:
            at = min(at, opens)
        if at < (math.inf if self._wake is None else self._wake):
            self._wake = at
            out.append(Wake(at))

    @property
    def _on_lambda(self) -> int:
        """How many invocations of Lambda are in flight."""
        return len(self.in_flight) - self.local.used

    # -- events --------------------------------------------------------------------------------

    def _add(self, event: GroupsAdded, out: list[Instruction]) -> None:
        run = self._runs.get(event.run)
        if run is None:
            run = self._runs[event.run] = RunBook(event.run)
        if run.ended:
            return
        closing = event.last and not run.last
        run.last = event.last
        run.split, run.batch = event.split, event.batch
        run.speculate, run.patience = event.speculate, event.patience
        run.budget, run.isolated = event.budget, event.isolated
        self._watching = self._watching or run.speculate or run.budget is not None
        data = run.data
        for key in event.given:
            data[key] = Datum(available=True, keep=True)
        outputs.expect(run, event.groups)
        for key in event.keep & data.keys():
            data[key].keep = True
        self._enter(run, event.groups, out)
        if closing:  # until now somebody might still have come to read these
            self._release(run, outputs.unread(run), out)
        self._end_if_done(run, out)

    def _enter(
        self, run: RunBook, groups: Sequence[Group], out: list[Instruction], rung: int = 0
    ) -> None:
        outputs.expect(run, groups)
        run.unfinished += len(groups)
        for spec in groups:
            job = Job(spec, run, 0, rung)
            if run.isolated:
                run.jobs.update(dict.fromkeys(spec.outputs, job))
            failed = outputs.await_inputs(job)
            if failed is not None:
                self._give_up(job, *failed, out)
            elif not job.missing:
                self._make_ready(job)

    def _invocation_ended(self, event: InvocationEnded, now: float, out: list[Instruction]) -> None:
        flight = self.in_flight.pop(event.invocation)
        run, jobs = flight.run, flight.jobs
        if flight.is_local:
            self.local.give(jobs[0].spec)
        run.ended_one(flight, event.usd)
        if event.usd_second is not None:
            run.priced(flight.rung, event.usd_second)
        self._speculating -= flight.speculative
        share = 1 / len(jobs)
        released: list[Key] = []
        success = False
        for job, outcome in zip(jobs, event.outcomes, strict=True):
            job.in_flight -= 1
            if isinstance(outcome, Done):
                success = True
                if run.ended or job.done:
                    out.append(Discard(run.name, job.spec, outcome.result))
                    continue
                out.append(Accept(run.name, job.spec, outcome.result))
                flight.pace.done(outcome.seconds, event.usd * share, (now - flight.started) * share)
                released += self._done(job)
            elif run.ended or job.done:
                continue
            elif outcome.kind in _REFUSED:
                self._refused(job, outcome, now, out)
            elif job.in_flight and outcome.kind not in _FINAL:
                continue  # the other invocation may do it
            elif event.as_a_whole and len(jobs) > 1 and self._one_is_guilty(run, outcome.kind):
                self._make_ready(job)
            else:
                self._failed(job, outcome, now, out)
        if success and not flight.is_local:
            self._last_success = now
            self.window.succeeded()
        if not run.ended:
            self._release(run, released, out)
        self._end_if_done(run, out)
        if run.ended and not run.in_flight and run.name in self._runs:
            self._forget(run, out)
        elif run.starved and not run.ended:
            run.starved = False
            self._queue(run)

    @staticmethod
    def _one_is_guilty(run: RunBook, kind: FailureKind) -> bool:
        """Whether a failure of several groups may be that of one, so that each is tried alone."""
        return kind in _ONE_IS_GUILTY or (run.isolated and kind is FailureKind.UNSENDABLE)

    def _done(self, job: Job) -> list[Key]:
        """Take note that a group is done; return what nobody reads any more."""
        job.done = True
        job.run.unfinished -= 1
        ready, released = outputs.made(job)
        for reader in ready:
            self._make_ready(reader)
        return released

    def _split(self, job: Job) -> bool:
        """Replace a group by smaller ones; tell whether that is possible."""
        run, spec = job.run, job.spec
        smaller = run.split(spec) if run.split is not None else ()
        if not smaller:
            return False
        self._enter(run, smaller, [], job.rung)  # before the job lets go of its inputs
        run.unfinished -= 1
        for key in spec.inputs:
            run.data[key].readers -= 1
        return True

    @staticmethod
    def _release(run: RunBook, keys: Sequence[Key], out: list[Instruction]) -> None:
        if keys:
            out.append(Release(run.name, tuple(keys)))

    # -- failures ------------------------------------------------------------------------------

    def _refused(self, job: Job, failure: Failure, now: float, out: list[Instruction]) -> None:
        """Send later what Lambda would not start now: this is no failure of the group."""
        window, run = self.window, job.run
        match failure.kind:
            case FailureKind.THROTTLED:
                window.throttled(self._on_lambda, now)
            case FailureKind.RATE_LIMITED:
                window.rate_limited(now)
            case _:
                window.not_ready(now)
        if job.in_flight:
            return
        if run.refused_since <= self._last_success:
            run.refused_since = now
        if now - run.refused_since >= self.policy.throttle_patience:
            self._lose(job, failure, out)
            return
        self._notice(run, failure, run.refused_since, self.policy.throttle_patience, now, out)
        self._delay(job, window.refusals, now)

    def _failed(self, job: Job, failure: Failure, now: float, out: list[Instruction]) -> None:
        policy, kind, run = self.policy, failure.kind, job.run
        larger = job.rung + 1 < self.rungs and not job.spec.is_local
        if kind is FailureKind.MEMORY and larger:
            job.rung += 1
            self._make_ready(job)
            return
        if kind in _TOO_LARGE:
            if self._split(job):
                return
            kind = FailureKind.TASK
        count = job.failures[kind] = job.failures.get(kind, 0) + 1
        if kind not in _OUTSIDE:
            job.failing_since = None
        elif job.failing_since is None:
            job.failing_since = now
        again = False
        match kind:
            case FailureKind.TASK:
                again = count <= job.spec.retries
            case FailureKind.DEATH:
                again = count <= policy.deaths + job.spec.retries
                if not again and self._split(job):
                    return
            case FailureKind.TRANSIENT | FailureKind.EXPIRED:
                since = job.failing_since
                assert since is not None
                again = now - since < run.patience or count < policy.transient_tries
                if again:
                    self._notice(run, failure, since, run.patience, now, out)
        if again:
            self._delay(job, count, now)
        else:
            self._lose(job, failure, out)

    def _delay(self, job: Job, count: int, now: float) -> None:
        # "Full jitter": anywhere between 0 and the exponentially growing bound
        # (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
        policy = self.policy
        bound = min(policy.max_backoff, policy.backoff * 2.0 ** min(max(count - 1, 0), 60))
        self._counter += 1
        at = now + self._random.uniform(0, bound)
        job.due = at
        heapq.heappush(self._delayed, (at, self._counter, job))

    def _notice(
        self,
        run: RunBook,
        failure: Failure,
        since: float,
        patience: float,
        now: float,
        out: list[Instruction],
    ) -> None:
        """Let the user know, now and then, that a run tries in vain."""
        policy = self.policy
        if now - since >= policy.notice_after and now - run.noticed >= policy.notice_every:
            run.noticed = now
            out.append(Stalled(run.name, failure, since, patience))

    # -- transitions ---------------------------------------------------------------------------

    def _make_ready(self, job: Job) -> None:
        run = job.run
        self._push(job)
        if job.spec.is_local:
            if not run.local_queued:
                run.local_queued = True
                self._local_rotation.append(run)
        elif not run.starved:
            self._queue(run)

    def _push(self, job: Job) -> None:
        self._counter += 1
        ready = job.run.local if job.spec.is_local else job.run.ready
        heapq.heappush(ready, (job.spec.priority, self._counter, job))

    def _queue(self, run: RunBook) -> None:
        if not run.queued:
            run.queued = True
            self._rotation.append(run)

    def _undelay(self, now: float) -> None:
        while self._delayed and self._delayed[0][0] <= now:
            job = heapq.heappop(self._delayed)[2]
            if not job.run.ended and not job.done:
                self._make_ready(job)

    def _dispatch(self, now: float, out: list[Instruction]) -> None:
        rotation, window = self._rotation, self.window
        while rotation and window.room(self._on_lambda, now):
            run = rotation.popleft()
            if run.ended or not run.has_ready():
                run.queued = False
                continue
            jobs = run.next_jobs(window.allowed, self.policy)
            if not run.can_pay(jobs, now):
                for job in jobs:
                    self._push(job)
                run.queued, run.starved = False, True
                if not run.in_flight:
                    self._end(run, Failure(FailureKind.BUDGET), None, out)
                continue
            rotation.append(run)
            self._try(jobs, now, out)

    def _dispatch_local(self, now: float, out: list[Instruction]) -> None:
        """Start what waits for room outside of Lambda."""
        rotation = self._local_rotation
        while rotation:
            run = rotation[0]
            if run.ended or not run.has_local():
                rotation.popleft()
                run.local_queued = False
                continue
            if run.budget is not None and now >= run.budget.until:
                self._end(run, Failure(FailureKind.BUDGET), None, out)
                continue
            job = run.local[0][2]
            if not self.local.fits(job.spec):
                return
            heapq.heappop(run.local)
            rotation.rotate(-1)
            self._try((job,), now, out)

    def _try(self, jobs: tuple[Job, ...], now: float, out: list[Instruction]) -> None:
        self._send(jobs, now, out)
        for job in jobs:
            job.tries += 1
            if job.failing_since is not None:  # waiting for room is not trying
                job.failing_since += now - job.due

    def _send(
        self,
        jobs: tuple[Job, ...],
        now: float,
        out: list[Instruction],
        *,
        speculative: bool = False,
    ) -> None:
        run, rung, tries = jobs[0].run, jobs[0].rung, jobs[0].tries
        self._counter += 1
        spec = jobs[0].spec
        pace = run.pace_of(spec)
        expected = run.expected_usd(jobs, pace)
        flight = Flight(run, jobs, rung, now, pace, expected, speculative)
        self.in_flight[self._counter] = flight
        run.started(flight)
        self._speculating += speculative
        if spec.is_local:
            self.local.take(spec)
        else:
            self.window.sent(now)
        groups = tuple(job.spec for job in jobs)
        out.append(Invoke(self._counter, run.name, groups, tries, rung, speculative, spec.is_local))
        for job in jobs:
            job.in_flight += 1

    # -- money and stragglers ------------------------------------------------------------------

    def _check(self, now: float, out: list[Instruction]) -> None:
        """Look whether budgets are spent, and whether anything takes conspicuously long."""
        self._next_check = now + self.policy.check_interval
        for run in list(self._runs.values()):
            if not run.ended and run.is_spent(self.in_flight.values(), now):
                self._end(run, Failure(FailureKind.BUDGET), None, out)
        late: list[Flight] = []
        bounds: dict[tuple[int, int], float] = {}
        for flight in self.in_flight.values():
            run = flight.run
            if not run.speculate or run.ended or flight.speculative or flight.duplicated:
                continue
            if flight.is_local:
                continue
            alike = id(flight.pace), len(flight.jobs)
            if alike not in bounds:
                bounds[alike] = flight.pace.patience(self.policy, len(flight.jobs))
            if now - flight.started > bounds[alike]:
                late.append(flight)
        for flight in sorted(late, key=lambda flight: flight.started):
            if self._may_duplicate(flight, now):
                flight.duplicated = True
                self._send(flight.jobs, now, out, speculative=True)

    def _may_duplicate(self, flight: Flight, now: float) -> bool:
        """Whether there is room and money for a duplicate."""
        run, share = flight.run, self.policy.speculative_share
        return (
            all(job.in_flight == 1 and not job.done for job in flight.jobs)
            and self.window.room(self._on_lambda, now)
            and self._speculating < max(1, int(share * self.window.allowed))
            and run.can_pay(flight.jobs, now)
            and run.speculative_usd + run.expected_usd(flight.jobs, flight.pace) <= share * run.usd
        )

    # -- the single calls of an isolated run -----------------------------------------------------

    def _lose(self, job: Job, failure: Failure, out: list[Instruction]) -> None:
        """End what a group that failed for good takes with it."""
        if job.run.isolated and failure.kind is not FailureKind.BUDGET:
            self._give_up(job, failure, job.spec, out)
        else:
            self._end(job.run, failure, job.spec, out)

    def _give_up(self, job: Job, failure: Failure, origin: Group, out: list[Instruction]) -> None:
        """End a group without result, and with it all that wait for its outputs."""
        run = job.run
        lost, released = outputs.give_up(job, failure, origin)
        run.unfinished -= len(lost)
        out += [GroupFailed(run.name, each.spec, failure, origin) for each in lost]
        self._release(run, released, out)

    def _cancel_groups(self, event: GroupsCancelled, out: list[Instruction]) -> None:
        run = self._runs.get(event.run)
        if run is None or run.ended:
            return
        for key in event.outputs:
            job = run.jobs.get(key)
            if job is not None and (event.in_flight or not job.in_flight):
                self._give_up(job, event.failure, job.spec, out)
        self._end_if_done(run, out)

    def _let_go(self, name: str, keys: Iterable[Key], out: list[Instruction]) -> None:
        run = self._runs.get(name)
        if run is not None and not run.ended:
            self._release(run, outputs.let_go(run, keys), out)

    # -- the end of a run ----------------------------------------------------------------------

    def _end_if_done(self, run: RunBook, out: list[Instruction]) -> None:
        if run.last and not run.unfinished and not run.ended:
            self._end(run, None, None, out)

    def _end(
        self,
        run: RunBook,
        failure: Failure | None,
        group: Group | None,
        out: list[Instruction],
        *,
        cancelled: bool = False,
    ) -> None:
        run.ended = True
        run.ready.clear()
        run.local.clear()
        run.data.clear()
        run.jobs.clear()
        if not cancelled:
            out.append(RunEnded(run.name, failure, group))
        if not run.in_flight:
            self._forget(run, out)

    def _forget(self, run: RunBook, out: list[Instruction]) -> None:
        del self._runs[run.name]
        self._watching = any(
            other.budget is not None or other.speculate for other in self._runs.values()
        )
        out.append(RunDrained(run.name))

    # -- for observers and tests -----------------------------------------------------------------

    @property
    def runs(self) -> Iterable[str]:
        """Names of the runs that are not drained."""
        return self._runs.keys()

    def expected(self, run: str) -> Iterable[Key]:
        """Return the outputs that invocations of a run in flight may yet write."""
        for flight in self.in_flight.values():
            if flight.run.name == run:
                for job in flight.jobs:
                    yield from job.spec.outputs
