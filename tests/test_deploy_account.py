"""Deployments in an account where things are in the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dask_lambda.deploy import deployment, record, status
from dask_lambda.deploy.artifact import Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.calls import Step
from dask_lambda.deploy.destroy import destroy, prepare_removal
from dask_lambda.deploy.naming import TAG
from dask_lambda.deploy.resources import Options
from dask_lambda.errors import AccessDeniedError, ConfigurationError, DeploymentError
from dask_lambda.local import LocalAWS
from tests.account_helpers import (
    _leaves_nothing,
    account,
    briefly,
    deploy,
    package,
    prepare,
    remove,
    verbs,
)
from tests.deploy_helpers import (
    answer_as,
    answer_instead,
    answer_with,
    denied,
    inventory,
    refuse_large_functions,
)

__all__ = ["_leaves_nothing", "account", "package"]

pytestmark = pytest.mark.local
ROLE_TOO_NEW = "The role defined for the function cannot be assumed by Lambda."
KEY_TOO_NEW = (
    "Lambda was unable to configure access to your environment variables because the KMS key is "
    "invalid for CreateGrant. Please check your KMS key settings. KMS Exception: "
    "InvalidArnException KMS Message: ARN does not refer to a valid principal"
)


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


# -- what AWS takes its time for ---------------------------------------------------------------


@pytest.mark.parametrize("message", [ROLE_TOO_NEW, KEY_TOO_NEW])
def test_a_role_that_is_too_new_is_waited_for(
    account: Account, package: Package, message: str
) -> None:
    said = answer_with(
        account,
        "lambda",
        "CreateFunction",
        "InvalidParameterValueException",
        message,
        times=6,
    )
    clock = Clock()
    # What the embedded AWS itself needs time for is not waited for with this clock.
    answer_as(account, "lambda", "GetFunctionConfiguration", lambda parsed: parsed.update(READY))
    deployment.deploy(prepare(account, package), sleep=clock.sleep, clock=clock)
    assert len(said) == 6
    assert 8 < clock.now < 30
    assert account.call("lambda", "GetFunction", FunctionName="dask-lambda-1769")


READY = {"State": "Active", "LastUpdateStatus": "Successful"}


def test_a_role_that_stays_unusable_is_an_error_in_the_end(
    account: Account, package: Package
) -> None:
    answer_with(
        account,
        "lambda",
        "CreateFunction",
        "InvalidParameterValueException",
        ROLE_TOO_NEW,
        times=1000,
    )
    clock = Clock()
    with pytest.raises(DeploymentError, match="cannot be assumed"):
        deployment.deploy(prepare(account, package), sleep=clock.sleep, clock=clock)


@pytest.mark.parametrize(
    ("operation", "message", "waits"),
    [
        ("PutRolePolicy", "The role with name dask-lambda-us-east-1 cannot be found.", True),
        ("CreateRole", "Scope ARN: arn:aws:iam::1:policy/x does not exist", False),
    ],
)
def test_what_is_not_known_yet_is_waited_for_and_what_does_not_exist_is_said(
    account: Account, package: Package, operation: str, message: str, waits: bool
) -> None:
    answer_with(account, "iam", operation, "NoSuchEntity", message, status=404, times=1000)
    clock = Clock()
    with pytest.raises(DeploymentError, match=message.partition(":")[0]):
        deployment.deploy(prepare(account, package), sleep=clock.sleep, clock=clock)
    assert (clock.now > 60) == waits


@pytest.mark.parametrize("state", ["State", "LastUpdateStatus"])
def test_a_function_that_cannot_be_set_up_is_an_error(
    account: Account, package: Package, state: str
) -> None:
    broken = {state: "Failed", f"{state}Reason": "the image is gone"}
    answer_as(account, "lambda", "GetFunctionConfiguration", lambda parsed: parsed.update(broken))
    with pytest.raises(DeploymentError, match="the image is gone"):
        deploy(account, package)


@pytest.mark.parametrize(
    ("broken", "operations"),
    [
        ({"State": "Failed", "StateReason": "no reason"}, ["DeleteFunction", "CreateFunction"]),
        (
            {"LastUpdateStatus": "Failed", "LastUpdateStatusReason": "no reason"},
            ["UpdateFunctionCode", "UpdateFunctionConfiguration"],
        ),
    ],
)
def test_what_lambda_could_not_set_up_is_not_taken_for_done(
    account: Account, package: Package, broken: dict[str, str], operations: list[str]
) -> None:
    deploy(account, package)
    answer_as(
        account, "lambda", "GetFunction", lambda parsed: parsed["Configuration"].update(broken)
    )
    (step,) = prepare(account, package).changes
    assert [call.operation for call in step.calls] == operations
    assert "no reason" in "; ".join(step.why)


def test_a_function_whose_role_is_gone_is_made_anew(account: Account, package: Package) -> None:
    done = deploy(account, package)
    name = {"RoleName": done.record.names.role}
    account.call("iam", "DeleteRolePolicy", **name, PolicyName="dask-lambda")
    account.call("iam", "DeleteRole", **name)
    prepared = prepare(account, package)
    calls = [call.operation for step in prepared.changes for call in step.calls]
    assert calls == ["CreateRole", "PutRolePolicy", "DeleteFunction", "CreateFunction"]
    deployment.deploy(prepared, sleep=briefly)
    assert verbs(prepare(account, package)) == {"keep"}


def test_a_function_that_goes_slowly_is_waited_for(account: Account, package: Package) -> None:
    done = deploy(account, package)
    name = done.record.names.functions[0]
    still = {"FunctionName": name, "State": "Deleting"}
    said = answer_instead(account, "lambda", "GetFunctionConfiguration", still, times=3)
    clock = Clock()
    destroy(prepare_removal(account, done.record, kept=False), sleep=clock.sleep, clock=clock)
    assert len(said) == 3
    assert clock.now > 0


# -- breaking off half-way ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "operation", "permission"),
    [
        ("s3", "CreateBucket", "s3:CreateBucket"),
        ("s3", "PutBucketTagging", "s3:PutBucketTagging"),
        ("s3", "PutPublicAccessBlock", "s3:PutBucketPublicAccessBlock"),
        ("s3", "PutBucketLifecycleConfiguration", "s3:PutLifecycleConfiguration"),
        ("iam", "CreateRole", "iam:CreateRole"),
        ("iam", "PutRolePolicy", "iam:PutRolePolicy"),
        ("logs", "CreateLogGroup", "logs:CreateLogGroup"),
        ("logs", "PutRetentionPolicy", "logs:PutRetentionPolicy"),
        ("lambda", "CreateFunction", "lambda:CreateFunction"),
    ],
)
def test_without_one_permission_it_says_which_and_goes_on_later(
    account: Account, package: Package, service: str, operation: str, permission: str
) -> None:
    code = "AccessDeniedException" if service in ("lambda", "logs") else "AccessDenied"
    message = "Access Denied" if service == "s3" else denied(permission, "arn:aws:x:::y")
    answer_with(account, service, operation, code, message, status=403)
    with pytest.raises(DeploymentError) as caught:
        deploy(account, package)
    assert permission in str(caught.value)
    assert "so far" in str(caught.value) or "nothing was done" in str(caught.value)
    assert "dask-lambda destroy" in str(caught.value)
    if operation in ("PutBucketTagging", "CreateFunction"):  # for all of them: too slow
        deploy(account, package)
        assert verbs(prepare(account, package)) == {"keep"}


def test_what_broke_off_is_removed_by_destroy(account: Account, package: Package) -> None:
    answer_with(account, "s3", "PutBucketTagging", "AccessDenied", "Access Denied", status=403)
    with pytest.raises(DeploymentError, match=r"done so far: create bucket .*, 1 of \d calls"):
        deploy(account, package)
    state = status.state_of(account, "dask-lambda")
    assert state.exists
    assert any("did not come to its end" in each for each in state.remarks)
    before = inventory(account)
    remove(account)
    gone = set(before["buckets"]) - set(inventory(account)["buckets"])
    assert len(gone) == 1


def test_what_was_interrupted_goes_on(account: Account, package: Package) -> None:
    def interrupt(step: Step) -> None:
        if step.kind == "function":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"(?s)function.*done so far: create bucket .*role"):
        deployment.deploy(prepare(account, package), interrupt, sleep=briefly)
    assert {step.kind for step in prepare(account, package).changes} == {"function"}
    assert status.state_of(account, "dask-lambda").remarks
    deploy(account, package)
    assert not status.state_of(account, "dask-lambda").remarks


def test_a_removal_that_broke_off_goes_on(account: Account, package: Package) -> None:
    deploy(account, package)
    message = denied("iam:DeleteRole", "arn:aws:iam::1:role/dask-lambda-us-east-1")
    answer_with(account, "iam", "DeleteRole", "AccessDenied", message, status=403)
    with pytest.raises(DeploymentError, match=r"could not delete role .*iam:DeleteRole on arn"):
        remove(account)
    state = status.state_of(account, "dask-lambda")
    assert state.exists
    assert {each.state for each in state.functions} == {"missing"}
    assert any("`dask-lambda destroy` did not come to its end" in each for each in state.remarks)
    assert remove(account) == []


def test_a_new_account_gets_the_functions_that_it_may_have(
    account: Account, package: Package
) -> None:
    refuse_large_functions(account)
    done = deploy(account, package, Options(memory=(1769, 10_240)))
    ((step, why),) = done.applied.left_out
    assert step.name == "dask-lambda-10240"
    assert "3008" in why
    assert record.configuration(done.record)["larger-functions"] == {}
    assert not status.state_of(account, "dask-lambda").remarks


def test_few_concurrent_executions_are_said(account: Account, package: Package) -> None:
    answer_as(
        account,
        "lambda",
        "GetAccountSettings",
        lambda parsed: parsed["AccountLimit"].update(ConcurrentExecutions=10),
    )
    (warning,) = prepare(account, package).warnings
    assert "may run 10 functions at a time" in warning
    assert "Service Quotas" in warning


# -- names that are taken ----------------------------------------------------------------------


def test_a_bucket_of_somebody_else_is_said_before_anything_is_made(
    account: Account, package: Package
) -> None:
    answer_with(account, "s3", "HeadBucket", "403", "Forbidden", status=403, times=2)
    with pytest.raises(DeploymentError, match="somebody else's"):
        prepare(account, package)


def test_a_bucket_name_that_is_taken_meanwhile(account: Account, package: Package) -> None:
    answer_with(account, "s3", "CreateBucket", "BucketAlreadyExists", "taken", status=409)
    with pytest.raises(DeploymentError, match=r"choose another name .*--name or --bucket"):
        deploy(account, package)
    answer_with(account, "s3", "HeadBucket", "403", "Forbidden", status=403)
    (stays,) = remove(account)
    assert "somebody else's" in stays


@pytest.mark.parametrize("kind", ["function", "role", "log group", "bucket"])
def test_what_somebody_else_made_under_the_same_name_stays(
    account: Account, package: Package, aws: LocalAWS, kind: str
) -> None:
    names = prepare(account, package).wanted.names
    trust = json.dumps(prepare(account, package).wanted.role.trust)
    make: dict[str, Callable[[], object]] = {
        "role": lambda: account.call(
            "iam", "CreateRole", RoleName=names.role, AssumeRolePolicyDocument=trust
        ),
        "log group": lambda: account.call(
            "logs", "CreateLogGroup", logGroupName=names.log_groups[0]
        ),
        "bucket": lambda: account.call("s3", "CreateBucket", Bucket=names.bucket),
        "function": lambda: account.call(
            "lambda",
            "CreateFunction",
            FunctionName=names.functions[0],
            Role=f"arn:aws:iam::{names.where.account}:role/dask-lambda-worker",
            Runtime="python3.12",
            Handler="x.y",
            Code={"ZipFile": package.code.read()},
        ),
    }
    clear: dict[str, Callable[[], object]] = {
        "role": lambda: account.call("iam", "DeleteRole", RoleName=names.role),
        "log group": lambda: account.call(
            "logs", "DeleteLogGroup", logGroupName=names.log_groups[0]
        ),
        "bucket": lambda: account.call("s3", "DeleteBucket", Bucket=names.bucket),
        "function": lambda: account.call(
            "lambda", "DeleteFunction", FunctionName=names.functions[0]
        ),
    }
    make[kind]()
    try:
        before = inventory(account)
        with pytest.raises(DeploymentError, match=f"there is a {kind}.*--name"):
            deploy(account, package)
        stays = remove(account)
        assert any(each.startswith(kind) for each in stays)
        assert inventory(account) == before
    finally:
        clear[kind]()


# -- credentials and regions -------------------------------------------------------------------


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    with pytest.raises(AccessDeniedError, match="log in"):
        _ = Account.open().where


def test_no_region() -> None:
    with pytest.raises(ConfigurationError, match="--region"):
        Account.open()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("ExpiredToken", "have expired"),
        ("InvalidClientTokenId", "has the region us-east-1 enabled"),
        ("RequestTimeTooSkewed", "clock is wrong"),
    ],
)
def test_credentials_that_aws_refuses(account: Account, code: str, said: str) -> None:
    answer_with(account, "sts", "GetCallerIdentity", code, "no", status=403)
    with pytest.raises(AccessDeniedError, match=said):
        _ = account.where


def test_a_region_that_does_not_exist(aws: LocalAWS) -> None:
    from botocore.exceptions import EndpointConnectionError

    account = Account.of_local(aws)
    account.region = "us-esat-1"

    def nowhere(parsed: Any) -> None:
        raise EndpointConnectionError(endpoint_url="https://sts.us-esat-1.amazonaws.com")

    answer_as(account, "sts", "GetCallerIdentity", nowhere)
    with pytest.raises(ConfigurationError, match="did you mean .*us-east-1"):
        _ = account.where


def test_a_bucket_in_another_region(account: Account, package: Package) -> None:
    account.call("s3", "CreateBucket", Bucket="far-away")
    try:
        answer_as(
            account, "s3", "HeadBucket", lambda parsed: parsed.update(BucketRegion="eu-north-1")
        )
        with pytest.raises(ConfigurationError, match="--region eu-north-1"):
            prepare(account, package, Options(bucket="far-away"))
    finally:
        account.call("s3", "DeleteBucket", Bucket="far-away")


@pytest.mark.parametrize(
    "options",
    [
        Options(name="Not a name"),
        Options(memory=(64,)),
        Options(memory=()),
        Options(timeout=901),
        Options(storage=100),
        Options(log_days=8),
        Options(expire_days=0),
        Options(prefix="/x"),
        Options(prefix="x*"),
        Options(tags={TAG: "mine"}),
    ],
)
def test_options_out_of_range_are_refused_before_aws_is_asked(
    account: Account, package: Package, options: Options
) -> None:
    with pytest.raises(ConfigurationError):
        prepare(account, package, options)
    assert account._identity is None


def test_an_address_that_is_configured_is_told_from_aws_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever botocore finds it: hello says who has answered."""
    address = "http://127.0.0.1:1"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_LAMBDA"):
        monkeypatch.delenv(name, raising=False)
    assert Account.open("eu-west-1").configured_endpoint("lambda") is None
    assert Account.open("eu-west-1", address).configured_endpoint("lambda") == address
    configuration = tmp_path / "config"
    configuration.write_text(f"[default]\nendpoint_url = {address}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(configuration))
    assert Account.open("eu-west-1").configured_endpoint("lambda") == address
