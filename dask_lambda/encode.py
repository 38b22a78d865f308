"""From groups to the payload of an invocation.

May import: pickling, local_modules, lease, entangled, graph, plan, errors, the ground.

Lambda takes 6 MB in one synchronous request, so everything is measured before it is sent.  What
does not fit goes through S3, once: large buffers inside a task (chunks of ``from_array``) and
large literals, content-addressed; inline inputs, when a task has too many; the body of a task,
or the whole list of groups, when nothing else helps.  The user's own modules go through S3 as well.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from dask._task_spec import Alias, GraphNode

from dask_lambda.entangled import entangled
from dask_lambda.errors import PayloadTooLargeError, UnserializableError
from dask_lambda.graph import Graph, short
from dask_lambda.lease import Lease
from dask_lambda.local_modules import LocalModules
from dask_lambda.pickling import FunctionCache
from dask_lambda.plan import Group
from lambda_worker import codec, environment, protocol
from lambda_worker.protocol import Body, GroupRequest, Key, Modules, Reference, Request, Value
from lambda_worker.store import Store

#: A buffer inside a task from this size on becomes an object of its own: below, sending it along
#: is cheaper than a PUT and a GET (25 and 2 invocations' price, some 70 ms).
MIN_UPLOAD_BYTES = 256 * 1024
#: So many inline inputs of one invocation are moved to S3 one by one; above that, and up to so many
#: bytes in all, they are moved together.
MAX_SPILLS = 4
MAX_LIST_BYTES = 64 * 2**20
#: Uploads at the same time; each holds a sealed copy of what it uploads.
UPLOADS = 16
#: Hashing, sealing and verifying more than this is left to another thread.
MIN_THREAD_BYTES = 1024 * 1024

K = TypeVar("K")
T = TypeVar("T")

_to_json = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


class Encoder:
    """Builds the payloads of one run.  To be used in the engine's thread.

    Parameters
    ----------
    graph : Graph
    store : Store
    prefix, bucket, run, secret
        Of the run.
    secret_of : callable
        The secret of a reference's run.
    compression : {"none", "zstd"}
        Of large buffers and literals, and of the outputs of tasks.
    label, once : callable, optional
        The labels of a key's object, and of an object that nobody will look for later, such as a
        task's body.
    present : dict, optional
        Object name to size: what is uploaded already.
    inline_literals : int
        Literals up to this size travel in the request, if results do not.
    forgetful : bool
        Whether what tasks hold is to be forgotten with them (:meth:`forget`).
    modules : LocalModules, optional
        Which of the user's own modules travel with the tasks.
    shown : callable
        How users know a key.

    Attributes
    ----------
    written : set of str
        Objects that the encoder has put into S3 and nobody has deleted.
    lease : Lease
        Of the run: each payload says whether it was written.
    modules : LocalModules
        That the tasks were seen to need so far.
    """

    def __init__(
        self,
        graph: Graph,
        store: Store,
        *,
        prefix: str,
        bucket: str,
        run: str,
        secret: bytes,
        secret_of: Callable[[Reference], bytes],
        compression: protocol.Compression = "none",
        label: Callable[[Key], str] = protocol.key_label,
        once: Callable[[str], str] = str,
        present: Mapping[str, int] | None = None,
        inline_literals: int = 0,
        forgetful: bool = False,
        modules: LocalModules | None = None,
        shown: Callable[[Key], str] = short,
    ):
        self.written: set[str] = set()
        self.label = label
        self.run = run
        self.lease = Lease(store, protocol.object_name(prefix, run, once("lease")), secret)
        self.modules = LocalModules() if modules is None else modules
        if graph.stored:
            self.modules.recall()
        self._once_label = once
        self._present = present or {}
        self._inline_literals = inline_literals
        self.secret_of = secret_of
        self._graph = graph
        self._store = store
        self._prefix = prefix
        self._bucket = bucket
        self._secret = secret
        self._compression = compression
        self._functions = FunctionCache(self.modules.note)
        self._entangled: dict[tuple[Key, ...], bool] = {}  # by the outputs of a group
        self._uploading = asyncio.Semaphore(UPLOADS)
        self._uploads: dict[str, asyncio.Task[int]] = {}
        self._spills: dict[str, asyncio.Task[tuple[str, int]]] = {}
        self._literals: dict[Key, asyncio.Task[Value]] = {}
        self._archives: dict[frozenset[str], asyncio.Task[Modules]] = {}  # by what is needed
        self._frames: dict[tuple[int, int], tuple[Any, str]] = {}  # buffer -> itself, name
        self._forgetful = forgetful
        self._shown = shown
        self._frames_named = 0
        self._digests: dict[str, str] = {}  # of buffers -> name
        self._users: dict[tuple[int, int], set[Key]] = {}  # buffer -> an output of who uses it
        self._used: dict[Key, set[tuple[int, int]]] = {}  # the other way round

    def object_name(self, label: str) -> str:
        """Return the name of one of the run's objects."""
        return protocol.object_name(self._prefix, self.run, label)

    def owns(self, name: str) -> bool:
        """Whether an object is one of the run's."""
        return protocol.run_of(name) == self.run

    def folder(self, shard: str) -> str:
        """Return where the run's objects of one shard are."""
        return f"{shard}/{self._prefix}/{self.run}"

    def take_written(self) -> set[str]:
        """Return what was written, to be deleted by the caller."""
        written, self.written = self.written, set()
        return written

    async def settle(self) -> None:
        """Wait until no upload is on its way any more, however it ends."""
        uploads = (*self._uploads.values(), *self._spills.values())
        await asyncio.gather(*uploads, return_exceptions=True)

    def is_entangled(self, group: Group) -> bool:
        """Whether the outputs of a group must be of one attempt."""
        if len(group.outputs) < 2:
            return False
        if group.outputs not in self._entangled:
            self._entangled[group.outputs] = entangled(self._graph, group)
        return self._entangled[group.outputs]

    def forget(self, user: Key) -> list[str]:
        """Forget a task that will not be sent again; return the objects that only it used.

        Parameters
        ----------
        user : key
            The first output of its group.
        """
        objects = []
        for place in self._used.pop(user, ()):
            users = self._users[place]
            users.discard(user)
            if users:
                continue
            del self._users[place]
            _, name = self._frames.pop(place)
            upload = self._uploads.get(name)
            if upload is None or not upload.done():
                continue  # what is still on its way goes at the end of the run
            if any(other == name for _, other in self._frames.values()):
                continue
            del self._uploads[name]
            self.written.discard(name)
            self._digests = {d: n for d, n in self._digests.items() if n != name}
            objects.append(name)
        return objects

    async def payload(
        self, groups: Sequence[Group], values: dict[Key, Value], inline_bytes: int
    ) -> bytes:
        """Build the payload of one invocation.

        Parameters
        ----------
        groups : sequence of Group
        values : dict
            Where the outputs of earlier groups are.
        inline_bytes : int
            Outputs up to this size may come back in the reply.

        Raises
        ------
        UnserializableError
            If a task or a literal cannot be pickled.
        PayloadTooLargeError
            If the payload exceeds Lambda's limit in spite of all.
        LocalModulesError
            If the user's own modules cannot travel.
        StoreError
            If an upload fails.
        """
        secrets = {self.run: self._secret}
        requests = []
        for group in groups:
            requests.append(await self._group(group, values, inline_bytes, secrets))
        inline = [v for r in requests for v in (r.body, *r.inputs) if v.data is not None]
        await self._make_room(inline)
        request = Request(
            self.run,
            secrets,
            self._bucket,
            inline_bytes,
            requests,
            self._compression,
            self.lease.name,
            self.lease.there,
            await self._modules(),
            environment.imported(),
        )
        payload = _json(request.to_json())
        if len(payload) > protocol.MAX_PAYLOAD_BYTES:  # very many inputs
            listing = _json([r.to_json() for r in requests])
            digest = hashlib.blake2b(listing, digest_size=16).hexdigest()
            name = self.object_name(self._once_label("groups-" + digest))
            sealed = codec.dumps(listing, self._secret, name)
            request.groups = Value(name, await self._upload(name, lambda: sealed))
            payload = _json(request.to_json())
            if len(payload) > protocol.MAX_PAYLOAD_BYTES:
                raise PayloadTooLargeError(
                    f"Task {self._shown(groups[0].outputs[-1])}: its payload of "
                    f"{len(payload):,} bytes exceeds Lambda's limit of "
                    f"{protocol.MAX_PAYLOAD_BYTES:,}"
                )
        return payload

    async def spill(self, value: Value) -> None:
        """Move an inline value to S3, under a name at which nobody else writes.

        Under its own there may be what a lost attempt has committed, which is another value.
        """
        if value.data is not None:
            name = value.name
            moved = await _once(self._spills, name, lambda: self._spill(value))
            value.data = None  # before the name: see Session.at_hand
            value.name, value.size = moved

    async def _spill(self, value: Value) -> tuple[str, int]:
        assert value.data is not None
        name = protocol.attempt_name(protocol.output_of(value.name))
        sealed = bytearray(value.data)
        codec.sign(sealed, self._secret, name)
        return name, await self._upload(name, lambda: sealed)

    async def _modules(self) -> Modules | None:
        """Upload the user's own modules that were seen to be needed so far: once."""
        roots = self.modules.roots
        if not roots:
            return None
        return await _once(self._archives, roots, lambda: self._archive(roots))

    async def _archive(self, roots: frozenset[str]) -> Modules:
        archive = await asyncio.to_thread(self.modules.archive, roots)
        # A later session has other modules, or reads them anew.
        name = self.object_name(self._once_label("modules-" + archive.digest))
        frames = [memoryview(archive.data)]
        size = len(archive.data)
        size = await self._upload(name, lambda: codec.seal(frames, self._secret, name), size)
        return Modules(archive.digest, Value(name, size))

    # -- one group -------------------------------------------------------------------------------

    async def _group(
        self,
        group: Group,
        values: dict[Key, Value],
        inline_bytes: int,
        secrets: dict[str, bytes],
    ) -> GroupRequest:
        graph = self._graph
        tasks: list[GraphNode] = []
        inner = set(group.tasks)
        places: dict[Key, int] = {}
        inputs: list[Value] = []
        names: list[Key] = []
        sources: list[int] = []
        named: set[Key] = set()
        for task in map(graph.tasks.__getitem__, group.tasks):
            for name in task.dependencies:
                if name in named:
                    continue
                key = graph.resolve(name)
                if key in inner:
                    if name != key:
                        tasks.append(Alias(name, key))  # type: ignore[arg-type]
                        named.add(name)
                    continue
                named.add(name)
                if key not in places:
                    places[key] = len(inputs)
                    if (value := values.get(key)) is None:
                        value = await self._outside(key, inline_bytes, secrets)
                    inputs.append(value)
                names.append(name)
                sources.append(places[key])
            tasks.append(task)
        body = Body(tasks, names, sources, list(group.outputs))
        try:
            with protocol.collect_references() as references:
                frames = codec.serialize(body.fields(), self._functions.dumps)
        except Exception as error:
            key = self._shown(group.outputs[-1])
            raise UnserializableError(
                f"Task {key} cannot be pickled, so that it cannot be sent to Lambda "
                f"({type(error).__name__}: {error}). Does its function or one of its arguments "
                "hold a lock, an open file, a connection or a generator? Make it inside the task."
            ) from error
        if references:
            self.modules.recall()
        for reference in references:
            if (run := protocol.run_of(reference.name)) not in secrets:
                secrets[run] = self.secret_of(reference)
        uploads = []
        for place in range(len(frames) - 1, 0, -1):
            if frames[place].nbytes >= MIN_UPLOAD_BYTES:
                uploads.append((place, await self._frame(frames.pop(place), group.outputs[0])))
        labels = [self.label(key) for key in group.outputs]
        outputs = [self.object_name(label) for label in labels]
        # A part of a group that was split may have its first output.
        label = self._once_label(f"body-{len(group.tasks)}-{labels[0]}")
        name = self.object_name(label)
        sealed = codec.seal(frames, self._secret, name)
        return GroupRequest(
            Value(name, len(sealed), sealed),
            inputs,
            outputs,
            uploads[::-1],
            self.is_entangled(group),
            group.timeout,
        )

    async def _outside(self, key: Key, inline_bytes: int, secrets: dict[str, bytes]) -> Value:
        """Describe an input that no group makes."""
        graph = self._graph
        if key in graph.stored:
            reference = graph.stored[key]
            secrets[protocol.run_of(reference.name)] = self.secret_of(reference)
            return Value(reference.name, reference.size, shared=True)
        literal = graph.literals[key]
        inline = max(inline_bytes, self._inline_literals)
        return await _once(self._literals, key, lambda: self._literal(key, literal, inline))

    async def _literal(self, key: Key, literal: Any, inline_bytes: int) -> Value:
        name = self.object_name("literal-" + self.label(key))
        try:
            frames = codec.serialize(literal, self._functions.dumps)
        except Exception as error:
            raise UnserializableError(
                f"The data {short(key)} in the graph, a {type(literal).__name__}, cannot be "
                f"pickled, so that it cannot be sent to Lambda ({type(error).__name__}: {error})."
            ) from error
        size = sum(frame.nbytes for frame in frames)
        if size <= inline_bytes:
            sealed = codec.seal(frames, self._secret, name)
            return Value(name, len(sealed), sealed)
        size = await self._upload(name, lambda: self._seal(frames, name), size)
        return Value(name, size, shared=True)

    async def _frame(self, frame: memoryview, user: Key) -> Value:
        """Upload a large buffer of a task, once for all tasks that hold it."""
        place = id(frame.obj), frame.nbytes
        if place not in self._frames:
            digest = await _in_thread(frame.nbytes, lambda: hashlib.sha256(frame).hexdigest())
            self._frames[place] = frame.obj, self._frame_name(digest[:32])
        name = self._frames[place][1]
        if self._forgetful:
            self._users.setdefault(place, set()).add(user)
            self._used.setdefault(user, set()).add(place)
        size = await self._upload(name, lambda: self._seal([frame], name), frame.nbytes)
        return Value(name, size, shared=True)

    def _frame_name(self, digest: str) -> str:
        if not self._forgetful:
            return self.object_name("frame-" + digest)
        # What is forgotten is deleted a little later, and must not be what was uploaded anew.
        if digest not in self._digests:
            self._frames_named += 1
            self._digests[digest] = self.object_name(f"frame-{digest}-{self._frames_named}")
        return self._digests[digest]

    def _seal(self, frames: list[memoryview], name: str) -> bytearray:
        return codec.seal(frames, self._secret, name, self._compression)

    async def _make_room(self, inline: list[Value]) -> None:
        """Move the largest inline values to S3, if a few of them make the rest fit.

        If it would take many, the whole list of groups, with the values in it, is one object.
        """
        total = sum(value.size for value in inline)
        if total <= protocol.MAX_INLINE_TOTAL_BYTES:
            return
        largest = sorted(inline, key=lambda v: v.size, reverse=True)
        moved = 0
        while total > protocol.MAX_INLINE_TOTAL_BYTES:
            total -= largest[moved].size
            moved += 1
        if moved <= MAX_SPILLS or total + sum(v.size for v in largest[:moved]) > MAX_LIST_BYTES:
            await all_of(self.spill(value) for value in largest[:moved])

    # -- uploads ---------------------------------------------------------------------------------

    async def _upload(self, name: str, sealed: Callable[[], Any], size: int = 0) -> int:
        """Put an object once, however often this is called; return its size."""
        return await _once(self._uploads, name, lambda: self._put(name, sealed, size))

    async def _put(self, name: str, sealed: Callable[[], Any], size: int) -> int:
        if (there := self._present.get(name)) is not None:
            return there
        async with self._uploading:
            data = await _in_thread(size, sealed)
            self.written.add(name)
            try:
                await self._store.put_async(name, data)
            finally:
                self.written.add(name)  # it may have been taken, and deleted too early, meanwhile
            return len(data)


async def _once(
    tasks: dict[K, asyncio.Task[T]], key: K, work: Callable[[], Coroutine[Any, Any, T]]
) -> T:
    """Do some work once for all who ask for it; anew after it has failed."""
    task = tasks.get(key)
    if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
        task = tasks[key] = asyncio.get_running_loop().create_task(work())
    return await task


async def all_of(work: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Do several things at the same time; if one fails, raise that when all have ended.

    So nothing is written any more when what was written is deleted.
    """
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _in_thread(size: int, work: Callable[[], Any]) -> Any:
    if size < MIN_THREAD_BYTES:
        return work()
    return await asyncio.to_thread(work)


def _json(record: Any) -> bytes:
    return _to_json(record).encode()
