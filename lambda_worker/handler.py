"""The Lambda function: one request in, one reply out.  May import: all of lambda_worker.

The reply always describes what happened, also when a task failed: the handler itself raises
only if it has a bug.  So an error that Lambda reports (``X-Amz-Function-Error``) means that the
environment was lost: a time-out, no memory left, a crash.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lambda_worker import codec, protocol
from lambda_worker.cache import Cache
from lambda_worker.errors import IntegrityError, StoreError, UnserializableError
from lambda_worker.execute import TaskError, run_group
from lambda_worker.protocol import Body, GroupRequest, Reference, Request, Value
from lambda_worker.store import Store, open_bucket

#: Downloads at the same time.  S3 answers one small GET in about 27 ms (median, from Lambda).
FETCH_THREADS = 16
#: Part of the function's memory that the cache of inputs may take.
CACHE_SHARE = 0.2
#: A pickled exception above this size is replaced by its text.
MAX_EXCEPTION_BYTES = 200_000
MAX_TEXT = 20_000


class Environment:
    """What outlives an invocation: connections, the cache, and whether it is the first call."""

    def __init__(self) -> None:
        self.cold = True
        memory = int(os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "1769"))
        self.cache = Cache(int(memory * 2**20 * CACHE_SHARE))
        self._stores: dict[str, Store] = {}
        self._threads: ThreadPoolExecutor | None = None

    def store(self, bucket: str) -> Store:
        """Return the store of a bucket, opened once."""
        if bucket not in self._stores:
            self._stores[bucket] = Store(open_bucket(bucket))
        return self._stores[bucket]

    def map(self, function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """Apply a function to items, several at the same time where there are several."""
        if len(items) < 2:
            return [function(item) for item in items]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(FETCH_THREADS, "fetch")
        return list(self._threads.map(function, items))


environment = Environment()


class Failure(Exception):
    """Why a group failed, in the terms of the reply."""

    def __init__(self, kind: str, message: str, **fields: Any):
        super().__init__(message)
        self.record = {"kind": kind, "message": message[:MAX_TEXT], **fields}


class Invocation:
    """One request being served."""

    def __init__(self, request: Request):
        self.request = request
        self.store = environment.store(request.bucket)
        self.inline_left = protocol.MAX_INLINE_TOTAL_BYTES
        for run in request.secrets:
            protocol.resolvers[run] = self.resolve

    def groups(self) -> list[GroupRequest]:
        """Return the groups, from S3 where the request was too long to hold them."""
        groups = self.request.groups
        if isinstance(groups, Value):
            text = codec.deserialize(self.fetch(groups))
            groups = [GroupRequest.from_json(g) for g in json.loads(text)]
        return groups

    def secret(self, name: str) -> bytes:
        """Return the secret under which an object was sealed."""
        run = protocol.run_of(name)
        try:
            return self.request.secrets[run]
        except KeyError:
            raise Failure("integrity", f"no secret for run {run!r} of object {name!r}") from None

    def fetch(self, value: Value) -> list[memoryview]:
        """Return the verified frames of a value, wherever it is."""
        data: Any = value.data
        if data is not None:
            return codec.unseal(data, self.secret(value.name), value.name)
        data = environment.cache.get(value.name)
        if data is None:
            data = self.store.get(value.name, value.size)
            frames = codec.unseal(data, self.secret(value.name), value.name)
            if value.shared:
                environment.cache.put(value.name, data)
            return frames
        return codec.unseal(data, self.secret(value.name), value.name)

    def resolve(self, reference: Reference) -> Any:
        """Load a reference inside a task."""
        value = Value(reference.name, reference.size, shared=True)
        return codec.deserialize(self.fetch(value))

    def run(self, group: GroupRequest) -> dict[str, Any]:
        """Run one group: fetch, execute, commit."""
        body = self._load_body(group)
        inputs = environment.map(self.fetch, group.inputs)
        started = time.perf_counter()
        values = {}
        for key, source in zip(body.inputs, body.sources, strict=True):
            try:
                values[key] = codec.deserialize(inputs[source])
            except Exception as error:
                raise self._exception(
                    group, body.tasks[0].key, error, f"unpickling its input {key!r}: "
                ) from error
        del inputs
        outputs: list[dict[str, Any]] = [{} for _ in body.outputs]
        seconds = time.perf_counter() - started
        steps = run_group(body, values)
        while True:
            started = time.perf_counter()
            try:
                step = next(steps, None)
            except TaskError as error:
                if isinstance(error.__cause__, StoreError | IntegrityError):
                    raise error.__cause__ from None  # a reference that could not be loaded
                raise self._exception(group, error.key, error.__cause__) from error
            finally:
                seconds += time.perf_counter() - started
            if step is None:
                break
            place, result = step
            outputs[place] = self._commit(body.outputs[place], group.outputs[place], result)
            del step, result
        return {"outputs": outputs, "seconds": seconds}

    def _load_body(self, group: GroupRequest) -> Body:
        values = [group.body, *(value for _, value in group.frames)]
        frames, *extra = environment.map(self.fetch, values)
        for (place, _), frame in zip(group.frames, extra, strict=True):
            frames.insert(place, frame[0])
        try:
            body = Body(*codec.deserialize(frames))
        except Exception as error:
            raise self._exception(group, None, error, "unpickling the task: ") from error
        return body

    def _commit(self, key: Any, name: str, result: Any) -> dict[str, Any]:
        try:
            frames = codec.serialize(result)
        except Exception as error:
            kind = type(result).__name__
            raise Failure(
                "unserializable",
                f"its result, a {kind}, cannot be pickled ({type(error).__name__}: {error}); "
                "return a value that can, for example list(...) in place of a generator",
                key=repr(key)[:500],
                type=type(error).__name__,
            ) from error
        del result
        data = codec.seal(frames, self.request.secrets[self.request.run], name)
        size = len(data)
        if size <= self.request.inline_bytes and size <= self.inline_left:
            self.inline_left -= size
            return Value(name, size, data).to_json()
        return Value(name, self.store.put_new(name, data)).to_json()

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
        if isinstance(error, ModuleNotFoundError) and error.name:
            fields["module"] = error.name
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


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Serve one Invoke; see :mod:`lambda_worker.protocol` for the two formats."""
    started = time.perf_counter()
    cold, environment.cold = environment.cold, False
    reply: dict[str, Any] = {
        "protocol": protocol.PROTOCOL,
        "cold": cold,
        "memory_mb": int(context.memory_limit_in_mb),
    }
    ours = protocol.versions()
    theirs = {"protocol": event.get("protocol"), **event.get("client", {})}
    if theirs != {"protocol": protocol.PROTOCOL, **ours}:
        reply["refused"] = {"protocol": protocol.PROTOCOL, **ours}
        reply["milliseconds"] = (time.perf_counter() - started) * 1e3
        _log(event, context, reply)
        return reply
    request = Request.from_json(event)
    invocation = Invocation(request)
    hits = environment.cache.hits
    try:
        reply["groups"] = [_run(invocation, group) for group in invocation.groups()]
    except (Failure, StoreError, IntegrityError) as error:  # from reading the list of groups
        reply["error"] = _record(error)
    counts = invocation.store.counts.take()
    reply["s3"] = {name: getattr(counts, name) for name in counts.__slots__}
    reply["cache_hits"] = environment.cache.hits - hits
    reply["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    reply["milliseconds"] = (time.perf_counter() - started) * 1e3
    _log(event, context, reply)
    return reply


def _run(invocation: Invocation, group: GroupRequest) -> dict[str, Any]:
    try:
        return invocation.run(group)
    except (Failure, StoreError, IntegrityError, UnserializableError) as error:
        return {"error": _record(error)}


def _record(error: Exception) -> dict[str, Any]:
    """Describe in the reply why something failed."""
    if isinstance(error, Failure):
        return error.record
    if isinstance(error, StoreError):
        return {"kind": f"store-{error.kind}", "message": str(error)}
    kind = "integrity" if isinstance(error, IntegrityError) else "unserializable"
    return {"kind": kind, "message": str(error)}


def _log(event: dict[str, Any], context: Any, reply: dict[str, Any]) -> None:
    """Write one structured line for each invocation, to CloudWatch on AWS."""
    groups = reply.get("groups", [])
    line = {
        "run": event.get("run"),
        "request": context.aws_request_id,
        "cold": reply["cold"],
        "groups": len(groups),
        "errors": sum("error" in g for g in groups),
        "milliseconds": round(reply["milliseconds"], 3),
        "peak_memory": reply.get("peak_memory"),
    }
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()


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
