"""What calling a task's function may leave to be done.  May import: the standard library.

A coroutine function returns at once: what it has to do is done by an event loop, of which each
call gets one of its own, since nothing else runs in an environment meanwhile.
"""

from __future__ import annotations

from types import CoroutineType
from typing import Any


def finish(result: Any) -> Any:
    """Return what a call comes to: of a coroutine, what it returns."""
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
