"""Whatever bytes arrive: an error of ours, or a reply that says so; never anything else."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dask._task_spec import Task, TaskRef
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from dask_lambda import errors, failures, lambda_answers, replies
from dask_lambda.events import Failure
from lambda_worker import codec, handler, protocol
from lambda_worker.errors import DaskLambdaError, IntegrityError
from lambda_worker.protocol import Body, GroupRequest, Request, Value
from lambda_worker.store import Store

RUN, SECRET = "run", b"s" * 32
NAME = protocol.object_name("prefix", RUN, "x")
CONTEXT = SimpleNamespace(memory_limit_in_mb="1769", aws_request_id="41d0")
unpickled: list[int] = []

usual = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Trap:
    def __reduce__(self) -> Any:
        return exec, (f"import sys; sys.modules[{__name__!r}].unpickled.append(1)",)


@pytest.fixture(autouse=True)
def _nothing_is_unpickled() -> Iterator[None]:
    unpickled.clear()
    yield
    assert not unpickled


# -- the codec -----------------------------------------------------------------------------------

PLAIN = bytes(codec.seal(codec.serialize([Trap(), np.arange(500.0)]), SECRET, NAME))
COMPRESSED = bytes(codec.seal([memoryview(bytes(300_000))] * 2, SECRET, NAME, "zstd"))


def mutate(data: bytes, place: float, new: bytes, removed: int) -> bytes:
    """Replace some bytes somewhere by others."""
    at = int(place * len(data))
    return data[:at] + new + data[at + removed :]


MUTATIONS = {
    "place": st.floats(0, 1),
    "new": st.binary(max_size=16),
    "removed": st.integers(0, 64),
}


@usual
@given(st.binary(max_size=400))
def test_random_bytes_are_no_object(data: bytes) -> None:
    for read in (codec.loads, codec.unseal):
        with pytest.raises(IntegrityError):
            read(data, SECRET, NAME)


@usual
@given(st.sampled_from([PLAIN, COMPRESSED]), st.fixed_dictionaries(MUTATIONS))
def test_a_mutated_object_is_refused(valid: bytes, how: dict[str, Any]) -> None:
    mutated = mutate(valid, **how)
    if mutated != valid:
        with pytest.raises(IntegrityError):
            codec.loads(mutated, SECRET, NAME)


def laid_out(data: bytes) -> list[memoryview] | None:
    """The frames of data that carry any tag: none if that is refused."""
    try:
        codec.is_compressed(data, NAME)
        return codec.frames_of(data, NAME)
    except IntegrityError:
        return None


@usual
@given(
    st.binary(max_size=300),
    st.sampled_from([b"DLv1", b""]),
    st.integers(0, 4) | st.integers(0, 2**32 - 1),
)
def test_random_frames_are_read_or_refused(data: bytes, magic: bytes, count: int) -> None:
    header = magic + struct.pack("<I", count) if magic else b""
    laid_out(bytes(32) + header + data)


@usual
@given(st.sampled_from([PLAIN, COMPRESSED]), st.fixed_dictionaries(MUTATIONS))
def test_a_mutated_layout_is_read_or_refused(valid: bytes, how: dict[str, Any]) -> None:
    how["place"] = how["place"] ** 8  # the header is at the beginning
    laid_out(mutate(valid, **how))


@usual
@given(st.binary(max_size=100), st.integers(0, 2**64 - 1) | st.integers(0, 1000))
def test_a_random_compressed_frame_is_refused(data: bytes, size: int) -> None:
    frame = struct.pack("<Q", size) + data
    with pytest.raises(IntegrityError):
        codec._decompressed(memoryview(frame), NAME)
    with pytest.raises(IntegrityError):
        codec._decompressed(memoryview(data[:7]), NAME)


# -- the handler ---------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["groups", "run", "name", "size", "data", "kind", "outputs"])
            | st.text(max_size=8),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


class AnyBucket(dict[str, Store]):
    """One bucket, by whatever name."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> Store:
        return self["bucket"]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    store = Store(MemoryStore())
    environment = handler.Environment()
    environment._stores = AnyBucket(bucket=store)
    monkeypatch.setattr(handler, "environment", environment)
    monkeypatch.setattr(protocol, "resolvers", {})
    yield store
    environment.fetching.shutdown()
    environment.uploading.shutdown()


