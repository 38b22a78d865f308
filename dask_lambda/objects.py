"""The objects of runs in the bucket: what stays, and the deletion of all else.

May import: run, encode, plan, errors, the ground.  To be used in the engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from dask_lambda import errors
from dask_lambda.encode import all_of
from dask_lambda.plan import Group
from dask_lambda.run import Run
from lambda_worker import protocol
from lambda_worker.errors import StoreError
from lambda_worker.protocol import Key, Reference, Value
from lambda_worker.store import Store

logger = logging.getLogger("dask_lambda")

#: Deletes are collected for so many seconds, or until there are so many.
DELETE_DELAY = 0.25
DELETE_BATCH = 1000


class Objects:
    """What the runs of one engine have in the bucket.

    Parameters
    ----------
    store : Store
        For what is not a run's own any more.
    spawn : callable
        Starts a coroutine in the background.
    load : callable
        Loads a reference, for whoever unpickles one in this process.
    """

    def __init__(
        self,
        store: Store,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
        load: Callable[[Reference], Any],
    ):
        self.store = store
        self._spawn = spawn
        self._load = load
        self._kept: dict[str, tuple[bytes, set[str]]] = {}  # run -> secret, object names
        self._deletes: set[asyncio.Task[Any]] = set()  # of stored results

    def release(self, run: Run, keys: Iterable[Key]) -> None:
        """Delete values that nobody reads any more."""
        names = []
        for key in keys:
            value = run.values.pop(key)
            run.held -= run.inline.pop(key, 0)
            if value.data is None:
                run.encoder.written.discard(value.name)
                names.append(value.name)
        self.discard(run, names)

    def discard_outputs(self, run: Run, group: Group, values: Iterable[Value]) -> None:
        """Delete what an attempt at a group has written that came too late.

        Of two attempts that wrote the same object there is only one: it stays while it is needed.
        """
        names = []
        for key, value in zip(group.outputs, values, strict=True):
            accepted = run.values.get(key)
            in_use = accepted is not None and accepted.data is None and accepted.name == value.name
            if value.data is None and not in_use:
                names.append(value.name)
        self.discard(run, names)

    def discard(self, run: Run, names: Iterable[str]) -> None:
        """Delete objects soon, many at a time."""
        run.trash.extend(names)
        if len(run.trash) >= DELETE_BATCH:
            self._spawn(self._empty(run))
        elif run.trash and not run.delete_soon:
            run.delete_soon = True
            asyncio.get_running_loop().call_later(DELETE_DELAY, self._delete_now, run)

    def _delete_now(self, run: Run) -> None:
        run.delete_soon = False
        if run.trash:
            self._spawn(self._empty(run))

    async def _empty(self, run: Run) -> None:
        async with run.deleting:
            names, run.trash = run.trash, []
            await self.delete(run.store, names)

    async def sweep(self, run: Run) -> None:
        """Delete every object of an ended run that is known or, in the end, possible."""
        self.release(run, list(run.values))
        if run.drained.is_set():  # nothing new is uploaded
            await run.encoder.settle()
        names = run.encoder.take_written()
        if run.drained.is_set():
            names |= run.uncertain | await self._find_lost(run)
            run.uncertain, run.lost = set(), set()
        run.trash.extend(names.difference(run.trash))
        await self._empty(run)

    async def _find_lost(self, run: Run) -> set[str]:
        """Find what invocations have written that were lost before they could say so.

        A large output is an object of which only its pointer, if it was written, has the name.
        """
        folders = {protocol.attempts_folder(name) for name in run.lost}
        if len(folders) > len(protocol.shards()):
            folders = {run.encoder.folder(shard) for shard in protocol.shards()}
        found = set(run.lost)
        try:
            for folder in folders:
                found.update([name async for name in run.store.list_async(folder)])
        except StoreError as error:
            logger.warning("what lost invocations have left behind is not known: %s", error)
        kept = {name for v in run.kept.values() for name in protocol.objects_of(v.name)}
        return found - kept

    async def keep(self, run: Run) -> None:
        """Leave the results of a run in S3 and remember how to load and delete them."""
        names = set()
        found = run.plan.fetch & run.values.keys()
        await all_of(run.encoder.spill(run.values[key]) for key in found)
        for key in found:
            value = run.values.pop(key)
            run.held -= run.inline.pop(key, 0)
            run.encoder.written.discard(value.name)
            run.uncertain.discard(value.name)
            names.add(value.name)
            run.kept[key] = value
        self._kept[run.name] = run.secret, names
        protocol.resolvers[run.name] = self._load

    def secret_of(self, reference: Reference) -> bytes:
        """Return the secret under which a stored result was sealed.

        Raises
        ------
        LostDataError
            If it is not known here.
        """
        try:
            return self._kept[protocol.run_of(reference.name)][0]
        except KeyError:
            raise errors.LostDataError(
                f"the persisted result {reference.name!r} does not exist any more, or belongs "
                "to another scheduler; compute with the scheduler that persisted it, or persist "
                "again"
            ) from None

    def forget(self, name: str) -> None:
        """Delete a stored result that nobody refers to any more."""
        run = protocol.run_of(name)
        kept = self._kept.get(run)
        if kept is None or name not in kept[1]:
            return
        kept[1].discard(name)
        if not kept[1]:
            del self._kept[run]
            protocol.resolvers.pop(run, None)
        task = self._spawn(self.delete(self.store, [name]))
        self._deletes.add(task)
        task.add_done_callback(self._deletes.discard)

    async def delete(self, store: Store, names: list[str]) -> None:
        """Delete objects now; if that fails, it is logged."""
        try:
            await store.delete_async(names)
        except StoreError as error:
            logger.warning("%d objects are left behind: %s", len(names), error)

    async def close(self) -> None:
        """Delete all results that stay."""
        names = [name for _, kept in self._kept.values() for name in kept]
        for run in self._kept:
            protocol.resolvers.pop(run, None)
        self._kept.clear()
        await asyncio.gather(*self._deletes, self.delete(self.store, names))
