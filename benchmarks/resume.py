"""What a killed client loses: ``python -m benchmarks.resume``.

On an embedded AWS that outlives the client.  A computation is run from scratch; then it is run
under another name, its client is killed with SIGKILL when half of its tasks have begun, and a
second client computes the same.  Printed are the share of the begun work that was done twice, the
seconds of the second client next to those from scratch, and whether the results are the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from dask_lambda.local import LocalAWS

CLIENT = """
import hashlib, os, sys, time
import dask, dask.array as da, numpy as np
from dask_lambda import LambdaScheduler, last_report

what, name, marks, function, bucket, endpoint = sys.argv[1:]

def marked(block, block_info=None):
    handle = os.open(marks, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{what}-{block_info[None]['chunk-location']}\\n".encode())
    os.close(handle)
    time.sleep(0.1)
    return block

n, chunk = 2048, 256
rng = da.random.default_rng(1)
x = rng.random((n, n), chunks=chunk)
if what == "matmul":
    y = (x @ rng.random((n, n), chunks=chunk)).map_blocks(marked, dtype=float, meta=np.ones((0, 0)))
else:
    z = (x @ x.T + n * da.eye(n, chunks=chunk)).map_blocks(
        marked, dtype=float, meta=np.ones((0, 0)))
    y = da.linalg.cholesky(z, lower=True)
started = time.perf_counter()
scheduler = LambdaScheduler(backend="aws", function=function, bucket=bucket, region="us-east-1",
                            endpoint_url=endpoint, concurrency=4, resume=name)
found = y.compute(scheduler=scheduler)
seconds = time.perf_counter() - started
report = last_report()
print(seconds, report.tasks, report.reused, hashlib.sha256(found.tobytes()).hexdigest())
"""
TOTAL = {"matmul": 64, "cholesky": 36}  # marked tasks


def counts(marks: Path) -> Counter[str]:
    """Return how often each task has begun."""
    return Counter(marks.read_text().splitlines()) if marks.exists() else Counter()


def client(aws: LocalAWS, what: str, name: str, marks: Path) -> subprocess.Popen[str]:
    """Start a client."""
    arguments = [what, name, str(marks), aws.function, aws.bucket, aws.endpoint_url]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLIENT, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "AWS_ACCESS_KEY_ID": aws.access_key_id,
            "AWS_SECRET_ACCESS_KEY": aws.secret_access_key,
            "DASK_LAMBDA_STATE_DIR": str(marks.parent / "state"),
        },
    )


def finished(process: subprocess.Popen[str]) -> tuple[float, int, int, str]:
    """Return what a client measured."""
    out, _ = process.communicate(timeout=600)
    seconds, tasks, reused, digest = out.split()
    return float(seconds), int(tasks), int(reused), digest


def measure(aws: LocalAWS, what: str, directory: Path) -> None:
    """Kill a client half-way, and print what the next one has to do."""
    whole, _, _, digest = finished(client(aws, what, f"scratch-{what}", directory / "scratch"))
    marks = directory / what
    killed = client(aws, what, what, marks)
    while counts(marks).total() < TOTAL[what] // 2 and killed.poll() is None:
        time.sleep(0.005)
    killed.kill()
    killed.communicate()
    begun = counts(marks).total()
    rest, tasks, reused, again = finished(client(aws, what, what, marks))
    twice = sum(count - 1 for count in counts(marks).values())
    print(
        f"{what:9} {begun} of {TOTAL[what]} marked tasks begun at the kill; {twice} of these again "
        f"({twice / begun:.1%}; up to 4 were in flight); {reused} tasks reused, {tasks} run; "
        f"{rest:.1f} s after {whole:.1f} s from scratch; same result: {again == digest}"
    )


def main() -> None:
    """Run the benchmark."""
    with LocalAWS.start(concurrency=4) as aws, tempfile.TemporaryDirectory() as directory:
        for what in TOTAL:
            measure(aws, what, Path(directory))
            (Path(directory) / "scratch").unlink()


if __name__ == "__main__":
    main()
