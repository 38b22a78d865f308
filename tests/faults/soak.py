"""Mixed graphs under random faults, for a while: ``python -m tests.faults.soak`` (``make soak``).

Each run has a seed, which says what is computed, how it is planned and sent, and which faults it
meets (:mod:`tests.faults.graphs`, :mod:`tests.faults.plans`); several are made at a time, by
threads that share two schedulers.  Whatever happens, a run must end, in the right answer or, if a
fault was fatal, in the error that says so; readers of one task must have seen the same value; and
nothing may be left in the bucket.  The table at the end counts what was not so, and the exit code
is 1 if anything was not.

``--seed S --runs 1`` repeats the run that was reported with seed S: the same graph, settings and
faults, as far as its requests come in the same order.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import random
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import psutil

from dask_lambda import LambdaScheduler
from dask_lambda.local import LocalAWS
from tests.faults import graphs
from tests.faults.deploy import FAULTY, deploy, use_credentials
from tests.faults.graphs import Case, Disagreement, Wrong
from tests.faults.plans import INTENSITIES, Dealer, Faults
from tests.faults.proxy import Proxy
from tests.helpers import eventually

#: Runs at the same time.
THREADS = 32
#: Between two looks at the bucket.
ROUND = 250
#: A run that takes longer hangs: the stalls and waits of the worst plan are a fraction of that.
HANG_SECONDS = 180.0
#: Of the function: what oversleeps it is killed by AWS.
FUNCTION_TIMEOUT = 20
#: How long the last invocations of runs that have ended may take, and what they wrote be there.
DRAIN_SECONDS = 60.0
#: Invocations at the same time, of the schedulers: most of them wait for what was stalled.
WINDOWS = (16, 8)

#: How often each intensity is chosen.
MIX = {
    "none": 0.2,
    "mild": 2.0,
    "heavy": 3.0,
    "30 % of invocations fail": 3.0,
    "throttles": 1.0,
    "duplicates": 2.0,
    "S3": 2.0,
    "fatal": 2.0,
}

ERRORS = ("wrong results", "duplicate effects", "lost", "hangs", "leftovers")


@dataclass(frozen=True)
class Setup:
    """All about a run that its seed says."""

    seed: int
    graph: str
    intensity: str
    settings: dict[str, Any]
    scheduler: int

    @staticmethod
    def of(seed: int, graph: str | None = None, intensity: str | None = None) -> Setup:
        """Draw what is not given."""
        rng = random.Random(seed)
        drawn_graph = rng.choice(list(graphs.GRAPHS))
        drawn = rng.choices(list(MIX), list(MIX.values()))[0]
        settings = {
            "plan": rng.choice(["auto", "none", "none"]),
            "inline_bytes": rng.choice([0, 1000, 65536]),
            "retries": rng.choice([0, 2]),
        }
        scheduler = rng.randrange(2)
        return Setup(seed, graph or drawn_graph, intensity or drawn, settings, scheduler)

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f'--seed {self.seed} --graph "{self.graph}" ({self.intensity}; {settings})'


@dataclass
class Outcome:
    """What became of a run."""

    setup: Setup
    faults: Faults
    problem: str = ""  #: one of :data:`ERRORS`, or nothing
    tasks: int = 0
    error: BaseException | None = None


@dataclass
class Table:
    """What is printed."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count a run."""
        counts = self.counts
        counts["runs"] += 1
        counts["faulted runs"] += bool(outcome.faults.injected)
        counts["runs that ended in the error of a fatal fault"] += bool(
            outcome.faults.fatal and outcome.error and not outcome.problem
        )
        counts["tasks"] += outcome.tasks
        self.faults += outcome.faults.injected
        if outcome.problem:
            counts[outcome.problem] += 1

    @property
    def bad(self) -> int:
        """How much was not as it should be."""
        return sum(self.counts[name] for name in ERRORS)

    def __str__(self) -> str:
        rows = [
            *(
                (name, self.counts[name])
                for name in (
                    "runs",
                    "faulted runs",
                    "runs that ended in the error of a fatal fault",
                    "tasks",
                    "invocations asked for",
                )
            ),
            ("faults injected", self.faults.total()),
            *((f"... {name}", count) for name, count in sorted(self.faults.items())),
            *((name, self.counts[name]) for name in ERRORS),
        ]
        lines = [f"| {name:<46} | {value:>9,} |" for name, value in rows]
        minutes = f"| {'minutes':<46} | {self.seconds / 60:>9.1f} |"
        return "\n".join([f"| {'':46} | {'':9} |", f"|{'-' * 48}|{'-' * 10}:|", *lines, minutes])


