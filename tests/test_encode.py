"""Payloads that fit, and uploads that happen once; the worker itself reads what was built."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import obstore
import pytest
from dask._task_spec import Alias, DataNode, Task, TaskRef
from obstore.store import MemoryStore

from dask_lambda.encode import MIN_UPLOAD_BYTES, Encoder
from dask_lambda.errors import LostDataError, UnserializableError
from dask_lambda.graph import materialise, normalise
from dask_lambda.plan import Group, make_plan
from lambda_worker import codec, handler, protocol
from lambda_worker.errors import StoreError
from lambda_worker.protocol import Reference, Value, load_reference
from lambda_worker.store import Store

RUN, SECRET = "run", b"s" * 32
CONTEXT = SimpleNamespace(memory_limit_in_mb=1769, aws_request_id="41d0")
LARGE = MIN_UPLOAD_BYTES


class Unreliable(Store):
    """A store whose first uploads fail."""

    failures = 0

    async def put_new_async(self, name, data):
        if self.failures:
            self.failures -= 1
            raise StoreError("transient", f"s3:PutObject {name}: connection reset")
        await super().put_new_async(name, data)


class Run:
    """A run without an engine: payloads are built here and handed to the worker."""

    def __init__(self, dsk: dict, keys: Any, store: Store, inline_bytes: int = 100_000):
        self.graph = normalise(materialise(dsk), keys)
        self.groups = {g.outputs[0]: g for g in make_plan(self.graph, finalise=False).groups}
        self.store = store
        self.inline_bytes = inline_bytes
        self.values: dict[Any, Value] = {}
        self.secrets: dict[str, bytes] = {}
        self.encoder = Encoder(
            self.graph,
            store,
            prefix="prefix",
            bucket="bucket",
            run=RUN,
            secret=SECRET,
            secret_of=self.secret_of,
        )

    def secret_of(self, reference: Reference) -> bytes:
        try:
            return self.secrets[protocol.run_of(reference.name)]
        except KeyError:
            raise LostDataError("gone") from None

    async def payload(self, *keys: Any) -> bytes:
        groups = [self.groups[key] for key in keys]
        return await self.encoder.payload(groups, self.values, self.inline_bytes)

    def call(self, payload: bytes, *keys: Any) -> None:
        """Let the worker serve a payload, and note where the outputs are."""
        assert len(payload) <= protocol.MAX_PAYLOAD_BYTES
        reply = handler.handler(json.loads(payload), CONTEXT)
        for key, said in zip(keys, reply["groups"], strict=True):
            for output, record in zip(self.groups[key].outputs, said["outputs"], strict=True):
                self.values[output] = Value.from_json(record)

    def run(self, *keys: Any) -> bytes:
        payload = asyncio.run(self.payload(*keys))
        self.call(payload, *keys)
        return payload

    def value(self, key: Any) -> Any:
        value = self.values[key]
        data = value.data or self.store.get(value.name, value.size)
        return codec.loads(data, SECRET, value.name)

    def objects(self) -> set[str]:
        return {e["path"] for page in obstore.list(self.store.bucket) for e in page}

    def labels(self) -> list[str]:
        """What kinds of objects there are."""
        names = map(protocol.output_of, self.objects())
        return sorted(name.rsplit("/", 1)[1].split("-")[0] for name in names)


@pytest.fixture
def start(monkeypatch):
    """``start(dsk, keys)``: a run, with a worker that sees the same bucket."""

    def start(dsk: dict, keys: Any, **kwargs: Any) -> Run:
        bucket = MemoryStore()
        environment = handler.Environment()
        environment._stores["bucket"] = Store(bucket)
        monkeypatch.setattr(handler, "environment", environment)
        monkeypatch.setattr(protocol, "resolvers", {})
        return Run(dsk, keys, Unreliable(bucket), **kwargs)

    return start


def inc(x):
    return x + 1


def total(*args):
    return float(sum(np.sum(a) for a in args))


# -- what the worker gets ------------------------------------------------------------------------


def test_the_worker_runs_what_was_encoded(start):
    run = start({"x": (inc, 1), "y": (inc, "x")}, "y")
    run.run("x")
    run.run("y")
    assert run.value("y") == 3
    assert run.objects() == set()


def test_data_of_the_graph_is_an_input(start):
    run = start({"d": DataNode("d", 41), "y": Task("y", inc, TaskRef("d"))}, "y")
    run.run("y")
    assert run.value("y") == 42


def test_inputs_are_known_to_a_task_by_the_names_that_it_uses(start):
    dsk = {
        "x": Task("x", inc, 1),
        "a": Alias("a", "x"),
        "b": Alias("b", "a"),
        "y": Task("y", total, TaskRef("a"), TaskRef("b"), TaskRef("x")),
    }
    run = start(dsk, "y")
    run.run("x")
    payload = run.run("y")
    assert run.value("y") == 6.0
    assert len(json.loads(payload)["groups"][0]["inputs"]) == 1


def test_several_groups_share_an_invocation(start):
    run = start({"x": (inc, 1), "y": (inc, 2)}, ["x", "y"])
    run.run("x", "y")
    assert (run.value("x"), run.value("y")) == (2, 3)


def test_a_group_of_several_tasks_sends_no_value_that_it_makes_itself(start):
    dsk = {"w": (inc, 0), "x": (inc, "w"), "y": (inc, "x"), "z": (total, "x", "y", "w")}
    run = start(dsk, ["x", "z"])
    run.run("w")
    run.groups["xz"] = Group(("x", "y", "z"), ("w",), ("x", "z"))
    payload = run.run("xz")
    assert (run.value("x"), run.value("z")) == (2, 6.0)
    (group,) = json.loads(payload)["groups"]
    assert (len(group["inputs"]), len(group["outputs"])) == (1, 2)


def test_outputs_are_named_after_their_keys(start):
    run = start({("x", 0): (inc, 1)}, [("x", 0)])
    run.run(("x", 0))
    assert run.values["x", 0].name == run.encoder.object_name(protocol.key_label(("x", 0)))


# -- large buffers -------------------------------------------------------------------------------


def test_a_small_array_travels_inside_its_task(start):
    run = start({"y": (total, np.ones((LARGE - 8) // 8))}, "y")
    run.run("y")
    assert run.objects() == set()


def test_a_large_array_becomes_an_object_and_is_put_back(start):
    run = start({"y": Task("y", total, np.ones(LARGE // 8))}, "y")
    payload = run.run("y")
    assert run.labels() == ["frame"]
    assert len(payload) < 10_000
    assert run.value("y") == LARGE // 8


def test_many_large_arrays_of_one_task_keep_their_places(start):
    arrays = [np.full(LARGE + i, i, np.uint8) for i in range(5)]
    small = np.zeros(5000, np.uint8)
    task = Task("y", lambda *a: [int(x[-1]) for x in a], arrays[0], small, *arrays[1:])
    run = start({"y": task}, "y")
    run.run("y")
    assert run.value("y") == [0, 0, 1, 2, 3, 4]


def test_an_array_in_many_tasks_is_uploaded_once(start):
    array = np.random.default_rng(0).random(LARGE // 8)
    run = start({i: Task(i, total, array, i) for i in range(5)}, list(range(5)))

    async def all_at_once():
        return await asyncio.gather(*(run.payload(i) for i in range(5)))

    for i, payload in enumerate(asyncio.run(all_at_once())):
        run.call(payload, i)
    assert run.labels() == ["frame"]
    assert run.store.counts.puts == 1
    assert run.value(3) == pytest.approx(array.sum() + 3)


def test_equal_arrays_are_one_object(start):
    run = start({i: Task(i, total, np.ones(LARGE)) for i in range(3)}, [0, 1, 2])
    for i in range(3):
        run.run(i)
    assert run.labels() == ["frame"]


def test_equally_long_slices_of_one_array_are_different_objects(start):
    base = np.repeat([1.0, 2.0], LARGE // 8)
    half = len(base) // 2
    dsk = {"a": Task("a", total, base[:half]), "b": Task("b", total, base[half:])}
    run = start(dsk, ["a", "b"])
    run.run("a", "b")
    assert (run.value("a"), run.value("b")) == (half, 2 * half)


def test_a_task_may_write_to_an_array_that_was_uploaded(start):
    def fill(a):
        a[:] = 2
        return float(a.sum())

    array = np.zeros(LARGE)
    run = start({i: Task(i, fill, array) for i in range(3)}, [0, 1, 2])
    for i in range(3):
        run.run(i)
        assert run.value(i) == 2 * LARGE
    assert not array.any()


def test_an_array_in_fortran_order_arrives_in_fortran_order(start):
    array = np.asfortranarray(np.random.default_rng(0).random((300, 300)))
    run = start({"y": Task("y", lambda a: a.flags.f_contiguous, array)}, "y")
    run.run("y")
    assert run.value("y") is True


# -- large literals ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "labels"), [(500, []), (20_000, ["literal"])])
def test_a_literal_is_sent_along_or_uploaded_by_its_size(start, size, labels):
    dsk = {"d": DataNode("d", np.zeros(size)), "y": Task("y", np.size, TaskRef("d"))}
    run = start(dsk, "y")
    run.run("y")
    assert run.labels() == labels
    assert run.value("y") == size


def test_with_no_inline_bytes_every_literal_is_uploaded(start):
    dsk = {"d": DataNode("d", 1), "y": Task("y", inc, TaskRef("d"))}
    run = start(dsk, "y", inline_bytes=0)
    run.run("y")
    assert "literal" in run.labels()
    assert run.value("y") == 2


def test_a_literal_of_many_tasks_is_uploaded_once(start):
    dsk = {"d": DataNode("d", np.ones(LARGE))}
    dsk |= {i: Task(i, total, TaskRef("d"), i) for i in range(5)}
    run = start(dsk, list(range(5)))

    async def all_at_once():
        return await asyncio.gather(*(run.payload(i) for i in range(5)))

    for i, payload in enumerate(asyncio.run(all_at_once())):
        run.call(payload, i)
    assert run.store.counts.puts == 1
    assert run.value(4) == LARGE + 4


# -- what is too much ----------------------------------------------------------------------------


def test_many_inline_inputs_that_do_not_fit_are_moved_to_s3_together(start):
    dsk: dict = {i: Task(i, np.full, 12_000, float(i)) for i in range(80)}
    dsk["y"] = Task("y", total, *map(TaskRef, range(80)))
    run = start(dsk, "y")
    for i in range(80):
        run.run(i)
    assert run.objects() == set()
    payload = run.run("y")
    assert len(run.objects()) == 1
    assert len(payload) < 0.1 * protocol.MAX_PAYLOAD_BYTES
    assert run.value("y") == 12_000 * sum(range(80))


def test_the_largest_inline_inputs_are_moved_first(start):
    dsk: dict = {i: Task(i, bytes, 10) for i in range(20)}
    dsk["large"] = Task("large", bytes, 4_390_000)
    dsk["y"] = Task("y", lambda *a: sum(map(len, a)), *map(TaskRef, [*range(20), "large"]))
    run = start(dsk, "y", inline_bytes=4_395_000)
    for key in [*range(20), "large"]:
        run.run(key)
    padding = Task("z", lambda a, b: len(a) + len(b), TaskRef("large"), bytes(50_000))
    run.graph.tasks["z"] = padding
    run.groups["z"] = Group(("z",), ("large",), ("z",))
    run.run("z")
    assert run.objects() == {run.values["large"].name}
    assert run.value("z") == 4_440_000


def test_a_value_that_was_moved_to_s3_stays_there_for_the_next_reader(start):
    run = start({"x": (bytes, 50), "y": (len, "x")}, "y")
    run.run("x")
    asyncio.run(run.encoder.spill(run.values["x"]))
    assert run.values["x"].data is None
    assert run.objects() == {run.values["x"].name}
    asyncio.run(run.encoder.spill(run.values["x"]))
    run.run("y")
    assert run.store.counts.puts == 1
    assert run.value("y") == 50


def test_a_value_that_is_moved_to_s3_is_not_taken_for_what_a_lost_attempt_left_there(start):
    run = start({"x": (bytes, 50), "y": (len, "x")}, "y")
    run.run("x")
    name = run.values["x"].name
    run.store.put_new(name, codec.dumps(bytes(7), SECRET, name))
    asyncio.run(run.encoder.spill(run.values["x"]))
    run.run("y")
    assert run.value("x") == bytes(50)
    assert run.value("y") == 50
    assert protocol.objects_of(run.values["x"].name)[-1] == name


def test_a_task_of_many_middling_buffers_is_uploaded_as_a_whole(start):
    arrays = [np.full(200_000, i, np.uint8) for i in range(40)]
    run = start({"y": Task("y", total, *arrays)}, "y")
    payload = run.run("y")
    assert run.labels() == ["body"]
    assert len(payload) < 10_000
    assert run.value("y") == 200_000 * sum(range(40))


def test_a_part_of_a_group_whose_task_was_uploaded_is_not_taken_for_the_whole(start):
    arrays = [np.full(200_000, i, np.uint8) for i in range(40)]
    dsk = {"x": Task("x", total, *arrays), "y": Task("y", str, TaskRef("x"))}
    run = start(dsk, ["x", "y"])
    for outputs in (("x", "y"), ("x",)):
        run.groups["x"] = Group(outputs, (), outputs)
        run.run("x")
        assert run.labels() == ["body"] * (3 - len(outputs))
        assert run.value("x") == 200_000 * sum(range(40))


def test_a_list_of_inputs_that_is_too_long_is_uploaded(start):
    run, count = long_list(start)
    payload = run.run("y")
    assert "groups" in run.labels()
    assert len(payload) < 10_000
    assert run.value("y") == count


def test_a_list_of_inputs_that_was_uploaded_serves_a_retry_too(start):
    run, count = long_list(start)
    asyncio.run(run.payload("y"))
    for value in run.values.values():
        value.shared = False  # another payload, and another length, than the first time
    run.run("y")
    assert run.value("y") == count


def long_list(start) -> tuple[Run, int]:
    """A run whose task y has too many inputs for a payload, since their names are long."""
    count = 7_500
    dsk = {i: Task(i, inc, i) for i in range(count)}
    dsk["y"] = Task("y", lambda *a: len(a), *map(TaskRef, range(count)))
    run = start(dsk, "y")
    name = protocol.object_name("p" * 850, RUN, "x")
    data = codec.dumps(1, SECRET, name)
    Store(run.store.bucket).put_new(name, data)
    run.values = {i: Value(name, len(data), shared=True) for i in range(count)}
    return run, count


# -- bookkeeping ---------------------------------------------------------------------------------


def test_what_was_written_is_known_so_that_it_can_be_deleted(start):
    array = np.ones(LARGE)
    dsk = {"d": DataNode("d", array + 1), "y": Task("y", total, TaskRef("d"), array)}
    run = start(dsk, "y")
    asyncio.run(run.payload("y"))
    assert run.encoder.written == run.objects()
    assert run.labels() == ["frame", "literal"]
    assert run.encoder.take_written() == run.objects()
    assert run.encoder.take_written() == set()


@pytest.mark.parametrize(
    "dsk",
    [
        pytest.param({"y": Task("y", total, np.ones(LARGE))}, id="frame"),
        pytest.param(
            {"d": DataNode("d", np.ones(LARGE)), "y": Task("y", total, TaskRef("d"))}, id="literal"
        ),
    ],
)
def test_an_upload_that_failed_is_tried_again_with_the_next_payload(start, dsk):
    run = start(dsk, "y")
    run.store.failures = 1

    async def twice():
        with pytest.raises(StoreError, match="connection reset"):
            await run.payload("y")
        return await run.payload("y")

    run.call(asyncio.run(twice()), "y")
    assert run.value("y") == LARGE


def test_an_object_that_may_have_been_written_by_a_failed_upload_is_remembered(start):
    run = start({"y": Task("y", total, np.ones(LARGE))}, "y")
    run.store.failures = 1
    with pytest.raises(StoreError):
        asyncio.run(run.payload("y"))
    assert len(run.encoder.written) == 1


# -- secrets and references ----------------------------------------------------------------------


def stored_elsewhere(run: Run, value: Any) -> Reference:
    """A result that another run has left in S3."""
    secret = run.secrets["other"] = b"o" * 32
    name = protocol.object_name("prefix", "other", "x")
    data = codec.dumps(value, secret, name)
    Store(run.store.bucket).put_new(name, data)
    return Reference(name, len(data))


def secrets_in(payload: bytes) -> set[str]:
    return set(json.loads(payload)["secrets"])


def test_a_payload_names_the_secret_of_its_run_only(start):
    run = start({"y": (inc, 1)}, "y")
    assert secrets_in(asyncio.run(run.payload("y"))) == {RUN}


@pytest.mark.parametrize("fused", [False, True])
def test_a_task_that_reads_a_stored_result_is_given_its_secret(start, fused):
    run = start({}, [])
    reference = stored_elsewhere(run, 41)
    load = Task("x", load_reference, reference)
    read = Task("y", inc, TaskRef("x"))
    dsk = {"y": Task.fuse(load, read, key="y")} if fused else {"x": load, "y": read}
    again = Run(dsk, "y", run.store)
    again.secrets = run.secrets
    assert secrets_in(again.run("y")) == {RUN, "other"}
    assert again.value("y") == 42


def test_a_stored_result_of_a_closed_scheduler_is_refused_before_anything_is_sent(start):
    dsk = {"y": Task("y", inc, Task("x", load_reference, Reference("0/prefix/closed/x", 9)))}
    run = start(dsk, "y")
    with pytest.raises(LostDataError):
        asyncio.run(run.payload("y"))


# -- what cannot be sent -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument", [threading.Lock(), (i for i in range(3))], ids=["lock", "generator"]
)
def test_a_task_that_cannot_be_pickled_is_named(start, argument):
    run = start({"y": Task("y", inc, argument)}, "y")
    with pytest.raises(UnserializableError, match="Task 'y' cannot be pickled") as info:
        asyncio.run(run.payload("y"))
    assert isinstance(info.value, TypeError)
    assert "Make it inside the task" in str(info.value)


def test_data_that_cannot_be_pickled_is_named(start):
    dsk = {"d": DataNode("d", threading.Lock()), "y": Task("y", inc, TaskRef("d"))}
    run = start(dsk, "y")
    with pytest.raises(UnserializableError, match="data 'd' in the graph, a lock, cannot"):
        asyncio.run(run.payload("y"))
