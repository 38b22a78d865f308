"""What `dask-lambda doctor` finds of functions that are deployed."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata

import pytest

from dask_lambda.config import Settings
from dask_lambda.deploy import record
from dask_lambda.deploy.artifact import Layer, Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.deployment import Deployed as Done
from dask_lambda.deploy.doctor import Check, examine
from dask_lambda.local import LocalAWS
from lambda_worker.environment import FILE, Deployed
from tests.account_helpers import TWO, _leaves_nothing, account, deploy, package, zipped

__all__ = ["_leaves_nothing", "account", "package"]

pytestmark = pytest.mark.local


def with_packages(package: Package, packages: dict[str, str], listed: set[str]) -> Package:
    """Return a package whose environment says that it has these versions."""
    told = Deployed("feed", packages, frozenset(listed)).to_json()
    archive = zipped({f"python/{FILE}": told})
    return replace(package, layers=(Layer("versions", archive, archive.sha256),))


@pytest.fixture
def _credentials(aws: LocalAWS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", aws.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", aws.secret_access_key)


def versions_found(done: Done) -> list[Check]:
    """Examine what Dask is configured for, as a process that begins now would."""
    given = {k.replace("-", "_"): v for k, v in record.configuration(done.record).items()}
    found = examine(Settings.resolve(**given))
    return [each for each in found if each.name.startswith("versions in ")]


@pytest.mark.usefixtures("_credentials")
@pytest.mark.parametrize(
    ("theirs", "listed", "result", "said"),
    [
        ({"numpy": "1.0.0"}, {"numpy"}, "failed", "numpy: worker 1.0.0, client {numpy}"),
        ({"tornado": "1.0"}, set(), "warning", "tornado: worker 1.0, client {tornado}; it works"),
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
    here = {name: metadata.version(name) for name in ("numpy", "tornado")}
    checks = versions_found(done)
    assert [each.name for each in checks] == [
        "versions in dask-lambda-1769",
        "versions in dask-lambda-3538",
    ]
    assert {each.result for each in checks} == {result}
    assert said.format(**here) in checks[0].said
    assert ("dask-lambda deploy" in checks[0].advice) == (result != "passed")


@pytest.mark.usefixtures("_credentials")
@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise RuntimeError('it is broken')", "it is broken"),
        ("def handler(event, context): return {'refused': 'politely'}", "politely"),
        ("def handler(event, context): return [1, 2]", "[1, 2]"),
    ],
)
def test_what_is_no_worker_is_said_to_be_none_with_what_it_says(
    account: Account, package: Package, code: str, said: str
) -> None:
    other = replace(package, code=zipped({"other.py": code}), handler="other.handler")
    done = deploy(account, other)
    (check,) = versions_found(done)
    assert check.result == "failed"
    assert "it is no worker of ours" in check.said
    assert said in check.said
    assert check.advice == "dask-lambda deploy"