class Soak:
    """Runs cases under faults.  A context: it deploys functions and starts a proxy and schedulers.

    Parameters
    ----------
    aws : LocalAWS
    without : iterable of str
        Names of faults that do not happen.
    windows : sequence of int
        Invocations at the same time, of each of the two schedulers.
    """

    def __init__(
        self,
        aws: LocalAWS,
        without: Iterable[str] = (),
        windows: Sequence[int] = WINDOWS,
    ):
        self.aws = aws
        self.windows = windows
        self.without = frozenset(without)
        self.dealer = Dealer()
        self.proxy = Proxy(aws.endpoint_url, self.dealer)
        self.schedulers: list[LambdaScheduler] = []
        self._stack = ExitStack()
        self._functions: list[str] = []

    def __enter__(self) -> Soak:
        self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._stack.enter_context(self.proxy)
        for number, window in enumerate(self.windows):
            function = deploy(
                self.aws,
                f"{self.aws.function}-soak-{number}",
                **FAULTY,
                timeout=FUNCTION_TIMEOUT,
                environment={
                    "AWS_ENDPOINT_URL_S3": self.proxy.url,
                    **({"FAULTS_SMALL_PARTS": "1"} if number else {}),
                },
            )
            self._functions.append(function)
            scheduler = LambdaScheduler(
                backend="aws",
                function=function,
                bucket=self.aws.bucket,
                region=self.aws.region,
                endpoint_url=self.proxy.url,
                concurrency=window,
                timeout=FUNCTION_TIMEOUT,
            )
            self.schedulers.append(scheduler)
            self._stack.callback(scheduler.close)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
        if self.aws.is_alive():
            functions = self.aws.client("lambda")
            for name in self._functions:
                functions.delete_function(FunctionName=name)

    def run(self, setup: Setup) -> Outcome:
        """Compute one case; say what became of it."""
        place = self.directory / f"{setup.seed}-{time.monotonic_ns()}"
        place.mkdir()
        case = graphs.make(setup.graph, setup.seed, place)
        settings = {**setup.settings, **case.settings}
        intensity = INTENSITIES[setup.intensity]
        without = set(self.without)
        if case.error is not None or intensity.fatal:
            without.add("reset during")  # who fails does not wait for what nobody hears of
        faults = Faults(
            setup.seed,
            intensity,
            without,
            retries=settings["retries"] >= 2 and case.error is None,
        )
        outcome = Outcome(setup, faults)
        try:
            self._compute(case, settings, setup.scheduler, outcome)
            if case.error is not None:
                outcome.problem = "wrong results"
                outcome.error = Wrong("there was no error")
        except Wrong as error:
            outcome.problem, outcome.error = "wrong results", error
        except Disagreement as error:
            outcome.problem, outcome.error = "duplicate effects", error
        except Exception as error:
            outcome.error = error
            expected = tuple(kind for kind in (case.error, faults.fatal) if kind is not None)
            if not isinstance(error, expected):
                outcome.problem = "lost"
        return outcome

    def _compute(self, case: Case, settings: dict[str, Any], number: int, outcome: Outcome) -> None:
        scheduler = self.schedulers[1 if case.small_parts else number].get
        options = {"scheduler": scheduler, **settings}
        dealt: list[Any] = []

        def deal(collections: list[Any]) -> None:
            keys = graphs.keys_of(collections)
            self.dealer.add(outcome.faults, keys)
            dealt.extend(keys)
            outcome.tasks += len(keys)

        try:
            deal(case.collections)
            if not case.persist:
                case.check(dask.compute(*case.collections, **options))
                return
            kept = list(dask.persist(*case.collections, **options))
            case.check(dask.compute(*kept, **options))
            more = [graphs.again(each) for each in kept]
            deal(more)
            case.check(dask.compute(*more, **options))
        finally:
            self.dealer.remove(dealt)

    def leftovers(self) -> list[str]:
        """What is in the bucket when all runs have ended and AWS has nothing to do."""
        gc.collect()  # persisted collections may hang in reference cycles
        eventually(lambda: not self.proxy.in_flight, DRAIN_SECONDS)
        eventually(lambda: not self._objects(), DRAIN_SECONDS if self._objects() else 0)
        left = self._objects()
        delete = self.aws.client("s3").delete_object
        for name in left:  # the next round is not to blame
            delete(Bucket=self.aws.bucket, Key=name)
        return left

    def seeds_of(self, names: Iterable[str]) -> list[int]:
        """The seeds of the runs to which objects belong, as far as that is known."""
        return sorted({f.seed for n in names if (f := self.dealer.faults_of(n)) is not None})

    def _objects(self) -> list[str]:
        pages = self.aws.client("s3").get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self.aws.bucket)
        return [entry["Key"] for page in found for entry in page.get("Contents", [])]


