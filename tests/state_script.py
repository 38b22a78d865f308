"""A state machine that is told events by hand: what the tests of its rules share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dask_lambda.events import (
    Accept,
    Discard,
    Done,
    Event,
    Failure,
    FailureKind,
    GroupsAdded,
    Instruction,
    InvocationEnded,
    Invoke,
    Release,
    RunDrained,
    RunEnded,
    TimePassed,
    Wake,
    WindowChanged,
)
from dask_lambda.plan import Group, Where
from dask_lambda.policy import Policy
from dask_lambda.state import State
from tests.state_invariants import check

TASK, MEMORY, TIMEOUT, DEATH, TRANSIENT, EXPIRED, THROTTLED, RATE_LIMITED, NOT_READY, FATAL = (
    Failure(FailureKind.TASK),
    Failure(FailureKind.MEMORY),
    Failure(FailureKind.TIMEOUT),
    Failure(FailureKind.DEATH),
    Failure(FailureKind.TRANSIENT),
    Failure(FailureKind.EXPIRED),
    Failure(FailureKind.THROTTLED),
    Failure(FailureKind.RATE_LIMITED),
    Failure(FailureKind.NOT_READY),
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
    memory: int = 0,
    where: Where = "lambda",
) -> Group:
    """``group("a b", "c")`` makes a and b from c."""
    keys = tuple(outputs.split())
    return Group(
        keys,
        tuple(inputs.split()),
        keys,
        priority,
        retries,
        kind,
        seconds,
        memory,
        where=where,
    )


class Script:
    """A machine that is told events by hand, checked after each, at a time that is set by hand."""

    def __init__(
        self,
        window: int = 100,
        policy: Policy | None = None,
        seed: int = 0,
        rungs: int = 1,
        **local: Any,
    ):
        self.state = State(window, policy, seed, rungs=rungs, **local)
        self.now = 0.0
        self.flying: dict[int, Invoke] = {}
        self.timers: list[float] = []
        self.out: list[Instruction] = []  # but for what becomes of results
        self.accepted: list[Any] = []
        self.discarded: list[Any] = []

    def tell(self, event: Event) -> list[Instruction]:
        out = self.state.handle(event, self.now)
        check(self.state)
        self.accepted += [i.result for i in out if isinstance(i, Accept)]
        self.discarded += [i.result for i in out if isinstance(i, Discard)]
        self.out = [i for i in out if not isinstance(i, Accept | Discard)]
        for instruction in out:
            if isinstance(instruction, Invoke):
                self.flying[instruction.invocation] = instruction
            elif isinstance(instruction, Wake):
                self.timers.append(instruction.at)
        return self.out

    def add(
        self, run: str, *groups: Group, keep: Iterable[str] = (), last: bool = True, **more: Any
    ) -> None:
        self.tell(GroupsAdded(run, groups, frozenset(keep), last, **more))

    def end(
        self,
        key: str,
        *outcomes: Done | Failure,
        run: str = "r",
        whole: bool = False,
        usd: float = 0.0,
        usd_second: float | None = None,
        duplicate: bool = False,
    ) -> None:
        """End the invocation in flight that makes a key, well if nothing is said."""
        invocation = next(
            i
            for i, invoke in self.flying.items()
            if invoke.run == run
            and invoke.speculative == duplicate
            and any(key in group.outputs for group in invoke.groups)
        )
        groups = self.flying.pop(invocation).groups
        if len(outcomes) < 2:
            outcomes = (outcomes or (DONE,)) * len(groups)
        self.tell(InvocationEnded(invocation, outcomes, whole, usd, usd_second))

    def wake(self) -> None:
        """Let the time of the earliest timer come."""
        at = min(self.timers)
        self.timers.remove(at)
        self.now = max(self.now, at)
        self.tell(TimePassed(at))

    def wake_until_flying(self, key: str) -> None:
        while key not in self.in_flight():
            self.wake()

    def wake_until_flying_or_ended(self, key: str) -> None:
        while key not in self.in_flight() and not self.ended():
            self.wake()

    def tell_window(self, window: int) -> None:
        self.tell(WindowChanged(window))

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