def inc(x: Any) -> Any:
    return x + 1


def valid_request(store: Store) -> dict[str, Any]:
    """A request with all that a request may have."""

    def inline(label: str, value: Any) -> Value:
        name = protocol.object_name("prefix", RUN, label)
        data = codec.dumps(value, SECRET, name)
        return Value(name, len(data), data)

    def stored(label: str, value: Any) -> Value:
        made = inline(label, value)
        assert made.data is not None
        store.put_new(made.name, bytes(made.data))
        return Value(made.name, made.size, shared=True)

    groups = []
    for number, key in enumerate("ab"):
        tasks = [Task(key, inc, TaskRef("x")), Task(f"{key}2", inc, TaskRef(key))]
        body = Body(tasks, ["x"], [0], [key, f"{key}2"])
        outputs = [protocol.object_name("prefix", RUN, each) for each in body.outputs]
        frames = codec.serialize(body.fields())
        name = protocol.object_name("prefix", RUN, f"body-{key}")
        sealed = codec.seal(frames, SECRET, name)
        groups.append(
            GroupRequest(
                Value(name, len(sealed), sealed),
                [stored("x", 1) if number else inline("y", 1)],
                outputs,
                entangled=bool(number),
            )
        )
    lease = protocol.object_name("prefix", RUN, "lease")
    request = Request(RUN, {RUN: SECRET}, "bucket", 100, groups, "none", lease, True)
    return json.loads(json.dumps(request.to_json()))


def call(event: Any) -> dict[str, Any]:
    """Invoke the function; its reply, which is one."""
    reply = json.loads(json.dumps(handler.handler(event, CONTEXT)))
    replies.check(reply)
    return reply


def test_the_valid_request_is_served(environment: Store) -> None:
    reply = call(valid_request(environment))
    assert all("error" not in group for group in reply["groups"])


@usual
@given(event=JSON)
def test_random_json_is_refused(environment: Store, event: Any) -> None:
    reply = call(event)
    assert "refused" in reply
    assert isinstance(failures.from_refusal(reply["refused"]), Failure)


@usual
@given(event=st.dictionaries(st.sampled_from(["run", "secrets", "groups", "lease"]), JSON))
def test_random_json_with_the_right_versions_is_answered(
    environment: Store, event: dict[str, Any]
) -> None:
    reply = call({"protocol": protocol.PROTOCOL, "client": protocol.versions(), **event})
    assert reply["error"]["kind"] == "request"
    exception = failures.to_exception(failures.from_record(reply["error"]), "y", {})
    assert "could not serve the request" in str(exception)


