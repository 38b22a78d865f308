"""What faults and integrity cost: ``python -m benchmarks.faults``.

Three measurements on the embedded AWS behind a proxy that fails as it is told
(:mod:`tests.faults.proxy`), each with what it is compared with in the same rounds:

* *failures*: calls of 0.2 s and the sum of their results, one invocation each, while 30 % of the
  invocations fail (the worker is killed, 500, 503, a broken connection before or after the work),
  over the time without.
* *throttles*: calls of 0.2 s with a window ten times as wide as what Lambda lets run, over the same
  with the window that it lets run and no throttle.
* *tags*: ``(x @ x).sum()``, the matrix product of ``benchmarks.peers``, as planned by default, and
  one of half the side with one invocation for each task, which writes every block to S3.  The
  seconds over those of a run in which tags are neither made nor compared, on both sides; and the
  processor time inside the HMACs, over all processor time of client and workers (the emulator's
  not counted: AWS's does not cost the user time).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array as da

from dask_lambda import LambdaScheduler
from dask_lambda.local import LocalAWS
from lambda_worker import codec
from tests.faults.deploy import FAULTY, deploy, use_credentials
from tests.faults.plans import INTENSITIES, Faults
from tests.faults.proxy import Proxy

SECONDS = 0.2
#: What Lambda lets run at the same time, and how much more is wanted.
ALLOWED, WANTED = 6, 60

#: The function of the third measurement: it notes, or leaves out, what the tags take.
TAGS = """
import os, time
from lambda_worker import codec, handler as worker

tag, spent = codec._tag, []

def timed(body, secret, name):
    started = time.thread_time()
    try:
        return tag(body, secret, name)
    finally:
        spent.append(time.thread_time() - started)

codec._tag = timed if os.environ["TAGS"] else lambda body, secret, name: bytes(32)

def handler(event, context):
    started = time.process_time()
    reply = worker.handler(event, context)
    with open(os.environ["SPENT"], "a") as file:
        file.write(f"{sum(spent)} {time.process_time() - started}\\n")
    spent.clear()
    return reply
