"""SnapStart: functions that are called through an alias of a version that has a snapshot.

The embedded AWS publishes versions and initialises an environment for each, as Lambda does; it
takes no snapshots of memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import dask.array as da
import pytest

import dask_lambda
from dask_lambda.deploy import artifact, cloudformation, policies, record, status
from dask_lambda.deploy.artifact import Archive, Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.deployment import Prepared
from dask_lambda.deploy.naming import Where, function_of
from dask_lambda.deploy.resources import NO_SNAPSHOTS, Options, blueprint
from dask_lambda.errors import ConfigurationError, DeploymentError
from tests.account_helpers import (
    ONE,
    _leaves_nothing,
    account,
    deploy,
    prepare,
    remove,
    verbs,
    zipped,
)
from tests.deploy_helpers import answer_as, answer_with, denied, refuse_large_functions

__all__ = ["_leaves_nothing", "account"]

pytestmark = pytest.mark.local

NAME = "dask-lambda-1769"
SNAPSTART = Options(memory=(1769,), snapstart=True)
BOTH = Options(memory=(1769, 3538), snapstart=True)
WHERE = Where("123456789012", "eu-west-1")


@pytest.fixture(scope="module")
def package() -> Package:
    """The worker as for Python 3.12: the embedded AWS runs it in this Python, whatever that is."""
    return replace(artifact.worker_only(), runtime="python3.12")


def versions(account: Account, name: str = NAME) -> list[str]:
    pages = account.pages("lambda", "ListVersionsByFunction", "Versions", FunctionName=name)
    return [each["Version"] for each in pages if each["Version"] != "$LATEST"]


def aliases(account: Account, name: str = NAME) -> dict[str, str]:
    pages = account.pages("lambda", "ListAliases", "Aliases", FunctionName=name)
    return {each["Name"]: each["FunctionVersion"] for each in pages}


def operations(prepared: Prepared) -> list[str]:
    return [call.operation for step in prepared.steps for call in step.calls]


def archive(text: str) -> Archive:
    return zipped({"lambda_worker/__init__.py": "", "lambda_worker/handler.py": text})


# -- there, changed, and back --------------------------------------------------------------------


def test_it_is_called_through_the_alias_of_a_version(
    account: Account,
    package: Package,
    credentials: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    done = deploy(account, package, SNAPSTART)
    (version,) = versions(account)
    assert aliases(account) == {"snapstart": version}
    settings = record.configuration(done.record)
    assert settings["function"] == f"{NAME}:snapstart"
    live = account.call("lambda", "GetFunctionConfiguration", FunctionName=settings["function"])
    assert live["SnapStart"] == {"ApplyOn": "PublishedVersions", "OptimizationStatus": "On"}

    x = da.ones((40, 40), chunks=(20, 20))
    known = {name.replace("-", "_"): value for name, value in settings.items()}
    with dask_lambda.LambdaScheduler(
        **{**known, "backend": "aws", "inline_bytes": 0, "concurrency": 2}
    ) as scheduler:
        assert (x @ x).sum().compute(scheduler=scheduler) == 40 * 40 * 40

    assert verbs(prepare(account, package, SNAPSTART)) == {"keep"}
    state = status.state_of(account, "dask-lambda")
    assert state.remarks == []
    assert [each.snapshot for each in state.functions] == ["Active"]


def test_what_changes_is_published_anew_and_the_old_version_goes(
    account: Account, package: Package
) -> None:
    deploy(account, package, SNAPSTART)
    (before,) = versions(account)
    done = deploy(account, package, replace(SNAPSTART, timeout=60))
    (after,) = versions(account)
    assert after != before
    assert aliases(account) == {"snapstart": after}
    found = account.call("lambda", "GetFunctionConfiguration", FunctionName=f"{NAME}:snapstart")
    assert found["Timeout"] == 60
    assert [str(step) for step in done.applied.done] == [
        f"change function {NAME}",
        f"change snapshot {NAME}:snapstart",
    ]


def test_snapshots_of_all_functions_are_begun_before_one_is_waited_for(
    account: Account, package: Package
) -> None:
    found = operations(prepare(account, package, BOTH))
    last_published = len(found) - 1 - found[::-1].index("PublishVersion")
    assert found.count("PublishVersion") == found.count("CreateAlias") == 2
    assert last_published < found.index("CreateAlias")


def test_without_the_option_snapshots_go_again(account: Account, package: Package) -> None:
    deploy(account, package, ONE)
    assert versions(account) == []
    deploy(account, package, SNAPSTART)
    assert len(versions(account)) == 1
    done = deploy(account, package, ONE)
    assert versions(account) == []
    assert aliases(account) == {}
    assert record.configuration(done.record)["function"] == NAME
    assert verbs(prepare(account, package, ONE)) == {"keep"}


def test_versions_that_somebody_else_has_published_stay(account: Account, package: Package) -> None:
    deploy(account, package, SNAPSTART)
    theirs = {"FunctionName": NAME, "Description": "a version of my own"}
    account.call("lambda", "UpdateFunctionConfiguration", FunctionName=NAME, Timeout=7)
    number = account.call("lambda", "PublishVersion", **theirs)["Version"]
    deploy(account, package, SNAPSTART)
    assert number in versions(account)
    deploy(account, package, ONE)
    assert versions(account) == [number]


# -- what somebody has changed -------------------------------------------------------------------


def test_an_alias_that_is_gone_or_means_something_else_is_said_and_mended(
    account: Account, package: Package
) -> None:
    deploy(account, package, SNAPSTART)
    alias = {"FunctionName": NAME, "Name": "snapstart"}
    account.call("lambda", "DeleteAlias", **alias)
    (remark,) = status.state_of(account, "dask-lambda").remarks
    assert remark == f"{NAME}: nothing has its alias 'snapstart', by which it is called"
    deploy(account, package, SNAPSTART)
    assert status.state_of(account, "dask-lambda").remarks == []
    assert len(versions(account)) == 1

    account.call("lambda", "UpdateFunctionConfiguration", FunctionName=NAME, Timeout=7)
    other = account.call("lambda", "PublishVersion", FunctionName=NAME)["Version"]
    account.call("lambda", "UpdateAlias", **alias, FunctionVersion=other)
    remarks = "\n".join(status.state_of(account, "dask-lambda").remarks)
    assert f"{NAME}: Timeout: 7, to be 900" in remarks
    assert "means another version of it than the one deployed" in remarks
    deploy(account, package, SNAPSTART)
    assert status.state_of(account, "dask-lambda").remarks == []
    assert aliases(account)["snapstart"] != other


def test_what_was_changed_and_is_changed_back_keeps_its_snapshot(
    account: Account, package: Package
) -> None:
    deploy(account, package, SNAPSTART)
    (before,) = versions(account)
    account.call("lambda", "UpdateFunctionConfiguration", FunctionName=NAME, Timeout=7)
    found = operations(prepare(account, package, SNAPSTART))
    assert found == ["UpdateFunctionConfiguration"]
    deploy(account, package, SNAPSTART)
    assert versions(account) == [before]


# -- breaking off half-way ---------------------------------------------------------------------


def test_a_snapshot_that_cannot_be_taken_is_an_error_and_leaves_the_old_one(
    account: Account, package: Package
) -> None:
    deploy(account, package, SNAPSTART)
    (before,) = versions(account)
    broken = replace(package, code=archive("raise RuntimeError('no such thing')"))
    with pytest.raises(DeploymentError, match="could not take a snapshot of .*no such thing"):
        deploy(account, broken, SNAPSTART)
    assert aliases(account) == {"snapstart": before}
    assert "did not come to its end" in "\n".join(status.state_of(account, "dask-lambda").remarks)
    with pytest.raises(DeploymentError, match="no such thing"):  # it is tried again
        deploy(account, broken, SNAPSTART)
    deploy(account, package, SNAPSTART)
    assert len(versions(account)) == 1
    assert verbs(prepare(account, package, SNAPSTART)) == {"keep"}


def test_a_snapshot_that_lambda_has_lost_is_taken_anew(account: Account, package: Package) -> None:
    deploy(account, package, SNAPSTART)
    (before,) = versions(account)

    def lose(answer: dict[str, Any]) -> None:
        if answer.get("Version") == before:
            answer["State"], answer["StateReason"] = "Failed", "it could not be restored"

    answer_as(account, "lambda", "GetFunctionConfiguration", lose)
    (remark,) = status.state_of(account, "dask-lambda").remarks
    assert remark == f"{NAME}: Lambda has no snapshot of it: it could not be restored"
    deploy(account, package, SNAPSTART)
    (after,) = versions(account)
    assert after != before
    assert aliases(account) == {"snapstart": after}


@pytest.mark.parametrize("operation", ["PublishVersion", "CreateAlias"])
def test_what_broke_off_goes_on(account: Account, package: Package, operation: str) -> None:
    permission = f"lambda:{operation}"
    arn = f"arn:aws:lambda:us-east-1:1:function:{NAME}"
    code, message = "AccessDeniedException", denied(permission, arn)
    answer_with(account, "lambda", operation, code, message, status=403)
    with pytest.raises(DeploymentError, match=permission):
        deploy(account, package, SNAPSTART)
    deploy(account, package, SNAPSTART)
    assert len(versions(account)) == 1
    assert verbs(prepare(account, package, SNAPSTART)) == {"keep"}


def test_an_old_version_that_could_not_be_deleted_goes_with_the_next_deployment(
    account: Account, package: Package
) -> None:
    deploy(account, package, SNAPSTART)
    arn = f"arn:aws:lambda:us-east-1:1:function:{NAME}:1"
    code, message = "AccessDeniedException", denied("lambda:DeleteFunction", arn)
    answer_with(account, "lambda", "DeleteFunction", code, message, status=403)
    with pytest.raises(DeploymentError, match="lambda:DeleteFunction"):
        deploy(account, package, replace(SNAPSTART, timeout=60))
    assert len(versions(account)) == 2
    deploy(account, package, replace(SNAPSTART, timeout=60))
    assert len(versions(account)) == 1


def test_a_function_that_is_left_out_has_no_snapshot(account: Account, package: Package) -> None:
    refuse_large_functions(account)
    done = deploy(account, package, Options(memory=(1769, 10_240), snapstart=True))
    assert [step.name for step, _ in done.applied.left_out] == ["dask-lambda-10240"]
    assert [step.name for step in done.applied.done if step.kind == "snapshot"] == [
        f"{NAME}:snapstart"
    ]
    assert record.configuration(done.record)["larger-functions"] == {}


def test_destroy_leaves_no_version(account: Account, package: Package) -> None:
    deploy(account, package, BOTH)
    remove(account)
    assert not [
        each["FunctionName"]
        for each in account.pages("lambda", "ListFunctions", "Functions", FunctionVersion="ALL")
        if each["FunctionName"].startswith("dask-lambda-")
    ]


# -- before anything is made ---------------------------------------------------------------------


def test_what_lambda_takes_no_snapshots_of_is_refused(package: Package) -> None:
    def refused(options: Options, package: Package, where: Where = WHERE) -> str:
        with pytest.raises(ConfigurationError) as caught:
            blueprint(options, where, package, version="1.0")
        return str(caught.value)

    assert "3.12 or newer" in refused(SNAPSTART, replace(package, runtime="python3.11"))
    assert "with --snapstart it must be 512" in refused(replace(SNAPSTART, storage=600), package)
    for region in NO_SNAPSHOTS:
        assert region in refused(SNAPSTART, package, Where("123456789012", region))
    registry = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
    image = artifact.from_image(f"{registry}/mine@sha256:{'a' * 64}")
    assert blueprint(SNAPSTART, WHERE, image, version="1.0").functions[0].alias


def test_whoever_computes_may_call_the_alias_only(package: Package) -> None:
    names = blueprint(BOTH, WHERE, package, version="1.0").names
    (statement,) = [s for s in policies.invoker(names)["Statement"] if s["Sid"] == "Invoke"]
    arn = "arn:aws:lambda:eu-west-1:123456789012:function:dask-lambda"
    assert statement["Resource"] == [f"{arn}-1769:snapstart", f"{arn}-3538:snapstart"]


@pytest.mark.parametrize("option", [{"timeout": 60}, {"metrics": True}])
def test_the_template_names_another_version_for_another_state(
    package: Package, option: dict[str, Any]
) -> None:
    def version(options: Options) -> str:
        template = cloudformation.template(blueprint(options, WHERE, package, version="1.0"))
        (name,) = [
            name
            for name, each in template["Resources"].items()
            if each["Type"] == "AWS::Lambda::Version"
        ]
        return str(name)

    assert version(SNAPSTART) == version(replace(SNAPSTART, tags={"a": "b"}))
    assert version(SNAPSTART) != version(replace(SNAPSTART, **option))


def test_the_function_is_found_by_whatever_it_is_called() -> None:
    arn = "arn:aws:lambda:eu-west-1:123456789012:function"
    for name in (NAME, f"{NAME}:snapstart", f"{arn}:{NAME}", f"{arn}:{NAME}:snapstart"):
        assert function_of(name) == NAME
