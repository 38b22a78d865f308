"""Deployments that change, and what is left of removed ones: nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dask_lambda import kept_runs, lifecycle
from dask_lambda.deploy import artifact, deployment, record, status
from dask_lambda.deploy.artifact import Layer, Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.destroy import destroy, prepare_removal
from dask_lambda.deploy.resources import Options
from dask_lambda.errors import BucketNotFoundError, ConfigurationError, DeploymentError
from tests.account_helpers import (
    TWO,
    _leaves_nothing,
    account,
    briefly,
    deploy,
    layer,
    package,
    prepare,
    remove,
    verbs,
)
from tests.deploy_helpers import inventory

__all__ = ["_leaves_nothing", "account", "package"]

pytestmark = pytest.mark.local


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

    remarks = "\n".join(status.state_of(account, "dask-lambda").remarks)
    assert f"{name}: MemorySize: 2048, to be 1769" in remarks
    assert f"{name}: Environment PYTHONHASHSEED: 0, to be 6640" in remarks
    assert f"{name}: Environment X: 1, to be null" in remarks
    assert "its code is not the one that was deployed" in remarks
    assert "left behind is deleted never, to be after 7 days" in remarks
    assert "is missing: nothing is logged" in remarks

    deploy(account, package)
    assert status.state_of(account, "dask-lambda").remarks == []
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
    group = done.record.names.log_groups[0]
    account.call("logs", "PutRetentionPolicy", logGroupName=group, retentionInDays=3)
    state = status.state_of(account, "dask-lambda")
    assert set(state.remarks) == {
        f"the role {role}: its policy is another one",
        f"the bucket {bucket}: versioning is on",
        f"the bucket {bucket}: public access is not blocked",
        f"the log group {group}: lines are kept 3 days, to be 14 days",
    }
    (foreign,) = state.foreign
    assert f"the role {role} has a policy that is not this deployment's, more" in foreign

    prepared = prepare(account, package)
    said = {step.kind: "; ".join(step.why) for step in prepared.steps}
    assert "versioning is on" in said["bucket"]
    assert "public access is not blocked" in said["bucket"]
    assert "its policy is another one" in said["role"]
    assert "other policies as well, which stay: more" in said["role"]
    deployment.deploy(prepared, sleep=briefly)
    assert verbs(prepare(account, package)) == {"keep"}
    state = status.state_of(account, "dask-lambda")
    assert (state.remarks, state.foreign) == ([], [foreign])


def test_the_users_own_bucket_is_as_it_was_but_for_the_rules(
    account: Account, package: Package
) -> None:
    account.call("s3", "CreateBucket", Bucket="users-own")
    try:
        deploy(account, package, Options(bucket="users-own", memory=(1769,)))
        state = status.state_of(account, "dask-lambda")
        assert (state.remarks, state.foreign) == ([], [])  # whatever else it lacks is theirs
        account.call("s3", "DeleteBucketLifecycle", Bucket="users-own")
        (remark,) = status.state_of(account, "dask-lambda").remarks
        assert "the bucket users-own: what is left behind is deleted never" in remark
    finally:
        remove(account)
        account.call("s3", "DeleteBucket", Bucket="users-own")


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
    state = status.state_of(account, "dask-lambda")
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
        known = status.known(account, "dask-lambda", "users-own")
        assert destroy(prepare_removal(account, known, kept=False)) == [
            "bucket users-own: it is your own"
        ]
        assert account.call("s3", "ListObjectsV2", **bucket)["KeyCount"] == 0
    finally:
        account.call("s3", "DeleteBucket", **bucket)