class Hang(Exception):
    """A run does not end."""


def soak(soak: Soak, setups: Iterable[Setup], deadline: float, table: Table) -> None:
    """Make runs until there are no more, or no more time; what is not right is printed.

    Raises
    ------
    Hang
        After all stacks were printed.
    """
    setups = iter(setups)
    started = time.monotonic()
    with_more = True
    pool = ThreadPoolExecutor(THREADS, "soak")
    try:
        while with_more:
            with_more = _round(soak, setups, deadline, table, pool)
            left = soak.leftovers()
            if left:
                table.counts["leftovers"] += len(left)
                print(f"LEFT: {left} of seeds {soak.seeds_of(left)}")
            soak.dealer.forget()
            table.counts["invocations asked for"] = soak.proxy.seen["invoke"]
            table.seconds = time.monotonic() - started
            print(
                f"{table.seconds:6.0f} s: {table.counts['runs']:,} runs, "
                f"{table.faults.total():,} faults, {table.bad} bad",
                flush=True,
            )
    except Hang:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _round(
    soak: Soak, setups: Any, deadline: float, table: Table, pool: ThreadPoolExecutor
) -> bool:
    """Make the runs of a round; tell whether there are more."""
    running: dict[Future[Outcome], tuple[Setup, float]] = {}
    made, more = 0, True
    while running or (more and made < ROUND):
        while more and made < ROUND and len(running) < THREADS:
            setup = next(setups, None) if time.monotonic() < deadline else None
            if setup is None:
                more = False
                break
            made += 1
            running[pool.submit(soak.run, setup)] = setup, time.monotonic()
        done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        for future in done:
            running.pop(future)
            outcome = future.result()
            table.add(outcome)
            if outcome.problem:
                _tell(outcome)
        for setup, since in running.values():
            if time.monotonic() - since > HANG_SECONDS:
                table.counts["hangs"] += 1
                print(f"HANGS: {setup}", flush=True)
                faulthandler.dump_traceback(all_threads=True)
                raise Hang
    return more


def _tell(outcome: Outcome) -> None:
    print(f"{outcome.problem.upper()}: {outcome.setup}; faults: {dict(outcome.faults.injected)}")
    if outcome.error is not None:
        lines = traceback.format_exception(outcome.error)
        print("    " + "".join(lines[-6:]).replace("\n", "\n    "), flush=True)


def main() -> None:
    """Run, print the table, exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="at most (default 15)")
    parser.add_argument("--runs", type=int, default=100_000, help="at most")
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--graph", choices=list(graphs.GRAPHS))
    parser.add_argument("--intensity", choices=list(INTENSITIES))
    parser.add_argument("--without", default="", help="names of faults, separated by commas")
    arguments = parser.parse_args()
    setups = (
        Setup.of(seed, arguments.graph, arguments.intensity)
        for seed in range(arguments.seed, arguments.seed + arguments.runs)
    )
    table = Table()
    threads = set(threading.enumerate())
    with LocalAWS.start(concurrency=sum(WINDOWS)) as aws:
        server = psutil.Process(aws.server_pid)
        use_credentials(aws)
        deadline = time.monotonic() + 60 * arguments.minutes
        without = filter(None, arguments.without.split(","))
        context = Soak(aws, without)
        context.__enter__()
        try:
            soak(context, setups, deadline, table)
        except Hang:
            print(table, flush=True)
            aws.stop()
            os._exit(1)  # the thread that hangs would be waited for
        processes = server.children(recursive=True)
        context.__exit__()
    alive = [p for p in (server, *processes) if p.is_running() and p.status() != "zombie"]
    left = [t for t in threading.enumerate() if t not in threads and t.name != "asyncio_0"]
    for each in (*alive, *left):
        print(f"LEFT: {each}")
    table.counts["leftovers"] += len(alive) + len(left)
    print(table)
    sys.exit(1 if table.bad else 0)


if __name__ == "__main__":
    main()
