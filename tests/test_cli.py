"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dask_lambda import cli

pytestmark = pytest.mark.local

ROOT = Path(cli.__file__).parents[2]


class Shell:
    def __init__(self, directory: Path):
        self.environment = {
            **os.environ,
            "DASK_LAMBDA_STATE_DIR": str(directory / "state"),
            "TMPDIR": str(directory),
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "dask_lambda", *arguments)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.cli("local", "stop")


def test_start_status_stop(shell: Shell, tmp_path: Path) -> None:
    started = shell.cli("local", "start", "--concurrency", "2", "--json")
    assert started.returncode == 0, started.stderr
    aws = json.loads(started.stdout)
    assert aws["started"]
    assert aws["concurrency"] == 2
    supervisor = psutil.Process(aws["pid"])

    again = shell.cli("local", "start")
    assert again.returncode == 0
    assert "already running" in again.stdout
    for name in ("endpoint_url", "function", "bucket", "pid"):
        assert str(aws[name]) in again.stdout
    assert "dask-lambda local stop" in again.stdout

    status = shell.cli("local", "status", "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["pid"] == aws["pid"]

    program = "from dask_lambda.local_shared import local_aws; print(local_aws().endpoint_url)"
    assert shell.run("-c", program).stdout.strip() == aws["endpoint_url"]

    other = shell.cli("local", "start", "--concurrency", "3")
    assert other.returncode == 1
    assert "Traceback" not in other.stderr
    assert "concurrency is 2, not 3" in other.stderr

    stopped = shell.cli("local", "stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert not supervisor.is_running() or supervisor.status() == psutil.STATUS_ZOMBIE
    again = shell.cli("local", "stop", "--json")
    assert (again.returncode, json.loads(again.stdout)) == (0, {"stopped": False})
    assert shell.cli("local", "status").returncode == 3
    assert not list(tmp_path.glob("dask-lambda-*"))
    assert not list((tmp_path / "state").iterdir())


def test_version_and_help(shell: Shell) -> None:
    assert shell.cli("--version").stdout.startswith("dask-lambda ")
    assert "local" in shell.cli("--help").stdout


def test_the_command_line_itself_imports_only_click() -> None:
    ours = {"dask_lambda.cli", "dask_lambda.cli.common", "dask_lambda.cli.env"}
    allowed = {"__future__", "json", "typing", "click", *ours}
    for path in Path(cli.__file__).parent.glob("*.py"):
        source = path.read_text()
        lines = [line for line in source.splitlines() if line.startswith(("import", "from"))]
        assert {line.split()[1] for line in lines} <= allowed, path.name
