"""Iterations on Lambda: chains of calls, each of which reads what the one before has made.

May import: calling, arguments, futures, session, report, errors, the ground.

The state of a chain goes from one step to the next through S3, and never through the client.  A few
steps are submitted ahead, so that each starts when the one before is done, and a chain of a million
steps is never more than these few.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from dask._task_spec import Task, TaskRef

from dask_lambda.arguments import parse
from dask_lambda.calling import Calling, Deferred, Limits, name_of
from dask_lambda.futures import LambdaFuture, LateFuture
from dask_lambda.report import CallReport
from dask_lambda.session import Session


class ChainFuture(LateFuture):
    """The last state of a chain of steps; see :meth:`LambdaExecutor.iterate`.

    It is the future of the last step.  :meth:`cancel` gives up the steps that were not sent yet; a
    step that raises is the last one, and its exception that of the chain.

    Attributes
    ----------
    k : int
        How many steps are done.
    """

    def __init__(
        self,
        calling: Calling,
        step: Callable[[int, Any, Any], Any],
        iterations: int,
        argument: Any,
        limits: Limits,
        *,
        history: bool,
        ahead: int,
    ):
        session = calling.session()
        self._name = name_of(step)
        super().__init__(calling.new_key(self._name), session)
        self.k = 0
        self._calling = calling
        self._step = step
        self._iterations = iterations
        self._inputs: dict[str, LambdaFuture] = {}
        self._argument = parse(argument, session, self._inputs)
        self._limits = limits
        self._history: list[LambdaFuture] | None = [] if history else None
        self._ahead = ahead
        self._begun = False
        self._submitted = 0
        self._steps: deque[LambdaFuture] = deque()  # submitted, and not known to be done
        self._last: LambdaFuture | None = None  # the step before the next one

    def begin(self) -> None:
        """Submit the first steps."""
        self._calling.expect(self)
        unknown = [each for each in self._inputs.values() if not each._known]
        if unknown:
            Deferred(unknown, self._begin)
        else:
            self._begin()

    def _begin(self) -> None:
        with self._late_lock:
            self._begun = True
            if self.cancelled():
                self._submit_last()
            while self._submitted < self._iterations and len(self._steps) < self._ahead:
                self._submit_next()

    @property
    def history(self) -> list[LambdaFuture]:
        """The futures of the steps that are done, if they were to be kept: x_1, x_2, ...

        Raises
        ------
        ValueError
            If they were not (``history=True``).
        """
        if self._history is None:
            raise ValueError("the steps are not kept: call iterate(..., history=True)")
        last = [self] if self.k == self._iterations else []
        return [*self._history, *last]

    def running(self) -> bool:
        """Whether any step was sent, and the chain has not ended."""
        if self.done():
            return False
        with self._late_lock:
            steps = tuple(self._steps)
        return super().running() or bool(self.k) or any(each.running() for each in steps)

    # -- in any thread ---------------------------------------------------------------------------

    def _give_up(self) -> None:
        with self._late_lock:
            if not self._begun:
                return
            if not self._known:  # so that those who wait for the chain are cancelled with it
                self._submit_last()
            keys = [self.key, *(each.key for each in self._steps)]
        self._session.cancel(keys)

    def _submit_next(self) -> None:
        if self._submitted == self._iterations - 1:
            self._submit_last()
            return
        future = Step(self._calling.new_key(self._name), self._session, self)
        self._calling.expect_more(future)
        self._steps.append(future)
        self._send(future, self._submitted)
        self._submitted += 1
        self._last = future

    def _submit_last(self) -> None:
        """Submit what this is the future of: the last step, or what takes its place."""
        self._send(self, self._iterations - 1)
        self._submitted = self._iterations
        self._last = None
        self._inputs, self._argument = {}, None
        self._became_known()

    def _send(self, future: LambdaFuture, k: int) -> None:
        inputs, before = dict(self._inputs), self._last
        state = None
        if before is not None:
            inputs[before.key] = before
            state = TaskRef(before.key)
        task = Task(future.key, self._step, k, state, self._argument)
        self._calling.send(future, task, inputs, self._limits, self._name)

    # -- in the delivery thread ------------------------------------------------------------------

    def _one_done(self, future: LambdaFuture) -> None:
        with self._late_lock:
            if self._steps and self._steps[0] is future:
                self._steps.popleft()
            if future.cancelled() or future.exception() is not None:
                if not self._known:  # it fails as its input has
                    self._submit_last()
                return
            self.k += 1
            if self._history is not None:
                self._history.append(future)
            if not self._known and not self.done():
                self._submit_next()

    def _succeed(self, report: CallReport) -> None:
        self.k = self._iterations
        super()._succeed(report)


class Step(LambdaFuture):
    """A step of a chain before the last one."""

    def __init__(self, key: str, session: Session, chain: ChainFuture):
        super().__init__(key, session)
        self._chain: ChainFuture | None = chain

    def _succeed(self, report: CallReport) -> None:
        super()._succeed(report)
        self._tell()

    def _fail(self, exception: BaseException, log: str) -> None:
        super()._fail(exception, log)
        self._tell()

    def _tell(self) -> None:
        chain, self._chain = self._chain, None  # which may hold this as part of its history
        if chain is not None:
            chain._one_done(self)
