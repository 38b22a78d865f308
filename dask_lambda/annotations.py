"""What users say about their tasks: ``with dask.annotate(retries=3, seconds=20, memory="4 GB")``.

May import: placement, errors, the ground, dask.

Annotations of a graph (those that were active when it was made) have precedence over those that
are active when it is computed, and these over the settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from dask.base import get_annotations
from dask.utils import parse_bytes

from dask_lambda.errors import ConfigurationError
from dask_lambda.placement import EVERY_TASK, Declared, Offer, Placement, place
from dask_lambda.plan import Where
from lambda_worker.protocol import Key


class Annotations:
    """The annotations of one computation.

    Parameters
    ----------
    dsk : Expr, HighLevelGraph or mapping
        What the scheduler was called with.
    """

    def __init__(self, dsk: Any):
        self._of_keys: dict[str, dict[Key, Any]] = getattr(dsk, "__dask_annotations__", dict)()
        self._active = get_annotations()

    def of(self, name: str, default: Any) -> Callable[[Key], Any] | Any:
        """Return an annotation: one value, or a function of the key where keys differ."""
        active = self._active.get(name)
        if active is None:
            active = default
        of_keys = self._of_keys.get(name)
        if not of_keys:
            return active
        return lambda key: of_keys.get(key, active)

    def seconds(self) -> Callable[[Key], float | None] | None:
        """Return how long tasks are said to take as a function of the key, None if nobody says so.

        Raises
        ------
        ConfigurationError
            If what is said is no number of seconds.
        """
        return self._numbers("seconds", _seconds)

    def nbytes(self) -> Callable[[Key], int | None] | None:
        """Return how large results are said to be, in the same way; "2 MB" is a number."""
        return self._numbers("nbytes", parse_bytes)

    def _numbers(self, name: str, number: Callable[[Any], Any]) -> Callable[[Key], Any] | None:
        said = self._said(name)
        if not said:
            return None
        numbers = {key: _number(name, key, value, number) for key, value in said.items()}
        usual = numbers.get(EVERY_TASK)
        return lambda key: numbers.get(key, usual)

    def _said(self, name: str) -> dict[Key, Any]:
        """Return all that is said under a name, by key."""
        said = dict(self._of_keys.get(name, {}))
        if (active := self._active.get(name)) is not None:
            said[EVERY_TASK] = active
        return said

    def memory(self) -> Callable[[Key], int] | None:
        """Return the bytes of memory that tasks are said to need, as a function of the key.

        Returns
        -------
        callable or None
            0 for a task of which nothing is said; None if nothing is said of any.
        """
        numbers = self._numbers("memory", parse_bytes)
        return None if numbers is None else lambda key: int(numbers(key) or 0)

    def placement(self, offer: Offer) -> Placement | None:
        """Return where tasks run, as a function of the key; None if all run on Lambda.

        Parameters
        ----------
        offer : Offer

        Raises
        ------
        ConfigurationError, OutOfMemoryError, FunctionTimeoutError
            If a task cannot run where it says, or anywhere.
        """
        where = self._numbers("where", _where)
        memory, seconds = self.memory(), self.seconds()
        if where is None and memory is None and seconds is None:
            return None
        found = Placement()
        names = ("where", "memory", "seconds")
        said = dict.fromkeys(key for name in names for key in self._of_keys.get(name, ()))
        for key in (EVERY_TASK, *said):
            declared = Declared(
                where(key) if where else None,
                memory(key) if memory else 0,
                (seconds(key) if seconds else None) or 0.0,
            )
            chosen, why = place(repr(key), declared, offer)
            if key == EVERY_TASK:
                found.usual = chosen
            else:
                found.of[key] = chosen
            if why:
                found.reasons[key] = why
        return found if found.usual == "local" or "local" in found.of.values() else None


def task_memory(key: Key, said: Any) -> int:
    """Return the bytes of memory that one task is said to need; 0 if nothing is said.

    Raises
    ------
    ConfigurationError
        If what is said is no number of bytes.
    """
    return 0 if said is None else int(_number("memory", key, said, parse_bytes))


def task_timeout(key: Key, said: Any) -> float | None:
    """Return the seconds after which one task is to be interrupted, if anything is said.

    Raises
    ------
    ConfigurationError
        If what is said is no number of seconds.
    """
    seconds: float | None = None if said is None else _number("timeout", key, said, _seconds)
    return seconds


def task_seconds(key: Key, said: Any) -> float:
    """Return how long one task is said to take; 0 if nothing is said.

    Raises
    ------
    ConfigurationError
        If what is said is no number of seconds.
    """
    return 0.0 if said is None else float(_number("seconds", key, said, _seconds))


def _number(name: str, key: Key, value: Any, number: Callable[[Any], Any]) -> Any:
    try:
        return number(value)
    except (ValueError, TypeError, AttributeError) as error:  # of what is not even a text
        what = _WHAT[name]
        raise ConfigurationError(
            f"the annotation {name}={value!r} of {key!r} is not {what}: {error}"
        ) from error


_WHAT = {
    "seconds": "a number of seconds",
    "timeout": "a number of seconds",
    "memory": "a number of bytes",
    "nbytes": "a number of bytes",
    "where": "a place",
}


def _where(value: Any) -> Where:
    if value not in get_args(Where):
        raise ValueError("it must be 'lambda' or 'local'")
    found: Where = value
    return found


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError("it must be 0 or more")
    return float(value)
