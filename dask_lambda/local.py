"""The embedded AWS: S3, Lambda and IAM on this machine, without an account and without Docker.

MiniStack, an emulator that is a Python package, runs as a child process on the loopback
interface; this module starts it, creates bucket, role and function in it, and makes sure that
it ends with this process, however that ends (:mod:`dask_lambda.local_supervisor`).  One can also
be kept running for several processes (``dask-lambda local start``).

May import: the standard library, botocore, :mod:`dask_lambda.errors`; ``lambda_worker`` only as
files to deploy.

Notes
-----
* The server answers only requests with an access key that is drawn at each start: another user
  of the machine, and a web page in the user's browser, can reach a loopback port too, and who
  may create a Lambda function may run code (:mod:`dask_lambda.local_server`).
* The function's role and its policy are enforced (MiniStack's ``AUTH=true``), and workers have
  temporary credentials, as on AWS.
* Objects live in files below a private directory (``S3_PERSIST=1``), so that the server's memory
  does not grow with the data.
* The server and the workers see a short list of the user's environment variables only, as on
  Lambda, and none that configures AWS.
"""

from __future__ import annotations

import atexit
import hashlib
import http.client
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dask_lambda import local_server, local_supervisor
from dask_lambda.errors import ConfigurationError, LocalAWSError

__all__ = [
    "LocalAWS",
    "available_cores",
    "fingerprint",
    "lock_is_held",
    "terminate",
    "worker_code",
]

logger = logging.getLogger("dask_lambda")

REGION = "us-east-1"
FUNCTION = "dask-lambda"
BUCKET = "dask-lambda-local"
ROLE = "dask-lambda-worker"
HANDLER = "lambda_worker.handler.handler"
#: Memory at which a Lambda function gets one whole core.
DEFAULT_MEMORY = 1769
#: Lambda's longest time-out, in seconds.
MAX_TIMEOUT = 900
#: Concurrent invocations for each core: one computes while the others move data or wait.
INVOCATIONS_PER_CORE = 3
#: Seconds until a server that does not answer is given up.
START_TIMEOUT = 60.0
#: Seconds that stopping may take before the client ends the processes itself.
STOP_TIMEOUT = 10.0
PREFIX = "dask-lambda-"
INSTALL = 'pip install "dask_lambda[local]"'

