"""Deployments elsewhere: by CloudFormation, in other regions, and as moto sees AWS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import botocore.session
import pytest
from botocore.validate import ParamValidator
from moto.server import ThreadedMotoServer

from dask_lambda.deploy import artifact, cloudformation, deployment, layers, policies
from dask_lambda.deploy import package as packaging
from dask_lambda.deploy.apply import Applier
from dask_lambda.deploy.artifact import Archive, Layer, Package, Recipe
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.calls import Push, Step
from dask_lambda.deploy.destroy import destroy, prepare_removal
from dask_lambda.deploy.look import look
from dask_lambda.deploy.naming import Where, image_uri
from dask_lambda.deploy.plan import changes, plan
from dask_lambda.deploy.platforms import Platform
from dask_lambda.deploy.resources import Blueprint, Options, blueprint
from dask_lambda.deploy.seen import Seen
from dask_lambda.errors import ConfigurationError
from dask_lambda.local import LocalAWS
from lambda_worker.store import elsewhere
from tests.deploy_helpers import eventually_created, inventory
from tests.helpers import eventually

WHERE = Where("123456789012", "eu-west-1")
ARCHIVE = Archive.of(b"PK")
PACKAGE = Package(ARCHIVE, (Layer("packages-1", ARCHIVE, "c0ffee"),), "python3.12", "arm64")
IMAGE = artifact.from_image(
    f"123456789012.dkr.ecr.eu-west-1.amazonaws.com/dask-lambda@sha256:{'a' * 64}", "arm64"
)
RECIPE = artifact.from_recipe(
    Recipe(Path("context"), Platform.of_lambda("3.12", "arm64", image=True), "c0ffee-1"),
    image_uri("dask-lambda", WHERE, "c0ffee-1"),
    "c0ffee",
)
EVERYTHING = Options(
    memory=(1769, 10_240),
    boundary="arn:aws:iam::123456789012:policy/boundary",
    tracing=True,
    metrics=True,
    storage=1024,
    tags={"team": "physics"},
)


SNAPSTART = Options(memory=(1769, 10_240), snapstart=True)


@pytest.fixture(autouse=True)
def _private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("dask.config.PATH", str(tmp_path / "dask"))


def described(options: Options, package: Package = PACKAGE) -> Blueprint:
    return blueprint(options, WHERE, package, version="1.0")


# -- every call is one that AWS knows ------------------------------------------------------------


@pytest.mark.parametrize("options", [EVERYTHING, SNAPSTART])
@pytest.mark.parametrize(
    ("package", "large"), [(PACKAGE, False), (PACKAGE, True), (IMAGE, False), (RECIPE, False)]
)
def test_botocore_accepts_the_parameters_of_every_call(
    monkeypatch: pytest.MonkeyPatch, options: Options, package: Package, large: bool
) -> None:
    if large:
        monkeypatch.setattr("dask_lambda.deploy.layers.MAX_DIRECT", 1)
    steps = plan(described(options, package), Seen())
    assert {step.verb for step in steps} <= {"create", "delete"}
    calls = [call for step in steps for call in step.calls]
    assert {c.operation for c in calls} >= {"CreateBucket", "CreateRole", "CreateFunction"}
    session = botocore.session.get_session()
    applier = Applier(None)  # type: ignore[arg-type]  # fills in bytes and ARNs, calls nothing
    applier.applied.layers["dask-lambda-packages-1"] = "arn:aws:lambda:eu-west-1:1:layer:x:1"
    applier.applied.versions.update({"dask-lambda-1769": "1", "dask-lambda-10240": "1"})
    for call in calls:
        if isinstance(call, Push):
            continue
        model = session.get_service_model(call.service).operation_model(call.operation)
        report = ParamValidator().validate(applier._filled(call.parameters), model.input_shape)
        assert not report.has_errors(), f"{call.operation}: {report.generate_report()}"


@pytest.mark.parametrize("options", [EVERYTHING, SNAPSTART])
@pytest.mark.parametrize("package", [PACKAGE, IMAGE, RECIPE])
def test_whoever_deploys_is_allowed_every_call(options: Options, package: Package) -> None:
    wanted = described(options, package)
    document = policies.deployer(wanted.names, image=package.image)
    allowed = {action for each in document["Statement"] for action in each["Action"]}
    needed = {call.action for step in plan(wanted, Seen()) for call in step.calls}
    assert needed <= allowed


@pytest.mark.parametrize(
    ("region", "constraint"), [("us-east-1", None), ("eu-west-1", "eu-west-1")]
)
def test_only_us_east_1_is_not_named_to_create_bucket(region: str, constraint: str | None) -> None:
    wanted = blueprint(Options(), Where("123456789012", region), PACKAGE, version="1.0")
    create = plan(wanted, Seen())[0].calls[0]
    assert create.operation == "CreateBucket"
    configuration = create.parameters.get("CreateBucketConfiguration", {})
    assert configuration.get("LocationConstraint") == constraint


def test_s3_is_found_in_all_partitions() -> None:
    endpoints = botocore.session.get_session().get_component("data_loader").load_data("endpoints")
    for partition in endpoints["partitions"]:
        for region in partition["regions"]:
            said = elsewhere(region)
            if partition["dnsSuffix"] == "amazonaws.com":  # which obstore knows
                assert said is None
            else:
                assert said == f"https://s3.{region}.{partition['dnsSuffix']}"


def test_what_is_shown_of_a_plan_holds_no_bytes() -> None:
    shown = json.dumps([step.to_json() for step in plan(described(EVERYTHING), Seen())])
    assert f"<2 bytes, SHA-256 {ARCHIVE.sha256}>" in shown
    assert "<ARN of the new version of dask-lambda-packages-1>" in shown


def test_the_functions_are_as_the_documents_say() -> None:
    functions = {each.memory: each for each in described(EVERYTHING).functions}
    settings = functions[10_240].settings
    assert settings["Environment"]["Variables"] == {
        "PYTHONHASHSEED": "6640",
        "OMP_NUM_THREADS": "6",
        "OPENBLAS_NUM_THREADS": "6",
        "MKL_NUM_THREADS": "6",
        "DASK_LAMBDA_METRICS": "1",
    }
    assert settings["EphemeralStorage"] == {"Size": 1024}
    assert settings["TracingConfig"] == {"Mode": "Active"}
    assert functions[1769].settings["Environment"]["Variables"]["OMP_NUM_THREADS"] == "1"


def test_an_image_of_another_region_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="in another region.*us-west-2"):
        blueprint(Options(), Where("123456789012", "us-west-2"), IMAGE, version="1.0")


def test_an_environment_that_was_built_is_deployed_as_its_layers(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK-a")
    (tmp_path / "b.zip").write_bytes(b"PK-b")
    digests = [Archive.of(tmp_path / name).sha256 for name in ("a.zip", "b.zip")]
    built = packaging.Package(
        digest="c0ffee",
        form="layers",
        platform=Platform.of_lambda("3.12", "arm64"),
        packages={"numpy": "2.4.0"},
        listed=("numpy",),
        layers=(
            layers.Layer("a.zip", digests[0], 4, 9, ("numpy",)),
            layers.Layer("b.zip", digests[1], 4, 9, ("scipy",)),
        ),
        sizes=(),
        cuts={},
        directory=tmp_path,
    )
    package = artifact.from_environment(built, b"PK", [("DASK_LAMBDA_PREIMPORT", "numpy")])
    wanted = described(Options(memory=(1769,)), package)
    (function,) = wanted.functions
    assert [each.archive.read() for each in wanted.layers] == [b"PK-a", b"PK-b"]
    assert [each.content for each in wanted.layers] == digests
    assert function.layers == ("dask-lambda-packages-1", "dask-lambda-packages-2")
    assert function.architecture == "arm64"
    assert function.settings["Runtime"] == "python3.12"
    assert function.settings["Environment"]["Variables"]["DASK_LAMBDA_PREIMPORT"] == "numpy"
    assert "c0ffee" in function.settings["Description"]


# -- CloudFormation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "package"),
    [
        (Options(), PACKAGE),
        (EVERYTHING, PACKAGE),
        (Options(bucket="users-own"), PACKAGE),
        (Options(), IMAGE),
        (SNAPSTART, PACKAGE),
        (SNAPSTART, IMAGE),
    ],
)
def test_cfn_lint_has_nothing_to_say_about_the_template(options: Options, package: Package) -> None:
    from cfnlint.api import ManualArgs, lint

    text = json.dumps(cloudformation.template(described(options, package)))
    found = lint(text, config=ManualArgs(regions=["us-east-1", "eu-west-1"]))
    assert [str(each) for each in found] == []


@pytest.mark.local
@pytest.mark.parametrize("snapstart", [False, True])
def test_what_the_template_creates_is_what_deploy_wants(aws: LocalAWS, snapstart: bool) -> None:
    account = Account.of_local(aws)
    found = changes_after_the_template(account, snapstart=snapstart)
    # The embedded AWS's CloudFormation leaves out the tags and rules of buckets.
    assert [each for each in found if each.kind != "bucket"] == []


def test_the_bucket_of_the_template_has_the_tags_and_rules_of_deploy() -> None:
    wanted = described(EVERYTHING)
    bucket = cloudformation.template(wanted)["Resources"]["Bucket"]["Properties"]
    assert {each["Key"]: each["Value"] for each in bucket["Tags"]} == wanted.bucket.tags
    rules = bucket["LifecycleConfiguration"]["Rules"]
    assert [(each["Prefix"], each["ExpirationInDays"]) for each in rules] == [
        (rule["Filter"]["Prefix"], rule["Expiration"]["Days"]) for rule in wanted.bucket.rules()
    ]


def changes_after_the_template(account: Account, *, snapstart: bool = False) -> list[Step]:
    """Create a stack; return what a deployment would change then; remove it."""
    before = inventory(account)
    options = Options("by-stack", memory=(1769,), snapstart=snapstart)
    package = replace(artifact.worker_only(), runtime="python3.12")
    wanted = deployment.prepare(account, options, package, "1.0").wanted
    region = account.region
    place = {"CreateBucketConfiguration": {"LocationConstraint": region}}
    bucket = {"Bucket": "code-for-stack"}
    account.call("s3", "CreateBucket", **bucket, **(place if region != "us-east-1" else {}))
    try:
        for name, archive in cloudformation.files(wanted).items():
            account.call("s3", "PutObject", **bucket, Key=f"x/{name}", Body=archive.read())
        account.call(
            "cloudformation",
            "CreateStack",
            StackName="by-stack",
            TemplateBody=json.dumps(cloudformation.template(wanted)),
            Parameters=[
                {"ParameterKey": "CodeBucket", "ParameterValue": "code-for-stack"},
                {"ParameterKey": "CodePrefix", "ParameterValue": "x/"},
            ],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        eventually_created(account, "by-stack")
        seen = look(account, "by-stack", wanted.bucket.name)
        return changes(plan(wanted, seen, begun=[wanted.bucket.name]))
    finally:
        account.call("cloudformation", "DeleteStack", StackName="by-stack")
        for name in cloudformation.files(wanted):
            account.call("s3", "DeleteObject", **bucket, Key=f"x/{name}")
        account.call("s3", "DeleteBucket", **bucket)
        assert eventually(lambda: inventory(account) == before)


# -- a second opinion ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def test_moto_agrees_that_it_is_deployed_kept_and_removed(moto: str) -> None:
    session = boto3.Session("a", "b", region_name="eu-west-1")
    account = Account(session, moto)
    before = inventory(account)
    options = Options(memory=(1769, 3538))
    package = artifact.worker_only()
    done = deployment.deploy(deployment.prepare(account, options, package, "1.0"))
    again = deployment.prepare(account, options, package, "1.0")
    assert again.changes == []
    location = account.call("s3", "GetBucketLocation", Bucket=done.record.bucket)
    assert location["LocationConstraint"] == "eu-west-1"
    assert destroy(prepare_removal(account, done.record, kept=False)) == []
    assert inventory(account) == before
