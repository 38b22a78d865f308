"""Objects that travel in parts, over HTTP to the embedded S3; mostly with small limits."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask import delayed

from dask_lambda import lambda_get
from dask_lambda.local import LocalAWS
from lambda_worker import codec, protocol
from lambda_worker.commit import commit
from lambda_worker.errors import IntegrityError, StoreError
from lambda_worker.protocol import Value
from lambda_worker.store import Parts, Store, open_bucket
from tests.faults.proxy import Corrupt, Proxy, Reset, Truncate, s3_error
from tests.helpers import report

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("without_lease")]
uses_bucket = True

Names = Callable[[], list[str]]
SECRET = b"s" * 32
RUN = "run"
KB = 1024
PARTS = Parts(read_above=100 * KB, read=64 * KB, write_above=200 * KB, write=128 * KB)
NAME = protocol.object_name("prefix", RUN, "y")


@pytest.fixture
def store(aws: LocalAWS, proxy: Proxy, bucket_names: Names) -> Iterator[Store]:
    """A store with small limits, behind a proxy; what is in it is deleted at the end."""
    bucket = open_bucket(
        aws.bucket,
        endpoint_url=proxy.url,
        region=aws.region,
        access_key_id=aws.access_key_id,
        secret_access_key=aws.secret_access_key,
        retry_seconds=5,
    )
    yield Store(bucket, PARTS)
    proxy.plan()
    for name in bucket_names():
        aws.client("s3").delete_object(Bucket=aws.bucket, Key=name)


def noise(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def laid_out(value: Any) -> bytearray:
    return codec.lay_out(codec.serialize(value))


def load(store: Store, value: Value) -> Any:
    return codec.loads(store.get(value.name, value.size), SECRET, value.name)


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100 * KB, 100 * KB + 1, 128 * KB, 1000 * KB + 7])
def test_an_object_of_any_size_is_read_whole(store: Store, proxy: Proxy, size: int) -> None:
    data = noise(size)
    store.put_new(NAME, data)
    store.counts.take()
    proxy.plan()
    if size:
        assert bytes(store.get(NAME, size)) == data
        assert bytes(asyncio.run(store.get_async(NAME, size))) == data
        requests = 1 if size <= 100 * KB else -(-size // (64 * KB))
        assert store.counts.gets == proxy.seen["get"] == 2 * requests
        assert store.counts.bytes_read == 2 * size


def test_a_large_array_is_loaded_without_another_copy(store: Store) -> None:
    x = np.arange(100_000.0)
    sealed = codec.dumps(x, SECRET, NAME)
    store.put_new(NAME, sealed)
    data = store.get(NAME, len(sealed))
    loaded = codec.loads(data, SECRET, NAME)
    loaded[0] = 7
    assert memoryview(data).obj is data
    assert bytes(data)[-x.nbytes :][:8] == np.float64(7).tobytes()
    assert (loaded[1:] == x[1:]).all()


@pytest.mark.parametrize("there", [0, 64 * KB, 300 * KB])
def test_an_object_that_is_shorter_than_was_said_is_noticed(store: Store, there: int) -> None:
    store.put_new(NAME, noise(there))
    with pytest.raises((IntegrityError, StoreError)):
        store.get(NAME, 400 * KB)
    with pytest.raises((IntegrityError, StoreError)):
        asyncio.run(store.get_async(NAME, 400 * KB))


def test_one_part_that_cannot_be_read_is_told_with_the_objects_name(
    store: Store, proxy: Proxy
) -> None:
    store.put_new(NAME, noise(400 * KB))
    for read in (store.get, lambda *a: asyncio.run(store.get_async(*a))):
        proxy.plan(get=[None, None, s3_error(403, "AccessDenied")])
        with pytest.raises(StoreError, match=NAME) as info:
            read(NAME, 400 * KB)
        assert info.value.kind == "denied"


def test_a_large_object_that_is_gone_is_missing(store: Store) -> None:
    with pytest.raises(StoreError) as info:
        store.get(NAME, 400 * KB)
    assert info.value.kind == "missing"


# -- writing -------------------------------------------------------------------------------------


def test_a_large_object_is_written_in_parts_and_each_request_is_counted(
    store: Store, proxy: Proxy
) -> None:
    data = noise(500 * KB)
    proxy.plan()
    asyncio.run(store.put_async(NAME, data))
    assert proxy.seen["put"] == 4
    assert store.counts.puts == proxy.seen["put"] + proxy.seen["post"] == 6
    assert store.counts.bytes_written == len(data)
    assert bytes(store.get(NAME, len(data))) == data


@pytest.mark.parametrize("kind", ["put", "post"])
def test_when_a_part_fails_the_upload_is_aborted(
    store: Store, proxy: Proxy, aws: LocalAWS, kind: str
) -> None:
    proxy.plan(**{kind: [None, s3_error(403, "AccessDenied", "not today")]})
    with pytest.raises(StoreError, match="not today"):
        store.put(NAME, noise(500 * KB))
    assert proxy.seen["abort"] == 1
    assert not aws.client("s3").list_multipart_uploads(Bucket=aws.bucket).get("Uploads")


# -- committing ----------------------------------------------------------------------------------


def commit_value(store: Store, value: Any) -> tuple[Value, set[str]]:
    left: set[str] = set()
    return commit(store, NAME, laid_out(value), SECRET, left), left


SMALL, LARGE, OTHER = b"x" * 100, noise(300 * KB), noise(400 * KB)


@pytest.mark.parametrize(
    ("first", "second"),
    [(LARGE, OTHER), (SMALL, LARGE), (LARGE, SMALL), (noise(150 * KB), LARGE)],
    ids=["both large", "small and large", "large and small", "middling and large"],
)
def test_the_first_of_two_attempts_wins(
    store: Store, bucket_names: Names, first: bytes, second: bytes
) -> None:
    won, left = commit_value(store, first)
    there = bucket_names()
    again, left_too = commit_value(store, second)
    assert again == won
    assert load(store, won) == first
    assert not left | left_too
    assert bucket_names() == there
    assert sorted(protocol.objects_of(won.name)) == there


def test_a_value_and_its_pointer_are_deleted_together(store: Store, bucket_names: Names) -> None:
    value, _ = commit_value(store, LARGE)
    assert len(bucket_names()) == 2
    assert protocol.run_of(value.name) == RUN
    asyncio.run(store.delete_async(protocol.objects_of(value.name)))
    assert bucket_names() == []


def test_an_answer_that_was_lost_does_not_make_an_attempt_its_own_rival(
    store: Store, proxy: Proxy
) -> None:
    proxy.plan(put=[None, None, None, Reset(forwarded=True)])  # three parts, then the pointer
    value, left = commit_value(store, LARGE)
    assert proxy.seen["put"] == 5
    assert load(store, value) == LARGE
    assert not left


def test_what_may_be_left_after_a_failure_is_told(
    store: Store, proxy: Proxy, bucket_names: Names
) -> None:
    left: set[str] = set()
    proxy.plan(put=[None, None, None, s3_error(403, "AccessDenied")])
    with pytest.raises(StoreError):
        commit(store, NAME, laid_out(LARGE), SECRET, left)
    assert left == set(bucket_names())
    asyncio.run(store.delete_async(sorted(left)))
    assert bucket_names() == []


@pytest.mark.parametrize("damage", [Corrupt(), Truncate(0.5, announced=False)])
def test_a_pointer_that_is_damaged_on_the_way_is_fetched_once_more(
    store: Store, proxy: Proxy, damage: Corrupt | Truncate
) -> None:
    won, _ = commit_value(store, LARGE)
    proxy.plan(get=[damage])
    again, left = commit_value(store, OTHER)
    assert again == won
    assert proxy.seen["get"] == 2
    assert not left


def test_a_forged_pointer_is_not_followed(store: Store) -> None:
    elsewhere = json.dumps(["0/prefix/run/elsewhere", 100]).encode()
    forged = codec.seal([memoryview(elsewhere)], b"guess", protocol.pointer_name(NAME))
    store.put_new(NAME, forged)
    value, _ = commit_value(store, LARGE)
    assert value == Value(NAME, len(forged))
    with pytest.raises(IntegrityError):
        load(store, value)


def test_a_pointer_is_no_value(store: Store) -> None:
    value, _ = commit_value(store, LARGE)
    pointer = bytes(store.get(NAME, store.put_new(NAME, b"") or 0))
    assert value.name.encode() in pointer
    with pytest.raises(IntegrityError):
        codec.loads(pointer, SECRET, NAME)


# -- whole runs, with the real limits ------------------------------------------------------------

N = 9_000_000  # 72 MB


def make() -> np.ndarray:
    return np.arange(float(N))


def test_a_large_output_goes_through_s3_in_parts_and_leaves_nothing(bucket_names: Names) -> None:
    x = delayed(make)()
    total = delayed(np.sum)(x)
    assert total.compute(scheduler=lambda_get, plan="none") == N * (N - 1) / 2
    assert report().s3_puts == 5 + 2 + 1  # parts, begin and end, pointer
    assert report().s3_gets == 9
    assert bucket_names() == []
    result = x.compute(scheduler=lambda_get)
    assert result[-1] == N - 1
    result[0] = 1  # writable, as it was


def test_a_large_literal_is_uploaded_in_parts() -> None:
    x = np.arange(float(N))
    assert delayed(np.sum)(x).compute(scheduler=lambda_get, optimize_graph=False) == x.sum()
    assert report().s3_puts == 5 + 2


def test_a_large_persisted_result_is_loaded_and_deleted(bucket_names: Names) -> None:
    x = da.arange(float(N), chunks=N).persist(scheduler=lambda_get)
    assert len(bucket_names()) == 2
    assert x.sum().compute(scheduler=lambda_get) == N * (N - 1) / 2
    assert len(bucket_names()) == 2


def test_an_output_whose_group_failed_afterwards_is_deleted(bucket_names: Names) -> None:
    x = delayed(make)()

    def fail(x: Any) -> None:
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        delayed(fail)(x).compute(scheduler=lambda_get, optimize_graph=False, plan="none")
    assert bucket_names() == []


def write_and_die(key: str, bucket: str, marker: str) -> str:
    """Leave what a large upload leaves when the environment dies before the pointer is written."""
    import obstore

    if Path(marker).exists():
        return "done"
    Path(marker).touch()
    for run in list(protocol.serving):
        name = protocol.object_name("dask-lambda", run, protocol.key_label(key))
        obstore.put(open_bucket(bucket), protocol.attempt_name(name), b"orphan")
    os._exit(1)


def test_what_a_dying_environment_has_left_is_deleted_at_the_end(
    aws: LocalAWS, bucket_names: Names, tmp_path: Path
) -> None:
    marker = tmp_path / "died"
    y = delayed(write_and_die)("y", aws.bucket, str(marker), dask_key_name="y")
    assert y.compute(scheduler=lambda_get) == "done"
    assert marker.exists()
    assert report().s3_lists == 1
    assert bucket_names() == []


def test_many_lost_outputs_are_found_with_one_list_for_each_shard(
    aws: LocalAWS, bucket_names: Names, tmp_path: Path
) -> None:
    calls = [
        delayed(write_and_die)(f"y{i}", aws.bucket, str(tmp_path / str(i)), dask_key_name=f"y{i}")
        for i in range(20)
    ]
    assert dask.compute(*calls, scheduler=lambda_get) == ("done",) * 20
    assert report().s3_lists == len(protocol.shards())
    assert bucket_names() == []
