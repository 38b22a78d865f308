"""What a system's process does: warm up, then a round for each line that it reads.

May import: the standard library.  Runs in the environments of the peers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

#: Does a workload in the given size and returns its result, and more to report if there is more.
Function = Callable[..., tuple[float, dict[str, Any]]]

#: Processes (or concurrent invocations) that a system may use for each core are its own affair,
#: but it is told the cores.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(
    packages: Iterable[str], open_system: Callable[[], AbstractContextManager[dict[str, Function]]]
) -> None:
    """Warm up as the arguments say, then measure a round for each line of standard input.

    Each answer is a line of JSON on the original standard output; whatever else is printed goes to
    standard error.

    Parameters
    ----------
    packages : iterable of str
        Whose versions are reported.
    open_system : callable
        Returns a context manager that gives the system's workloads by name.
    """
    name, size, warm = sys.argv[-3], json.loads(sys.argv[-2]), json.loads(sys.argv[-1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    with open_system() as functions:
        function = functions[name]
        function(**warm)
        answer(versions={package: version(package) for package in packages})
        for _ in sys.stdin:
            started = time.perf_counter()
            value, more = function(**size)
            answer(seconds=time.perf_counter() - started, value=value, **more)
