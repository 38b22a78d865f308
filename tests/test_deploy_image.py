"""Workers as a container image: what docker is told, and what is in ECR before and after.

Docker is another program, and a stand-in for it is put on ``PATH``: it writes down what it is told
and what it is given, and puts an image into the registry when it is told to push one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from click.testing import CliRunner, Result

from dask_lambda.cli import main
from dask_lambda.deploy import artifact, deployment, environment, image
from dask_lambda.deploy import package as packaging
from dask_lambda.deploy.artifact import Package, Recipe
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.deployment import Prepared
from dask_lambda.deploy.naming import TAG, Where, image_uri
from dask_lambda.deploy.platforms import Platform
from dask_lambda.deploy.resources import blueprint
from dask_lambda.errors import DeploymentError
from dask_lambda.local import LocalAWS
from lambda_worker.environment import FILE, Deployed
from tests.account_helpers import ONE, _leaves_nothing, account, remove
from tests.deploy_helpers import answer_with, denied, inventory

__all__ = ["_leaves_nothing", "account"]

pytestmark = pytest.mark.local

PASSWORD = "ministack-auth-token"
REPOSITORY = "dask-lambda-workers"

DOCKER = """\
#!{python} -S
import json, os, sys
told = sys.argv[1:]
given = sys.stdin.read() if "--password-stdin" in told else ""
with open({log!r}, "a") as log:
    print(json.dumps([told, given]), file=log)
if told[0] == os.environ.get("DOCKER_FAILS_AT"):
    sys.exit("no space left on device")
if told[0] == "push":
    sys.path.append({packages!r})
    import boto3
    name, tag = told[1].partition("/")[2].split(":")
    ecr = boto3.client("ecr", endpoint_url={endpoint!r}, region_name="us-east-1")
    ecr.put_image(repositoryName=name, imageTag=tag, imageManifest=json.dumps({{"tag": tag}}))
