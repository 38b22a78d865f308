"""What users say about their tasks: ``with dask.annotate(retries=3, seconds=20, memory="4 GB")``.

May import: errors, the ground, dask.

Annotations of a graph (those that were active when it was made) have precedence over those that
are active when it is computed, and these over the settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dask.base import get_annotations
from dask.utils import parse_bytes

from dask_lambda.errors import ConfigurationError, OutOfMemoryError
from lambda_worker.protocol import Key

#: In place of a key: what was active when the graph was computed, and is said of all its tasks.
_ALL = "the computation"


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
        usual = numbers.get(_ALL)
        return lambda key: numbers.get(key, usual)

    def _said(self, name: str) -> dict[Key, Any]:
        """Return all that is said under a name, by key."""
        said = dict(self._of_keys.get(name, {}))
        if (active := self._active.get(name)) is not None:
            said[_ALL] = active
        return said

    def memory(self, memory_mb: int) -> Callable[[Key], Any] | None:
        """Check what tasks say that they need; tell those apart that say anything.

        Parameters
        ----------
        memory_mb : int
            Of the function.

        Returns
        -------
        callable or None
            Different for each task with an annotation ``memory``: they run alone.

        Raises
        ------
        OutOfMemoryError
            If a task needs more than the function has.
        """
        said = self._said("memory")
        if not said:
            return None
        for key, text in said.items():
            if _number("memory", key, text, parse_bytes) > memory_mb * 2**20:
                raise OutOfMemoryError(
                    f"Task {key!r} is annotated with memory={text!r}, more than the function's "
                    f"{memory_mb:,} MB; nothing was sent. Give the function more memory "
                    "(dask-lambda.memory; Lambda allows 10,240 MB), or make the chunks smaller."
                )
        everyone = _ALL in said
        return lambda key: key if everyone or key in said else None


def _number(name: str, key: Key, value: Any, number: Callable[[Any], Any]) -> Any:
    try:
        return number(value)
    except (ValueError, TypeError, AttributeError) as error:  # of what is not even a text
        what = "seconds" if name == "seconds" else "bytes"
        raise ConfigurationError(
            f"the annotation {name}={value!r} of {key!r} is not a number of {what}: {error}"
        ) from error


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError("it must be 0 or more")
    return float(value)
