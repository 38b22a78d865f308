"""What `dask-lambda doctor` finds of functions that are deployed."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from importlib import metadata

import pytest

from dask_lambda.config import Settings
from dask_lambda.deploy import record
from dask_lambda.deploy.artifact import Archive, Layer, Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.doctor import examine
from dask_lambda.local import LocalAWS
from lambda_worker.environment import FILE, Deployed
from tests.account_helpers import TWO, _leaves_nothing, account, deploy, package

__all__ = ["_leaves_nothing", "account", "package"]

pytestmark = pytest.mark.local


def with_packages(package: Package, packages: dict[str, str], listed: set[str]) -> Package:
    """Return a package whose environment says that it has these versions."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        told = Deployed("feed", packages, frozenset(listed)).to_json()
        file.writestr(f"python/{FILE}", told)
    archive = Archive.of(buffer.getvalue())
    return replace(package, layers=(Layer("versions", archive, archive.sha256),))


@pytest.fixture
def _credentials(aws: LocalAWS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", aws.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", aws.secret_access_key)


@pytest.mark.usefixtures("_credentials")
@pytest.mark.parametrize(
    ("theirs", "listed", "result", "said"),
    [
        ({"numpy": "1.0.0"}, {"numpy"}, "failed", "numpy 1.0.0, here {numpy}"),
        ({"tornado": "1.0"}, set(), "warning", "tornado 1.0, here {tornado}; it works"),
        ({"not-installed-here": "1.0"}, {"not-installed-here"}, "passed", "the same as here"),
    ],
)
def test_the_packages_of_all_functions_are_compared_with_what_is_installed(
    account: Account,
    package: Package,
    theirs: dict[str, str],
    listed: set[str],
    result: str,
    said: str,
) -> None:
    done = deploy(account, with_packages(package, theirs, listed), TWO)
    given = {k.replace("-", "_"): v for k, v in record.configuration(done.record).items()}
    here = {name: metadata.version(name) for name in ("numpy", "tornado")}
    found = examine(Settings.resolve(**given))
    checks = [each for each in found if each.name.startswith("versions in ")]
    assert [each.name for each in checks] == [
        "versions in dask-lambda-1769",
        "versions in dask-lambda-3538",
    ]
    assert {each.result for each in checks} == {result}
    assert said.format(**here) in checks[0].said
    assert ("dask-lambda deploy" in checks[0].advice) == (result != "passed")
