"""Deployments in an account where things are in the way, and what is left of them: nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dask_lambda import kept_runs, lifecycle
from dask_lambda.deploy import artifact, deployment, record
from dask_lambda.deploy.artifact import Archive, Layer, Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.calls import Step
from dask_lambda.deploy.deployment import Deployed, Prepared
from dask_lambda.deploy.destroy import destroy, prepare_removal
from dask_lambda.deploy.naming import TAG
from dask_lambda.deploy.resources import Options
from dask_lambda.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigurationError,
    DeploymentError,
)
from dask_lambda.local import LocalAWS
from tests.deploy_helpers import answer_as, answer_truly, answer_with, denied, inventory

pytestmark = pytest.mark.local

ONE = Options(memory=(1769,))
TWO = Options(memory=(1769, 3538))
ROLE_TOO_NEW = "The role defined for the function cannot be assumed by Lambda."


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


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def prepare(account: Account, package: Package, options: Options = ONE) -> Prepared:
    return deployment.prepare(account, options, package, "1.0")


def deploy(account: Account, package: Package, options: Options = ONE) -> Deployed:
    return deployment.deploy(prepare(account, package, options), sleep=briefly)


def briefly(seconds: float) -> None:
    """Look often: the embedded AWS takes half a second for a function."""
    time.sleep(min(seconds, 0.02))


def remove(account: Account, name: str = "dask-lambda", *, kept: bool = True) -> list[str]:
    return destroy(prepare_removal(account, deployment.known(account, name), kept=kept))


def verbs(prepared: Prepared) -> set[str]:
    return {step.verb for step in prepared.steps}


def layer(name: str, text: str) -> Layer:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(f"python/{name}.py", text)
    archive = Archive.of(buffer.getvalue())
    return Layer(name, archive, archive.sha256)


# -- what AWS takes its time for ---------------------------------------------------------------


def test_a_role_that_is_too_new_is_waited_for(account: Account, package: Package) -> None:
    said = answer_with(
        account,
        "lambda",
        "CreateFunction",
        "InvalidParameterValueException",
        ROLE_TOO_NEW,
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


def test_a_function_that_cannot_be_set_up_is_an_error(account: Account, package: Package) -> None:
    broken = {"State": "Failed", "StateReason": "the image is gone", "StateReasonCode": "X"}
    answer_as(account, "lambda", "GetFunctionConfiguration", lambda parsed: parsed.update(broken))
    with pytest.raises(DeploymentError, match="the image is gone"):
        deploy(account, package)


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
    with pytest.raises(DeploymentError):
        deploy(account, package)
    state = deployment.state_of(account, "dask-lambda")
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

    with pytest.raises(KeyboardInterrupt):
        deployment.deploy(prepare(account, package), interrupt, sleep=briefly)
    assert {step.kind for step in prepare(account, package).changes} == {"function"}
    assert deployment.state_of(account, "dask-lambda").remarks
    deploy(account, package)
    assert not deployment.state_of(account, "dask-lambda").remarks


def test_a_removal_that_broke_off_goes_on(account: Account, package: Package) -> None:
    deploy(account, package)
    message = denied("iam:DeleteRole", "arn:aws:iam::1:role/dask-lambda-us-east-1")
    answer_with(account, "iam", "DeleteRole", "AccessDenied", message, status=403)
    with pytest.raises(DeploymentError, match=r"could not delete role .*iam:DeleteRole on arn"):
        remove(account)
    state = deployment.state_of(account, "dask-lambda")
    assert state.exists
    assert {each.state for each in state.functions} == {"missing"}
    assert remove(account) == []


def test_a_new_account_gets_the_functions_that_it_may_have(
    account: Account, package: Package
) -> None:
    answer_with(
        account,
        "lambda",
        "CreateFunction",
        "InvalidParameterValueException",
        "'MemorySize' value failed to satisfy constraint: Member must have value less than or "
        "equal to 3008",
        only=lambda body: json.loads(body)["MemorySize"] > 3008,
        times=10,
    )
    done = deploy(account, package, Options(memory=(1769, 10_240)))
    ((step, why),) = done.applied.left_out
    assert step.name == "dask-lambda-10240"
    assert "3008" in why
    assert record.configuration(done.record)["larger-functions"] == {}
    assert not deployment.state_of(account, "dask-lambda").remarks


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
    assert remove(account) == []


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


# -- changes -----------------------------------------------------------------------------------


def test_what_somebody_changed_by_hand_is_said_and_mended(
    account: Account, package: Package
) -> None:
    done = deploy(account, package)
    name = done.record.names.functions[0]
    configuration = account.call("lambda", "GetFunctionConfiguration", FunctionName=name)
    variables = {**configuration["Environment"]["Variables"], "PYTHONHASHSEED": "0", "X": "1"}
    account.call(
        "lambda",
        "UpdateFunctionConfiguration",
        FunctionName=name,
        MemorySize=2048,
        Environment={"Variables": variables},
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("other.py", "")
    account.call("lambda", "UpdateFunctionCode", FunctionName=name, ZipFile=buffer.getvalue())
    account.call("s3", "DeleteBucketLifecycle", Bucket=done.record.bucket)
    account.call("logs", "DeleteLogGroup", logGroupName=done.record.names.log_groups[0])

    remarks = "\n".join(deployment.state_of(account, "dask-lambda").remarks)
    assert f"{name}: MemorySize: 2048, to be 1769" in remarks
    assert f"{name}: Environment PYTHONHASHSEED: 0, to be 6640" in remarks
    assert f"{name}: Environment X: 1, to be null" in remarks
    assert "its code is not the one that was deployed" in remarks
    assert "has no rules" in remarks
    assert "is missing: nothing is logged" in remarks

    deploy(account, package)
    assert deployment.state_of(account, "dask-lambda").remarks == []
    assert verbs(prepare(account, package)) == {"keep"}


def test_a_role_and_a_bucket_that_were_changed_are_mended(
    account: Account, package: Package
) -> None:
    done = deploy(account, package)
    role, bucket = done.record.names.role, done.record.bucket
    statement = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    account.call(
        "iam",
        "PutRolePolicy",
        RoleName=role,
        PolicyName="dask-lambda",
        PolicyDocument=json.dumps(policy),
    )
    account.call(
        "iam",
        "PutRolePolicy",
        RoleName=role,
        PolicyName="more",
        PolicyDocument=json.dumps(policy),
    )
    account.call(
        "s3", "PutBucketVersioning", Bucket=bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    account.call("s3", "DeletePublicAccessBlock", Bucket=bucket)
    principal = {"AWS": f"arn:aws:iam::{account.where.account}:root"}
    theirs = {**statement, "Sid": "Theirs", "Principal": principal}
    theirs["Resource"] = f"arn:aws:s3:::{bucket}"
    theirs_only = json.dumps({"Version": "2012-10-17", "Statement": [theirs]})
    account.call("s3", "PutBucketPolicy", Bucket=bucket, Policy=theirs_only)
    prepared = prepare(account, package)
    said = {step.kind: "; ".join(step.why) for step in prepared.steps}
    assert "versioning is on" in said["bucket"]
    assert "public access is not blocked" in said["bucket"]
    assert "its policy is another one" in said["role"]
    assert "other policies as well, which stay: more" in said["role"]
    deployment.deploy(prepared, sleep=briefly)
    assert verbs(prepare(account, package)) == {"keep"}


def test_other_options_change_what_is_there(account: Account, package: Package) -> None:
    deploy(account, package, TWO)
    options = Options(
        memory=(1769, 2048),
        timeout=60,
        log_days=30,
        expire_days=3,
        tags={"team": "x"},
        metrics=True,
    )
    steps = {
        f"{step.kind} {step.name}": step for step in prepare(account, package, options).changes
    }
    assert steps["function dask-lambda-3538"].verb == "delete"
    assert steps["log group /aws/lambda/dask-lambda-3538"].verb == "delete"
    assert "Timeout: 900, to be 60" in steps["function dask-lambda-1769"].why
    done = deploy(account, package, options)
    assert verbs(prepare(account, package, options)) == {"keep"}
    assert record.configuration(done.record) == {
        "function": "dask-lambda-1769",
        "memory": 1769,
        "bucket": done.record.bucket,
        "prefix": "dask-lambda",
        "region": "us-east-1",
        "architecture": "x86_64",
        "timeout": 60,
        "larger-functions": {"2048": "dask-lambda-2048"},
        "endpoint-url": account.endpoint_url,
    }
    function = account.call("lambda", "GetFunction", FunctionName="dask-lambda-1769")
    assert function["Tags"]["team"] == "x"


def test_layers_are_uploaded_once(account: Account, package: Package) -> None:
    def having(*layers: Layer) -> Package:
        return Package(package.code, layers, environment="e")

    one, two, three = layer("one", "x = 1"), layer("two", "x = 2"), layer("two", "x = 3")
    deploy(account, having(one, two))
    arns = [each["Arn"] for each in configuration(account)["Layers"]]
    assert verbs(prepare(account, having(one, two))) == {"keep"}
    changed = {f"{s.verb} {s.kind} {s.name}" for s in prepare(account, having(one, three)).changes}
    assert "create layer dask-lambda-two" in changed
    assert not any("dask-lambda-one" in each for each in changed)
    deploy(account, having(one, three))
    now = [each["Arn"] for each in configuration(account)["Layers"]]
    assert now[0] == arns[0]
    assert now[1] != arns[1]
    versions = account.pages(
        "lambda", "ListLayerVersions", "LayerVersions", LayerName="dask-lambda-two"
    )
    assert [each["LayerVersionArn"] for each in versions] == [now[1]]


def configuration(account: Account) -> dict[str, Any]:
    return account.call("lambda", "GetFunctionConfiguration", FunctionName="dask-lambda-1769")


def test_large_archives_go_through_the_bucket_and_are_not_left_there(
    account: Account, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dask_lambda.deploy.layers.MAX_DIRECT", 100)
    large = Package(package.code, (layer("big", "x = 1" * 100),), environment="e")
    done = deploy(account, large)
    kinds = [step.kind for step in done.applied.done]
    assert kinds.count("upload of function code") == 2
    found = account.call("s3", "ListObjectsV2", Bucket=done.record.bucket)
    assert found["KeyCount"] == 0
    digest = hashlib.sha256(package.code.read()).digest()
    assert configuration(account)["CodeSha256"] == base64.b64encode(digest).decode()


def test_an_image_takes_the_place_of_layers_and_back(account: Account, package: Package) -> None:
    repository = f"{account.where.account}.dkr.ecr.us-east-1.amazonaws.com/dask-lambda"
    one, two = (artifact.from_image(f"{repository}@sha256:{n * 64}") for n in "ab")
    account.call("ecr", "CreateRepository", repositoryName="dask-lambda")
    try:
        deploy(account, one)
        assert configuration(account)["PackageType"] == "Image"
        assert verbs(prepare(account, one)) == {"keep"}
        (step,) = prepare(account, two).changes
        assert [call.operation for call in step.calls] == [
            "UpdateFunctionCode",
            "UpdateFunctionConfiguration",  # the description has the hash
        ]
        (step,) = prepare(account, package).changes
        assert [call.operation for call in step.calls] == ["DeleteFunction", "CreateFunction"]
        deploy(account, package)
        assert configuration(account)["PackageType"] == "Zip"
        assert verbs(prepare(account, package)) == {"keep"}
    finally:
        account.call("ecr", "DeleteRepository", repositoryName="dask-lambda")


@pytest.mark.parametrize("uri", ["python:3.12", "docker.io/x/y:1", "1.dkr.ecr.x.amazonaws.com/y:1"])
def test_images_come_from_ecr_only(uri: str) -> None:
    with pytest.raises(ConfigurationError, match="not the URI of an image in ECR"):
        artifact.from_image(uri)


# -- removal -----------------------------------------------------------------------------------


def test_a_bucket_of_the_users_own_stays_with_what_is_in_it(
    account: Account, package: Package
) -> None:
    bucket = {"Bucket": "users-own"}
    with pytest.raises(BucketNotFoundError, match="leave out --bucket"):
        prepare(account, package, Options(bucket="users-own"))
    theirs = {
        "ID": "theirs",
        "Status": "Enabled",
        "Filter": {"Prefix": "x/"},
        "Expiration": {"Days": 9},
    }
    account.call("s3", "CreateBucket", **bucket)
    try:
        account.call(
            "s3",
            "PutBucketLifecycleConfiguration",
            **bucket,
            LifecycleConfiguration={"Rules": [theirs]},
        )
        for name in ("x/mine", "3/dask-lambda/run/a", "3/dask-lambda-kept/run/b"):
            account.call("s3", "PutObject", **bucket, Key=name, Body=b"x")
        deploy(account, package, Options(bucket="users-own", memory=(1769,)))
        found = account.call("s3", "GetBucketLifecycleConfiguration", **bucket)
        assert lifecycle.days_of(found["Rules"], "dask-lambda") == 7
        stays = remove(account, kept=False)
        assert stays == [
            "kept runs users-own: 1 runs; --kept deletes them, too",
            "bucket users-own: it is your own",
        ]
        found = account.call("s3", "GetBucketLifecycleConfiguration", **bucket)
        assert [rule["ID"] for rule in found["Rules"]] == ["theirs"]
        left = account.call("s3", "ListObjectsV2", **bucket)["Contents"]
        assert [each["Key"] for each in left] == ["3/dask-lambda-kept/run/b", "x/mine"]
    finally:
        for name in ("x/mine", "3/dask-lambda-kept/run/b"):
            account.call("s3", "DeleteObject", **bucket, Key=name)
        account.call("s3", "DeleteBucket", **bucket)


def test_kept_runs_are_not_removed_unless_asked(account: Account, package: Package) -> None:
    done = deploy(account, package)
    bucket, run = done.record.bucket, "ab" * 16
    account.call("s3", "PutObject", Bucket=bucket, Key=f"1/dask-lambda-kept/{run}/x", Body=b"x")
    place = kept_runs.Place(bucket, "dask-lambda", "us-east-1", account.endpoint_url)
    kept_runs.write(kept_runs.KeptRun("mine", run, b"s" * 32, place, "f", 0.0, 0.0))
    with pytest.raises(DeploymentError, match="1 kept runs: add --kept"):
        remove(account, kept=False)
    assert configuration(account)
    remove(account, kept=True)
    assert kept_runs.names() == []


def test_a_bucket_with_objects_that_are_not_ours_stays(account: Account, package: Package) -> None:
    done = deploy(account, package)
    bucket = {"Bucket": done.record.bucket}
    account.call("s3", "PutObject", **bucket, Key="thesis.pdf", Body=b"x")
    account.call("s3", "PutObject", **bucket, Key="2/dask-lambda/run/x", Body=b"x")
    (stays,) = remove(account)
    assert "1 objects or more that are not ours" in stays
    left = account.call("s3", "ListObjectsV2", **bucket)["Contents"]
    assert [each["Key"] for each in left] == ["thesis.pdf"]
    account.call("s3", "DeleteObject", **bucket, Key="thesis.pdf")


def test_old_versions_and_unfinished_uploads_go_with_the_bucket(
    account: Account, package: Package
) -> None:
    done = deploy(account, package)
    bucket = {"Bucket": done.record.bucket}
    on = {"Status": "Enabled"}
    account.call("s3", "PutBucketVersioning", **bucket, VersioningConfiguration=on)
    for _ in range(2):
        account.call("s3", "PutObject", **bucket, Key="2/dask-lambda/run/x", Body=b"x")
    account.call("s3", "DeleteObject", **bucket, Key="2/dask-lambda/run/x")
    account.call("s3", "CreateMultipartUpload", **bucket, Key="2/dask-lambda/run/y")
    assert remove(account) == []


def test_without_the_record_it_is_found_by_its_tags(
    account: Account, package: Package, tmp_path: Path
) -> None:
    done = deploy(account, package, TWO)
    shutil.rmtree(tmp_path / "state" / "deployments")
    state = deployment.state_of(account, "dask-lambda")
    assert [each.state for each in state.functions] == ["Active", "Active"]
    assert verbs(prepare(account, package, TWO)) == {"keep"}
    assert remove(account) == []
    assert done.record.bucket not in inventory(account)["buckets"]


def test_without_the_record_a_bucket_of_the_users_own_can_be_named(
    account: Account, package: Package, tmp_path: Path
) -> None:
    bucket = {"Bucket": "users-own"}
    account.call("s3", "CreateBucket", **bucket)
    try:
        deploy(account, package, Options(bucket="users-own", memory=(1769,)))
        account.call("s3", "PutObject", **bucket, Key="3/dask-lambda/run/a", Body=b"x")
        shutil.rmtree(tmp_path / "state" / "deployments")
        known = deployment.known(account, "dask-lambda", "users-own")
        assert destroy(prepare_removal(account, known, kept=False)) == [
            "bucket users-own: it is your own"
        ]
        assert account.call("s3", "ListObjectsV2", **bucket)["KeyCount"] == 0
    finally:
        account.call("s3", "DeleteBucket", **bucket)


def test_two_deployments_do_not_see_each_other(account: Account, package: Package) -> None:
    deploy(account, package)
    deploy(account, package, Options(name="dask-lambda-b", memory=(1769,)))
    remove(account, "dask-lambda-b")
    assert verbs(prepare(account, package)) == {"keep"}
