"""The records of a run that stays open: its calls, and the results that somebody holds.

May import: run, plan, report, failures, events, the ground.  Users' threads hold
:class:`Stored`; all else is touched in the engine's thread only.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from dask_lambda import failures
from dask_lambda.events import Failure, FailureKind
from dask_lambda.plan import Group
from dask_lambda.report import CallReport
from dask_lambda.run import Result, Run
from lambda_worker.protocol import Key, Value

if TYPE_CHECKING:
    from dask_lambda.session import Session


class Call(Protocol):
    """Hears what becomes of one call.

    Its methods are called in the engine's thread: they must return at once, and not raise.
    """

    def started(self) -> bool | None:
        """It is about to be sent, perhaps once more; False if nobody wants it any more."""

    def finished(self, report: CallReport) -> None:
        """Its result is there, in its :class:`Stored`."""

    def failed(self, exception: BaseException, log: str) -> None:
        """It ends without result; CancelledError if nobody wanted it any more.

        ``log`` is the end of the log of its last invocation, in base64, if there was one.
        """


class Stored:
    """The result of a call, or other data of a session: in S3, or small and at hand.

    The object in S3 lives as long as this one here, or until the session is closed.

    Attributes
    ----------
    key : key
    session : Session
    value : Value or None
        Where it is; None as long as the call has not ended.
    nbytes : int
        Its size in the memory of a worker.
    kind : str
        Its type, as ``module.name``.
    """

    __slots__ = ("__weakref__", "key", "kind", "nbytes", "session", "value")

    def __init__(self, session: Session, key: Key):
        self.session = session
        self.key = key
        self.value: Value | None = None
        self.nbytes = 0
        self.kind = ""
        weakref.finalize(self, session.let_go, key).atexit = False

    def __repr__(self) -> str:
        return f"<Stored {self.key!r}>"

    def load(self) -> Any:
        """Fetch, verify and unpickle the value.

        Raises
        ------
        IntegrityError, LostDataError, AccessDeniedError
        InvocationError
            If the session is closed.
        """
        return self.session.fetch(self).result().load()


@dataclass(slots=True)
class _Spent:
    """What the attempts at one call have cost so far."""

    usd: float = 0.0
    invocations: int = 0
    log: str = ""
    last: int = 0  # a number of the last of them


@dataclass(eq=False)
class SessionRun(Run):
    """The run of a session; in the engine's thread.

    Attributes
    ----------
    calls : dict
        Those that have not ended: who holds the result, and who hears of it.
    """

    session: Session = field(kw_only=True)
    calls: dict[Key, tuple[Stored, Call]] = field(default_factory=dict)
    spending: dict[Key, _Spent] = field(default_factory=dict)
    attempts: int = 0  # that were noted

    def is_shared(self, key: Key) -> bool:
        """Whoever may come to read it."""
        return True

    def is_wanted(self, group: Group) -> bool:
        """Whether the call has not ended."""
        return group.outputs[0] in self.calls

    def tell_started(self, group: Group) -> None:
        """Tell that a call was sent."""
        key = group.outputs[0]
        if (found := self.calls.get(key)) is not None and found[1].started() is False:
            del self.calls[key]
            found[1].failed(CancelledError(), "")

    def tell_finished(self, group: Group, result: Result) -> None:
        """Tell that a call is done."""
        (key, value) = result.told[0]
        self.graph.tasks.pop(key, None)
        if key not in self.calls:
            return
        stored, call = self.calls.pop(key)
        spent = self.spending.pop(key, _Spent())
        measured = list(result.measured.values())
        stored.value = value
        stored.nbytes = int(sum(each[2] for each in measured))
        stored.kind = result.types[0] if result.types else ""
        call.finished(
            CallReport(
                seconds=sum(each[1] for each in measured),
                peak_memory_mb=result.peak_memory / 2**20,
                cold_start=result.cold,
                cost_usd=spent.usd,
                invocations=spent.invocations,
                nbytes=stored.nbytes,
                kind=stored.kind,
                finished=time.time(),
                log=spent.log,
                invocation=spent.last,
            )
        )

    def tell_failed(self, group: Group, failure: Failure, origin: Group) -> None:
        """Tell that a call ends without result."""
        key = group.outputs[0]
        self.graph.tasks.pop(key, None)
        if key in self.calls:
            _, call = self.calls.pop(key)
            call.failed(self._exception(failure, origin), self.spending.pop(key, _Spent()).log)

    def _exception(self, failure: Failure, origin: Group) -> BaseException:
        if failure.kind is FailureKind.CANCELLED:
            return CancelledError()
        if isinstance(failure.detail, failures.Detail):
            failure = replace(failure, detail=replace(failure.detail, key=""))
        name = self.session.shown(origin.outputs[0])
        return failures.to_exception(failure, name, {self.encoder.run: self.secret})

    def if_spent(self) -> str:
        """Say how to go on when there is no budget left."""
        return (
            "Its calls were given up, and results that are in S3 deleted. Raise the limit, and "
            "begin with a new executor or cluster."
        )

    def note_attempt(self, groups: Sequence[Group], usd: float, log: str) -> None:
        """Take note of what an attempt at some calls has cost."""
        self.attempts += 1
        for group in groups:
            key = group.outputs[0]
            if key in self.calls:
                spent = self.spending.setdefault(key, _Spent())
                spent.usd += usd / len(groups)
                spent.invocations += 1
                spent.log = log or spent.log
                spent.last = self.attempts
