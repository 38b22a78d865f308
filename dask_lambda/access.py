"""What other threads ask of the bucket: stored results, and the objects of kept runs.

May import: objects, stored, run, kept_folder, kept_runs, failures, loop_thread, events, errors, the
ground.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from dask_lambda import errors, failures
from dask_lambda.events import PATIENCE
from dask_lambda.kept_folder import Inventory, survey, write_manifest
from dask_lambda.kept_runs import KeptRun
from dask_lambda.loop_thread import LoopThread, claim_process
from dask_lambda.objects import Objects
from dask_lambda.run import Sealed, fetch_sealed
from dask_lambda.stored import tell_whose
from lambda_worker.protocol import Reference


class Access:
    """Answers in any other thread than the engine's, in which the work is done.

    Whatever waits for an answer raises InvocationError if the engine is closed.

    Parameters
    ----------
    thread : LoopThread
        The engine's.
    objects : Objects
    """

    def __init__(self, thread: LoopThread, objects: Objects):
        self._thread = thread
        self._objects = objects
        self._store = objects.store

    def load(self, reference: Reference) -> Any:
        """Load a stored result, in any other thread than the engine's.

        Raises
        ------
        DaskLambdaError
            LostDataError, IntegrityError, or what else S3 says.
        """
        claim_process()
        secret = self._objects.secret_of(reference)
        work = partial(fetch_sealed, self._store, reference, secret)
        try:
            with failures.translated():
                sealed: Sealed = self._thread.ask(self._objects.patiently(PATIENCE, work))
        except (errors.LostDataError, errors.IntegrityError) as error:
            tell_whose(error)
            raise
        return sealed.load()

    def adopt(self, record: KeptRun) -> None:
        """Take note of a kept run, so that references to its objects can be loaded."""
        self._objects.adopt(record.run, record.secret)

    def write(self, name: str, data: bytes | bytearray) -> None:
        """Write an object of a kept run, at whose name there is nothing yet.

        Raises
        ------
        DaskLambdaError
        """
        with failures.translated():
            self._thread.ask(
                self._objects.patiently(PATIENCE, partial(self._store.put_async, name, data))
            )

    def survey(self, record: KeptRun) -> Inventory:
        """See what a kept run has in the bucket; what means nothing any more is deleted.

        Raises
        ------
        DaskLambdaError
            If the bucket cannot be read.
        """
        found: Inventory = self._thread.ask(self._survey(record))
        return found

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects of kept runs now."""
        self._thread.ask(self._objects.delete(self._store, list(names)))

    def forget(self, name: str) -> None:
        """Delete a stored result that nobody refers to any more."""
        self._thread.wake(partial(self._objects.forget, name))

    async def _survey(self, record: KeptRun) -> Inventory:
        self._objects.adopt(record.run, record.secret)
        with failures.translated():
            found = await survey(self._store, record)
            await write_manifest(self._store, record)
        await self._objects.delete(self._store, sorted(found.rubbish))
        return found
