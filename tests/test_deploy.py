"""Deploying to the embedded AWS, as a new user does: with an empty home directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dask_lambda.deploy.aws import Account
from dask_lambda.local import LocalAWS
from tests.deploy_helpers import inventory

pytestmark = pytest.mark.local

ROOT = Path(__file__).parents[1]
LADDER = ("--memory", "1769", "--memory", "3538")

#: README's example, a hundredth as long in each direction: this machine is all of AWS here.
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLE = README.split("```python\n")[1].split("```")[0].replace("_000", "0")

PROGRAM = """
import dask.array as da
from dask_lambda import lambda_get, last_report
x = da.ones((40, 40), chunks=(20, 20))
print((x @ x.T).sum().compute(scheduler=lambda_get), last_report().invocations)
"""


class Home:
    """A user of a machine, who has nothing but credentials."""

    def __init__(self, directory: Path, variables: dict[str, str]):
        self.directory = directory
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("AWS_", "DASK_", "XDG_"))}
        self.environment = {
            **kept,
            "HOME": str(directory),
            "PYTHONPATH": str(ROOT),
            "AWS_EC2_METADATA_DISABLED": "true",
            **variables,
        }

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=400,
        )

    def cli(self, *arguments: str, code: int = 0) -> str:
        done = self.python("-m", "dask_lambda", *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout if code in (0, 3, 4) else done.stderr

    def files(self) -> list[str]:
        found = self.directory.rglob("*")
        return sorted(str(p.relative_to(self.directory)) for p in found if p.is_file())


@pytest.fixture
def home(tmp_path: Path, aws: LocalAWS, credentials: dict[str, str]) -> Home:
    variables = {**credentials, "AWS_REGION": aws.region, "AWS_ENDPOINT_URL": aws.endpoint_url}
    return Home(tmp_path, variables)


@pytest.fixture
def account(aws: LocalAWS) -> Account:
    return Account.of_local(aws)


@pytest.fixture(autouse=True)
def _leaves_nothing(account: Account) -> Iterator[None]:
    before = inventory(account)
    yield
    assert inventory(account) == before


def test_from_an_account_to_a_result_and_back(home: Home) -> None:
    deployed = home.cli("deploy", "--worker-only", *LADDER, "--yes")
    assert "+ create function dask-lambda-1769" in deployed
    assert "dask-lambda hello" in deployed
    again = json.loads(home.cli("deploy", "--worker-only", *LADDER, "--yes", "--json"))
    assert again["done"] == []
    assert again["functions"] == ["dask-lambda-1769", "dask-lambda-3538"]

    said = json.loads(home.cli("hello", "--json"))
    assert not said["local"]
    assert said["endpoint_url"].startswith("http://127.0.0.1")  # it does not pass for AWS
    assert said["place"]["function"] == "dask-lambda-1769"
    assert said["place"]["region"] == "us-east-1"
    assert said["cold"]

    done = home.python("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    result, invocations = done.stdout.split()
    assert float(result) == 40 * 40 * 40
    assert int(invocations) > 0

    assert "(200, 200), chunks=(20, 20)" in EXAMPLE
    done = home.python("-c", f"{EXAMPLE}\nprint(y)")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(200**3 / 4, rel=0.1)
    assert home.cli("cost").startswith("no runs are kept:")  # each run's report said what it cost

    status = json.loads(home.cli("status", "--json"))
    assert status["deployed"]
    assert status["remarks"] == []
    assert [each["state"] for each in status["functions"]] == ["Active", "Active"]

    lines = [json.loads(line) for line in home.cli("logs", "--json").splitlines()]
    records = [line["record"] for line in lines if "record" in line]
    assert len(records) >= int(invocations)
    run = records[-1]["run"]
    assert records[-1]["work"][0]["key"]
    of_run = home.cli("logs", "--run", run).splitlines()
    assert of_run
    assert all(run[:8] in line for line in of_run)

    checks = json.loads(home.cli("doctor", "--json"))["checks"]
    assert {c["result"] for c in checks} == {"passed"}, checks

    destroyed = home.cli("destroy", "--yes")
    assert "delete bucket" in destroyed
    assert home.cli("status", code=3).startswith("nothing of 'dask-lambda' is deployed")
    assert not home.files()


# -- with the packages themselves: make packaging ------------------------------------------------

WHERE_NUMPY_IS = """
import dask
from dask_lambda import lambda_get

@dask.delayed
def where():
    import numpy, lambda_worker
    return numpy.__file__, lambda_worker.__file__

print(*where().compute(scheduler=lambda_get))
"""

#: Lambda's own runtime of Python 3.11 has too old a C library for wheels of NumPy and SciPy.
LAYERS_FIT = sys.version_info >= (3, 12)


@pytest.fixture
def home_with_cache(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home directory whose cache is kept, and from which no docker is seen."""
    home.environment["XDG_CACHE_HOME"] = str(ROOT / ".venv" / "deployed")
    home.environment["PATH"] = str(tmp_path_factory.mktemp("bin"))
    return home


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.skipif(not LAYERS_FIT, reason="these packages need an image with this Python")
def test_from_an_account_to_a_result_and_back_with_layers(home_with_cache: Home) -> None:
    home = home_with_cache
    built = json.loads(home.cli("env", "build", "--json"))
    assert built["form"] == "layers"
    assert built["unzipped"] <= 200e6
    deployed = home.cli("deploy", "--yes")
    assert "create layer dask-lambda-packages-1" in deployed
    assert json.loads(home.cli("deploy", "--yes", "--json"))["done"] == []
    assert json.loads(home.cli("hello", "--json"))["cold"]
    numpy, worker = home.python("-c", WHERE_NUMPY_IS).stdout.split()
    assert "site-packages" not in numpy  # but a layer's
    assert Path(worker).parents[1] != ROOT  # but the function's own code
    done = home.python("-c", f"{EXAMPLE}\nprint(y)")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(200**3 / 4, rel=0.1)
    assert home.cli("cost").startswith("no runs are kept:")
    assert "delete layer dask-lambda-packages-1" in home.cli("destroy", "--yes")
    assert not home.files()


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.skipif(LAYERS_FIT, reason="these packages fit into layers with this Python")
def test_where_only_an_image_would_do_it_says_how_to_build_one(home_with_cache: Home) -> None:
    said = home_with_cache.cli("deploy", "--yes", code=1)
    assert "docker, which builds container images, is not installed here" in said
    assert "docker push " in said
    assert not home_with_cache.files()
