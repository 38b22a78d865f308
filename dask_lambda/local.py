"""The embedded AWS: S3, Lambda and IAM on this machine, without an account and without Docker.

MiniStack, an emulator that is a Python package, runs as a child process on the loopback
interface.  :mod:`dask_lambda.local_start` starts it with bucket, role and function; it ends with
this process, however that ends (:mod:`dask_lambda.local_supervisor`).  One can also be kept
running for several processes (``dask-lambda local start``).

May import: the standard library, :mod:`dask_lambda.local_start`, local_process, config, errors.

Notes
-----
The server answers only requests with an access key that is drawn at each start: another user of
the machine, and a web page in the user's browser, can reach a loopback port too, and who may
create a Lambda function may run code (:mod:`dask_lambda.local_server`).
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

from dask_lambda.config import MAX_MEMORY, MAX_TIMEOUT, MIN_MEMORY
from dask_lambda.errors import ConfigurationError, LocalAWSError
from dask_lambda.local_process import lock_is_held, poll_until, stop_supervisor, sweep
from dask_lambda.local_start import (
    DEFAULT_MEMORY,
    HANDLER,
    INVOCATIONS_PER_CORE,
    PortInUse,
    Start,
    available_cores,
    clients,
    ending,
    worker_code,
)

__all__ = ["LocalAWS"]

logger = logging.getLogger("dask_lambda")

INSTALL = "pip install '.[local]', in a checkout of dask_lambda"


class LocalAWS:
    """A running embedded AWS with bucket, role and function; make one with :meth:`start`.

    Attributes
    ----------
    endpoint_url : str
        Address of all its services.
    region, access_key_id, secret_access_key : str
        What to sign requests with.  They mean nothing anywhere else.
    function, bucket : str
        The function that runs tasks, and the bucket for their inputs and outputs.
    concurrency : int
        How many invocations may run at the same time (reserved concurrency, enforced).
    memory, timeout : int
        The function's memory in MB (reported to it, not enforced) and time-out in seconds.
    pid : int
        The supervisor's process id.  SIGTERM to it ends everything.
    server_pid : int
        The server's process id.
    directory : Path
        Private directory with everything that is on disk.
    """

    def __init__(self, state: dict[str, Any], supervisor: subprocess.Popen[bytes] | None = None):
        self.endpoint_url: str = state["endpoint_url"]
        self.region: str = state["region"]
        self.access_key_id: str = state["access_key_id"]
        self.secret_access_key: str = state["secret_access_key"]
        self.function: str = state["function"]
        self.bucket: str = state["bucket"]
        self.concurrency: int = state["concurrency"]
        self.memory: int = state["memory"]
        self.timeout: int = state["timeout"]
        self.pid: int = state["pid"]
        self.server_pid: int = state["server_pid"]
        self.directory = Path(state["directory"])
        self._fingerprint: dict[str, Any] = state["fingerprint"]
        self._supervisor = supervisor
        self._owner = os.getpid() if supervisor else None
        self._ended: str | None = None

    @property
    def is_shared(self) -> bool:
        """Whether it goes on when this process ends."""
        return self._supervisor is None

    def __repr__(self) -> str:
        return (
            f"<LocalAWS {self.endpoint_url} function={self.function!r} bucket={self.bucket!r} "
            f"concurrency={self.concurrency} pid={self.pid}>"
        )

    def __enter__(self) -> LocalAWS:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @staticmethod
    def start(
        *,
        concurrency: int | None = None,
        memory: int = DEFAULT_MEMORY,
        timeout: int = MAX_TIMEOUT,
        port: int | None = None,
        code: bytes | None = None,
        handler: str = HANDLER,
        directory: Path | None = None,
        detach: bool = False,
        log_level: int = logging.INFO,
    ) -> LocalAWS:
        """Start an embedded AWS and wait until its function can be invoked.

        Parameters
        ----------
        concurrency : int, optional
            Concurrent invocations, each one a process; default: three for each core that this
            process may use.
        memory, timeout : int
            Of the function, in MB and seconds.
        port : int, optional
            Default: a free one.
        code : bytes, optional
            Zip file of the function; default: the installed ``lambda_worker``.
        handler : str
            Its handler.
        directory : Path, optional
            Where to make the private directory that holds the data; default: the directory
            for temporary files.
        detach : bool
            Let it run on when this process ends.
        log_level : int
            Of the one line that says that it was started.

        Returns
        -------
        LocalAWS
            Ended by :meth:`stop`, and unless detached also when this process ends or when the
            object is garbage collected.

        Raises
        ------
        LocalAWSError
            It is not installed, the port is in use, or it did not start: with its log.
        ConfigurationError
            An argument is out of range.
        """
        if sys.platform == "win32":
            raise LocalAWSError(
                "the embedded AWS needs Linux or macOS (on Windows: WSL); or use real AWS"
            )
        if concurrency is None:
            concurrency = INVOCATIONS_PER_CORE * available_cores()
        _check_range("concurrency", concurrency, 1, 10_000)
        _check_range("memory", memory, MIN_MEMORY, MAX_MEMORY)
        _check_range("timeout", timeout, 1, MAX_TIMEOUT)
        if port is not None:
            _check_range("port", port, 1, 65_535)
        if importlib.util.find_spec("ministack") is None:
            raise LocalAWSError(
                f"the embedded AWS needs the package ministack: {INSTALL}; or configure a "
                "function to use real AWS"
            )
        code = worker_code() if code is None else code
        parent = Path(tempfile.gettempdir() if directory is None else directory)
        sweep(parent)
        # Another process may take a free port before the server does: then try another one.
        attempts = 3 if port is None else 1
        while True:
            attempts -= 1
            try:
                start = Start(parent, port, concurrency, memory, timeout, code, handler, detach)
                aws = LocalAWS(*start.run())
            except PortInUse as error:
                if attempts == 0:
                    raise LocalAWSError(
                        f"port {error.port} on 127.0.0.1 is in use: choose another one, or none "
                        "to have a free one chosen"
                    ) from None
            else:
                break
        if not detach:
            _owned.add(aws)
        logger.log(
            log_level,
            "started an embedded AWS (S3 and Lambda in processes of this machine) at %s with %d "
            "concurrent invocations; to use real AWS: `dask-lambda deploy`, or configure a "
            "function and a bucket of yours (dask-lambda.function, dask-lambda.bucket)",
            aws.endpoint_url,
            aws.concurrency,
        )
        return aws

    def client(self, service: str) -> Any:
        """Return a botocore client of one of its services (``"s3"``, ``"lambda"``, ...)."""
        (client,) = clients(
            [service],
            self.endpoint_url,
            self.access_key_id,
            self.secret_access_key,
            self.directory / "aws-config",
        )
        return client

    def is_alive(self) -> bool:
        """Whether it is running."""
        if self._supervisor is not None and self._owner == os.getpid():
            return self._supervisor.poll() is None
        return lock_is_held(self.directory)

    def check(self, wait: float = 0.0) -> None:
        """Raise LocalAWSError, with the end of its log, if it is not running any more.

        Parameters
        ----------
        wait : float
            Seconds to wait for its end: a connection to a server that died breaks a little
            earlier than it is known why.
        """
        if not poll_until(lambda: not self.is_alive(), wait):
            return
        if self._ended is None:
            self._ended = self._last_words()
        raise LocalAWSError(f"the embedded AWS at {self.endpoint_url} has ended{self._ended}")

    def _last_words(self) -> str:
        if self._supervisor is None or self._owner != os.getpid():
            return ""
        if self._supervisor.stdout is None or self._supervisor.stdout.closed:
            return ""
        for line in self._supervisor.stdout.read().splitlines():
            message = json.loads(line)
            if "exit" in message:
                return ending(message)
        return ""

    def stop(self) -> None:
        """End it and remove what is on disk; does nothing if that was done, or is not ours.

        Only the process that started it can stop it (not a forked child, and not a process that
        uses the shared one: see :func:`stop_shared`).
        """
        if self._supervisor is None or self._owner != os.getpid():
            return
        _owned.discard(self)
        if self._ended is None:
            self._ended = " (it was stopped)" if self.is_alive() else self._last_words()
        stop_supervisor(self._supervisor, self.server_pid, self.directory)

    def _state(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**state, "directory": str(self.directory), "fingerprint": self._fingerprint}

    def _release_after_fork(self) -> None:
        """Close a forked child's copies of the pipes: the parent's end must be the only one."""
        assert self._supervisor is not None
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            if pipe is not None:
                pipe.close()
        self._supervisor = None


# Ending those that this process started.

_owned: weakref.WeakSet[LocalAWS] = weakref.WeakSet()


@atexit.register
def _stop_owned() -> None:
    """Stop those that this process started."""
    for aws in list(_owned):
        aws.stop()


def _disown_after_fork() -> None:
    """In a forked child nothing is owned, and the parent's pipes are not held open."""
    for aws in list(_owned):
        aws._release_after_fork()
    _owned.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_after_fork)


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ConfigurationError(f"{name} must be between {low} and {high}, not {value!r}")
