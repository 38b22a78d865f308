"""The map and a reduction in Lithops, with its localhost backend and S3.

Lithops maps functions and reduces what they return in one call of its own (``map_reduce``); a tree
of additions would take a job for each level.  Version 1 of the localhost backend is chosen since it
forks a process for each call; version 2, the default, starts an interpreter for each, which took
four times as long here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lithops

from benchmarks.peers.system import CORES, Function, serve


def increment(x: int) -> int:
    """Do next to nothing."""
    return x + 1


def total(results: list[int]) -> int:
    """Add all."""
    return sum(results)


def trivial_calls(executor: Any, calls: int) -> float:
    """Map."""
    executor.map(increment, range(calls))
    return float(sum(executor.get_result(show_progressbar=False)))


def reduction(executor: Any, leaves: int) -> float:
    """Map and reduce."""
    executor.map_reduce(increment, range(leaves), total)
    return float(executor.get_result(show_progressbar=False))


WORK = {"map": trivial_calls, "tree": reduction}


@contextmanager
def on_localhost() -> Iterator[dict[str, Function]]:
    """With as many processes as cores."""
    config = {
        "lithops": {
            "backend": "localhost",
            "storage": "aws_s3",
            "log_level": "WARNING",
            "data_cleaner": False,  # it would work during the rounds of the others
        },
        "localhost": {"version": 1, "worker_processes": CORES, "runtime": sys.executable},
        "aws_s3": {
            "region": os.environ["AWS_REGION"],
            "access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
            "storage_bucket": os.environ["BENCHMARK_BUCKET"],
        },
    }
    with lithops.FunctionExecutor(config=config) as executor:

        def run(work: Any, **size: int) -> tuple[float, dict[str, Any]]:
            return work(executor, **size), {}

        yield {name: partial(run, work) for name, work in WORK.items()}


if __name__ == "__main__":
    serve(["lithops", "boto3"], on_localhost)
