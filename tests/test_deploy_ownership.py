"""Whose it is: what a deployment takes for its own, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dask_lambda.deploy import record, status
from dask_lambda.deploy.artifact import Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.destroy import prepare_removal
from dask_lambda.deploy.resources import Options
from dask_lambda.errors import AccessDeniedError, ConfigurationError, DeploymentError
from tests.account_helpers import (
    ONE,
    TWO,
    _leaves_nothing,
    account,
    deploy,
    layer,
    package,
    prepare,
    remove,
    verbs,
)
from tests.deploy_helpers import answer_as, answer_truly, answer_with, denied

__all__ = ["_leaves_nothing", "account", "package"]

pytestmark = pytest.mark.local


def test_two_deployments_do_not_see_each_other(account: Account, package: Package) -> None:
    layers = (layer("packages-1", "x = 1"),)
    package = Package(package.code, layers, environment="e")
    other = Options(name="dask-lambda-b", memory=(1769,))
    deploy(account, package)
    deploy(account, package, other)
    assert verbs(prepare(account, package)) == {"keep"}
    deploy(account, package)
    assert verbs(prepare(account, package, other)) == {"keep"}
    remove(account)
    assert verbs(prepare(account, package, other)) == {"keep"}
    deploy(account, package)
    remove(account, "dask-lambda-b")
    assert verbs(prepare(account, package)) == {"keep"}


def test_functions_whose_tags_may_not_be_seen_are_not_taken_for_somebody_elses(
    account: Account, package: Package
) -> None:
    done = deploy(account, package)
    answer_as(account, "lambda", "GetFunction", lambda parsed: parsed.pop("Tags"))
    assert verbs(prepare(account, package)) == {"keep"}
    said = denied("lambda:ListTags", done.record.names.called_arns[0])
    answer_with(account, "lambda", "ListTags", "AccessDeniedException", said, status=403, times=9)
    with pytest.raises(AccessDeniedError, match="lambda:ListTags"):
        prepare(account, package)
    with pytest.raises(AccessDeniedError, match="lambda:ListTags"):
        remove(account)


def test_s3_is_asked_for_a_bucket_of_this_account(account: Account, package: Package) -> None:
    asked: list[str] = []

    def note(params: dict[str, Any], **_: Any) -> None:
        asked.append(params["headers"].get("x-amz-expected-bucket-owner", ""))

    account.client("s3").meta.events.register("before-call.s3.HeadBucket", note)
    try:
        prepare(account, package)
    finally:
        account.client("s3").meta.events.unregister("before-call.s3.HeadBucket", note)
    assert asked == [account.where.account]


def test_a_bucket_that_may_not_be_looked_at_is_said_to_stay(
    account: Account, package: Package
) -> None:
    done = deploy(account, package)
    answer_with(account, "s3", "HeadBucket", "403", "Forbidden", status=403, times=9)
    (stays,) = remove(account)
    assert stays.startswith(f"bucket {done.record.bucket}")
    assert "s3:ListBucket" in stays
    answer_truly()
    account.call("s3", "DeleteBucket", Bucket=done.record.bucket)


def test_two_deployments_do_not_share_a_prefix_of_a_bucket(
    account: Account, package: Package
) -> None:
    bucket = {"Bucket": "users-own-shared"}
    account.call("s3", "CreateBucket", **bucket)
    try:
        options = Options(bucket=bucket["Bucket"], memory=(1769,))
        deploy(account, package, options)
        other = Options("other", bucket["Bucket"], memory=(1769,))
        with pytest.raises(ConfigurationError, match="'dask-lambda' has its objects.*--prefix"):
            prepare(account, package, other)
        assert prepare(account, package, replace(other, prefix="other")).changes
        remove(account)
    finally:
        account.call("s3", "DeleteBucket", **bucket)


def test_what_a_stack_has_made_is_left_to_the_stack(account: Account, package: Package) -> None:
    deploy(account, package)
    tag = {"aws:cloudformation:stack-name": "administrators"}
    answer_as(account, "lambda", "GetFunction", lambda parsed: parsed["Tags"].update(tag))
    assert verbs(prepare(account, package)) == {"keep"}
    with pytest.raises(DeploymentError, match="'administrators'.*--cloudformation"):
        prepare(account, package, TWO)
    with pytest.raises(DeploymentError, match="delete-stack .*--stack-name administrators"):
        remove(account)


def test_a_deployment_keeps_its_prefix(account: Account, package: Package) -> None:
    deploy(account, package, replace(ONE, prefix="one"))
    with pytest.raises(DeploymentError, match="--prefix one again"):
        prepare(account, package)


def test_a_deployment_that_does_not_exist_has_no_objects_in_a_bucket_that_is_named(
    account: Account, package: Package
) -> None:
    bucket = {"Bucket": "users-own-named"}
    account.call("s3", "CreateBucket", **bucket)
    key = f"0/dask-lambda/{'a' * 32}/x"
    account.call("s3", "PutObject", **bucket, Key=key, Body=b"x")
    try:
        deploy(account, package)  # in a bucket of its own
        (Path(record.find("dask-lambda")[0].path)).unlink()
        for name in ("misspelt", "dask-lambda"):
            known = status.known(account, name, bucket["Bucket"])
            removal = prepare_removal(account, known, kept=True)
            touched = [step for step in removal.steps if step.calls and "bucket" in step.kind]
            assert not touched
            assert not any(step.kind == "objects of runs" for step in removal.steps)
            assert any(step.verb == "leave" and step.kind == "bucket" for step in removal.steps)
        assert account.call("s3", "ListObjectsV2", **bucket)["KeyCount"] == 1
    finally:
        account.call("s3", "DeleteObject", **bucket, Key=key)
        account.call("s3", "DeleteBucket", **bucket)