"""


def call(i: int) -> int:
    """Take a while."""
    time.sleep(SECONDS)
    return i


def compute(scheduler: LambdaScheduler, count: int) -> float:
    """Return the seconds of so many calls and their sum."""
    made = [dask.delayed(call)(i) for i in range(count)]
    started = time.perf_counter()
    total = dask.delayed(sum)(made).compute(scheduler=scheduler, plan="none")
    seconds = time.perf_counter() - started
    assert total == count * (count - 1) // 2
    return seconds


def failures(aws: LocalAWS, rounds: int, count: int) -> None:
    """Print what failing invocations cost."""
    without, with_faults, shares = [], [], []
    with Proxy(aws.endpoint_url) as proxy:
        function = deploy(aws, "failures", **FAULTY, environment={"AWS_ENDPOINT_URL_S3": proxy.url})
        with connect(aws, proxy.url, function, ALLOWED) as scheduler:
            compute(scheduler, 2 * ALLOWED)  # start processes
            for seed in range(rounds):
                without.append(compute(scheduler, count))
                proxy.decide = faults = Faults(seed, INTENSITIES["30 % of invocations fail"])
                proxy.seen.clear()
                with_faults.append(compute(scheduler, count))
                shares.append(faults.injected.total() / proxy.seen["invoke"])
                proxy.decide = None
    print(f"{count} calls of {SECONDS} s, {ALLOWED} at a time")
    print(f"  without faults                   {statistics.median(without):9.2f} s")
    print(f"  {statistics.median(shares):4.0%} of invocations fail         ", end="")
    print(f"{statistics.median(with_faults):9.2f} s   ", end="")
    print(f"ratio {statistics.median(map(div, with_faults, without)):5.2f}")


def throttles(aws: LocalAWS, rounds: int, count: int) -> None:
    """Print what a storm of throttles costs."""
    allowed, storm, refused = [], [], []
    with (
        Proxy(aws.endpoint_url) as proxy,
        connect(aws, proxy.url, aws.function, ALLOWED) as modest,
        connect(aws, proxy.url, aws.function, WANTED) as greedy,
    ):
        compute(modest, 2 * ALLOWED)
        for _ in range(rounds):
            proxy.plan()
            allowed.append(compute(modest, count))
            proxy.limit(concurrency=ALLOWED)
            storm.append(compute(greedy, count))
            assert greedy.last_report is not None
            refused.append(greedy.last_report.throttles)
            # What it has learned of the limit is not for the next round.
            greedy.close()
    print(f"{count} calls of {SECONDS} s, of which {ALLOWED} may run at a time")
    print(f"  window {ALLOWED:<4}                      {statistics.median(allowed):9.2f} s")
    print(f"  window {WANTED:<4} {statistics.median(refused):9,.0f} throttles  ", end="")
    print(f"{statistics.median(storm):9.2f} s   ", end="")
    print(f"throughput {statistics.median(map(div, allowed, storm)):5.2f}")


def tags(aws: LocalAWS, rounds: int, size: int) -> None:
    """Print what integrity costs."""
    with tempfile.TemporaryDirectory() as directory:
        spent = Path(directory) / "spent"
        functions = {
            tagged: deploy(
                aws,
                f"tags-{tagged}",
                files={"tags.py": TAGS},
                handler="tags.handler",
                environment={"TAGS": tagged, "SPENT": str(spent)},
            )
            for tagged in ("yes", "")
        }
        for plan, side in {"auto": size, "none": size // 2}.items():
            seconds: dict[str, list[float]] = {"yes": [], "": []}
            hmacs, shares = [], []
            for each in range(rounds + 1):
                for tagged in ("yes", "") if each % 2 else ("", "yes"):
                    spent.write_text("")
                    with (
                        tags_of_client(bool(tagged)) as ours,
                        connect(aws, aws.endpoint_url, functions[tagged], ALLOWED) as scheduler,
                    ):
                        wall, cpu = time.perf_counter(), time.process_time()
                        product(side).compute(scheduler=scheduler, plan=plan)
                        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    if not each:  # processes were started
                        continue
                    seconds[tagged].append(wall)
                    if tagged:
                        lines = [line.split() for line in spent.read_text().splitlines()]
                        hmacs.append(sum(ours) + sum(float(line[0]) for line in lines))
                        shares.append(hmacs[-1] / (cpu + sum(float(line[1]) for line in lines)))
            ratio = statistics.median(map(div, seconds["yes"], seconds[""]))
            print(f"(x @ x).sum(), {side:,} x {side:,} in chunks of 512 x 512, plan {plan}")
            print(f"  with tags                        {statistics.median(seconds['yes']):9.2f} s")
            print(
                f"  without                          {statistics.median(seconds['']):9.2f} s   ",
                end="",
            )
            print(f"ratio {ratio:5.2f}")
            print(
                f"  HMACs on client and workers      {statistics.median(hmacs):9.2f} s   ", end=""
            )
            print(f"{statistics.median(shares):5.1%} of their processor time")


def product(size: int) -> da.Array:
    """Return the product of matrices of ``benchmarks.peers``, summed."""
    x = da.random.default_rng(1).random((size, size), chunks=512)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", da.PerformanceWarning)
        return (x @ x).sum()


@contextmanager
def tags_of_client(tagged: bool) -> Iterator[list[float]]:
    """Note what tags take in this process, or leave them out."""
    spent: list[float] = []
    tag = codec._tag

    def timed(body: memoryview, secret: bytes, name: str) -> bytes:
        started = time.thread_time()
        try:
            return tag(body, secret, name)
        finally:
            spent.append(time.thread_time() - started)

    def none(body: memoryview, secret: bytes, name: str) -> bytes:
        return bytes(codec.TAG_BYTES)

    codec._tag = timed if tagged else none
    try:
        yield spent
    finally:
        codec._tag = tag


@contextmanager
def connect(
    aws: LocalAWS, endpoint_url: str, function: str, window: int
) -> Iterator[LambdaScheduler]:
    """Connect to the embedded AWS as to AWS, so that nothing but the proxy limits the window."""
    scheduler = LambdaScheduler(
        backend="aws",
        function=function,
        bucket=aws.bucket,
        region=aws.region,
        endpoint_url=endpoint_url,
        concurrency=window,
    )
    try:
        yield scheduler
    finally:
        scheduler.close()


def div(a: float, b: float) -> float:
    """Divide."""
    return a / b


def main() -> None:
    """Print all measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--size", type=int, default=4096, help="of the matrix")
    parser.add_argument("--only", choices=["failures", "throttles", "tags"])
    arguments = parser.parse_args()
    rounds = arguments.rounds
    work: dict[str, Callable[[LocalAWS], Any]] = {
        "failures": lambda aws: failures(aws, rounds, arguments.calls),
        "throttles": lambda aws: throttles(aws, rounds, arguments.calls),
        "tags": lambda aws: tags(aws, rounds, arguments.size),
    }
    with LocalAWS.start(concurrency=WANTED) as aws:
        use_credentials(aws)
        for name, measure in work.items():
            if arguments.only in (None, name):
                measure(aws)


if __name__ == "__main__":
    main()
