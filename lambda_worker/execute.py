"""Running the tasks of one group.  May import: :mod:`lambda_worker.folds`, calls, protocol, dask.

Values are loaded when a task first reads them and dropped when the last one has; sums are
accumulated as their terms appear.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dask._task_spec import Alias  # tasks are unpickled into it: loaded at the cold start
from dask.utils import key_split

from lambda_worker.calls import finish
from lambda_worker.folds import RunningSum, find_folds, replace_fold
from lambda_worker.protocol import Body, Key

#: What is told of a group's tasks stays small, whatever their keys are.
MAX_PREFIXES, MAX_PREFIX = 50, 100
OTHERS = "..."


class TaskError(Exception):
    """A task raised: carries its key; the exception is the cause."""

    def __init__(self, key: Key):
        super().__init__(key)
        self.key = key


class Cancelled(Exception):
    """The run has ended, and with it this group."""


@dataclass(slots=True)
class Output:
    """A result to commit.

    Attributes
    ----------
    place : int
        Among ``Body.outputs``.
    value : object
    size : int, optional
        Serialised, to be set by who serialises it.
    """

    place: int
    value: Any
    size: int | None = None


@dataclass(slots=True)
class _Sum:
    """A fold whose terms are added as they appear."""

    running: RunningSum
    reader: Key  #: the task that the fold belongs to
    terms: list[Key]  #: those that were not added yet, from the last to the next
    uses: Counter[Key]  #: how often each of them is still to be added


@dataclass(frozen=True, slots=True)
class _Total:
    """Under which key a task finds one of its sums."""

    task: Key
    number: int


class GroupRun:
    """The run of one group.

    Parameters
    ----------
    body : Body
        It is emptied on the way.
    load : callable
        ``load(name, reader)`` returns the input of a name in ``body.inputs``; called once for
        each, before the task with the key ``reader`` runs for which it is needed first.
    cancelled : callable, optional
        Asked before each task whether to stop.

    Attributes
    ----------
    needs : list of key
        The inputs in the order in which they will be loaded.
    seconds : float
        Inside tasks.
    tasks : dict
        For each prefix of keys (:func:`dask.utils.key_split`): number of tasks that have run,
        seconds inside them, bytes of their results.
    """

    def __init__(
        self,
        body: Body,
        load: Callable[[Key, Key], Any],
        cancelled: Callable[[], bool] = lambda: False,
    ):
        self.seconds = 0.0
        self.tasks: dict[str, list[Any]] = {}
        self.values: dict[Key, Any] = {}
        self._load = load
        self._cancelled = cancelled
        self._inputs = set(body.inputs)
        self._places: dict[Key, list[int]] = {}
        for place, key in enumerate(body.outputs):
            self._places.setdefault(key, []).append(place)
        self._sums: dict[Key, _Sum] = {}  # where its total is found -> sum
        self._feeds: dict[Key, _Sum] = {}  # term -> sum
        self._readers: Counter[Key] = Counter()
        tasks, body.tasks = body.tasks, []
        self._waiting = self._accumulating(tasks)
        self._waiting.reverse()
        for task in self._waiting:
            self._readers.update(task.dependencies)
        self.needs = self._order_of_inputs()

    def outputs(self) -> Iterator[Output]:
        """Run the tasks in order, yielding each output as soon as it is there.

        Raises
        ------
        TaskError
            From the exception that a task raised.
        Cancelled
        """
        try:
            while self._waiting:
                if self._cancelled():
                    raise Cancelled
                yield from self._run(self._waiting.pop())
        finally:  # also when a task raised, whose traceback may live on
            self.values.clear()
            self._sums.clear()
            self._feeds.clear()
            self._waiting.clear()

    def _run(self, task: Any) -> Iterator[Output]:
        key = task.key
        self._prepare(task)
        with self._measured(key, counted=not isinstance(task, Alias)) as record:
            for name in task.dependencies:
                if name in self._sums:
                    self.values[name] = self._sums.pop(name).running
            result = finish(task(self.values))
            record[0] += 1
        self._drop_what_was_read(task)
        del task
        size = None
        for place in self._places.get(key, ()):
            output = Output(place, result)
            yield output
            size = output.size
            del output
        record[2] += _nbytes(result, size)
        if self._readers[key] or key in self._feeds:
            self.values[key] = result
        del result
        if key in self._feeds:
            self._add_terms(self._feeds[key])

    # -- values ----------------------------------------------------------------------------------

    def _prepare(self, task: Any) -> None:
        """Have everything there that a task reads."""
        for name in task.dependencies:
            if name in self._sums:
                self._add_terms(self._sums[name])
        for name in task.dependencies:
            self._fetch(name, task.key)

    def _fetch(self, name: Key, reader: Key) -> None:
        if name in self._inputs and name not in self.values:
            self.values[name] = self._load(name, reader)

    def _drop_what_was_read(self, task: Any) -> None:
        for name in task.dependencies:
            self._readers[name] -= 1
            if not self._readers[name]:
                self.values.pop(name, None)

    @contextmanager
    def _measured(self, key: Key, counted: bool = True) -> Iterator[list[Any]]:
        """Count the time as that of one task, and tell whose exception it was."""
        record = self._record(key) if counted else [0, 0.0, 0]
        started = time.perf_counter()
        try:
            yield record
        except BaseException as error:  # SystemExit too: it must not end the environment
            raise TaskError(key) from error
        finally:
            seconds = time.perf_counter() - started
            self.seconds += seconds
            record[1] += seconds

    def _record(self, key: Key) -> list[Any]:
        """Return what is counted for the prefix of a key, which is to be text for a reply."""
        prefix = key_split(key)[:MAX_PREFIX].encode("utf-8", "backslashreplace").decode()
        if prefix not in self.tasks and len(self.tasks) >= MAX_PREFIXES:
            prefix = OTHERS
        return self.tasks.setdefault(prefix, [0, 0.0, 0])

    # -- sums ------------------------------------------------------------------------------------

    def _accumulating(self, tasks: list[Any]) -> list[Any]:
        """Have the sums accumulated whose terms nobody else needs; return the tasks to run."""
        readers = Counter(name for task in tasks for name in task.dependencies)
        found = []
        there = set(self._inputs)
        for task in tasks:
            there.add(task.key)
            for number, fold in enumerate(find_folds(task)):
                terms = set(fold.terms)
                if not terms <= there or not terms.isdisjoint(self._places):
                    continue
                if any(readers[term] > 1 for term in terms):
                    continue
                total = _Total(task.key, number)
                running, changed = replace_fold(task, fold, total)
                if terms.isdisjoint(changed.dependencies):
                    task = changed
                    waiting = _Sum(running, task.key, [*reversed(fold.terms)], Counter(fold.terms))
                    self._sums[total] = waiting
                    self._feeds.update(dict.fromkeys(terms, waiting))
            found.append(task)
        return found

    def _add_terms(self, waiting: _Sum) -> None:
        """Add the terms that are there, or can be fetched, in their order."""
        while waiting.terms:
            name = waiting.terms[-1]
            self._fetch(name, waiting.reader)
            if name not in self.values:
                return
            waiting.terms.pop()
            with self._measured(waiting.reader):
                waiting.running.add(self.values[name])
            waiting.uses[name] -= 1
            if not waiting.uses[name]:
                del self.values[name]

    def _order_of_inputs(self) -> list[Key]:
        """Say in which order :meth:`outputs` will load the inputs, without running anything."""
        order: dict[Key, None] = {}
        done: set[Key] = set()
        left = {id(each): list(each.terms) for each in self._sums.values()}

        def load(name: Key) -> None:
            if name in self._inputs:
                order.setdefault(name)

        def add_terms(waiting: _Sum) -> None:
            terms = left[id(waiting)]
            while terms and (terms[-1] in self._inputs or terms[-1] in done):
                load(terms.pop())

        for task in reversed(self._waiting):
            for name in task.dependencies:
                if name in self._sums:
                    add_terms(self._sums[name])
            for name in task.dependencies:
                load(name)
            done.add(task.key)
            if task.key in self._feeds:
                add_terms(self._feeds[task.key])
        return list(order)


def _nbytes(value: Any, serialized: int | None) -> int:
    """Return about how large a result is."""
    try:
        size = getattr(value, "nbytes", None)
        if not isinstance(size, int):
            size = sys.getsizeof(value) if serialized is None else serialized
    except Exception:  # noqa: BLE001  whatever a user's class raises
        return serialized or 0
    return size