"""


class Docker:
    """The stand-in."""

    def __init__(self, directory: Path):
        self.program, self._log = directory / "docker", directory / "log"

    def install(self, endpoint_url: str) -> None:
        packages = str(Path(boto3.__file__).parents[1])
        text = DOCKER.format(
            python=sys.executable, log=str(self._log), endpoint=endpoint_url, packages=packages
        )
        self.program.write_text(text)
        self.program.chmod(0o755)

    @property
    def log(self) -> list[tuple[list[str], str]]:
        """What it was told, and given, since this was last asked."""
        if not self._log.exists():
            return []
        lines = self._log.read_text().splitlines()
        self._log.unlink()
        return [tuple(json.loads(line)) for line in lines]


@pytest.fixture
def docker(
    aws: LocalAWS, credentials: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Docker:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    docker = Docker(folder)
    docker.install(aws.endpoint_url)
    return docker


def an_image(account: Account, context: Path, tag: str = "one") -> Package:
    recipe = Recipe(context, Platform.of_lambda("3.12", image=True), tag, "it is too large")
    return artifact.from_recipe(recipe, image_uri("dask-lambda", account.where, tag), f"e-{tag}")


def deploy(prepared: Prepared) -> None:
    """Deploy, and look often: the embedded AWS takes half a second for a function."""
    deployment.deploy(prepared, sleep=lambda seconds: time.sleep(min(seconds, 0.02)))


def prepare(account: Account, package: Package) -> Prepared:
    return deployment.prepare(account, ONE, package, "1.0")


def tags_in_ecr(account: Account) -> list[str]:
    found = account.call("ecr", "ListImages", repositoryName=REPOSITORY)["imageIds"]
    return sorted(each["imageTag"] for each in found)


# -- docker and ECR ----------------------------------------------------------------------------


def test_the_image_is_built_pushed_deployed_and_removed(
    account: Account, docker: Docker, tmp_path: Path
) -> None:
    package = an_image(account, tmp_path)
    registry, uri = account.where.registry, package.image
    deploy(prepare(account, package))
    assert docker.log == [
        (
            [
                *("build", "--platform", "linux/amd64", "--provenance=false"),
                *("--tag", uri, str(tmp_path)),
            ],
            "",
        ),
        (["login", "--username", "AWS", "--password-stdin", registry], PASSWORD),
        (["push", uri], ""),
        (["logout", registry], ""),
    ]
    (repository,) = account.call("ecr", "DescribeRepositories", repositoryNames=[REPOSITORY])[
        "repositories"
    ]
    assert repository["imageTagMutability"] == "IMMUTABLE"
    tags = account.call("ecr", "ListTagsForResource", resourceArn=repository["repositoryArn"])
    assert {"Key": TAG, "Value": "dask-lambda"} in tags["tags"]
    policy = account.call("ecr", "GetRepositoryPolicy", repositoryName=REPOSITORY)["policyText"]
    (statement,) = json.loads(policy)["Statement"]
    assert statement["Principal"] == {"Service": "lambda.amazonaws.com"}
    function = account.call("lambda", "GetFunction", FunctionName="dask-lambda-1769")
    assert function["Code"]["ImageUri"] == uri
    assert prepare(account, package).changes == []

    other = an_image(account, tmp_path, "two")
    deploy(prepare(account, other))
    assert tags_in_ecr(account) == ["two"]
    assert [told[0] for told, _ in docker.log] == ["build", "login", "push", "logout"]

    docker.program.unlink()  # neither what is there nor what is removed needs it
    assert prepare(account, other).changes == []
    assert remove(account) == []
    assert inventory(account)["repositories"] == []


def test_layers_take_the_repositorys_place(
    account: Account, docker: Docker, tmp_path: Path
) -> None:
    deploy(prepare(account, an_image(account, tmp_path)))
    deploy(prepare(account, artifact.worker_only()))
    assert inventory(account)["repositories"] == []
    assert prepare(account, artifact.worker_only()).changes == []


def test_an_image_that_the_user_has_pushed_there_stays(
    account: Account, docker: Docker, tmp_path: Path
) -> None:
    built = an_image(account, tmp_path)
    deploy(prepare(account, built))
    assert built.image is not None
    named = artifact.from_image(built.image)
    assert [step.kind for step in prepare(account, named).changes] == ["function"]  # description


def test_a_repository_of_somebody_else_stays(
    account: Account, docker: Docker, tmp_path: Path
) -> None:
    account.call("ecr", "CreateRepository", repositoryName=REPOSITORY)
    try:
        with pytest.raises(DeploymentError, match=r"there is a repository .*--name"):
            prepare(account, an_image(account, tmp_path))
        assert any(each.startswith(f"repository {REPOSITORY}") for each in remove(account))
        assert inventory(account)["repositories"] == [REPOSITORY]
    finally:
        account.call("ecr", "DeleteRepository", repositoryName=REPOSITORY)


@pytest.mark.parametrize("command", ["login", "push"])
def test_what_docker_fails_at_is_said_and_goes_on_later(
    account: Account,
    docker: Docker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    package = an_image(account, tmp_path)
    before = inventory(account)["functions"]
    monkeypatch.setenv("DOCKER_FAILS_AT", command)
    with pytest.raises(DeploymentError) as caught:
        deploy(prepare(account, package))
    said = str(caught.value)
    assert "could not create image" in said
    assert "no space left on device" in said
    assert "done so far: create repository" in said
    assert PASSWORD not in said
    told = [each[0] for each, _ in docker.log]
    assert ("logout" in told) == (command == "push")  # nobody stays logged in
    assert inventory(account)["functions"] == before  # nothing came after it
    monkeypatch.delenv("DOCKER_FAILS_AT")
    changes = [step.kind for step in prepare(account, package).changes]
    assert changes[0] == "image"
    assert "repository" not in changes


def test_without_the_permission_to_log_in_it_is_named(
    account: Account, docker: Docker, tmp_path: Path
) -> None:
    answer_with(
        account,
        "ecr",
        "GetAuthorizationToken",
        "AccessDeniedException",
        denied("ecr:GetAuthorizationToken", "*"),
    )
    with pytest.raises(DeploymentError, match="ecr:GetAuthorizationToken"):
        deploy(prepare(account, an_image(account, tmp_path)))


@pytest.mark.parametrize(
    ("partition", "region", "registry"),
    [
        ("aws", "eu-west-1", "123456789012.dkr.ecr.eu-west-1.amazonaws.com"),
        ("aws-cn", "cn-north-1", "123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn"),
        ("aws-us-gov", "us-gov-west-1", "123456789012.dkr.ecr.us-gov-west-1.amazonaws.com"),
    ],
)
def test_every_partition_has_its_registry(partition: str, region: str, registry: str) -> None:
    where = Where("123456789012", region, partition)
    uri = image_uri("dask-lambda", where, "c0ffee-1")
    assert uri == f"{registry}/dask-lambda-workers:c0ffee-1"
    assert artifact.IMAGE.fullmatch(uri)
    recipe = Recipe(Path("x"), Platform.of_lambda("3.12", image=True), "c0ffee-1")
    package = artifact.from_recipe(recipe, uri, "c0ffee")
    wanted = blueprint(ONE, where, package, version="1.0")
    assert wanted.repository is not None
    (statement,) = wanted.repository.policy["Statement"]
    assert statement["Condition"]["StringLike"]["aws:sourceArn"].startswith(f"arn:{partition}:")


# -- the command -------------------------------------------------------------------------------


class Command:
    """``dask-lambda`` where an environment was built that needs an image."""

    def __init__(self, aws: LocalAWS, context: Path):
        self.context = context
        self._environment = {"AWS_REGION": aws.region, "AWS_ENDPOINT_URL": aws.endpoint_url}

    def __call__(self, *arguments: str, code: int = 0) -> Result:
        done = CliRunner().invoke(main, arguments, env=self._environment)
        assert done.exit_code == code, done.output
        return done


@pytest.fixture
def cli(aws: LocalAWS, docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parent = packaging.cache_directory() / "environments"
    platform = Platform.of_lambda(image=True)
    job = packaging._Job("image", platform, environment.WORKER, parent)
    context = parent / job.digest
    (context / image.PACKAGES).mkdir(parents=True)
    deployed = Deployed(job.digest, job.packages, job.resolved.listed)
    (context / image.PACKAGES / FILE).write_text(deployed.to_json())
    manifest: dict[str, Any] = {
        "digest": job.digest,
        "form": "image",
        "platform": dataclasses.asdict(platform),
        "packages": job.packages,
        "listed": sorted(job.resolved.listed),
        "layers": [],
        "sizes": [{"name": "scipy", "version": "1.17.0", "nbytes": 101_000_000}],
        "cuts": {"tests": 26_000_000},
        "because": "it has no wheel for Lambda's own runtime",
    }
    (context / packaging.MANIFEST).write_text(json.dumps(manifest))
    return Command(aws, context)


def test_deploy_builds_and_pushes_by_itself(cli: Command, docker: Docker, account: Account) -> None:
    calls = json.loads(cli("deploy", "--memory", "1769", "--dry-run", "--json").stdout)
    shown = [call for step in calls["steps"] for call in step["calls"]]
    (push,) = [call for call in shown if call["service"] == "docker"]
    assert push["parameters"]["context"] == str(cli.context)
    assert [call["operation"] for call in shown][:2] == ["CreateRepository", "SetRepositoryPolicy"]
    assert "ecr:GetAuthorizationToken" in json.dumps(calls["policies"]["whoever deploys"])
    assert docker.log == []  # nothing was done

    said = cli("deploy", "--memory", "1769", "--yes").output
    assert "create repository dask-lambda-workers" in said
    assert "it has no wheel for Lambda's own runtime" in said
    assert [told[0] for told, _ in docker.log] == ["version", "build", "login", "push", "logout"]
    assert (cli.context / "Dockerfile").is_file()
    assert (cli.context / image.WORKER / "lambda_worker" / "handler.py").is_file()
    assert PASSWORD not in said
    function = account.call("lambda", "GetFunction", FunctionName="dask-lambda-1769")
    variables = function["Configuration"]["Environment"]["Variables"]
    assert variables["DASK_LAMBDA_PREIMPORT"] == packaging.PREIMPORT

    again = cli("deploy", "--memory", "1769", "--yes").output
    assert "everything is there already" in again
    assert docker.log == []
    assert "repository dask-lambda-workers" in cli("status").output
    assert "delete repository dask-lambda-workers" in cli("destroy", "--yes").output


@pytest.mark.parametrize("why", ["not installed", "does not answer"])
def test_without_docker_it_says_what_to_do_before_anything_is_made(
    cli: Command, docker: Docker, account: Account, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "not installed":
        docker.program.unlink()
    else:
        monkeypatch.setenv("DOCKER_FAILS_AT", "version")
    before, registry = inventory(account), account.where.registry
    said = cli("deploy", "--yes", code=1).output
    assert why in said
    assert f"docker build --platform linux/amd64 --provenance=false --tag {registry}/" in said
    assert f"{cli.context}\n" in said
    assert "docker push " in said
    assert "dask-lambda deploy --image " in said
    assert inventory(account) == before
    template = cli("deploy", "--cloudformation", str(cli.context / "stack.json"), code=1).output
    assert "docker push " in template


def test_the_environment_is_shown(cli: Command) -> None:
    built = json.loads(cli("env", "build", "--json").stdout)
    assert built["form"] == "image"
    assert Path(built["recipe"]) == cli.context / "Dockerfile"
    assert built["sizes"] == {"scipy": 101_000_000}
    digest = built["environment"]
    text = cli("env", "build").output
    assert f"environment {digest}: an image, Python {built['python']}, x86_64" in text
    assert "scipy 1.17.0" in text
    assert "101.0 MB" in text
    assert "an image, because it has no wheel" in text
    assert digest in cli("env", "show").output
    (listed,) = json.loads(cli("env", "show", "--json").stdout)["environments"]
    assert json.loads(cli("env", "show", digest[:4], "--json").stdout) == listed
    assert f"numpy {built['packages']['numpy']}" in cli("env", "show", digest).output
    assert f"there are: {digest}" in cli("env", "show", "zzz", code=1).output
