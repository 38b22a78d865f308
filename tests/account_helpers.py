"""An account in which things are deployed: what the tests of deployments share."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dask_lambda.deploy import artifact, deployment, status
from dask_lambda.deploy.artifact import Archive, Layer, Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.deployment import Deployed, Prepared
from dask_lambda.deploy.destroy import destroy, prepare_removal
from dask_lambda.deploy.resources import Options
from dask_lambda.local import LocalAWS
from tests.deploy_helpers import answer_truly, inventory

ONE = Options(memory=(1769,))
TWO = Options(memory=(1769, 3538))


@pytest.fixture(scope="module")
def package() -> Package:
    return artifact.worker_only()


@pytest.fixture(scope="module")
def account(aws: LocalAWS) -> Account:
    return Account.of_local(aws)


@pytest.fixture(autouse=True)
def _leaves_nothing(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Destroy what a test has deployed: then everything is as it was before."""
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("dask.config.PATH", str(tmp_path / "dask"))
    account._identity = None
    before = inventory(account)
    yield
    answer_truly()
    remove(account)
    assert inventory(account) == before
    assert not list((tmp_path / "dask").glob("*"))
    assert not list((tmp_path / "state" / "deployments").glob("*"))


def prepare(account: Account, package: Package, options: Options = ONE) -> Prepared:
    return deployment.prepare(account, options, package, "1.0")


def deploy(account: Account, package: Package, options: Options = ONE) -> Deployed:
    return deployment.deploy(prepare(account, package, options), sleep=briefly)


def briefly(seconds: float) -> None:
    """Look often: the embedded AWS takes half a second for a function."""
    time.sleep(min(seconds, 0.02))


def remove(account: Account, name: str = "dask-lambda", *, kept: bool = True) -> list[str]:
    return destroy(prepare_removal(account, status.known(account, name), kept=kept))


def verbs(prepared: Prepared) -> set[str]:
    return {step.verb for step in prepared.steps}


def zipped(files: dict[str, str]) -> Archive:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    return Archive.of(buffer.getvalue())


def layer(name: str, text: str) -> Layer:
    archive = zipped({f"python/{name}.py": text})
    return Layer(name, archive, archive.sha256)
