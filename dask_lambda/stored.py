"""Blocks that are in S3: what stands for them in a graph, and whose they are.

May import: kept_folder, kept_runs, errors, the ground.
"""

from __future__ import annotations

from typing import Any

from dask._task_spec import Task

from dask_lambda import kept_runs
from dask_lambda.errors import IntegrityError, LostDataError
from dask_lambda.kept_folder import kept_prefix
from lambda_worker.protocol import Key, Reference, load_reference


class StoredBlock(Task):
    """A block of a persisted collection: a task that loads it.

    It has the ``result`` method of a future, which is how Dask itself looks at blocks that are
    elsewhere.  It travels as a plain task.
    """

    __slots__ = ()

    def result(self) -> Any:
        """Load the block."""
        return self({})

    def __reduce__(self) -> tuple[Any, ...]:
        return Task, (self.key, self.func, *self.args)


def stored_block(key: Key, reference: Reference) -> StoredBlock:
    """Return the task that loads a block."""
    return StoredBlock(key, load_reference, reference)


def tell_whose(error: LostDataError | IntegrityError) -> None:
    """Add to the message of an error which saved collection has lost the block that it names."""
    text = str(error)
    for record in kept_runs.records():
        folder = f"/{kept_prefix(record.place.prefix)}/{record.run}/"
        if record.saved is not None and folder in text:
            again = "save it again, which computes what is missing"
            if isinstance(error, IntegrityError):
                again = "save it again with overwrite=True, which computes all of it"
            error.args = (
                f"{text} It is a block of the saved collection {record.name!r}: if that was saved "
                f"anew meanwhile, load it again; if not, {again}",
            )
            return
