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

    def memory(self, memory_mb: int) -> Callable[[Key], int] | None:
        """Return the bytes of memory that tasks are said to need, as a function of the key.

        Parameters
        ----------
        memory_mb : int
            Of the largest function.

        Returns
        -------
        callable or None
            0 for a task of which nothing is said; None if nothing is said of any.

        Raises
        ------
        OutOfMemoryError
            If a task needs more than any function has.
        """
        said = self._said("memory")
        if not said:
            return None
        needed = {key: int(_number("memory", key, v, parse_bytes)) for key, v in said.items()}
        for key, nbytes in needed.items():
            if nbytes > memory_mb * 2**20:
                raise OutOfMemoryError(
                    f"Task {key!r} is annotated with memory={said[key]!r}, more than the "
                    f"function's {memory_mb:,} MB; nothing was sent. Give the function more memory "
                    "(dask-lambda.memory; Lambda allows 10,240 MB), name a larger one in "
                    "dask-lambda.larger-functions, or make the chunks smaller."
                )
        usual = needed.get(_ALL, 0)
        return lambda key: needed.get(key, usual)


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
