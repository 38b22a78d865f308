"""The process that keeps an embedded AWS and ends it.  May import: the standard library only.

:mod:`dask_lambda.local` runs this file by its path, so that nothing else of the package is
imported, with three kinds of arguments: the private state directory, ``attached`` or
``detached``, and the command of the server.  The supervisor

* lives in a session of its own, so that Ctrl-C in the client's terminal does not reach it;
* holds a lock on ``lock`` in the state directory for as long as it lives, which is how other
  processes know that it does (a lock, unlike a process id, cannot be somebody else's);
* ends when its standard input does (``attached``: the other end of that pipe is in the client,
  and the kernel closes it however the client ends), or on SIGTERM, or when the server ends;
* then ends the server with all processes that came from it, and removes the state directory.

On standard output it writes one line of JSON when the server was started, ``{"pid": ...}``, and
one when the server ended by itself, ``{"exit": ..., "log": ...}``.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

#: Seconds between SIGTERM and SIGKILL.
GRACE = 1.0
#: Characters of the log's end that are reported when the server ends by itself.
LOG_TAIL = 4000

# From <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    """Supervise one server; return the exit code."""
    directory, mode, *command = arguments
    wake, wake_write = os.pipe()
    for end in (wake, wake_write):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    stopping = []
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)

    _lock(directory)
    prctl = _prctl()
    if prctl:
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server become our children
    supervisor = os.getpid()

    def die_with_supervisor() -> None:
        if prctl:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != supervisor:
                os._exit(1)

    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=sys.stderr,
        start_new_session=True,
        preexec_fn=die_with_supervisor,
    )
    _report({"pid": server.pid})
    status: int | None = None
    try:
        watched = [wake] if mode == "detached" else [wake, sys.stdin.fileno()]
        while not stopping and status is None:
            ready, _, _ = select.select(watched, [], [])
            if wake in ready:
                while _read(wake):
                    pass
                status = _reap(server.pid)
            if sys.stdin.fileno() in ready and not _read(sys.stdin.fileno()):
                break
        if status is not None:
            code = os.waitstatus_to_exitcode(status)
            _report({"exit": code, "log": _tail(os.path.join(directory, "log"))})
    finally:
        _end(server.pid)
        _remove(directory)
    return 0 if status is None else 1


def _lock(directory: str) -> None:
    """Take the lock before it is visible under its name: who sees it unlocked may sweep."""
    path = os.path.join(directory, "lock")
    handle = os.open(path + ".new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.write(handle, str(os.getpid()).encode())
    os.rename(path + ".new", path)


def _prctl() -> Callable[[int, int], int] | None:
    """Return Linux's ``prctl``."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function: Callable[[int, int], int] = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    return function


def _report(message: dict[str, object]) -> None:
    try:
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")
    except OSError:  # nobody listens any more
        return


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 4096)
    except BlockingIOError:
        return b""


def _reap(server: int) -> int | None:
    """Wait for children that have ended; return the status of the server, if it is one."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == server:
            found = status


def _end(server: int) -> None:
    """End the server's process group, and then whatever left the group."""
    deadline = time.monotonic() + GRACE
    if _signal_group(server, signal.SIGTERM):
        while time.monotonic() < deadline:
            _reap(server)
            if not _signal_group(server, 0):
                break
            time.sleep(0.005)
        _signal_group(server, signal.SIGKILL)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        _reap(server)
        children = _children()
        if not children and not _signal_group(server, 0):
            break
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.005)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a process group; return whether there was anybody."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS, when only zombies are left
        return False
    return True


def _children() -> list[int]:
    """Return the ids of this process's children (Linux; elsewhere nothing is adopted)."""
    if not sys.platform.startswith("linux"):
        return []
    children = []
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                # pid (command) state parent ...; the command may contain anything
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            children.append(int(name))
    return children


def _tail(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()[-LOG_TAIL:]
    except OSError as error:
        return f"(no log: {error})"


def _remove(directory: str) -> None:
    for _ in range(10):  # a process that is just being killed may still create a file
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.exists(directory):
            return
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
