"""Sums of many blocks that need not be in memory together.  May import: dask's task classes.

Dask's blocked algorithms hand a task the list of all terms of a sum: ``_chunk_sum`` of a matrix
product, the builtin ``sum`` of the dots of a factorisation, often deep inside another task.  Such
a place is a :class:`Fold`.  Both add from the left, term by term, so the sum of the first few
terms stands for them: the worker keeps one running total (:class:`RunningSum`) in place of all
terms, and the client may give the first terms to another task (:func:`split_fold`).  In both
cases the same additions are made in the same order and type, so that no bit is different.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dask._task_spec import Alias, List, Task, TaskRef, _execute_subgraph, _identity_cast

from lambda_worker.protocol import Key

#: ``_chunk_sum`` by name: importing dask.array would take longer than most tasks.
CHUNK_SUM = ("dask.array.routines", "_chunk_sum")


@dataclass(frozen=True, slots=True)
class Fold:
    """A place in a task where a list of terms is added up.

    Attributes
    ----------
    path : tuple
        How to get there: at each level the place of an argument, or, in fused tasks, the key
        of an inner task.
    terms : tuple of key
        In the order of addition.
    """

    path: tuple[Any, ...]
    terms: tuple[Key, ...]


def find_folds(task: Any) -> list[Fold]:
    """Find the sums of two or more terms in a task, in its arguments and in fused tasks.

    Parameters
    ----------
    task : dask GraphNode

    Returns
    -------
    list of Fold
        Only those all of whose terms are keys of the graph.
    """
    return [Fold(path, terms) for path, terms in _find(task)]


def split_fold(task: Task, fold: Fold, prefix_key: Key, count: int) -> tuple[Task, Task]:
    """Leave the first terms of a sum to a task of their own.

    Parameters
    ----------
    task : Task
    fold : Fold
        One of ``find_folds(task)``.
    prefix_key : key
        Of the new task.
    count : int
        How many terms it adds up: at least one, at most all.

    Returns
    -------
    prefix, task : Task
        The new task; and the old one with the new one's value in place of these terms.  Its
        result has the same bits as before.

    Notes
    -----
    There is one exception: from Python 3.12 on the builtin ``sum`` adds Python's own floats, not
    NumPy's, with a compensation for rounding that a partial sum does not hand on.
    """
    if not 1 <= count <= len(fold.terms):
        raise ValueError(f"{count} of {len(fold.terms)} terms of a sum cannot be split off")
    addition = _addition(_follow(task, fold.path))
    assert addition is not None
    first = [_refer(key) for key in fold.terms[:count]]
    if addition.function is not sum:
        prefix = Task(prefix_key, partial(addition.function, **addition.keep_dims()), List(*first))
    elif addition.started:
        prefix = Task(prefix_key, sum, List(*first[1:]), first[0])
    else:
        prefix = Task(prefix_key, sum, List(*first))

    def shorten(node: Task) -> Task:
        rest = addition.nodes[count:]
        if addition.function is sum:
            return Task(node.key, sum, List(*rest), _refer(prefix_key))
        return Task(node.key, node.func, List(_refer(prefix_key), *rest), **node.kwargs)

    return prefix, _rebuilt(task, fold.path, shorten, prefix_key)


def replace_fold(task: Task, fold: Fold, key: Key) -> tuple[RunningSum, Task]:
    """Have a task take a sum from a :class:`RunningSum`, which it will find under a key."""
    addition = _addition(_follow(task, fold.path))
    assert addition is not None

    def finish(node: Task) -> Task:
        return Task(node.key, RunningSum.finish, _refer(key), node.func, **node.kwargs)

    return RunningSum(addition), _rebuilt(task, fold.path, finish, key)


class RunningSum:
    """The sum of the terms of one fold so far, in their order.

    Plain arrays of the type of the sum are added into one array, which is the sum's own.  From
    the first term on that is anything else, terms are kept as they are for the task itself.
    """

    def __init__(self, addition: _Addition):
        self._dtype = addition.dtype
        self._head: Any = None  # the first term, or the sum
        self._own = False  # whether the head was made here
        self._empty = True
        self._from_zero = addition.function is sum and not addition.started
        self._rest: list[Any] = []

    def add(self, term: Any) -> None:
        """Add the next term.  It is not changed."""
        if self._rest or not self._is_plain(term):
            self._rest.append(term)
        elif self._empty:
            self._empty = False
            self._head = 0 + term if self._from_zero else term
            self._own = self._from_zero
        else:
            self._head = self._plus(term)
            self._own = True

    def finish(self, function: Callable[..., Any], **kwargs: Any) -> Any:
        """Call the function of the fold with what is left to add up, giving up the sum."""
        head, self._head = self._head, None
        rest, self._rest = self._rest, []
        if function is not sum:
            return function(rest if self._empty else [head, *rest], **kwargs)
        if not self._empty:
            return sum(rest, head)
        return sum(rest) if self._from_zero else sum(rest[1:], rest[0])

    def _is_plain(self, term: Any) -> bool:
        np = sys.modules.get("numpy")
        if np is None or type(term) is not np.ndarray or not term.ndim:
            return False
        if term.dtype.kind not in "biufc" or not term.dtype.isnative:
            return False
        if self._dtype is not None and term.dtype != self._dtype:
            return False
        head = self._head
        return self._empty or (term.dtype == head.dtype and term.shape == head.shape)

    def _plus(self, term: Any) -> Any:
        import numpy as np

        head = self._head
        alike = (head.flags.c_contiguous and term.flags.c_contiguous) or (
            head.flags.f_contiguous and term.flags.f_contiguous
        )  # else a new sum might be laid out in another way
        return np.add(head, term, out=head if self._own and alike else None, dtype=self._dtype)


# ---------------------------------------------------------------------------------------------
# the nodes of dask
# ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Addition:
    """A node that adds up a list."""

    function: Callable[..., Any]  #: sum, or ``_chunk_sum`` itself
    keywords: dict[str, Any]
    nodes: Sequence[Any]  #: Alias or TaskRef of each term
    started: bool  #: whether the first of them is sum's ``start``

    @property
    def dtype(self) -> Any:
        return self.keywords.get("dtype")

    def keep_dims(self) -> dict[str, Any]:
        return {**self.keywords, "keepdims": True}


def _addition(node: Any) -> _Addition | None:
    if type(node) is not Task or not node.args:
        return None
    listed = _listed(node.args[0])
    if listed is None:
        return None
    function: Any = node.func
    keywords = dict(node.kwargs)
    started = False
    if function is sum:
        if keywords or len(node.args) > 2:
            return None
        if started := len(node.args) == 2:
            listed = [node.args[1], *listed]
    else:
        while isinstance(function, partial):
            if function.args:
                return None
            function, keywords = function.func, {**function.keywords, **keywords}
        names = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if names != CHUNK_SUM or len(node.args) > 1 or keywords.get("dtype") is None:
            return None
    if any(_reference(each) is None for each in listed):
        return None
    return _Addition(function, keywords, listed, started)


def _listed(node: Any) -> list[Any] | None:
    """Return the elements of a node that makes a list."""
    if type(node) is List:
        return list(node.args)
    if type(node) is Task and node.func is _identity_cast and node.kwargs == {"typ": list}:
        return list(node.args)
    return None


def _refer(key: Any) -> TaskRef:
    return TaskRef(key)


def _reference(node: Any) -> tuple[Key] | None:
    """Return the key that a node stands for (None is no key, but might be one)."""
    if isinstance(node, Alias):
        return (node.target,)
    return (node.key,) if isinstance(node, TaskRef) else None


def _find(node: Any) -> Iterator[tuple[tuple[Any, ...], tuple[Key, ...]]]:
    if type(node) is not Task:
        return
    if node.func is _execute_subgraph:
        inner, _, names, *outer = node.args
        outside = {name: _reference(each) for name, each in zip(names, outer, strict=True)}
        for key, each in inner.items():
            for path, terms in _find(each):
                found = [outside.get(term) for term in terms]
                if all(found):
                    yield (key, *path), tuple(term[0] for term in found if term)
        return
    addition = _addition(node)
    if addition is not None:
        if len(addition.nodes) > 1:
            yield (), tuple(_reference(each)[0] for each in addition.nodes)  # type: ignore[index]
        return
    for place, each in enumerate(node.args):
        for path, terms in _find(each):
            yield (place, *path), terms


def _follow(node: Any, path: Sequence[Any]) -> Any:
    for step in path:
        node = node.args[0][step] if node.func is _execute_subgraph else node.args[step]
    return node


def _rebuilt(node: Task, path: Sequence[Any], change: Callable[[Task], Task], key: Key) -> Task:
    """Copy a task with a change in one place, where ``key`` is read from now on."""
    if not path:
        return change(node)
    step, *rest = path
    args = list(node.args)
    if node.func is _execute_subgraph:
        inner, outkey, names, *outer = args
        inner = {**inner, step: _rebuilt(inner[step], rest, change, key)}
        read = frozenset[Key]().union(*(each.dependencies for each in inner.values()))
        pairs = [pair for pair in zip(names, outer, strict=True) if pair[0] in read]
        pairs.append((key, _refer(key)))
        args = [inner, outkey, tuple(n for n, _ in pairs), *(each for _, each in pairs)]
    else:
        args[step] = _rebuilt(args[step], rest, change, key)
    return Task(node.key, node.func, *args, _data_producer=node.data_producer, **node.kwargs)
