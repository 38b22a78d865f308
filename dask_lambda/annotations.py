"""What users say about their tasks: ``with dask.annotate(retries=3, seconds=20, memory="4 GB")``.

May import: errors, the ground, dask.

Annotations of a graph (those that were active when it was made) have precedence over those that
are active when it is computed, and these over the settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dask.base import get_annotations
from dask.utils import parse_bytes

from dask_lambda.errors import ConfigurationError, OutOfMemoryError
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

    def maybe(self, name: str) -> Callable[[Key], Any] | None:
        """Return an annotation as a function of the key, None if nobody uses it."""
        found = self.of(name, None)
        if found is None or callable(found):
            return found
        return lambda key: found

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
        said = self.maybe("memory")
        if said is None:
            return None
        declared = dict(self._of_keys.get("memory", {}))
        if (active := self._active.get("memory")) is not None:
            declared.setdefault("the computation", active)
        for key, text in declared.items():
            try:
                nbytes = parse_bytes(text)
            except ValueError as error:
                raise ConfigurationError(
                    f"the annotation memory={text!r} of {key!r} is not a number of bytes: {error}"
                ) from error
            if nbytes > memory_mb * 2**20:
                raise OutOfMemoryError(
                    f"Task {key!r} is annotated with memory={text!r}, more than the function's "
                    f"{memory_mb:,} MB; nothing was sent. Give the function more memory "
                    "(dask-lambda.memory; Lambda allows 10,240 MB), or make the chunks smaller."
                )
        return lambda key: None if said(key) is None else key
