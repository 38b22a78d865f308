"""The arguments of a call, with the futures in them.  May import: futures, distant, the ground.

A future becomes a reference to the task that makes its value, wherever it stands in lists, tuples,
sets, dicts (as a value) and dataclasses; all else stays as it is.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import fields, is_dataclass
from typing import Any

from dask._task_spec import Dict, GraphNode, List, Set, Task, TaskRef, Tuple

from dask_lambda.distant import DistantFuture
from dask_lambda.futures import LambdaFuture
from dask_lambda.session import Session
from lambda_worker.calls import rebuild

_ATOMS = frozenset({int, float, str, bytes, bool, complex, type(None)})
_SEQUENCES: dict[type, type[Task]] = {list: List, tuple: Tuple, set: Set}


def parse(value: Any, session: Session, found: dict[str, LambdaFuture]) -> Any:
    """Return an argument as a task may have it.

    Parameters
    ----------
    value : object
    session : Session
        To which its futures must belong.
    found : dict
        Into which they are put, by key.

    Raises
    ------
    TypeError, ValueError
        For futures of anybody else.
    """
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in _SEQUENCES or kind is frozenset:
        parsed = [parse(each, session, found) for each in value]
        if not any(map(_is_task, parsed)):
            return value
        if kind is frozenset:
            return Task(None, frozenset, List(*parsed))
        return _SEQUENCES[kind](*parsed)
    if kind is dict:
        named = {name: parse(each, session, found) for name, each in value.items()}
        return Dict(named) if any(map(_is_task, named.values())) else value
    if isinstance(value, Future | DistantFuture | TaskRef | GraphNode):
        return _reference(value, session, found)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        parsed = [parse(each, session, found) for each in value]
        return Task(None, kind, *parsed) if any(map(_is_task, parsed)) else value
    if is_dataclass(kind):
        named = {
            each.name: parse(getattr(value, each.name), session, found)
            for each in fields(kind)
            if hasattr(value, each.name)
        }
        if any(map(_is_task, named.values())):
            return Task(None, rebuild, kind, Dict(named))
    return value


def _is_task(value: Any) -> bool:
    return isinstance(value, TaskRef | GraphNode)


def _reference(value: Any, session: Session, found: dict[str, LambdaFuture]) -> TaskRef:
    if not isinstance(value, LambdaFuture):
        what = type(value)
        raise TypeError(
            f"{value!r} is a {what.__module__}.{what.__qualname__}, which a call on Lambda cannot "
            "wait for: give its result, or a future of this executor"
        )
    if value._session is not session:
        raise ValueError(
            f"the future {value.key} belongs to another executor: give its result(), or submit the "
            "call to the executor that made it"
        )
    found[value.key] = value
    return TaskRef(value.key)
