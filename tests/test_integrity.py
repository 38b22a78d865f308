"""What is not as it was written is fetched once more, then refused, and never unpickled.

The values here are traps: unpickling one leaves a trace.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler
from dask_lambda.errors import IntegrityError, LostDataError
from dask_lambda.local import LocalAWS
from lambda_worker import codec, protocol
from lambda_worker.commit import commit
from lambda_worker.errors import StoreError
from lambda_worker.protocol import Reference, Value
from lambda_worker.store import Store, open_bucket
from tests.faults.proxy import Corrupt, Proxy, Truncate
from tests.helpers import report

pytestmark = [
    pytest.mark.local,
    pytest.mark.usefixtures("one_task_each", "without_lease"),
]
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]
SECRET = b"s" * 32


def leave_a_trace(directory: str) -> str:
    (Path(directory) / "unpickled").touch()
    return "a trap"


class Trap:
    """Leaves a trace where it is unpickled."""

    def __init__(self, directory: str, padding: bytes = b""):
        self.directory, self.padding = directory, padding

    def __reduce__(self) -> Any:
        return leave_a_trace, (self.directory,), None, None, None


def set_trap(directory: str) -> Trap:
    return Trap(directory)


class Bucket:
    """What somebody with access to the bucket can do."""

    def __init__(self, aws: LocalAWS):
        self.s3, self.bucket = aws.client("s3"), aws.bucket

    def read(self, name: str) -> bytes:
        return self.s3.get_object(Bucket=self.bucket, Key=name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self.s3.put_object(Bucket=self.bucket, Key=name, Body=data)


def changed(bucket: Bucket, name: str, others: list[str]) -> None:
    data = bytearray(bucket.read(name))
    data[-3] ^= 1
    bucket.write(name, data)


def changed_tag(bucket: Bucket, name: str, others: list[str]) -> None:
    data = bytearray(bucket.read(name))
    data[0] ^= 1
    bucket.write(name, data)


def truncated(bucket: Bucket, name: str, others: list[str]) -> None:
    bucket.write(name, bucket.read(name)[:-1])


def emptied(bucket: Bucket, name: str, others: list[str]) -> None:
    bucket.write(name, b"")


def swapped(bucket: Bucket, name: str, others: list[str]) -> None:
    """Put another object of the same run there, with its right tag."""
    bucket.write(name, bucket.read(others[0]))


def replayed(bucket: Bucket, name: str, others: list[str]) -> None:
    """Put an object of another run there: what the same task made, with its right tag."""
    bucket.write(name, bucket.read(others[1]))


def forged(bucket: Bucket, name: str, others: list[str]) -> None:
    """Put an object there that is right but for the secret."""
    data = bucket.read(name)
    frames = codec.frames_of(data, name)
    bucket.write(name, codec.seal(frames, b"guess" * 7, name))


def unsealed(bucket: Bucket, name: str, others: list[str]) -> None:
    data = bucket.read(name)
    bucket.write(name, pickle.dumps(Trap("nowhere")).ljust(len(data), b"\0"))


@pytest.mark.parametrize("reader", ["client", "worker"])
@pytest.mark.parametrize(
    "attack", [changed, changed_tag, truncated, emptied, swapped, replayed, forged, unsealed]
)
def test_an_object_that_is_not_what_the_run_wrote_is_refused(
    aws: LocalAWS, connect: Connect, tmp_path: Path, attack: Any, reader: str
) -> None:
    scheduler = connect()
    tasks = [delayed(set_trap)(str(tmp_path), dask_key_name=f"trap-{i}") for i in range(2)]
    with scheduler:
        kept = dask.persist(*tasks)
        (earlier,) = dask.persist(tasks[0])
        target, other = (reference_of(each) for each in kept)
        attack(Bucket(aws), target.name, [other.name, reference_of(earlier).name])
        read = kept[0] if reader == "client" else delayed(id)(kept[0])
        with pytest.raises(IntegrityError) as info:
            read.compute()
    message = str(info.value)
    assert repr(target.name) in message
    assert repr(protocol.run_of(target.name)) in message
    assert "it was not unpickled" in message
    assert "Compute again" in message
    assert ("the worker refused" in message) == (reader == "worker")
    assert not (tmp_path / "unpickled").exists()


def test_an_object_that_is_whole_is_unpickled(connect: Connect, tmp_path: Path) -> None:
    with connect():
        kept = delayed(set_trap)(str(tmp_path)).persist()
        assert kept.compute() == "a trap"
    assert (tmp_path / "unpickled").exists()


def reference_of(collection: Any) -> Reference:
    (task,) = dict(collection.dask).values()
    found = [each for each in task.args if isinstance(each, Reference)]
    return found[0]


@pytest.mark.parametrize("reader", ["client", "worker"])
def test_an_object_that_is_gone_is_told(
    aws: LocalAWS, connect: Connect, tmp_path: Path, reader: str
) -> None:
    with connect():
        kept = delayed(set_trap)(str(tmp_path)).persist()
        name = reference_of(kept).name
        aws.client("s3").delete_object(Bucket=aws.bucket, Key=name)
        read = kept if reader == "client" else delayed(id)(kept)
        with pytest.raises(LostDataError, match=name):
            read.compute()


# -- damage on the way ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxied(shared_proxy: Proxy, deploy: Deploy) -> str:
    """A function whose workers reach S3 through the proxy."""
    return deploy(environment={"AWS_ENDPOINT_URL_S3": shared_proxy.url})


DAMAGE = [Corrupt(), Truncate(0.5, announced=False), Truncate(0.0, announced=False)]


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
@pytest.mark.parametrize("size", [50_000, 1_500_000], ids=["small", "in parts"])
def test_what_was_damaged_on_the_way_is_fetched_once_more(
    proxy: Proxy, proxied: str, connect: Connect, damage: Any, size: int
) -> None:
    """Once by the worker that reads x, once by the client that reads y."""
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    x = delayed(np.arange)(size)
    y = delayed(np.negative)(x)
    proxy.plan(get=[damage])
    assert (y.compute(scheduler=scheduler, optimize_graph=False) == -np.arange(size)).all()
    worker = proxy.seen["get"]
    assert report().s3_gets == worker
    proxy.plan(get=[*[None] * (worker // 2), damage])
    assert (y.compute(scheduler=scheduler, optimize_graph=False) == -np.arange(size)).all()
    assert proxy.seen["get"] == worker


@pytest.mark.parametrize("reads", [0, 1], ids=["worker", "client"])
def test_what_is_damaged_each_time_is_refused(
    proxy: Proxy, proxied: str, connect: Connect, reads: int
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0)
    y = delayed(np.negative)(delayed(np.arange)(1000))
    proxy.plan(get=[*[None] * reads, Corrupt(), Corrupt(), Corrupt()])
    with pytest.raises(IntegrityError, match="does not carry the tag of this run"):
        y.compute(scheduler=scheduler, optimize_graph=False)
    assert proxy.seen["get"] == 2 + reads


def test_a_damaged_input_that_several_tasks_read_is_not_kept(
    proxy: Proxy, proxied: str, connect: Connect
) -> None:
    scheduler = connect(endpoint_url=proxy.url, function=proxied, inline_bytes=0, concurrency=1)
    x = delayed(np.arange)(1000)
    parts = [delayed(np.sum)(x) for _ in range(3)]
    proxy.plan(get=[Corrupt()])
    total = delayed(sum)(parts)
    assert total.compute(scheduler=scheduler, optimize_graph=False) == 3 * 499_500


# -- pointers ------------------------------------------------------------------------------------

RUN = "run"
NAME = protocol.object_name("prefix", RUN, "y")


@pytest.fixture
def store(aws: LocalAWS, bucket_names: Callable[[], list[str]]) -> Iterator[Store]:
    """A store; what is in it is deleted at the end."""
    bucket = open_bucket(
        aws.bucket,
        endpoint_url=aws.endpoint_url,
        region=aws.region,
        access_key_id=aws.access_key_id,
        secret_access_key=aws.secret_access_key,
    )
    yield Store(bucket)
    for name in bucket_names():
        aws.client("s3").delete_object(Bucket=aws.bucket, Key=name)


def pointer(target: str, size: int, *, name: str = NAME, secret: bytes = SECRET) -> bytearray:
    content = memoryview(json.dumps([target, size]).encode())
    return codec.seal([content], secret, protocol.pointer_name(name))


def test_a_pointer_to_what_is_gone_leads_to_nothing(store: Store, tmp_path: Path) -> None:
    stale = protocol.attempt_name(NAME)
    store.put_new(NAME, pointer(stale, 500))
    value = commit(store, NAME, codec.lay_out(codec.serialize(1)), SECRET, set())
    assert value == Value(stale, 500)
    with pytest.raises(StoreError, match=stale) as info:
        store.get(value.name, value.size)
    assert info.value.kind == "missing"


@pytest.mark.parametrize(
    "replayed",
    [
        pointer(protocol.attempt_name(NAME), 500, secret=b"of another run".ljust(32)),
        pointer(protocol.attempt_name(NAME), 500, name=protocol.object_name("prefix", RUN, "z")),
    ],
    ids=["another run", "another output"],
)
def test_a_pointer_from_elsewhere_is_not_followed(store: Store, replayed: bytearray) -> None:
    store.put_new(NAME, replayed)
    value = commit(store, NAME, codec.lay_out(codec.serialize(1)), SECRET, set())
    assert value == Value(NAME, len(replayed))
    with pytest.raises(IntegrityError, match="not unpickled"):
        codec.loads(store.get(value.name, value.size), SECRET, value.name)
