"""The Lambda function: one request in, one reply out.  May import: all of lambda_worker.

The reply always describes what happened, also when a task failed or the request made no sense.
So an error that Lambda reports (``X-Amz-Function-Error``) means that the
environment was lost: a time-out, no memory left, a crash.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from lambda_worker import codec, log_lines, protocol, snapshot
from lambda_worker.cache import Cache
from lambda_worker.commit import commit
from lambda_worker.environment import PREIMPORT, Packages, find_deployed, preimport
from lambda_worker.errors import IntegrityError, RequestError, StoreError, UnserializableError
from lambda_worker.execute import Cancelled, GroupRun, Output, TaskError
from lambda_worker.lease import LeaseWatch
from lambda_worker.limits import OutOfTime, TimeLimit
from lambda_worker.log_lines import Work
from lambda_worker.memory import share_out
from lambda_worker.modules import LocalModules
from lambda_worker.prefetch import Prefetcher, Slot
from lambda_worker.protocol import Body, GroupRequest, Key, Reference, Request, Value
from lambda_worker.store import Store, open_bucket
from lambda_worker.uploads import Uploads

#: Downloads at the same time.  S3 answers one small GET in about 27 ms (median, from Lambda).
FETCH_THREADS = 16
#: Uploads at the same time: one small PUT takes about 41 ms.
UPLOAD_THREADS = 8
#: A pickled exception above this size is replaced by its text.
MAX_EXCEPTION_BYTES = 200_000
MAX_TEXT = 20_000
MAX_TYPE = 200
#: How messages begin of what failed before the task ran.
UNPICKLING = "unpickling"

Frames = Callable[[], list[memoryview]]


class Modules(Protocol):
    """Sees to the user's own modules, as :class:`lambda_worker.modules.LocalModules` does."""

    def use(self, digest: str | None, fetch: Callable[[], Any]) -> None:
        """Have the modules of an archive found, and no others."""


class Environment:
    """What outlives an invocation: connections, idle threads, cached inputs, modules.

    It serves one invocation at a time.

    Parameters
    ----------
    memory_mb : int, optional
        That it may take; default: the function's.
    log : callable, optional
        Takes the lines that are logged; default: standard error, which Lambda keeps.
    modules : LocalModules, optional
        If it is not alone in its process.
    """

    def __init__(
        self,
        memory_mb: int | None = None,
        log: Callable[[str], object] | None = None,
        modules: Modules | None = None,
    ) -> None:
        self.cold = True
        self.log = log or _to_stderr
        of_function = int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1769"))
        self.shares = share_out(memory_mb or of_function)
        self.cache = Cache(self.shares.cache)
        self.fetching = ThreadPoolExecutor(FETCH_THREADS, "fetch")  # starts threads when needed
        self.uploading = ThreadPoolExecutor(UPLOAD_THREADS, "upload")
        self.looking = ThreadPoolExecutor(1, "lease")
        self.modules = LocalModules() if modules is None else modules
        self.packages = Packages(find_deployed())
        self._stores: dict[str, Store] = {}

    def store(self, bucket: str) -> Store:
        """Return the store of a bucket, opened once."""
        if bucket not in self._stores:
            self._stores[bucket] = Store(open_bucket(bucket))
        return self._stores[bucket]

    def use(self, bucket: str, opened: Any) -> None:
        """Use a bucket that was opened elsewhere, as an obstore store."""
        self._stores[bucket] = Store(opened)

    def close(self) -> None:
        """Let go of all of it, when nothing is served any more."""
        for pool in (self.fetching, self.uploading, self.looking):
            pool.shutdown(wait=False)
        self.cache = Cache(0)


