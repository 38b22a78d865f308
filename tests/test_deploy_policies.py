"""The policies: what they say, that SECURITY.md says the same, and that they are enough."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import pytest

import dask_lambda
from dask_lambda.config import Settings
from dask_lambda.deploy import artifact, deployment, policies, status
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.destroy import destroy, prepare_removal
from dask_lambda.deploy.doctor import examine
from dask_lambda.deploy.hello import hello
from dask_lambda.deploy.naming import Names, Where, bucket_name
from dask_lambda.deploy.record import Record, configuration
from dask_lambda.deploy.resources import MAX_SIZES, Options, names_of
from dask_lambda.errors import AccessDeniedError, DaskLambdaError
from dask_lambda.local import LocalAWS

ROOT = Path(__file__).parents[1]
NAMES = Names(
    "dask-lambda",
    Where("123456789012", "eu-west-1"),
    "BUCKET",
    "dask-lambda",
    (1769, 3538),
)


def statements(document: policies.Document) -> dict[str, dict[str, Any]]:
    return {each["Sid"]: each for each in document["Statement"]}


# -- what they say -----------------------------------------------------------------------------


def test_security_md_lists_the_permissions_of_the_documents() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    table = text[text.index("## Permissions") : text.index("## What is not protected")]
    listed: dict[str, set[str]] = {}
    for row in re.findall(r"^\| (.+?) \| (.+?) \| .+ \|$", table, re.MULTILINE):
        for who in row[0].split(" and "):
            listed.setdefault(who, set()).update(re.findall(r"`(\w+:\w+)`", row[1]))
    for who, document in (
        ("function's role", policies.execution(NAMES)),
        ("caller", policies.invoker(NAMES)),
    ):
        actions = {a for each in document["Statement"] for a in each["Action"]}
        assert listed[who] == actions, who
    for arn in NAMES.object_arns:
        assert f"`{arn}`" in table


def test_the_roles_policy_names_its_objects_and_its_logs_only() -> None:
    found = statements(policies.execution(NAMES))
    assert set(found) == {"Objects", "List", "Logs"}
    assert found["Objects"]["Resource"] == [
        "arn:aws:s3:::BUCKET/?/dask-lambda/*",
        "arn:aws:s3:::BUCKET/?/dask-lambda-kept/*",
    ]
    logs = "arn:aws:logs:eu-west-1:123456789012:log-group:/aws/lambda/dask-lambda"
    assert found["Logs"]["Resource"] == [f"{logs}-1769:*", f"{logs}-3538:*"]
    assert "Traces" in statements(policies.execution(NAMES, tracing=True))


@pytest.mark.parametrize("partition", ["aws-cn", "aws-us-gov"])
def test_other_partitions_have_their_own_arns(partition: str) -> None:
    where = Where("123456789012", "cn-north-1", partition)
    names = Names("dask-lambda", where, "b", "dask-lambda", (1769,))
    for document in (
        policies.execution(names),
        policies.invoker(names),
        policies.deployer(names),
        policies.tls_only(names),
    ):
        arns = re.findall(r'"(arn:[\w-]+):', json.dumps(document))
        assert set(arns) == {f"arn:{partition}"}


def test_no_document_allows_everything() -> None:
    for document in (
        policies.execution(NAMES),
        policies.invoker(NAMES),
        policies.deployer(NAMES),
    ):
        for each in document["Statement"]:
            assert not [a for a in each["Action"] if "*" in a]
            if "*" in each["Resource"]:
                assert each["Sid"] in ("Account", "Look")  # these actions know no resources


def test_the_documents_are_not_longer_than_iam_takes() -> None:
    where = Where("123456789012", "ap-southeast-1")
    sizes = tuple(range(10_240 - MAX_SIZES, 10_240))
    names = Names("n" * 29, where, bucket_name("n" * 29, where), "dask-lambda", sizes)
    repository = f"123456789012.dkr.ecr.ap-southeast-1.amazonaws.com/{'r' * 256}:1"
    for document, most in (
        (policies.execution(names, tracing=True), 10_240),  # all policies in a role
        (policies.invoker(names), 6_144),  # a managed policy
        (policies.deployer(names, image=repository), 6_144),
    ):
        assert len(re.sub(r"\s", "", json.dumps(document))) <= most


def test_whoever_deploys_an_image_may_change_its_repository_only() -> None:
    image = "210987654321.dkr.ecr.eu-west-1.amazonaws.com/team/workers@sha256:" + "a" * 64
    found = statements(policies.deployer(NAMES, image=image))["Image"]
    assert found["Resource"] == ["arn:aws:ecr:eu-west-1:210987654321:repository/team/workers"]


def test_with_a_boundary_whoever_deploys_cannot_make_a_role_without_it() -> None:
    boundary = "arn:aws:iam::123456789012:policy/boundary"
    document = policies.deployer(NAMES, boundary=boundary)
    condition = {"StringEquals": {"iam:PermissionsBoundary": boundary}}
    for action in ("iam:CreateRole", "iam:PutRolePolicy", "iam:PutRolePermissionsBoundary"):
        (statement,) = (each for each in document["Statement"] if action in each["Action"])
        assert statement["Condition"] == condition
    assert "iam:DeleteRolePermissionsBoundary" not in json.dumps(document)
    assert "iam:DeleteRolePermissionsBoundary" in json.dumps(policies.deployer(NAMES))


def test_documents_are_equal_whatever_the_order_of_their_lists() -> None:
    one = policies.execution(NAMES)
    other = json.loads(json.dumps(one))
    for each in other["Statement"]:
        each["Action"].reverse()
    other["Statement"][1]["Resource"] = other["Statement"][1]["Resource"][0]
    other["Statement"][1]["Action"] = other["Statement"][1]["Action"][0]
    assert policies.normal(one) == policies.normal(other)
    other["Statement"][0]["Action"].pop()
    assert policies.normal(one) != policies.normal(other)


def test_a_policy_of_the_bucket_is_added_to_and_not_replaced() -> None:
    ours = policies.tls_only(NAMES)
    theirs = {"Version": "2012-10-17", "Statement": {"Sid": "Theirs", "Effect": "Deny"}}
    assert policies.joined(None, ours) == ours
    assert not policies.contains(None, ours)
    assert not policies.contains(theirs, ours)
    both = policies.joined(theirs, ours)
    assert [each["Sid"] for each in both["Statement"]] == ["Theirs", "EncryptedInTransit"]
    assert policies.contains(both, ours)
    assert policies.joined(both, ours) == both


def test_the_permission_and_resource_are_read_out_of_awss_message() -> None:
    message = (
        "User: arn:aws:iam::1:user/a is not authorized to perform: iam:PassRole on resource: "
        "arn:aws:iam::1:role/r because no identity-based policy allows the iam:PassRole action"
    )
    assert policies.refused(message) == ("iam:PassRole", "arn:aws:iam::1:role/r")
    assert policies.refused("Access Denied") is None


# -- that they are enough, and that nothing is spare ---------------------------------------------


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory = tmp_path_factory.mktemp("policies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_LAMBDA_STATE_DIR", str(directory / "state"))
        patch.setattr("dask.config.PATH", str(directory / "dask"))
        yield


@pytest.fixture(scope="module")
def account(aws: LocalAWS) -> Account:
    return Account.of_local(aws)


@pytest.fixture(scope="module")
def deployed(account: Account, private: None) -> Iterator[Record]:
    options = Options("policies", memory=(1769,))
    prepared = deployment.prepare(account, options, artifact.worker_only(), "1.0")
    record = deployment.deploy(prepared).record
    yield record
    destroy(prepare_removal(account, record, kept=True))


class Person:
    """Somebody with a policy, and nothing else: takes on a role of their own."""

    def __init__(self, account: Account, monkeypatch: pytest.MonkeyPatch):
        self._account, self._patch = account, monkeypatch
        self.role = f"person-{secrets.token_hex(4)}"
        root = f"arn:aws:iam::{account.where.account}:root"
        trust = {"Effect": "Allow", "Principal": {"AWS": root}, "Action": "sts:AssumeRole"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        made = account.call(
            "iam", "CreateRole", RoleName=self.role, AssumeRolePolicyDocument=document
        )
        self._arn = made["Role"]["Arn"]

    def may(self, document: policies.Document) -> None:
        """Give them a policy in place of the one before, and log in."""
        self._account.call(
            "iam",
            "PutRolePolicy",
            RoleName=self.role,
            PolicyName="p",
            PolicyDocument=json.dumps(document),
        )
        keys = self._account.call("sts", "AssumeRole", RoleArn=self._arn, RoleSessionName="person")[
            "Credentials"
        ]
        self._patch.setenv("AWS_ACCESS_KEY_ID", keys["AccessKeyId"])
        self._patch.setenv("AWS_SECRET_ACCESS_KEY", keys["SecretAccessKey"])
        self._patch.setenv("AWS_SESSION_TOKEN", keys["SessionToken"])

    def gone(self) -> None:
        self._account.call("iam", "DeleteRolePolicy", RoleName=self.role, PolicyName="p")
        self._account.call("iam", "DeleteRole", RoleName=self.role)


@pytest.fixture
def person(account: Account, monkeypatch: pytest.MonkeyPatch) -> Iterator[Person]:
    person = Person(account, monkeypatch)
    yield person
    person.gone()


def without(document: policies.Document, sid: str) -> policies.Document:
    rest = [each for each in document["Statement"] if each["Sid"] != sid]
    assert len(rest) == len(document["Statement"]) - 1
    return {**document, "Statement": rest}


def compute(record: Record, **settings: Any) -> float:
    """A small product whose blocks go through S3, with the credentials of the environment."""
    known = {k.replace("-", "_"): v for k, v in configuration(record).items()}
    x = da.ones((40, 40), chunks=(20, 20))
    with dask_lambda.LambdaScheduler(
        **{**known, "backend": "aws", "inline_bytes": 0, "concurrency": 2, "plan": "none"},
        patience=1,
        **settings,
    ) as scheduler:
        return float((x @ x).sum().compute(scheduler=scheduler))


@pytest.mark.local
def test_whoever_has_the_printed_policy_can_compute_and_look(
    deployed: Record, person: Person
) -> None:
    person.may(policies.invoker(deployed.names))
    assert compute(deployed) == 40 * 40 * 40
    account = Account.open("us-east-1", deployed.endpoint_url)
    function = deployed.names.functions[0]
    assert list(
        account.pages(
            "logs", "FilterLogEvents", "events", logGroupName=deployed.names.log_groups[0]
        )
    )
    with dask.config.set({f"dask-lambda.{k}": v for k, v in configuration(deployed).items()}):
        found = {each.name: each.result for each in examine(Settings.resolve())}
    assert set(found.values()) == {"passed"}, found
    for service, operation, parameters in (
        ("lambda", "DeleteFunction", {"FunctionName": function}),
        ("lambda", "GetFunction", {"FunctionName": function}),  # it tells where its code is
        ("s3", "DeleteBucket", {"Bucket": deployed.bucket}),
        ("s3", "PutObject", {"Bucket": deployed.bucket, "Key": "elsewhere", "Body": b""}),
        ("iam", "GetRole", {"RoleName": deployed.names.role}),
    ):
        with pytest.raises(AccessDeniedError):
            account.call(service, operation, **parameters)


@pytest.mark.local
@pytest.mark.parametrize(
    ("missing", "named"), [("Invoke", "lambda:InvokeFunction"), ("Objects", "s3:")]
)
def test_without_one_statement_the_permission_is_named(
    deployed: Record, person: Person, missing: str, named: str
) -> None:
    assert missing in policies.NEEDED
    person.may(without(policies.invoker(deployed.names), missing))
    with pytest.raises(AccessDeniedError, match=named):
        compute(deployed)


@pytest.mark.local
@pytest.mark.parametrize(("missing", "named"), [("Objects", "s3:")])
def test_the_role_needs_its_statements_too(
    deployed: Record,
    account: Account,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    named: str,
    credentials: dict[str, str],
) -> None:
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    role = {"RoleName": deployed.names.role, "PolicyName": "dask-lambda"}
    whole = policies.execution(deployed.names)
    account.call("iam", "PutRolePolicy", **role, PolicyDocument=json.dumps(without(whole, missing)))
    try:
        with pytest.raises(DaskLambdaError, match=named):
            compute(deployed)
    finally:
        account.call("iam", "PutRolePolicy", **role, PolicyDocument=json.dumps(whole))


@pytest.mark.local
def test_hello_waits_for_permissions_that_are_too_new(
    deployed: Record, account: Account, monkeypatch: pytest.MonkeyPatch, credentials: dict[str, str]
) -> None:
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    role = {"RoleName": deployed.names.role, "PolicyName": "dask-lambda"}
    whole = policies.execution(deployed.names)
    slept = []

    def put(document: policies.Document) -> None:
        account.call("iam", "PutRolePolicy", **role, PolicyDocument=json.dumps(document))

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        put(whole)

    settings = {k.replace("-", "_"): v for k, v in configuration(deployed).items()}
    put(without(whole, "Objects"))
    try:
        with pytest.raises(AccessDeniedError, match="s3:"):
            hello(sleep=sleep, **settings)
        assert not slept
        said = hello(patience=60, sleep=sleep, **settings)
    finally:
        put(whole)
    assert len(slept) == 1
    assert said.place["function"] == "policies-1769"


def with_what_the_embedded_aws_asks_for_everywhere(document: policies.Document) -> dict[str, Any]:
    """AWS asks for two of these on one function or repository, the embedded AWS on everything.

    And what changes an alias, the embedded AWS takes for what lists all of them.
    """
    actions = ["lambda:CreateFunction", "ecr:DescribeRepositories", "lambda:ListAliases"]
    more = {"Sid": "C", "Effect": "Allow", "Action": actions, "Resource": "*"}
    return {**document, "Statement": [*document["Statement"], more]}


@pytest.mark.local
def test_whoever_has_the_policy_for_deploying_can_deploy_and_remove(
    account: Account, person: Person, private: None
) -> None:
    options = Options("by-person", memory=(1769,))
    package = artifact.worker_only()
    names = names_of(options, account.where)
    whole = with_what_the_embedded_aws_asks_for_everywhere(policies.deployer(names))

    person.may(without(whole, "Role"))
    theirs = Account.open("us-east-1", account.endpoint_url)
    with pytest.raises(AccessDeniedError, match="iam:GetRole"):
        deployment.prepare(theirs, options, package, "1.0")

    person.may(whole)
    theirs = Account.open("us-east-1", account.endpoint_url)
    done = deployment.deploy(deployment.prepare(theirs, options, package, "1.0"))
    assert not status.state_of(theirs, options.name).remarks
    destroy(prepare_removal(theirs, done.record, kept=False))
    assert not status.state_of(account, options.name).exists


@pytest.mark.local
def test_with_snapshots_the_printed_policies_are_enough_and_for_the_alias(
    account: Account, person: Person, private: None
) -> None:
    options = Options("by-alias", memory=(1769,), snapstart=True)
    package = replace(artifact.worker_only(), runtime="python3.12")
    names = names_of(options, account.where)
    may_deploy = with_what_the_embedded_aws_asks_for_everywhere(policies.deployer(names))

    person.may(may_deploy)
    theirs = Account.open("us-east-1", account.endpoint_url)
    done = deployment.deploy(deployment.prepare(theirs, options, package, "1.0"))
    changed = replace(options, timeout=60)
    deployment.deploy(deployment.prepare(theirs, changed, package, "1.0"))

    person.may(policies.invoker(names))
    assert compute(done.record) == 40 * 40 * 40
    person.may(policies.invoker(replace(names, alias="")))
    with pytest.raises(AccessDeniedError, match="lambda:InvokeFunction"):
        compute(done.record)

    person.may(may_deploy)
    theirs = Account.open("us-east-1", account.endpoint_url)
    without_it = deployment.prepare(theirs, replace(options, snapstart=False), package, "1.0")
    destroy(prepare_removal(theirs, deployment.deploy(without_it).record, kept=False))
    assert not status.state_of(account, options.name).exists
