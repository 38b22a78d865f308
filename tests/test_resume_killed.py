"""A client that is killed loses nothing that was committed: the next one goes on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dask_lambda
from dask_lambda import kept_runs
from tests.helpers import eventually
from tests.resume_helpers import Marks, _own_records_and_empty_bucket, marks

__all__ = ["_own_records_and_empty_bucket", "marks"]

pytestmark = pytest.mark.local
ROOT = Path(dask_lambda.__file__).parents[1]

PROGRAM = """
import os, signal, sys, time
import dask, dask.array as da, numpy as np
from dask import delayed
from dask_lambda import LambdaScheduler, last_report

what, marks, function, bucket, endpoint = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
scheduler = LambdaScheduler(backend="aws", function=function, bucket=bucket, region="us-east-1",
                            endpoint_url=endpoint, concurrency=2, resume="killed")

def mark(name):
    handle = os.open(marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{name}\\n".encode())
    os.close(handle)

def visible(block, block_info=None):
    mark("block-%s-%s" % block_info[None]["chunk-location"])
    time.sleep(0.02)
    return block

if what == "cholesky":
    x = da.random.default_rng(1).random((480, 480), chunks=80)
    y = x @ x.T + 480 * da.eye(480, chunks=80)
    seen = y.map_blocks(visible, dtype=float, meta=np.ones((0, 0)))
    found = da.linalg.cholesky(seen, lower=True).compute(scheduler=scheduler)
    assert np.allclose(found @ found.T, y.compute(scheduler="sync"))
elif what == "delayed":
    @delayed
    def load(i):
        mark(f"load-{i}")
        time.sleep(0.05)
        return np.full(1000, i)
    @delayed
    def work(i, x):
        mark(f"work-{i}")
        time.sleep(0.05)
        return x * 2
    @delayed
    def total(xs):
        mark("total")
        return float(sum(x.sum() for x in xs))
    loaded = [load(i) for i in range(30)]
    found = total([work(i, x) for i, x in enumerate(loaded)]).compute(scheduler=scheduler)
    assert found == 2 * 1000 * sum(range(30))
elif what == "draws":
    @delayed
    def draw(i):
        mark(f"draw-{i}")
        time.sleep(0.02)
        return int.from_bytes(os.urandom(6), "big")
    @delayed
    def negate(i, x):
        mark(f"negate-{i}")
        time.sleep(0.05)
        return -x
    @delayed
    def square(i, x):
        mark(f"square-{i}")
        time.sleep(0.05)
        return x * x
    drawn = [draw(i) for i in range(20)]
    negated = [negate(i, x) for i, x in enumerate(drawn)]
    squared = [square(i, x) for i, x in enumerate(drawn)]
    a, b = dask.compute(negated, squared, scheduler=scheduler)
    assert all(y == x * x for x, y in zip(a, b)), (a, b)
report = last_report()
print(report.tasks, report.reused, flush=True)
"""


@pytest.mark.parametrize(
    ("what", "total", "number"),
    [
        ("cholesky", 21, signal.SIGKILL),
        ("delayed", 61, signal.SIGKILL),
        ("draws", 60, signal.SIGKILL),
        ("draws", 60, signal.SIGINT),
    ],
)
def test_a_client_that_is_stopped_loses_nothing_that_was_committed(
    aws: Any, credentials: dict[str, str], marks: Marks, what: str, total: int, number: int
) -> None:
    def client(seed: int) -> subprocess.Popen[str]:
        arguments = [what, str(marks.path), aws.function, aws.bucket, aws.endpoint_url]
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **credentials,
                "PYTHONPATH": str(ROOT),
                "PYTHONHASHSEED": str(seed),
            },
        )

    killed = client(1)
    try:
        assert eventually(lambda: sum(marks.counts().values()) >= total // 2, 60)
    finally:
        killed.send_signal(number)
        killed.communicate(timeout=30)
    record = kept_runs.read("killed")
    assert record is not None
    assert record.status == ("running" if number == signal.SIGKILL else "failed")
    done = sum(marks.counts().values())
    assert done < total

    second = client(2)
    try:
        out, errors = second.communicate(timeout=120)
    finally:
        second.kill()
        second.communicate()
    assert second.returncode == 0, errors
    reused = int(out.split()[1])
    assert reused > 0
    again = sum(count - 1 for count in marks.counts().values())
    # What was in flight when the client was killed may not have been committed.
    assert again <= 4 + 0.05 * done, (done, again, marks.counts())
    assert len(marks.counts()) == total
