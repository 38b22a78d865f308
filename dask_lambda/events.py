"""What the state machine hears and says: events, instructions, failures.  Pure.

May import: plan, the ground.  Whoever drives :class:`dask_lambda.state.State` (the engine, the
simulator, a test) speaks this language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dask_lambda.plan import Group
from lambda_worker.protocol import Key

# ---------------------------------------------------------------------------------------------
# failures
# ---------------------------------------------------------------------------------------------


class FailureKind(Enum):
    """What a failure means for the decision to try again."""

    TASK = "task"  #: the task's own exception; as often as asked for
    RESOURCES = "resources"  #: too long or too much memory; as TASK, once it cannot be split
    DEATH = "death"  #: the environment was lost under the task; a few times
    TRANSIENT = "transient"  #: the network or the service; for a while, ever more slowly
    THROTTLED = "throttled"  #: too many invocations; until nothing has moved for long
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
    """

    run: str
    groups: Sequence[Group]
    keep: frozenset[Key] = frozenset()
    last: bool = True
    split: Callable[[Group], Sequence[Group]] | None = None
    batch: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """A group's outputs are committed.

    Attributes
    ----------
    seconds : float
        That it took on the worker, with its inputs and outputs.
    """

    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class InvocationEnded:
    """An invocation came to an end, well or not for each of its groups.

    Attributes
    ----------
    invocation : int
    outcomes : tuple of Done or Failure
    as_a_whole : bool
        The invocation as such failed, so that nobody knows which group was the reason.
    """

    invocation: int
    outcomes: tuple[Done | Failure, ...]
    as_a_whole: bool = False


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


Event = GroupsAdded | InvocationEnded | RunCancelled | WindowChanged | TimePassed

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


Instruction = Invoke | Release | RunEnded | RunDrained | Wake
