"""What goes through S3, what travels along, and that nothing is left behind."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler, lambda_get
from dask_lambda.local import LocalAWS
from tests.helpers import eventually, report

pytestmark = [pytest.mark.local, pytest.mark.usefixtures("one_task_each", "without_lease")]
uses_bucket = True

Names = Callable[[], list[str]]

MB = 10**6


def inc(x: Any) -> Any:
    return x + 1


def size(x: Any) -> int:
    return len(x)


# -- large data ----------------------------------------------------------------------------------


def test_an_array_of_50_mb_is_uploaded_once_and_read_once() -> None:
    x = np.arange(50 * MB // 8, dtype="f8").reshape(2500, 2500)
    blocks = da.from_array(x, chunks=(500, 2500))
    assert blocks.sum().compute(scheduler=lambda_get) == x.sum()
    assert 50 * MB <= report().bytes_written < 51 * MB
    assert 50 * MB <= report().bytes_read < 51 * MB


def test_a_large_result_comes_back() -> None:
    x = da.ones((2000, 1000), chunks=(500, 1000)) * 3
    found = x.compute(scheduler=lambda_get)
    assert found.shape == (2000, 1000)
    assert (found == 3).all()


@pytest.mark.parametrize(
    "literal",
    [
        b"x" * (7 * MB),
        "x" * (7 * MB),
        bytearray(7 * MB),
        [str(i % 10) * 5000 + str(i) for i in range(1400)],
        np.zeros(MB),
        np.zeros(2 * MB)[::2],  # not contiguous
        {"nested": [np.zeros(MB), np.ones(MB)]},
    ],
    ids=["bytes", "text", "bytearray", "list", "array", "strided array", "nested arrays"],
)
def test_a_task_with_a_literal_above_the_limit_of_a_payload(literal: Any) -> None:
    assert delayed(size)(literal).compute(scheduler=lambda_get) == len(literal)


def test_a_task_with_very_many_inline_inputs() -> None:
    dsk: dict[Any, Any] = {("part", i): bytes([i % 256]) * 4000 for i in range(2000)}
    dsk["joined"] = (b"".join, list(dsk))
    assert lambda_get(dsk, "joined") == b"".join(bytes([i % 256]) * 4000 for i in range(2000))
    assert report().invocations == 1


def test_inline_results_whose_sum_is_above_the_limit_of_a_payload() -> None:
    parts = [delayed(np.full)(7000, i, dtype="f8") for i in range(120)]  # 56 kB each
    total = delayed(lambda parts: float(np.sum(parts)))(parts)
    assert total.compute(scheduler=lambda_get) == 7000 * sum(range(120))
    assert report().invocations == 121
    assert 0 < report().s3_puts < 121


def test_results_at_the_border_of_what_travels_inline() -> None:
    with LambdaScheduler(inline_bytes=4_000_000) as scheduler:
        for length in (3_990_000, 4_010_000):
            made = delayed(bytes)(length)
            assert delayed(size)(made).compute(scheduler=scheduler) == length
            assert len(made.compute(scheduler=scheduler)) == length


# -- counts --------------------------------------------------------------------------------------


def graph() -> Any:
    return delayed(sum)([delayed(inc)(i) for i in range(5)])


def test_small_results_do_not_touch_s3() -> None:
    assert graph().compute(scheduler=lambda_get) == 15
    found = report()
    assert (found.tasks, found.invocations) == (6, 6)
    assert (found.s3_puts, found.s3_gets, found.s3_lists, found.s3_deletes) == (0, 0, 0, 0)
    assert (found.bytes_read, found.bytes_written) == (0, 0)
    assert not found.failed
    assert found.wall_seconds > 0
    assert found.billed_gb_seconds > 0
    assert 0 < found.cost_usd < 0.01
    assert found.retries == found.throttles == found.speculative == 0


def test_without_inline_results_everything_goes_through_s3() -> None:
    scheduler = LambdaScheduler(inline_bytes=0)
    assert graph().compute(scheduler=scheduler) == 15
    found = scheduler.last_report
    assert found is not None
    assert found == report()
    assert found.invocations == 6
    assert found.s3_puts == 6  # one for each result
    assert found.s3_gets == 5 + 1  # the inputs of the sum, and the result
    assert found.s3_deletes >= 1
    assert found.bytes_written == found.bytes_read > 6 * 64
    scheduler.close()


def test_a_shared_literal_is_uploaded_once() -> None:
    big = np.ones(MB // 8)
    key = delayed(big)
    tasks = [delayed(np.sum)(big) for _ in range(5)] + [delayed(np.sum)(key) for _ in range(5)]
    assert dask.compute(*tasks, scheduler=lambda_get) == (MB // 8,) * 10
    assert report().invocations == 10
    assert report().s3_puts <= 2  # once inside the tasks, once as a node of the graph
    assert report().bytes_written < 2.1 * MB


def test_equal_literals_are_uploaded_once() -> None:
    tasks = [delayed(np.sum)(np.ones(MB // 8)) for _ in range(4)]
    assert dask.compute(*tasks, scheduler=lambda_get) == (MB // 8,) * 4
    assert report().s3_puts == 1


def test_a_result_is_the_same_for_all_that_read_it() -> None:
    @delayed
    def draw() -> bytes:
        return uuid.uuid4().bytes * 10_000

    for inline_bytes in (0, 65_536):
        drawn = draw()
        with LambdaScheduler(inline_bytes=inline_bytes) as scheduler:
            one, two, three = dask.compute(
                drawn, delayed(bytes)(drawn), delayed(bytes)(drawn), scheduler=scheduler
            )
        assert one == two == three


# -- compression ---------------------------------------------------------------------------------


def test_what_compresses_well_is_small_on_its_way() -> None:
    x = np.zeros(MB)
    blocks = da.from_array(x, chunks=MB // 4)  # uploaded by the client
    y = (blocks + 1).map_blocks(np.cumsum)  # and by the workers
    assert (y.compute(scheduler=lambda_get, compression="zstd")[:3] == [1, 2, 3]).all()
    assert report().bytes_written < MB
    with LambdaScheduler(compression="zstd") as scheduler:
        literal = delayed(x)
        assert delayed(np.sum)(literal).compute(scheduler=scheduler, optimize_graph=False) == 0
        assert report().bytes_written < 10_000


def test_what_does_not_compress_is_sent_as_it_is() -> None:
    x = delayed(np.random.default_rng(1).random)(MB // 8)
    found = delayed(np.sum)(x).compute(
        scheduler=lambda_get, compression="zstd", optimize_graph=False
    )
    assert found > 0
    assert MB <= report().bytes_written < 1.01 * MB


# -- nothing is left -----------------------------------------------------------------------------


@pytest.mark.parametrize("inline_bytes", [0, 65_536])
def test_after_success_the_bucket_is_empty(inline_bytes: int, bucket_names: Names) -> None:
    scheduler = LambdaScheduler(inline_bytes=inline_bytes)
    x = da.random.default_rng(1).random((400, 400), chunks=200)
    found = (x @ x.T + da.from_array(np.ones((400, 400)), chunks=200)).compute(scheduler=scheduler)
    assert found.shape == (400, 400)
    assert not bucket_names()
    scheduler.close()


def test_after_a_failure_the_bucket_is_empty_and_stays_so(
    bucket_names: Names, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    slow_is_done = tmp_path / "done"

    @delayed
    def fails(x: np.ndarray) -> None:
        raise ValueError("in the middle")

    @delayed
    def slow() -> np.ndarray:
        deadline = time.monotonic() + 30
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        slow_is_done.touch()
        return np.ones(MB // 8)

    large = delayed(np.ones)(MB // 8)
    with pytest.raises(ValueError, match="in the middle"):
        dask.compute(slow(), fails(large), delayed(np.sum)(large), scheduler=lambda_get)
    assert report().failed
    assert not slow_is_done.exists()
    assert eventually(lambda: not bucket_names())  # "large" is deleted already
    gate.touch()
    assert eventually(slow_is_done.exists)
    # The last invocation commits its megabyte now, and that is deleted as well: the check after
    # each test sees to it.  A run after it makes sure that the reply has come.
    assert delayed(inc)(1).compute(scheduler=lambda_get) == 2


def count_objects(x: np.ndarray, bucket: str, most: int) -> int:
    """List the bucket from inside a task until there are few objects; return how many."""
    import obstore

    from lambda_worker.store import open_bucket

    store = open_bucket(bucket)
    deadline = time.monotonic() + 20
    while True:
        found = sum(map(len, obstore.list(store)))
        if found <= most or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def test_intermediates_are_released_while_the_run_goes_on(aws: LocalAWS) -> None:
    x = delayed(np.ones)(20_000)
    for _ in range(10):
        x = delayed(inc)(x)
    left = delayed(count_objects)(x, aws.bucket, 1)
    assert left.compute(scheduler=lambda_get, optimize_graph=False) == 1  # its own input
    assert report().invocations == 12
    assert report().s3_puts == 11


def test_results_are_kept_until_the_end(aws: LocalAWS) -> None:
    x = delayed(np.ones)(20_000)
    y = delayed(inc)(x)
    left = delayed(count_objects)(y, aws.bucket, 2)
    with_x, found = dask.compute(x, left, scheduler=lambda_get)
    assert with_x.sum() == 20_000
    assert found == 2
