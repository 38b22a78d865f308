"""Starting an embedded AWS: the server with its environment, then bucket, role and function.

May import: the standard library, botocore (late), :mod:`dask_lambda.local_process`, lifecycle,
errors; ``lambda_worker`` only as files to deploy.

Notes
-----
* Objects live in files below a private directory (``S3_PERSIST=1``), so that the server's memory
  does not grow with the data.
* The function's role and its policy are enforced (MiniStack's ``AUTH=true``), and workers have
  temporary credentials, as on AWS.
* The server and the workers see a short list of the user's environment variables only, as on
  Lambda, and none that configures AWS.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.metadata
import importlib.util
import io
import json
import os
import secrets
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from dask_lambda import lifecycle, local_server, local_supervisor
from dask_lambda.errors import LocalAWSError
from dask_lambda.local_process import PREFIX, stop_supervisor
from lambda_worker.protocol import HASH_SEED

REGION = "us-east-1"
FUNCTION = "dask-lambda"
BUCKET = "dask-lambda-local"
#: What clients have left behind goes after so many days, if it has the usual prefix.
PREFIX_OF_OBJECTS = "dask-lambda"
EXPIRY_DAYS = 1
ROLE = "dask-lambda-worker"
HANDLER = "lambda_worker.handler.handler"
#: Memory at which a Lambda function gets one whole core.
DEFAULT_MEMORY = 1769
#: Concurrent invocations for each core: one computes while the others move data or wait.
INVOCATIONS_PER_CORE = 3
#: Seconds until a server that does not answer is given up.
START_TIMEOUT = 60.0

#: What the server and the workers inherit.  No AWS_*, no DASK_*, no secrets of the user's.
INHERITED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ"),
    *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "PYTHONUTF8", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    *("http_proxy", "https_proxy", "all_proxy"),
)
#: One BLAS thread a worker: there is one worker for each concurrent invocation.
FUNCTION_ENVIRONMENT = {
    "PYTHONHASHSEED": HASH_SEED,
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class PortInUse(Exception):
    """Another process listens on the port."""

    def __init__(self, port: int):
        super().__init__(port)
        self.port = port


class Start:
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
            made = clients(
                ["s3", "iam", "lambda"],
                self.endpoint_url,
                self.account,
                self.secret,
                self.directory / "aws-config",
            )
            server_pid = self._message(supervisor, deadline)["pid"]
            self._wait_until_healthy(supervisor, deadline)
            self._create(*made)
        except BaseException as error:
            if supervisor is None:
                shutil.rmtree(self.directory, ignore_errors=True)
            else:
                stop_supervisor(supervisor, server_pid, self.directory)
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
                    raise PortInUse(self.port)
                raise LocalAWSError("the embedded AWS ended at its start" + ending(message))
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
            s3.put_bucket_lifecycle_configuration(
                Bucket=BUCKET,
                LifecycleConfiguration={"Rules": lifecycle.rules(PREFIX_OF_OBJECTS, EXPIRY_DAYS)},
            )
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
                    "s3:AbortMultipartUpload",
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


def clients(
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


def _usable_port(port: int | None) -> int:
    wanted = 0 if port is None else port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except PermissionError as error:
            raise LocalAWSError(f"port {port} is reserved: choose one above 1023") from error
        except OSError:
            raise PortInUse(wanted) from None
        chosen: int = probe.getsockname()[1]
        return chosen


def _absolute_paths(paths: str) -> str:
    return os.pathsep.join(os.path.abspath(path) for path in paths.split(os.pathsep) if path)


def _policy(*actions: str, **fields: Any) -> str:
    statement = {"Effect": "Allow", "Action": actions, **fields}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def ending(message: dict[str, Any]) -> str:
    """Describe the supervisor's message that the server has ended."""
    log = str(message.get("log", "")).strip()
    return f" (exit code {message.get('exit')})" + (f"; the end of its log:\n{log}" if log else "")
