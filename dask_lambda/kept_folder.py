"""The objects of a kept run in the bucket: what is there, what may stay, what has to go.

May import: kept_runs, errors, the ground.  To be used in the engine's thread.

Objects of such runs have folders of their own, ``<shard>/<prefix>-kept/<run>/``, where no
lifecycle rule for the other runs finds them, and labels by which a later session knows what they
are: fingerprints, of outputs; ``frame-`` and ``literal-``, of data that tasks read; ``saved-``, of
the description of a saved collection, if it is the one that the record names.  All others mean
something to the session only that wrote them.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from dask_lambda.kept_runs import KeptRun
from lambda_worker import protocol
from lambda_worker.commit import MAX_POINTER_BYTES, POINTER_LOOKS, pointed
from lambda_worker.errors import IntegrityError
from lambda_worker.protocol import Key, Reference
from lambda_worker.store import Entry, Store

#: An attempt without a pointer may get one as long as an invocation may last, and a little more.
ATTEMPT_AGE = timedelta(minutes=30)
#: What the folder's manifest is called.
MANIFEST = "manifest"
#: Listings and pointers that are read at the same time.
AT_ONCE = 16

#: What labels of descriptions begin with.
DESCRIPTION = "saved-"

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_DATA = ("frame-", "literal-")


@dataclass(slots=True)
class Inventory:
    """What a folder holds.

    Attributes
    ----------
    results : dict
        Label to result.
    data : dict
        Object name to size, of uploaded data.
    rubbish : set of str
        Object names that mean nothing any more.
    """

    results: dict[str, Reference] = field(default_factory=dict)
    data: dict[str, int] = field(default_factory=dict)
    rubbish: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Folder:
    """One computation's view of the objects of a kept run.

    Attributes
    ----------
    record : KeptRun
    again : str
        How to go on if this one breaks off, for people.
    keep : bool
        Whether intermediate results stay.
    labels : dict
        Key to fingerprint; of other keys the results cannot be found again.
    results : set of str
        Labels that stay in any case.
    data : dict
        Uploaded data that is there: object name to size.
    open : bool
        Whether this computation has the name: afterwards it deletes nothing.
    succeeded : bool
    """

    record: KeptRun
    again: str = ""
    keep: bool = False
    labels: Mapping[Key, str] = field(default_factory=dict)
    results: set[str] = field(default_factory=set)
    data: dict[str, int] = field(default_factory=dict)
    open: bool = True
    succeeded: bool = False
    session: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def prefix(self) -> str:
        """The folder's prefix."""
        return kept_prefix(self.record.place.prefix)

    def label(self, key: Key) -> str:
        """Return the label of a key's object."""
        found = self.labels.get(key)
        return self.once(protocol.key_label(key)) if found is None else found

    def once(self, label: str) -> str:
        """Return a label for what means something to this computation only."""
        return f"once-{self.session}-{label}"

    def spares(self, name: str) -> bool:
        """Whether an object stays that this computation itself needs no more."""
        if not self.open:
            return True
        label = label_of(name)
        if is_description(self.record, label):
            return True
        if _FINGERPRINT.fullmatch(label) is None:
            return False
        return self.keep or label in self.results


def is_data(name: str) -> bool:
    """Whether an object is data that tasks read, which a later session need not upload again."""
    label = name.rpartition("/")[2]
    return label.startswith(_DATA) and "once-" not in label


def is_description(record: KeptRun, label: str) -> bool:
    """Whether an object is the description of the collection that is saved under a name."""
    return record.saved is not None and record.saved.label == label


def new_label() -> str:
    """Return a label for a result that cannot be found again, like a fingerprint to all others."""
    return secrets.token_hex(16)


def kept_prefix(prefix: str) -> str:
    """Return the prefix of kept runs' objects."""
    return f"{prefix}-kept"


def label_of(name: str) -> str:
    """Return the label of an object, or of the output of which it is an attempt."""
    return protocol.objects_of(name)[-1].rpartition("/")[2]


async def survey(store: Store, record: KeptRun) -> Inventory:
    """See what a run has in the bucket, and read the pointers to large results.

    Raises
    ------
    StoreError
    """
    entries = await listing(store, kept_prefix(record.place.prefix), record.run)
    found = Inventory()
    attempts: dict[str, list[Entry]] = {}
    outputs: dict[str, Entry] = {}
    for entry in entries:
        output = protocol.objects_of(entry.name)[-1]
        label = label_of(entry.name)
        if output != entry.name:
            attempts.setdefault(output, []).append(entry)
        elif is_data(entry.name):
            found.data[entry.name] = entry.size
        elif _FINGERPRINT.fullmatch(label):
            outputs[entry.name] = entry
        elif label != MANIFEST and not is_description(record, label):
            found.rubbish.add(entry.name)
    limit = asyncio.Semaphore(AT_ONCE)

    async def follow(output: Entry, pointed: list[Entry]) -> None:
        async with limit:
            target = await _pointed(store, record, output)
        sizes = {each.name: each.size for each in pointed}
        if target is None:
            found.results[label_of(output.name)] = Reference(output.name, output.size)
        elif sizes.get(target.name) == target.size:
            found.results[label_of(output.name)] = target
            pointed[:] = [each for each in pointed if each.name != target.name]
        else:  # it points to nothing
            found.rubbish.add(output.name)

    work = []
    for name, entry in outputs.items():
        if name in attempts and entry.size <= MAX_POINTER_BYTES:
            work.append(follow(entry, attempts[name]))
        else:
            found.results[label_of(name)] = Reference(name, entry.size)
    await asyncio.gather(*work)
    old = datetime.now(UTC) - ATTEMPT_AGE
    found.rubbish.update(
        each.name for pointed in attempts.values() for each in pointed if each.modified < old
    )
    return found


async def _pointed(store: Store, record: KeptRun, output: Entry) -> Reference | None:
    """Return where the result is to which an object points; None if it is one itself."""
    for _ in range(POINTER_LOOKS):
        with suppress(IntegrityError):  # a small value, or damaged on the way
            data = await store.get_async(output.name, output.size)
            target = pointed(data, record.secret, output.name)
            return Reference(target.name, target.size)
    return None


async def listing(store: Store, prefix: str, run: str) -> list[Entry]:
    """List all objects of a run, all shards at the same time."""

    async def shard(name: str) -> list[Entry]:
        return [entry async for entry in store.entries_async(f"{name}/{prefix}/{run}")]

    found = await asyncio.gather(*map(shard, protocol.shards()))
    return [entry for entries in found for entry in entries]


async def leftovers(store: Store, folder: Folder) -> list[str]:
    """Return what a computation that has succeeded leaves for nobody."""
    entries = await listing(store, folder.prefix, folder.record.run)
    return [
        entry.name
        for entry in entries
        if not folder.spares(entry.name) and label_of(entry.name) != MANIFEST
    ]


async def write_manifest(store: Store, record: KeptRun) -> None:
    """Say in the bucket what the folder is, without anything secret."""
    name = protocol.object_name(kept_prefix(record.place.prefix), record.run, MANIFEST)
    text = {
        "what": "objects of a run that dask_lambda keeps; see `dask-lambda runs`",
        "name": record.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
    }
    await store.put_new_async(name, json.dumps(text, indent=1).encode())


def named(error: BaseException, references: Iterable[Reference]) -> list[Reference]:
    """Return those of some results that an error message names."""
    text = str(error)
    return [each for each in references if any(n in text for n in protocol.objects_of(each.name))]
