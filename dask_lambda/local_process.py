"""The processes and the directory of an embedded AWS: whether they are there, and how they end.

May import: the standard library.  The supervisor (:mod:`dask_lambda.local_supervisor`) holds a lock
in the directory for as long as it lives; what is asked here is asked of that lock, since process
ids are given to others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Seconds that stopping may take before the client ends the processes itself.
STOP_TIMEOUT = 10.0
#: How the names of the private directories begin.
PREFIX = "dask-lambda-"


def lock_is_held(directory: Path) -> bool:
    """Whether the supervisor of this directory lives."""
    import fcntl

    try:
        with open(directory / "lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def terminate(pid: int, directory: Path) -> None:
    """End another process's supervisor; its lock is held, so the id is its own."""
    with _ignoring_missing():
        os.kill(pid, signal.SIGTERM)
    if not poll_until(lambda: not lock_is_held(directory), STOP_TIMEOUT):
        with _ignoring_missing():
            os.kill(pid, signal.SIGKILL)
        poll_until(lambda: not lock_is_held(directory), STOP_TIMEOUT)
    shutil.rmtree(directory, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove directories whose supervisor was killed together with its client."""
    for path in parent.glob(PREFIX + "*"):
        try:
            if path.stat().st_uid != os.getuid() or not (path / "lock").exists():
                continue
        except OSError:
            continue
        if not lock_is_held(path):
            shutil.rmtree(path, ignore_errors=True)


def stop_supervisor(
    supervisor: subprocess.Popen[bytes], server_pid: int | None, directory: Path
) -> None:
    """End a supervisor of this process, and do its work if it could not."""
    if supervisor.stdin is not None:
        with _ignoring_missing():
            supervisor.stdin.close()
    elif supervisor.poll() is None:
        supervisor.terminate()
    try:
        supervisor.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()
    if supervisor.stdout is not None:
        supervisor.stdout.close()
    if directory.exists():  # the supervisor was killed
        if server_pid is not None:
            with _ignoring_missing():
                os.killpg(server_pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _ignoring_missing() -> Iterator[None]:
    """A process or a pipe that is gone is what was wanted."""
    try:
        yield
    except (ProcessLookupError, PermissionError, BrokenPipeError):
        return


def poll_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Tell whether a condition becomes true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
