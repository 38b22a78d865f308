"""Every script in examples/ runs as it is, passes its check, and would notice a wrong answer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Computes in the script's own process and then returns something near the right answer.
WRONG_SCHEDULER = """
from concurrent.futures import Future
from types import SimpleNamespace

import dask
import numpy as np
import pandas as pd

dask.config.set({"dataframe.shuffle.method": "tasks"})


def spoil(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(spoil, value))
    if isinstance(value, str):
        return value + "x"
    if value is None:
        return value
    if isinstance(value, pd.DataFrame):
        return value.assign(**{name: value[name] - 1 for name in value.select_dtypes("number")})
    return value - 1


class LambdaCluster:
    # Threads of the script's own process, and a client that spoils what it gathers.
    dashboard_link = "nowhere"
    report = "no report"

    def __enter__(self):
        from distributed import LocalCluster

        self.cluster = LocalCluster(
            n_workers=1, processes=False, dashboard_address=None, silence_logs=50
        )
        return self

    def __exit__(self, *exc_info):
        self.cluster.close()

    def get_client(self):
        from distributed import Client

        class WrongClient(Client):
            async def _gather(self, *arguments, **options):
                return spoil(await super()._gather(*arguments, **options))

        return WrongClient(self.cluster)


def lambda_get(graph, keys, **kwargs):
    return spoil(dask.get(graph, keys, **kwargs))


class WrongFuture(Future):
    key = "call"
    report = SimpleNamespace(seconds=0.0, cost_usd=0.0, peak_memory_mb=0.0, cold_start=False)

    def __init__(self, value, k=0):
        super().__init__()
        self.k = k
        self.right = value
        self.set_result(spoil(value))

    def logs(self):
        return ""


def right(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(right, value))
    return value.right if isinstance(value, WrongFuture) else value


class LambdaExecutor:
    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def submit(self, function, *arguments):
        return WrongFuture(function(*right(arguments)))

    def scatter(self, value):
        return WrongFuture(value)

    def starmap(self, function, iterable):
        return (self.submit(function, *arguments).result() for arguments in iterable)

    def map(self, function, *iterables):
        return self.starmap(function, zip(*iterables))

    def iterate(self, step, iterations, args):
        def last(argument):
            state = None
            for k in range(iterations):
                state = step(k, state, right(argument))
            return WrongFuture(state, iterations)

        return list(map(last, args))


def last_report():
    return "no report"
"""


def run(script: Path, *options: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run an example with `path` to import dask_lambda from, and nobody's AWS or Dask settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "DASK_"))}
    environment |= {"PYTHONPATH": str(path), "DASK_DASK_LAMBDA__BACKEND": "local"}
    return subprocess.run(
        [sys.executable, *options, script.name],
        cwd=script.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,  # below pytest's own limit, so that the failure names the script
    )


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.local
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_passes_its_check_and_prints_its_report(script: Path) -> None:
    done = run(script, path=ROOT)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result, check, report = done.stdout.partition("\ncheck passed: ")
    assert result.strip(), "no result printed"
    assert check, done.stdout
    assert "invocations" in report, done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_notices_a_wrong_answer(script: Path, tmp_path: Path) -> None:
    (tmp_path / "dask_lambda.py").write_text(WRONG_SCHEDULER)
    done = run(script, "-O", path=tmp_path)  # -O removes assert statements
    assert done.returncode == 1, f"{done.stdout}\n{done.stderr}"
    assert done.stderr.startswith("check failed: "), done.stderr
    assert "check passed" not in done.stdout


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example_is_in_the_table_of_the_readme(script: Path) -> None:
    assert f"[{script.name}]({script.name})" in (ROOT / "examples" / "README.md").read_text()
