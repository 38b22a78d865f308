"""One system as a process of its own, driven line by line and measured.  May import: psutil."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

#: Seconds between two looks at the memory; one takes some 20 ms of processor time.
SAMPLE_SECONDS = 0.5
#: Seconds that a system may take to end by itself.
END_SECONDS = 10.0
ROOT = Path(__file__).parents[2]


class SystemFailed(Exception):
    """A system ended, or said nothing in time."""


class SystemProcess:
    """A process that runs :func:`benchmarks.peers.system.serve`.

    Parameters
    ----------
    command : list of str
    environment : dict
        Its whole environment.
    directory : Path
        Its private one, for temporary files and its log.
    servers : iterable of int
        Processes outside of its tree whose children work for it (but not they themselves).
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        directory: Path,
        servers: Iterable[int] = (),
    ):
        self._log = directory / "log"
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=ROOT,
                text=True,
            )
        self._root = psutil.Process(self._process.pid)
        self._servers = [psutil.Process(pid) for pid in servers]
        self._started: set[psutil.Process] = {self._root}
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self._peak = 0
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._memory())

    def _memory(self) -> int:
        mine = _tree(self._root)
        self._started.update(mine)
        others = [child for server in self._servers for child in _tree(server)[1:]]
        return sum(map(memory, [*mine, *others]))

    def answer(self, timeout: float) -> dict[str, Any]:
        """Return the next answer.

        Raises
        ------
        SystemFailed
            With the end of its log.
        """
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise SystemFailed(f"no answer after {timeout:g} s") from None
        if line is None:
            last = self._log.read_text("utf-8", "replace").strip().splitlines()[-1:]
            raise SystemFailed("ended: " + "".join(last)[:200])
        content: dict[str, Any] = json.loads(line)
        return content

    def round(self, timeout: float) -> dict[str, Any]:
        """Do the workload once; return the answer with ``peak_bytes`` added."""
        assert self._process.stdin is not None
        self._peak = 0
        with suppress(OSError):  # it has ended: then the answer says so
            print("go", file=self._process.stdin, flush=True)
        answer = self.answer(timeout)
        return {**answer, "peak_bytes": max(self._peak, self._memory())}

    def end(self) -> None:
        """End it and all processes that it started, which may have left its tree; idempotent."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._started.update(_tree(self._root))
        self._ended.set()
        self._sampler.join()
        for process in self._started:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # psutil looks whether the number is another process's by now
        self._process.wait()


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def memory(process: psutil.Process) -> int:
    """Return a process's share of memory: pages that several processes map are divided by them."""
    try:
        info = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
    return int(getattr(info, "pss", 0) or info.uss)


def private_environment(directory: Path) -> dict[str, str]:
    """Return an environment without the user's settings, one BLAS thread for each process."""
    inherited = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "USER", "PYTHONPATH")
    return {
        **{name: os.environ[name] for name in inherited if name in os.environ},
        "HOME": str(directory),
        "TMPDIR": str(directory),
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONWARNINGS": "ignore",
    }