def places(record: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each part of decoded JSON."""
    if path:
        yield path
    if isinstance(record, dict | list):
        for key, part in record.items() if isinstance(record, dict) else enumerate(record):
            yield from places(part, (*path, key))


def changed(record: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same with another part, or without it if that is ``...``."""
    record = copy.deepcopy(record)
    part = record
    for key in path[:-1]:
        part = part[key]
    if new is ...:
        del part[path[-1]]
    else:
        part[path[-1]] = new
    return record


OTHER = (
    JSON | st.just(...) | st.integers(0, 2**70) | st.sampled_from([2**40, "run", "bucket", NAME])
)


@usual
@given(data=st.data(), new=OTHER)
def test_a_mutated_request_is_answered(environment: Store, data: Any, new: Any) -> None:
    event = valid_request(environment)
    path = data.draw(st.sampled_from(sorted(places(event), key=repr)))
    reply = call(changed(event, path, new))
    for record in [reply, *reply.get("groups", [])]:
        if "error" in record:
            failure = failures.from_record(record["error"])
            assert isinstance(
                failures.to_exception(failure, "y", {RUN: SECRET}),
                errors.DaskLambdaError | TypeError,
            )


@usual
@given(data=st.data(), how=st.fixed_dictionaries(MUTATIONS))
def test_sealed_bytes_that_were_mutated_are_answered(
    environment: Store, data: Any, how: dict[str, Any]
) -> None:
    event = valid_request(environment)
    paths = [path for path in places(event) if path[-1] == "data"]
    path = data.draw(st.sampled_from(sorted(paths, key=repr)))
    sealed = event
    for key in path:
        sealed = sealed[key]
    mutated = mutate(base64.b64decode(sealed), **how)
    reply = call(changed(event, path, base64.b64encode(mutated).decode()))
    kinds = {record["error"]["kind"] for record in reply["groups"] if "error" in record}
    assert kinds <= {"integrity"}


# -- the client ----------------------------------------------------------------------------------


def reply_of(event: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(handler.handler(event, CONTEXT)))


@pytest.fixture
def valid_replies(environment: Store) -> list[dict[str, Any]]:
    good = valid_request(environment)
    failing = copy.deepcopy(good)
    name = failing["groups"][0]["body"]["name"]
    body = Body([Task("a", divmod, 1, 0)], [], [], ["a", "a2"])
    sealed = codec.dumps(body.fields(), SECRET, name)
    failing["groups"][0]["body"] = Value(name, len(sealed), sealed).to_json()
    return [reply_of(good), reply_of(failing), reply_of({}), reply_of({**good, "groups": 1})]


@usual
@given(data=st.data(), new=OTHER)
def test_a_mutated_reply_is_believed_or_refused_as_a_whole(
    valid_replies: list[dict[str, Any]], data: Any, new: Any
) -> None:
    reply = data.draw(st.sampled_from(valid_replies))
    path = data.draw(st.sampled_from(sorted(places(reply), key=repr)))
    mutated = json.loads(json.dumps(changed(reply, path, new)))
    try:
        replies.check(mutated)
    except replies.NotAReply as error:
        failure = failures.from_foreign_reply(json.dumps(mutated).encode(), "f", str(error))
        assert isinstance(failures.to_exception(failure, "", {}), errors.InvocationError)
        return
    found = []
    if "refused" in mutated:
        found.append(failures.from_refusal(mutated["refused"]))
    elif "error" in mutated:
        found.append(failures.from_record(mutated["error"]))
    else:
        for group in mutated["groups"]:
            if "error" in group:
                found.append(failures.from_record(group["error"]))
            else:
                for record in group["outputs"]:
                    read(record)
    for failure in found:
        assert isinstance(failures.to_exception(failure, "y", {RUN: SECRET}), Exception)


def read(record: dict[str, Any]) -> None:
    """Read a value as the engine does: it is what was sealed, or an error of ours."""
    try:
        value = Value.from_json(record)
        if value.data is not None:
            codec.loads(value.data, SECRET, value.name)
    except DaskLambdaError:
        return


@usual
@given(st.integers(100, 599), st.binary(max_size=200) | JSON.map(lambda j: json.dumps(j).encode()))
def test_any_answer_of_the_api_becomes_a_failure(status: int, body: bytes) -> None:
    for failure in (
        lambda_answers.from_response(status, body, "f", "r"),
        lambda_answers.from_function_error(body, "log", 128),
        failures.from_foreign_reply(body, "f"),
    ):
        assert isinstance(failures.to_exception(failure, "y", {}), errors.DaskLambdaError)


def test_the_trap_works() -> None:
    pickle.loads(pickle.dumps(Trap()))
    assert unpickled == [1]
    unpickled.clear()
