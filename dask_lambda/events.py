"""What the state machine hears and says: events, instructions, failures.  Pure.

May import: plan, the ground.  Whoever drives :class:`dask_lambda.state.State` (the engine, the
simulator, a test) speaks this language.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dask_lambda.plan import Group
from lambda_worker.protocol import Key

#: Seconds; enough for a laptop that changes networks, and for most incidents of a service.
PATIENCE = 180.0

# ---------------------------------------------------------------------------------------------
# failures
# ---------------------------------------------------------------------------------------------


class FailureKind(Enum):
    """What a failure means for the decision to try again."""

    TASK = "task"  #: the task's own exception; as often as asked for
    MEMORY = "memory"  #: a larger function, then in parts, then as TASK
    TIMEOUT = "timeout"  #: in parts, then as TASK
    DEATH = "death"  #: the environment was lost under the task; a few times, then in parts
    TRANSIENT = "transient"  #: the network or the service; ever more slowly, for some time
    EXPIRED = "expired"  #: credentials; as TRANSIENT, while they are refreshed
    THROTTLED = "throttled"  #: too many invocations at the same time; as long as anything moves
    RATE_LIMITED = "rate-limited"  #: too many invocations a second; likewise
    NOT_READY = "not-ready"  #: the function cannot run anything yet, for minutes; likewise
    BUDGET = "budget"  #: the run may not spend more; never
    CANCELLED = "cancelled"  #: nobody wants it any more; never
    UNSENDABLE = "unsendable"  #: there is no payload for it; never, but alone if it is isolated
    FATAL = "fatal"  #: never


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group did not get done.

    Attributes
    ----------
    kind : FailureKind
    detail : object
        What to tell the user; the machine only hands it on.
    """

    kind: FailureKind
    detail: Any = None


# ---------------------------------------------------------------------------------------------
# events
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run may take.

    Attributes
    ----------
    usd : float
        US dollars.
    until : float
        The moment at which it ends.
    usd_second : tuple of float
        Price of a second of an invocation, for each function from the smallest memory on; the
        highest there is for a function whose memory is not known yet.
    """

    usd: float = math.inf
    until: float = math.inf
    usd_second: tuple[float, ...] = (0.0,)


@dataclass(frozen=True, slots=True)
class GroupsAdded:
    """More work for a run, which is thereby opened if it is new.

    Attributes
    ----------
    run : str
    groups : sequence of Group
        Their inputs are outputs of groups in this event or of earlier ones.
    keep : frozenset of key
        Outputs that are not released when their last reader is done.
    last : bool
        Nothing is added after this: the run ends when all its groups are done.
    split : callable, optional
        Smaller groups that do together what a group does and commit all its outputs; of a group
        that cannot be split, nothing.  A pure function.
    batch : bool
        Whether groups may share an invocation.
    speculate : bool
        Whether an invocation that takes conspicuously long may be sent once more.
    patience : float
        For how many seconds a group whose invocations fail for reasons outside of it is tried.
    budget : Budget, optional
    isolated : bool
        A group that fails does not end the run, only those that read its outputs
        (:class:`GroupFailed`); and an output that nobody reads and that is not to be kept is
        released while the run is open.
    given : tuple of key
        Values that are there already, to be kept, for groups to read.
    """

    run: str
    groups: Sequence[Group]
    keep: frozenset[Key] = frozenset()
    last: bool = True
    split: Callable[[Group], Sequence[Group]] | None = None
    batch: bool = False
    speculate: bool = False
    patience: float = PATIENCE
    budget: Budget | None = None
    isolated: bool = False
    given: tuple[Key, ...] = ()


@dataclass(frozen=True, slots=True)
class GroupsCancelled:
    """Nobody wants these groups of an isolated run any more, nor what reads their outputs.

    Attributes
    ----------
    run : str
    outputs : tuple of key
        One of each group.
    in_flight : bool
        Whether also those that an invocation runs: what it brings is then discarded.
    failure : Failure
        What is said of them.
    """

    run: str
    outputs: tuple[Key, ...]
    in_flight: bool = False
    failure: Failure = Failure(FailureKind.CANCELLED)


@dataclass(frozen=True, slots=True)
class KeysReleased:
    """These outputs of an isolated run need not be kept any longer than groups read them."""

    run: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """A group's outputs are committed.

    Attributes
    ----------
    seconds : float
        That it took on the worker, with its inputs and outputs.
    result : object
        Where the outputs are; the machine hands it on with :class:`Accept` or :class:`Discard`.
    """

    seconds: float = 0.0
    result: Any = None


@dataclass(frozen=True, slots=True)
class InvocationEnded:
    """An invocation came to an end, well or not for each of its groups.

    Attributes
    ----------
    invocation : int
    outcomes : tuple of Done or Failure
    as_a_whole : bool
        The invocation as such failed, so that nobody knows which group was the reason.
    usd : float
        What it cost, with its requests to S3, in US dollars.
    usd_second : float, optional
        Price of a second of its function, as soon as the function's memory is known.
    """

    invocation: int
    outcomes: tuple[Done | Failure, ...]
    as_a_whole: bool = False
    usd: float = 0.0
    usd_second: float | None = None


@dataclass(frozen=True, slots=True)
class RunCancelled:
    """The caller does not want the run any more."""

    run: str


@dataclass(frozen=True, slots=True)
class WindowChanged:
    """Another number of invocations may be in flight."""

    window: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The time that a :class:`Wake` asked for has come."""

    at: float


Event = (
    GroupsAdded
    | GroupsCancelled
    | KeysReleased
    | InvocationEnded
    | RunCancelled
    | WindowChanged
    | TimePassed
)

# ---------------------------------------------------------------------------------------------
# instructions
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Invoke:
    """Run these groups of one run in one invocation."""

    invocation: int
    run: str
    groups: tuple[Group, ...]
    tries: int  #: how often the first of them was tried before
    rung: int = 0  #: which function: 0 is the usual one, the next ones have more memory
    speculative: bool = False  #: while another invocation with the same groups is in flight
    local: bool = False  #: not on Lambda


@dataclass(frozen=True, slots=True)
class Accept:
    """The result of a group; any other is discarded."""

    run: str
    group: Group
    result: Any


@dataclass(frozen=True, slots=True)
class Discard:
    """Another attempt at the group was first, or its run has ended: nobody reads this result."""

    run: str
    group: Group
    result: Any


@dataclass(frozen=True, slots=True)
class GroupFailed:
    """A group of an isolated run ends without result."""

    run: str
    group: Group
    failure: Failure
    origin: Group  #: the one that failed: itself, or one whose outputs it waited for


@dataclass(frozen=True, slots=True)
class Stalled:
    """A run has failed to get on for some time, and goes on trying: the user should know."""

    run: str
    failure: Failure
    since: float  #: when it began
    patience: float  #: for how many seconds it is tried in all


@dataclass(frozen=True, slots=True)
class Release:
    """No group of the run needs these values any more."""

    run: str
    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The outcome of a run is known; nothing more is started for it."""

    run: str
    failure: Failure | None
    group: Group | None = None  #: the one that failed


@dataclass(frozen=True, slots=True)
class RunDrained:
    """No invocation of an ended run is in flight: nobody writes its objects any more."""

    run: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Send :class:`TimePassed` at this time."""

    at: float


Instruction = (
    Invoke | Accept | Discard | GroupFailed | Stalled | Release | RunEnded | RunDrained | Wake
)
