"""The rounds: all systems in turn, on one embedded AWS for each workload.

May import: the rest of this package, and dask_lambda through :mod:`benchmarks.peers.emulator`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import counting_server, emulator
from benchmarks.peers.process import ROOT, SystemFailed, SystemProcess, private_environment
from benchmarks.peers.workloads import WORKLOADS, Size

OURS = "dask_lambda"
#: Seconds after which a system's round is its last one.
LONG_ROUND = 30.0
PEERS_DIRECTORY = ROOT / ".venv" / "peers"


@dataclass(frozen=True)
class System:
    """How to run a system, and what it cannot do.

    Attributes
    ----------
    arguments : sequence of str
        Of the interpreter.
    environment : str or None
        Directory of its virtual environment in ``.venv/peers``; None: the one of this process.
    lacks : dict
        Why a workload is not available.
    notes : dict
        What is different in how it does a workload.
    most : dict
        Calls or leaves that are enough for a system that takes long for each.
    """

    arguments: Sequence[str]
    environment: str | None = None
    lacks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)

    def size(self, workload: str, size: Size) -> Size:
        """Return the size in which it does a workload."""
        items = WORKLOADS[workload].items
        return {
            name: min(value, self.most.get(workload, value)) if name == items else value
            for name, value in size.items()
        }

    @property
    def interpreter(self) -> Path:
        """Return the path of its Python."""
        if self.environment is None:
            return Path(sys.executable)
        return PEERS_DIRECTORY / self.environment / "bin" / "python"


NO_ARRAYS = "it maps and reduces functions, and has no arrays"
SYSTEMS: dict[str, System] = {
    OURS: System(["-m", "benchmarks.peers.on_dask", "lambda"]),
    "dask.distributed": System(["-m", "benchmarks.peers.on_dask", "distributed"]),
    "cubed": System(
        ["-m", "benchmarks.peers.on_cubed"],
        "cubed",
        lacks={"cholesky": "its array API has no Cholesky factorisation"},
        notes={
            "map": "map_blocks over an array with one number in a chunk",
            "tree": "sum with split_every=2 of an array with one number in a chunk",
        },
    ),
    "lithops": System(
        ["-m", "benchmarks.peers.on_lithops"],
        "lithops",
        lacks=dict.fromkeys(("matmul", "cholesky", "tsqr"), NO_ARRAYS),
        notes={"tree": "map_reduce: one call adds all, which is less work than a tree"},
        most={"map": 100, "tree": 100},
    ),
}


@dataclass
class Outcome:
    """What one system did in one workload.

    Attributes
    ----------
    rounds : list of dict
        ``round``, ``seconds``, ``peak_bytes``, ``s3`` (requests and bytes as the server counted
        them), ``invocations``, and ours has its ``report``.
    problem : str
        Why there are no (more) rounds: it is not available, failed, or took too long.
    """

    workload: str
    system: str
    size: Size
    rounds: list[dict[str, Any]] = field(default_factory=list)
    problem: str = ""
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


def measure(
    workload: str, systems: Sequence[str], *, size: Size, rounds: int, timeout: float
) -> list[Outcome]:
    """Run a workload on all systems, in turn, and end everything that was started."""
    outcomes = {
        name: Outcome(workload, name, SYSTEMS[name].size(workload, size)) for name in systems
    }
    with ExitStack() as stack:
        aws = stack.enter_context(emulator.started(name for name in systems if name != OURS))
        running: dict[str, SystemProcess] = {}
        for name in systems:
            system, outcome = SYSTEMS[name], outcomes[name]
            outcome.note = system.notes.get(workload, "")
            if workload in system.lacks:
                outcome.problem = f"not available: {system.lacks[workload]}"
                continue
            if not system.interpreter.exists():
                outcome.problem = f"not installed in {system.interpreter.parents[1]}"
                continue
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{name}-")))
            sizes = [json.dumps(outcome.size), json.dumps(WORKLOADS[workload].warm)]
            process = SystemProcess(
                [str(system.interpreter), *system.arguments, workload, *sizes],
                {**private_environment(directory), **emulator.environment(aws, name)},
                directory,
                servers=[aws.server_pid] if name == OURS else [],
            )
            stack.callback(process.end)
            try:
                outcome.versions = process.answer(timeout)["versions"]
            except SystemFailed as error:
                outcome.problem = f"failed to start: {error}"
                continue
            running[name] = process
        for number in range(rounds):
            for name in _turns(list(running), number):
                outcome = outcomes[name]
                emulator.take_counts(aws)
                try:
                    answer = running[name].round(timeout)
                except SystemFailed as error:
                    outcome.problem = f"failed: {error}"
                    running.pop(name).end()
                    continue
                counts = emulator.take_counts(aws)
                bucket = aws.bucket if name == OURS else emulator.bucket(name)
                answer["round"] = number
                answer["s3"] = counts.get(bucket, {})
                invoked = counts.get(counting_server.INVOCATIONS, {})
                answer["invocations"] = invoked.get("invocations", 0) if name == OURS else None
                if not WORKLOADS[workload].is_right(outcome.size, answer["value"]):
                    outcome.problem = f"failed: the result {answer['value']} is wrong"
                    running.pop(name).end()
                    continue
                outcome.rounds.append(answer)
                if answer["seconds"] > LONG_ROUND and name != OURS:
                    running.pop(name).end()
    return list(outcomes.values())


def _turns(names: list[str], number: int) -> Iterator[str]:
    """Let another system begin each round."""
    for i in range(len(names)):
        yield names[(i + number) % len(names)]
