"""The objects of runs in the bucket: what stays, and the deletion of all else.

May import: run, kept_folder, kept_runs, encode, plan, graph, errors, the ground.  To be used in the
engine's thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from dask_lambda import errors, kept_runs
from dask_lambda.encode import all_of
from dask_lambda.graph import short
from dask_lambda.kept_folder import Folder, is_data, leftovers
from dask_lambda.kept_runs import Place
from dask_lambda.plan import Group
from dask_lambda.run import Run
from lambda_worker import protocol
from lambda_worker.errors import RequestError, StoreError
from lambda_worker.protocol import Key, Reference, Value
from lambda_worker.store import Store

logger = logging.getLogger("dask_lambda")

T = TypeVar("T")

#: Deletes are collected for so many seconds, or until there are so many.
DELETE_DELAY = 0.25
DELETE_BATCH = 1000
#: How often something is asked of S3 again while it or the credentials fail.
RENEW_SECONDS, MAX_RENEW_SECONDS = 0.25, 10.0
#: How long deletions are tried again: the caller may be waiting for them.
DELETE_PATIENCE = 2.0


def told_outputs(run: Run, group: Group, records: Any) -> list[tuple[Key, Value]]:
    """Read from a reply where the outputs of a group are.

    Raises
    ------
    IntegrityError
        If it names anything but this group's outputs.
    """
    try:
        values = [Value.from_json(record) for record in records]
    except RequestError as error:
        raise errors.IntegrityError(f"a reply makes no sense: {error}; it was not used") from None
    if len(values) != len(group.outputs):
        raise errors.IntegrityError(
            f"a reply tells of {len(values)} outputs of a group that has {len(group.outputs)}; "
            "it was not used"
        )
    for key, value in zip(group.outputs, values, strict=True):
        name = run.object_name(key)
        if value.name != name and not _is_attempt(value.name, name):
            raise errors.IntegrityError(
                f"a reply says that the output {short(key)} of run {run.name} is the object "
                f"{value.name[:500]!r}, which is no version of {name!r}; it was not read"
            )
    attempts = {value.name.rpartition("~/")[2] for value in values}
    if len(attempts) > 1 and run.encoder.is_entangled(group):
        raise errors.IntegrityError(
            f"a reply mixes outputs of several attempts at task {short(group.outputs[-1])} of run "
            f"{run.name}; they were not used"
        )
    return list(zip(group.outputs, values, strict=True))


def _is_attempt(name: str, output: str) -> bool:
    folder, _, attempt = name.rpartition("/")
    return folder == protocol.attempts_folder(output) and bool(attempt)


class Objects:
    """What the runs of one engine have in the bucket.

    Parameters
    ----------
    store : Store
        For what is not a run's own any more.
    place : Place
        Where that is.
    spawn : callable
        Starts a coroutine in the background.
    load : callable
        Loads a reference, for whoever unpickles one in this process.
    refresh : callable
        Looks for credentials anew.
    """

    def __init__(
        self,
        store: Store,
        place: Place,
        spawn: Callable[[Coroutine[Any, Any, Any]], asyncio.Task[Any]],
        load: Callable[[Reference], Any],
        refresh: Callable[[], None],
    ):
        self.store = store
        self._place = place
        self._spawn = spawn
        self._load = load
        self._refresh = refresh
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
                names += protocol.objects_of(value.name)
        self.discard(run, names)

    def discard_outputs(self, run: Run, outputs: Iterable[tuple[Key, Value]]) -> None:
        """Delete what an invocation has written that nobody reads.

        For the outputs of a group of an ended run, and for those of a group that is done already:
        then another attempt was first, and what is read in its stead stays.

        Parameters
        ----------
        run : Run
        outputs : iterable of (key, Value)
            What the reply told (:func:`told_outputs`).
        """
        names: list[str] = []
        stay = self._staying(run)
        for key, value in outputs:
            if value.data is None:
                needed = run.values.get(key)
                if needed is not None and needed.data is None and needed.name == value.name:
                    continue  # the very same: the pointer to it is needed no less
                read = stay if needed is None or needed.data is not None else {needed.name}
                names += [name for name in protocol.objects_of(value.name) if name not in read]
        self.discard(run, names)

    def _staying(self, run: Run) -> set[str]:
        """Return the objects of a run's results that stay."""
        _, names = self._kept.get(run.name, (b"", ()))
        return {each for name in names for each in protocol.objects_of(name)}

    def discard(self, run: Run, names: Iterable[str]) -> None:
        """Delete objects soon, many at a time."""
        run.trash.extend(name for name in names if not run.spares(name))
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
        """Delete every object of an ended run that is known or, in the end, possible.

        First of all the lease, so that workers stop and write no more.
        """
        await run.encoder.lease.end()
        if run.folder is not None:
            await self._sweep_folder(run, run.folder)
            return
        self.release(run, list(run.values))
        if run.drained.is_set():  # nothing new is uploaded
            await run.encoder.settle()
        names = run.encoder.take_written()
        if run.drained.is_set():
            names |= run.uncertain | await self._find_lost(run)
            names -= self._staying(run)  # which another attempt may have failed at
            run.uncertain, run.lost = set(), set()
        run.trash.extend(names.difference(run.trash))
        await self._empty(run)

    async def _sweep_folder(self, run: Run, folder: Folder) -> None:
        """Delete what nobody can use of a run that is kept.

        That is done before the caller hears of the end.  Afterwards the name may belong to the
        next computation, of which invocations of this one may not know.
        """
        if not folder.open:
            return
        run.values.clear()
        run.inline.clear()
        run.held = 0
        if run.drained.is_set():
            await run.encoder.settle()
        names = {name for name in run.encoder.take_written() if not is_data(name)}
        if folder.succeeded and not folder.keep:
            try:
                names.update(await leftovers(run.store, folder))
            except StoreError as error:
                logger.warning("what the run %r leaves is not known: %s", run.name, error)
            if not folder.open:  # its caller has given up waiting meanwhile
                return
        run.trash.extend(names.difference(run.trash))
        await self._empty(run)
        folder.open = False

    async def _find_lost(self, run: Run) -> set[str]:
        """Find what invocations have written that were lost before they could say so.

        An attempt's own version of an output has a name that only a reply or a pointer tells.
        """
        folders = {protocol.attempts_folder(name) for name in run.lost}
        if len(folders) > len(protocol.shards()):
            folders = {run.encoder.folder(shard) for shard in protocol.shards()}
        found = set(run.lost)
        try:
            for names in await asyncio.gather(*(self._list(run, each) for each in folders)):
                found.update(names)
        except StoreError as error:
            logger.warning("what lost invocations have left behind is not known: %s", error)
        return found

    async def _list(self, run: Run, folder: str) -> list[str]:
        return [name async for name in run.store.list_async(folder)]

    async def keep(self, run: Run) -> None:
        """Leave the results of a run in S3 and remember how to load and delete them."""
        names = set()
        found = run.plan.fetch & run.values.keys()
        if run.folder is not None:  # they stay in any case
            for key in found:
                run.kept[key] = run.values.pop(key)
            return
        spill = run.encoder.spill
        await all_of(self.patiently(run.patience, partial(spill, run.values[key])) for key in found)
        for key in found:
            value = run.values.pop(key)
            run.held -= run.inline.pop(key, 0)
            run.encoder.written.discard(value.name)
            names.add(value.name)
            run.kept[key] = value
        self._kept[run.name] = run.secret, names
        protocol.resolvers[run.name] = self._load

    def adopt(self, run: str, secret: bytes) -> None:
        """Take note of the secret of a run whose objects outlive this process."""
        if run not in self._kept:
            self._kept[run] = secret, set()
        protocol.resolvers[run] = self._load

    def secret_of(self, reference: Reference) -> bytes:
        """Return the secret under which a stored result was sealed.

        Of a run with a name the record tells it: a collection that was loaded may be used with
        any scheduler for the same bucket, and in another process of the same user.

        Raises
        ------
        LostDataError
            If it is not known here.
        """
        run = protocol.run_of(reference.name)
        if run not in self._kept:
            record = kept_runs.of_run(run)
            if record is None or record.place != self._place:
                where = "" if record is None else f"which is in {record.place}, "
                raise errors.LostDataError(
                    f"the persisted result {reference.name!r} does not exist any more, or belongs "
                    f"to another scheduler; compute with the scheduler that persisted it, {where}"
                    "or persist again"
                )
            self.adopt(run, record.secret)
        return self._kept[run][0]

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
        task = self._spawn(self.delete(self.store, protocol.objects_of(name)))
        self._deletes.add(task)
        task.add_done_callback(self._deletes.discard)

    async def patiently(self, patience: float, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do something with S3, again and again for as long as patience lasts.

        Each request was tried for a while already.  But where this is used, all has been computed,
        and would be lost.
        """
        loop = asyncio.get_running_loop()
        deadline, delay = loop.time() + patience, RENEW_SECONDS
        while True:
            try:
                return await work()
            except StoreError as error:
                passing = error.kind in ("expired", "transient")
                if not passing or loop.time() + delay > deadline:
                    raise
                if error.kind == "expired":
                    await asyncio.to_thread(self._refresh)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RENEW_SECONDS)

    async def delete(self, store: Store, names: list[str]) -> None:
        """Delete objects now; if that fails, it is logged."""
        try:
            await self.patiently(DELETE_PATIENCE, partial(store.delete_async, names))
        except StoreError as error:
            logger.warning("%d objects are left behind: %s", len(names), error)

    async def close(self) -> None:
        """Delete all results that stay."""
        names = [
            each
            for _, kept in self._kept.values()
            for name in kept
            for each in protocol.objects_of(name)
        ]
        for run in self._kept:
            protocol.resolvers.pop(run, None)
        self._kept.clear()
        await asyncio.gather(*self._deletes, self.delete(self.store, names))