def _to_stderr(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


environment = Environment()
for _name, _why in preimport(os.environ.get(PREIMPORT, "")).items():
    sys.stderr.write(json.dumps({"not imported": _name, "error": _why}) + "\n")
snapshot.prepare()


class Failure(Exception):
    """Why a group failed, in the terms of the reply."""

    def __init__(self, kind: str, message: str, **fields: Any):
        super().__init__(message)
        self.record = {"kind": kind, "message": message[:MAX_TEXT], **fields}


class Served:
    """What is known of one group while and after it runs."""

    def __init__(self, group: GroupRequest):
        self.group = group
        self.attempt = protocol.new_attempt() if group.entangled else ""
        self.outputs: list[Value | Future[Value] | None] = [None] * len(group.outputs)
        self.left: set[str] = set()  # objects in the bucket of which no value tells
        self.run: GroupRun | None = None
        self.key = ""
        self.wait = 0.0
        self.error: dict[str, Any] | None = None
        self.types = [""] * len(group.outputs)
        values = [group.body, *(value for _, value in group.frames), *group.inputs]
        self.values = values
        self.slots: list[Slot[Frames] | None] = [None] * len(values)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that is spent waiting for inputs."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.wait += time.perf_counter() - started

    def work(self) -> Work:
        """Describe the group in the log."""
        label = "".join(self.group.outputs[:1]).rpartition("/")[2]
        return Work(label, self.key, self.error["kind"] if self.error else None)

    def record(self) -> dict[str, Any]:
        """Describe the group in the reply, when its last output is committed."""
        values = []
        for output in self.outputs:
            try:
                value = output.result() if isinstance(output, Future) else output
            except Exception as error:  # noqa: BLE001  the same
                self.error = self.error or _record(error)
            else:
                values.append(value)
        record: dict[str, Any]
        if self.error is not None:
            record = {"error": self.error}
            self.left.update(value.name for value in values if value and value.data is None)
        else:
            assert self.run is not None
            record = {
                "outputs": [value.to_json() for value in values if value],
                "seconds": self.run.seconds,
                "wait": self.wait,
                "tasks": self.run.tasks,
                "types": self.types,
            }
        if self.left:
            record["left"] = sorted(self.left)
        return record


class Invocation:
    """One request being served.  To be closed, however it ends."""

    def __init__(self, request: Request, environment: Environment):
        self.request = request
        self.environment = environment
        self.store = environment.store(request.bucket)  # may raise for the name of no bucket
        self.inline_left = protocol.MAX_INLINE_TOTAL_BYTES
        self.served: list[Served] = []
        self._locks: dict[str, threading.Lock] = {}
        self._inputs: Prefetcher[Frames] = Prefetcher(
            environment.fetching, environment.shares.prefetch
        )
        self._uploads: Uploads[Value] = Uploads(environment.uploading, environment.shares.uploads)
        protocol.begin_serving(request.secrets, self.resolve)
        self._not_loaded: ModuleNotFoundError | None = None
        self._lease: LeaseWatch | None = None
        if request.lease:
            look = partial(self.store.exists, request.lease)
            self._lease = LeaseWatch(look, request.leased, environment.looking)

    def serve(self) -> list[dict[str, Any]]:
        """Run all groups, one after the other; return their records."""
        groups = self.request.groups
        if isinstance(groups, Value):  # the request was too long to hold them
            text = codec.deserialize(self.fetch(groups))
            groups = [GroupRequest.from_json(g) for g in json.loads(bytes(text))]
        served = self.served = [Served(group) for group in groups]
        self._prefetch(served)  # which unpickles nothing
        self._use_modules()
        for each in served:
            limit = TimeLimit(each.group.timeout)
            try:
                with limit:
                    self._run(each)
            except (Exception, OutOfTime) as error:  # noqa: BLE001  told in the reply, whatever it is
                each.error = self._describe(each.group, error, limit)
            finally:
                self._inputs.drop(slot for slot in each.slots if slot)
        return [each.record() for each in served]

    def _use_modules(self) -> None:
        """Have the user's own modules there that the tasks import."""
        modules = self.request.modules
        try:
            if modules is None:
                self.environment.modules.use(None, bytes)
            else:
                archive = modules.archive
                self.environment.modules.use(modules.digest, lambda: self.fetch(archive)[0])
        except OSError as error:
            raise Failure("disk", f"unpacking the local modules: {_text(error)}") from error

    def close(self) -> None:
        """Wait for what still runs in the background; forget the secrets."""
        protocol.end_serving(self.request.secrets, self.resolve)
        self._inputs.close()
        self._uploads.close()

    def cancelled(self) -> bool:
        """Whether the run has ended, so that nobody waits for what is done here."""
        return self._lease is not None and self._lease.gone()

    # -- inputs ----------------------------------------------------------------------------------

    def secret(self, name: str) -> bytes:
        """Return the secret under which an object was sealed."""
        run = protocol.run_of(name)
        try:
            return self.request.secrets[run]
        except KeyError:
            raise Failure("integrity", f"no secret for run {run!r} of object {name!r}") from None

    def fetch(self, value: Value) -> list[memoryview]:
        """Return the verified frames of a value, wherever it is: a copy for this reader alone."""
        return codec.frames_of(self._verified(value), value.name)

    def fetch_ahead(self, value: Value) -> Frames:
        """Begin to :meth:`fetch`; return a function that ends it.

        What is compressed stays so until then: it may be very much larger afterwards, and the
        budget of what is fetched ahead knows its size in S3.
        """
        data = self._verified(value)
        if codec.is_compressed(data, value.name):
            return partial(codec.frames_of, data, value.name)
        frames = codec.frames_of(data, value.name)
        return lambda: frames

    def _verified(self, value: Value) -> Any:
        """Return a value sealed and verified; read-only if somebody else has it as well."""
        name, data = value.name, value.data
        secret = self.secret(name)
        if data is not None:
            codec.verify(data, secret, name)
            return data
        if not value.shared:
            return self._download(value, secret)
        # What is resumed may have replaced an object by another one of the same name: a cached one
        # is of use as long as the client's session, which a lease has a name for, and no longer.
        own = protocol.run_of(name) == self.request.run
        cached = f"{self.request.lease} {name}" if own else name
        with self._locks.setdefault(name, threading.Lock()):  # two readers download it once
            data = self.environment.cache.get(cached)
            if data is not None:
                try:
                    codec.verify(data, secret, name)
                    return memoryview(data).toreadonly()
                except IntegrityError:
                    self.environment.cache.drop(cached)
            data = self._download(value, secret)
            if self.environment.cache.put(cached, data):
                return memoryview(data).toreadonly()
            return data

    def _download(self, value: Value, secret: bytes) -> Any:
        """Return an object that was verified; what was damaged on the way is fetched once more."""
        try:
            data = self.store.get(value.name, value.size)
            codec.verify(data, secret, value.name)
        except IntegrityError:
            data = self.store.get(value.name, value.size)
            codec.verify(data, secret, value.name)
        return data

    def resolve(self, reference: Reference) -> Any:
        """Load a reference inside a task."""
        value = Value(reference.name, reference.size, shared=True)
        frames = self.fetch(value)
        try:
            return codec.deserialize(frames)
        except ModuleNotFoundError as error:
            self._not_loaded = error
            raise

    def _prefetch(self, served: list[Served]) -> None:
        """Begin to fetch what the groups read."""
        readers = Counter(
            name for each in served for name in {v.name for v in each.values if v.data is None}
        )
        for each in served:
            for place, value in enumerate(each.values):
                if value.data is None:
                    value.shared = value.shared or readers[value.name] > 1
                    each.slots[place] = Slot(value.size, partial(self.fetch_ahead, value))
        self._inputs.add(slot for each in served for slot in each.slots if slot)

    def _take(self, served: Served, place: int) -> list[memoryview]:
        slot = served.slots[place]
        if slot is None:
            return self.fetch(served.values[place])
        with served.waiting():
            frames = self._inputs.take(slot)
        return frames()

    # -- one group -------------------------------------------------------------------------------

    def _run(self, served: Served) -> None:
        """Run one group: load, execute, begin to commit."""
        if self.cancelled():
            raise self._stopped()
        group = served.group
        body = self._load_body(served)
        keys = body.outputs
        served.key = repr(keys[0]) if keys else ""
        first = 1 + len(group.frames)
        places = {n: first + s for n, s in zip(body.inputs, body.sources, strict=True)}
        names = Counter(places.values())
        loaded: dict[int, Any] = {}  # what will be asked for by another name

        def load(name: Key, reader: Key) -> Any:
            place = places[name]
            names[place] -= 1
            if place in loaded:
                return loaded[place] if names[place] else loaded.pop(place)
            frames = self._take(served, place)
            try:
                value = codec.deserialize(frames)
            except BaseException as error:
                raise self._exception(
                    group, reader, error, f"{UNPICKLING} its input {name!r}: "
                ) from error
            if names[place]:
                loaded[place] = value
            return value

        run = served.run = GroupRun(body, load, self.cancelled)
        slots = [served.slots[places[name]] for name in run.needs]
        self._inputs.put_first([slot for slot in slots if slot])
        try:
            for output in run.outputs():
                served.outputs[output.place] = self._commit(served, keys[output.place], output)
        except Cancelled:
            raise self._stopped() from None
        except TaskError as error:
            if isinstance(error.__cause__, OutOfTime):
                raise error.__cause__ from None
            if isinstance(error.__cause__, StoreError | IntegrityError):
                raise error.__cause__ from None  # a reference that could not be loaded
            raise self._exception(group, error.key, error.__cause__) from error

    def _stopped(self) -> Failure:
        lease = self.request.lease
        return Failure("cancelled", f"the run has ended: its lease, the object {lease!r}, is gone")

    def _load_body(self, served: Served) -> Body:
        group = served.group
        frames = self._take(served, 0)
        for number, (place, _) in enumerate(group.frames):
            frames.insert(place, self._take(served, 1 + number)[0])
        try:
            return Body(*codec.deserialize(frames))
        except BaseException as error:
            raise self._exception(group, None, error, f"{UNPICKLING} the task: ") from error

    def _commit(self, served: Served, key: Key, output: Output) -> Any:
        """Send a result back, or begin to upload it: then the value is in a future.

        A copy is made now.  The value may be dropped at once, and whatever later tasks do to it
        or to an array that shares its memory does not change what is uploaded.
        """
        try:
            frames = codec.serialize(output.value)
        except MemoryError as error:
            raise self._exception(served.group, key, error, "packing its result: ") from error
        except BaseException as error:
            kind = type(output.value).__name__
            raise Failure(
                "unserializable",
                f"its result, a {kind}, cannot be pickled ({type(error).__name__}: {error}); "
                "return a value that can, for example list(...) in place of a generator",
                key=repr(key)[:500],
                type=type(error).__name__,
            ) from error
        cls = type(output.value)
        served.types[output.place] = f"{cls.__module__}.{cls.__qualname__}"[:MAX_TYPE]
        output.size = size = codec.sealed_size(frames)
        name = served.group.outputs[output.place]
        secret = self.request.secrets[self.request.run]
        if size <= self.request.inline_bytes and size <= self.inline_left:
            self.inline_left -= size
            if served.attempt:
                name = protocol.attempt_name(name, served.attempt)
            return Value(name, size, codec.seal(frames, secret, name))
        self._uploads.make_room(size)
        upload = partial(self._upload, [codec.lay_out(frames)], name, secret, served)
        return self._uploads.start(size, upload)

    def _upload(self, copy: list[bytearray], name: str, secret: bytes, served: Served) -> Value:
        laid_out = copy.pop()
        if self.request.compression != "none":
            frames = codec.frames_of(laid_out, name)
            laid_out = codec.lay_out(frames, self.request.compression)
            del frames
        return commit(self.store, name, laid_out, secret, served.left, served.attempt)

    def _describe(
        self, group: GroupRequest, error: BaseException, limit: TimeLimit
    ) -> dict[str, Any]:
        if limit.exceeded:
            return {"kind": "timeout", "message": f"it took longer than {group.timeout:g} s"}
        if isinstance(error, MemoryError):
            return self._exception(group, None, error).record
        return _record(error)

    def _exception(
        self, group: GroupRequest, key: Any, error: BaseException | None, doing: str = ""
    ) -> Failure:
        """Pickle an exception, and make sure that it can be unpickled."""
        assert error is not None
        kind = type(error)
        fields: dict[str, Any] = {
            "type": f"{kind.__module__}.{kind.__qualname__}",
            "traceback": _traceback(error),
        }
        if key is not None:
            fields["key"] = repr(key)[:500]
        if isinstance(error, MemoryError):
            fields["memory"] = True
        if isinstance(error, ModuleNotFoundError) and error.name:
            fields["module"] = error.name
            fields["loading"] = doing.startswith(UNPICKLING) or error is self._not_loaded
        name = protocol.error_name(group.outputs[0])
        try:
            error.__traceback__ = error.__cause__ = error.__context__ = None
            data = codec.dumps(error, self.request.secrets[self.request.run], name)
            codec.loads(data, self.request.secrets[self.request.run], name)
            if len(data) <= MAX_EXCEPTION_BYTES:
                fields["exception"] = Value(name, len(data), data).to_json()
        except Exception as why:  # noqa: BLE001  whatever a user's __reduce__ raises: the text will do
            fields["unpicklable"] = f"{type(why).__name__}: {why}"[:500]
        return Failure("exception", doing + _text(error), **fields)


def handler(event: Any, context: Any) -> dict[str, Any]:
    """Serve one Invoke; see :mod:`lambda_worker.protocol` for the two formats."""
    return serve(event, context, environment)


def serve(event: Any, context: Any, environment: Environment) -> dict[str, Any]:
    """Serve one request in an environment, on Lambda or elsewhere.

    Parameters
    ----------
    event : dict
        The request.
    context : object
        With ``memory_limit_in_mb`` and ``aws_request_id``, as Lambda's.
    environment : Environment
    """
    started = time.perf_counter()
    cold, environment.cold = environment.cold, False
    restored = cold and snapshot.from_snapshot()
    if restored:
        snapshot.renew()
    reply: dict[str, Any] = {
        "protocol": protocol.PROTOCOL,
        "cold": cold,
        "memory_mb": int(context.memory_limit_in_mb),
        "architecture": os.uname().machine,  # a GB-second of arm64 costs less
    }
    if restored:
        reply["restored"] = True
    ours = protocol.versions()
    event = event if isinstance(event, dict) else {}
    client = event.get("client")
    theirs = {"protocol": event.get("protocol"), **(client if isinstance(client, dict) else {})}
    differences = environment.packages.differences(event.get("packages"))
    if environment.packages.deployed is not None:
        reply["environment"] = environment.packages.deployed.digest
    if differences.warned:
        reply["differing"] = differences.warned
    if theirs != {"protocol": protocol.PROTOCOL, **ours} or differences.refused:
        reply["refused"] = {"protocol": protocol.PROTOCOL, **ours}
        if differences.refused:
            reply["refused"]["packages"] = differences.refused
        reply["milliseconds"] = (time.perf_counter() - started) * 1e3
        environment.log(log_lines.line(event, context, reply))
        return reply
    if (hold := protocol.held_seconds(event)) is not None:
        time.sleep(hold)
        reply["groups"] = []
        reply["milliseconds"] = (time.perf_counter() - started) * 1e3
        environment.log(log_lines.line(event, context, reply))
        return reply
    invocation: Invocation | None = None
    hits = environment.cache.hits
    try:
        invocation = Invocation(Request.from_json(event), environment)
        reply["groups"] = invocation.serve()
    except Exception as error:  # noqa: BLE001  from reading the request or the list of its groups
        reply["error"] = _record(error)
    finally:
        if invocation is not None:
            invocation.close()
            counts = invocation.store.counts.take()
            reply["s3"] = {name: getattr(counts, name) for name in counts.__slots__}
    reply["cache_hits"] = environment.cache.hits - hits
    # It never falls while the environment lives: the peak so far, not that of this call alone.
    reply["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reply["milliseconds"] = (time.perf_counter() - started) * 1e3
    work = [each.work() for each in invocation.served] if invocation is not None else []
    environment.log(log_lines.line(event, context, reply, work))
    return reply


def _record(error: BaseException) -> dict[str, Any]:
    """Describe in the reply why something failed."""
    if isinstance(error, Failure):
        return error.record
    if isinstance(error, StoreError):
        return {"kind": f"store-{error.kind}", "message": str(error)}
    for known, kind in _KINDS:
        if isinstance(error, known):
            return {"kind": kind, "message": str(error)[:MAX_TEXT]}
    return {"kind": "broken", "message": _text(error)[:MAX_TEXT], "traceback": _traceback(error)}


_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (IntegrityError, "integrity"),
    (UnserializableError, "unserializable"),
    (RequestError, "request"),
)


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001  a user's __str__ may fail
        return type(error).__name__


def _traceback(error: BaseException) -> str:
    """Format a traceback, leaving out the frames of this package."""
    here = os.path.dirname(os.path.abspath(__file__))
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(here):
        trace = trace.tb_next
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except Exception:  # noqa: BLE001  the same
        text = "".join(traceback.format_tb(trace)) + _text(error)
    return (
        text
        if len(text) <= MAX_TEXT
        else text[: MAX_TEXT // 2] + "\n...\n" + text[-MAX_TEXT // 2 :]
    )