#: What the server and the workers inherit.  No AWS_*, no DASK_*, no secrets of the user's.
INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONUTF8", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    *("http_proxy", "https_proxy", "all_proxy"),
)
#: One BLAS thread a worker: there is one worker for each concurrent invocation.  A fixed hash seed:
#: tasks that partition strings by hash() must agree (distributed's workers have the same one).
FUNCTION_ENVIRONMENT = {
    "PYTHONHASHSEED": "6640",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


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
        _check_range("memory", memory, 128, 10_240)
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
        _sweep(parent)
        # Another process may take a free port before the server does: then try another one.
        attempts = 3 if port is None else 1
        while True:
            attempts -= 1
            try:
                start = _Start(parent, port, concurrency, memory, timeout, code, handler, detach)
                aws = LocalAWS(*start.run())
            except _PortInUse as error:
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
            "concurrent invocations; to use real AWS, configure a function: "
            "dask.config.set({'dask-lambda.function': ...})",
            aws.endpoint_url,
            aws.concurrency,
        )
        return aws

    def client(self, service: str) -> Any:
        """Return a botocore client of one of its services (``"s3"``, ``"lambda"``, ...)."""
        (client,) = _clients(
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
        if not _poll_until(lambda: not self.is_alive(), wait):
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
                return _ending(message)
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
        _stop_supervisor(self._supervisor, self.server_pid, self.directory)

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


class _PortInUse(Exception):
    def __init__(self, port: int):
        super().__init__(port)
        self.port = port


class _Start:
    """One attempt to start a server."""

    def __init__(
        self,
        parent: Path,
        port: int | None,
        concurrency: int,
        memory: int,
        timeout: int,
        code: bytes,
        handler: str,
        detach: bool,
    ):
        self.parent = parent
        self.port = _usable_port(port)
        self.concurrency = concurrency
        self.memory = memory
        self.timeout = timeout
        self.code = code
        self.handler = handler
        self.detach = detach
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        # To MiniStack, a 12-digit access key is the root user of the account of that number.
        self.account = str(10**11 + secrets.randbelow(9 * 10**11))
        self.secret = secrets.token_hex(20)

    def run(self) -> tuple[dict[str, Any], subprocess.Popen[bytes]]:
        """Start it; return its state and its supervisor."""
        try:
            self.directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self.parent))
        except OSError as error:
            raise LocalAWSError(
                f"the embedded AWS cannot make a directory in {self.parent}: {error.strerror}; "
                "choose another one (TMPDIR)"
            ) from error
        supervisor = None
        server_pid = None
        try:
            supervisor = self._spawn()
            deadline = time.monotonic() + START_TIMEOUT
            # This takes as long as the server's start, so do it meanwhile.
            clients = _clients(
                ["s3", "iam", "lambda"],
                self.endpoint_url,
                self.account,
                self.secret,
                self.directory / "aws-config",
            )
            server_pid = self._message(supervisor, deadline)["pid"]
            self._wait_until_healthy(supervisor, deadline)
            self._create(*clients)
        except BaseException as error:
            if supervisor is None:
                shutil.rmtree(self.directory, ignore_errors=True)
            else:
                _stop_supervisor(supervisor, server_pid, self.directory)
            if isinstance(error, OSError):
                raise LocalAWSError(f"the embedded AWS could not be started: {error}") from error
            raise
        state = {
            "endpoint_url": self.endpoint_url,
            "region": REGION,
            "access_key_id": self.account,
            "secret_access_key": self.secret,
            "function": FUNCTION,
            "bucket": BUCKET,
            "concurrency": self.concurrency,
            "memory": self.memory,
            "timeout": self.timeout,
            "pid": supervisor.pid,
            "server_pid": server_pid,
            "directory": str(self.directory),
            "fingerprint": fingerprint(self.code),
        }
        return state, supervisor

    def _spawn(self) -> subprocess.Popen[bytes]:
        mode = "detached" if self.detach else "attached"
        supervisor = [sys.executable, "-I", "-S", str(local_supervisor.__file__)]
        server = [sys.executable, "-P", str(local_server.__file__)]
        with open(self.directory / "log", "ab") as log:
            return subprocess.Popen(
                [*supervisor, str(self.directory), mode, *server],
                stdin=subprocess.DEVNULL if self.detach else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(),
                cwd=self.directory,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """Return the server's whole environment, which its workers inherit."""
        aws_config = self.directory / "aws-config"
        aws_config.write_text("[default]\n")
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in INHERITED or name.startswith("LC_")
        }
        if "PYTHONPATH" in environment:
            environment["PYTHONPATH"] = _absolute_paths(environment["PYTHONPATH"])
        return {
            **environment,
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "TMPDIR": str(self.directory),
            # The root user's; a worker gets those of the function's role.
            "AWS_ACCESS_KEY_ID": self.account,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            # In place of the user's files in ~/.aws, which tasks must not see.
            "AWS_CONFIG_FILE": str(aws_config),
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            # MiniStack's settings.
            "AUTH": "true",
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(self.port),
            "MINISTACK_ACCOUNT_ID": self.account,
            "MINISTACK_HOST": "127.0.0.1",
            "MINISTACK_REGION": REGION,
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(self.directory / "s3"),
            "STATE_DIR": str(self.directory / "state"),
            "IOT_MTLS_ENABLED": "0",
            "SFTP_ENABLED": "0",
            "LOG_LEVEL": "WARNING",
            "LAMBDA_EXECUTOR": "local",
            "LAMBDA_ACCOUNT_CONCURRENCY": str(self.concurrency + 1000),
            # An invocation takes one of its threads.
            "MINISTACK_WORKER_THREADS": str(max(64, self.concurrency + 32)),
            # It would remove containers of other MiniStacks at its start.
            "DOCKER_HOST": f"unix://{self.directory}/no-docker",
        }

    def _message(self, supervisor: subprocess.Popen[bytes], deadline: float) -> dict[str, Any]:
        """Return the supervisor's next message."""
        assert supervisor.stdout is not None
        ready, _, _ = select.select([supervisor.stdout], [], [], deadline - time.monotonic())
        line = supervisor.stdout.readline() if ready else b""
        if not line:
            raise LocalAWSError("the embedded AWS could not be started" + self._log())
        message: dict[str, Any] = json.loads(line)
        return message

    def _wait_until_healthy(self, supervisor: subprocess.Popen[bytes], deadline: float) -> None:
        assert supervisor.stdout is not None
        while not self._is_healthy():
            if select.select([supervisor.stdout], [], [], 0.005)[0]:
                message = self._message(supervisor, deadline)
                if "already in use" in message.get("log", "").lower():
                    raise _PortInUse(self.port)
                raise LocalAWSError("the embedded AWS ended at its start" + _ending(message))
            if time.monotonic() > deadline:
                raise LocalAWSError(
                    f"the embedded AWS did not answer within {START_TIMEOUT:g} s" + self._log()
                )

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/_ministack/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _log(self) -> str:
        text = local_supervisor._tail(str(self.directory / "log")).strip()
        return f"; the end of its log:\n{text}" if text else " (its log is empty)"

    def _create(self, s3: Any, iam: Any, functions: Any) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            s3.create_bucket(Bucket=BUCKET)
            role = iam.create_role(
                RoleName=ROLE,
                AssumeRolePolicyDocument=_policy(
                    "sts:AssumeRole", Principal={"Service": "lambda.amazonaws.com"}
                ),
            )
            iam.put_role_policy(
                RoleName=ROLE,
                PolicyName="objects",
                PolicyDocument=_policy(
                    "s3:GetObject",
                    "s3:PutObject",
                    "s3:DeleteObject",
                    "s3:ListBucket",
                    Resource=[f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
                ),
            )
            functions.create_function(
                FunctionName=FUNCTION,
                Runtime=f"python{sys.version_info.major}.{sys.version_info.minor}",
                Handler=self.handler,
                Role=role["Role"]["Arn"],
                Code={"ZipFile": self.code},
                MemorySize=self.memory,
                Timeout=self.timeout,
                Environment={"Variables": FUNCTION_ENVIRONMENT},
            )
            functions.put_function_concurrency(
                FunctionName=FUNCTION, ReservedConcurrentExecutions=self.concurrency
            )
        except (BotoCoreError, ClientError) as error:
            raise LocalAWSError(
                f"the embedded AWS refused to be set up: {error}{self._log()}"
            ) from error


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


# Small parts.


def fingerprint(code: bytes) -> dict[str, Any]:
    """Return what must be equal for one process's tasks to run in another one's workers."""
    return {
        "python": sys.version,
        "environment": sys.prefix,
        "python_path": _absolute_paths(os.environ.get("PYTHONPATH", "")),
        "worker_code": hashlib.sha256(code).hexdigest(),
        **{
            f"{package}_version": importlib.metadata.version(package)
            for package in ("dask", "cloudpickle", "numpy")
        },
    }


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_code() -> bytes:
    """Return the installed ``lambda_worker`` as a zip file; equal files give equal bytes."""
    spec = importlib.util.find_spec("lambda_worker")
    if spec is None or not spec.submodule_search_locations:
        raise LocalAWSError("the package lambda_worker is not installed: reinstall dask_lambda")
    root = Path(spec.submodule_search_locations[0])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*.py")):
            name = zipfile.ZipInfo(f"lambda_worker/{path.relative_to(root).as_posix()}")
            name.external_attr = 0o644 << 16
            archive.writestr(name, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _clients(
    services: list[str], endpoint_url: str, access_key: str, secret: str, config_file: Path
) -> list[Any]:
    """Make botocore clients that no setting of the user's has a part in."""
    import botocore.session
    from botocore.config import Config

    session = botocore.session.Session()
    for name, value in {
        "config_file": str(config_file),
        "credentials_file": os.devnull,
        "profile": "default",
    }.items():
        session.set_config_variable(name, value)
    config = Config(
        connect_timeout=5,
        read_timeout=START_TIMEOUT,
        retries={"mode": "standard", "total_max_attempts": 3},
        proxies={},
        use_fips_endpoint=False,
        use_dualstack_endpoint=False,
        s3={"addressing_style": "path"},
    )
    return [
        session.create_client(
            service,
            region_name=REGION,
            endpoint_url=endpoint_url,
            aws_access_key_id=access_key,
            aws_secret_access_key=secret,
            config=config,
        )
        for service in services
    ]


def _check_range(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ConfigurationError(f"{name} must be between {low} and {high}, not {value!r}")


def _usable_port(port: int | None) -> int:
    wanted = 0 if port is None else port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except PermissionError as error:
            raise LocalAWSError(f"port {port} is reserved: choose one above 1023") from error
        except OSError:
            raise _PortInUse(wanted) from None
        chosen: int = probe.getsockname()[1]
        return chosen


def _absolute_paths(paths: str) -> str:
    return os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep) if path)


def _policy(*actions: str, **fields: Any) -> str:
    statement = {"Effect": "Allow", "Action": actions, **fields}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def _ending(message: dict[str, Any]) -> str:
    log = str(message.get("log", "")).strip()
    return f" (exit code {message.get('exit')})" + (f"; the end of its log:\n{log}" if log else "")


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
    if not _poll_until(lambda: not lock_is_held(directory), STOP_TIMEOUT):
        with _ignoring_missing():
            os.kill(pid, signal.SIGKILL)
        _poll_until(lambda: not lock_is_held(directory), STOP_TIMEOUT)
    shutil.rmtree(directory, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Remove directories whose supervisor was killed together with its client."""
    for path in parent.glob(PREFIX + "*"):
        try:
            if path.stat().st_uid != os.getuid() or not (path / "lock").exists():
                continue
        except OSError:
            continue
        if not lock_is_held(path):
            shutil.rmtree(path, ignore_errors=True)


def _stop_supervisor(
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


def _poll_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
