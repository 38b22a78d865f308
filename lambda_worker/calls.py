"""What single calls need on the worker.  May import: protocol.

What tasks call here is pickled by its name, so that it has to be the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import CoroutineType
from typing import Any

from lambda_worker.protocol import Reference, load_reference


def run_chunk(function: Callable[..., Any], calls: Iterable[Iterable[Any]]) -> list[Any]:
    """Call a function once for each set of arguments; return the results."""
    return [function(*arguments) for arguments in calls]


def rebuild(kind: type[Any], fields: dict[str, Any]) -> Any:
    """Return a dataclass with these fields, without calling its ``__init__``."""
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


class Finished:
    """What a future that has ended is inside a task to which an argument brought it.

    Parameters
    ----------
    key : str
    value : object
        The result, or a :class:`~lambda_worker.protocol.Reference` to it.
    exception : BaseException, optional
        In place of a result.
    """

    def __init__(self, key: str, value: Any, exception: BaseException | None = None):
        self.key = key
        self._value = value
        self._exception = exception

    def __repr__(self) -> str:
        return f"<Finished {self.key}>"

    def result(self, timeout: float | None = None) -> Any:
        """Return the result, or raise the exception of the call."""
        if self._exception is not None:
            raise self._exception
        if isinstance(self._value, Reference):
            return load_reference(self._value)
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return the exception of the call, or None."""
        return self._exception

    def done(self) -> bool:
        """Return True."""
        return True

    def running(self) -> bool:
        """Return False."""
        return False

    def cancelled(self) -> bool:
        """Return False."""
        return False


def finish(result: Any) -> Any:
    """Return what a call comes to: of a coroutine, what it returns.

    A coroutine function returns at once; what it has to do is done by an event loop of its own,
    since nothing else runs in an environment meanwhile.
    """
    if type(result) is not CoroutineType:
        return result
    import asyncio  # which takes longer than most cold starts' other imports

    return asyncio.run(result)


def call_joblib(batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a batch of joblib's Dask backend, which expects a client of distributed's where it runs.

    What is parallel inside its calls in turn is done one by one here.
    """
    from joblib import parallel  # type: ignore[import-untyped]

    parallel.BACKENDS["dask"] = parallel.SequentialBackend
    return batch(*args, **kwargs)
