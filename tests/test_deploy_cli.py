"""The commands that look at an account, in process."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import click
import dask
import pytest
import yaml
from click.testing import CliRunner, Result

from dask_lambda.cli import main
from dask_lambda.cli.deploy import DIFFERS, NOTHING_DEPLOYED
from dask_lambda.cli.env import requirements
from dask_lambda.cli.local import NOT_RUNNING
from dask_lambda.deploy import doctor
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.logs import follow
from dask_lambda.deploy.record import configuration_path
from dask_lambda.local import LocalAWS
from tests.deploy_helpers import inventory

pytestmark = pytest.mark.local

Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("dask.config.PATH", str(tmp_path / "dask"))


@pytest.fixture
def cli(aws: LocalAWS, credentials: dict[str, str]) -> Cli:
    """Run a command where the credentials are the embedded AWS's."""
    environment = {
        **credentials,
        "AWS_REGION": aws.region,
        "AWS_ENDPOINT_URL": aws.endpoint_url,
    }

    def run(*arguments: str, code: int = 0, **more: Any) -> Result:
        done = CliRunner().invoke(main, arguments, env=environment, **more)
        assert done.exit_code == code, done.output
        return done

    return run


@pytest.fixture
def deployed(cli: Cli, aws: LocalAWS) -> Iterator[dict[str, Any]]:
    """A deployment that Dask is configured for, as in a process that begins now."""
    before = inventory(Account.of_local(aws))
    cli("deploy", "--worker-only", "--memory", "1769", "--yes")
    (written,) = dask.config.collect_yaml([str(configuration_path())])
    with dask.config.set({f"dask-lambda.{k}": v for k, v in written["dask-lambda"].items()}):
        yield written["dask-lambda"]
    cli("destroy", "--yes", "--kept")
    assert inventory(Account.of_local(aws)) == before


# -- deploy ------------------------------------------------------------------------------------


def test_the_dry_run_prints_calls_and_policies_and_changes_nothing(
    cli: Cli, aws: LocalAWS, tmp_path: Path
) -> None:
    before = inventory(Account.of_local(aws))
    shown = json.loads(cli("deploy", "--worker-only", "--dry-run", "--json").stdout)
    operations = [c["operation"] for step in shown["steps"] for c in step["calls"]]
    assert operations.count("CreateFunction") == 3
    assert set(shown["policies"]) == {
        "execution role",
        "execution role's trust",
        "whoever computes",
        "whoever deploys",
    }
    assert inventory(Account.of_local(aws)) == before
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dask-lambda.backend": "aws"}, "function and bucket not set"),
        ({"dask-lambda.bucket": "mine"}, "dask-lambda.function is not"),
        ({"dask-lambda.larger-functions": {"3538": "to-be"}}, "larger-functions is set, but"),
    ],
)
def test_settings_that_only_lack_a_deployment_do_not_hinder_it(
    cli: Cli, settings: dict[str, Any], said: str
) -> None:
    with dask.config.set(settings):
        cli("deploy", "--worker-only", "--dry-run")
        cli("status", code=NOTHING_DEPLOYED)
        found = cli("doctor", code=1).output
    assert said in found
    assert "-> mend it, or dask-lambda deploy" in found


def test_whoever_says_no_gets_nothing(cli: Cli, aws: LocalAWS, tmp_path: Path) -> None:
    before = inventory(Account.of_local(aws))
    done = cli("deploy", "--worker-only", code=1, input="n\n")
    assert "+ create role dask-lambda-us-east-1" in done.output
    assert "--yes" in cli("deploy", "--worker-only", "--json", code=2).output
    assert inventory(Account.of_local(aws)) == before
    assert not list(tmp_path.rglob("*"))


def test_a_template_is_written_with_its_files(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "stack.json"
    said = cli("deploy", "--worker-only", "--cloudformation", str(target)).output
    template = json.loads(target.read_text())
    functions = [r for r in template["Resources"].values() if r["Type"] == "AWS::Lambda::Function"]
    for each in functions:
        name = each["Properties"]["Code"]["S3Key"]["Fn::Sub"].removeprefix("${CodePrefix}")
        assert (tmp_path / "stack-files" / name).read_bytes().startswith(b"PK")
    assert "aws cloudformation deploy --region us-east-1" in said
    # what is to be written into the configuration is what `deploy` would write
    _, _, text = said.partition("dask-lambda.yaml:\n")
    settings = yaml.safe_load(text)["dask-lambda"]
    assert settings["function"] == "dask-lambda-1769"
    assert settings["larger-functions"] == {
        "3538": "dask-lambda-3538",
        "10240": "dask-lambda-10240",
    }
    assert (settings["prefix"], settings["timeout"]) == ("dask-lambda", 900)
    assert settings["architecture"] == "x86_64"
    arguments = ("--worker-only", "--json", "--cloudformation", str(target))
    told = json.loads(cli("deploy", *arguments).stdout)
    assert told["configuration"] == {"dask-lambda": settings}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--memory", "64"), 2, "128 to 10,240"),
        (("--name", "A B"), 2, "cannot be the name"),
        (("--tag", "novalue"), 2, "KEY=VALUE"),
        (("--bucket", "not-there-at-all"), 1, "does not exist"),
        (("--log-days", "8"), 2, "CloudWatch takes one of"),
        (("--prefix", "a/b c"), 2, "must consist of letters"),
        (("--image", "x.dkr.ecr.us-east-1.amazonaws.com/y"), 2, "--image and --worker-only contra"),
        (("--package", "pandas"), 2, "--worker-only and --package contradict each other"),
        (("--without", "scipy", "--everything"), 2, "--worker-only and --everything and --without"),
    ],
)
def test_bad_options_are_said(cli: Cli, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = cli("deploy", "--worker-only", "--yes", *arguments, code=code)
    assert said in done.output


def test_a_dry_run_can_be_read(cli: Cli) -> None:
    shown = cli("deploy", "--worker-only", "--dry-run").output
    assert "iam CreateRole   (needs iam:CreateRole)" in shown
    assert "s3 PutPublicAccessBlock   (needs s3:PutBucketPublicAccessBlock)" in shown
    assert "The policy for whoever computes:" in shown
    assert "Nothing was changed." in shown


def test_what_snapshots_cost_is_said_before_they_are_made(cli: Cli, aws: LocalAWS) -> None:
    where = Account.of_local(aws).where
    image = ("--image", f"{where.registry}/mine@sha256:{'a' * 64}")
    given = ("deploy", *image, "--memory", "1024", "--snapstart", "--dry-run")
    shown = cli(*given).output
    assert "needs lambda:PublishVersion" in shown
    assert "<number of the new version of dask-lambda-1024>" in shown
    # 1 GB for 30 days of 86,400 s at $0.0000015046 (us-east-1)
    assert "Snapshots cost $3.90 in 30 days" in shown
    known = json.loads(cli(*given, "--json").stdout)
    assert known["snapshots_usd_30_days"] == pytest.approx(2_592_000 * 0.0000015046)
    (invoke,) = [
        each
        for each in known["policies"]["whoever computes"]["Statement"]
        if each["Sid"] == "Invoke"
    ]
    assert [arn.rpartition("function:")[2] for arn in invoke["Resource"]] == [
        "dask-lambda-1024:snapstart"
    ]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Lambda takes snapshots of this Python")
def test_snapshots_of_an_old_python_are_refused(cli: Cli) -> None:
    said = cli("deploy", "--worker-only", "--snapstart", "--yes", code=1).output
    assert "--snapstart needs Python 3.12 or newer" in said


@pytest.mark.parametrize("command", ["deploy", "status", "destroy"])
def test_without_credentials_it_says_so(command: str) -> None:
    done = CliRunner().invoke(main, [command, "--region", "eu-west-1"])
    assert done.exit_code == 1
    assert "log in, or set AWS_PROFILE" in done.output


def test_it_is_said_what_programs_use_when_one_of_two_deployments_is_gone(cli: Cli) -> None:
    for name in ("one", "two"):
        cli("deploy", "--name", name, "--worker-only", "--memory", "1769", "--yes")
    unused = cli("destroy", "--name", "one", "--yes").output
    assert "programs of yours" not in unused  # they use the other one
    cli("deploy", "--name", "one", "--worker-only", "--memory", "1769", "--yes")
    said = cli("destroy", "--name", "one", "--yes").output
    assert "use the embedded AWS on this machine from now on" in said
    assert "dask-lambda deploy --name two --region us-east-1" in said
    told = json.loads(cli("destroy", "--name", "two", "--yes", "--json").stdout)
    assert (told["used"], told["others"]) == (False, [])


# -- looking -----------------------------------------------------------------------------------


def test_status_says_what_somebody_changed(
    cli: Cli, deployed: dict[str, Any], aws: LocalAWS
) -> None:
    assert "dask-lambda-1769" in cli("status").output
    Account.of_local(aws).call(
        "lambda", "UpdateFunctionConfiguration", FunctionName="dask-lambda-1769", Timeout=3
    )
    said = cli("status", code=4).output
    assert "Timeout: 3, to be 900" in said
    assert "dask-lambda deploy puts it in order" in said
    (function,) = json.loads(cli("status", "--json", code=4).stdout)["functions"]
    assert function["differences"] == ["Timeout: 3, to be 900"]


def test_doctor_finds_what_is_in_the_way(
    cli: Cli, deployed: dict[str, Any], aws: LocalAWS, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results() -> dict[str, tuple[str, str]]:
        done = CliRunner().invoke(main, ["doctor", "--json"], env=environment)
        checks = json.loads(done.stdout)["checks"]
        failed = any(each["result"] == "failed" for each in checks)
        assert done.exit_code == (1 if failed else 0)
        return {each["name"]: (each["result"], each["said"]) for each in checks}

    environment = {
        "AWS_ACCESS_KEY_ID": aws.access_key_id,
        "AWS_SECRET_ACCESS_KEY": aws.secret_access_key,
        "AWS_ENDPOINT_URL": aws.endpoint_url,
    }
    assert {result for result, _ in results().values()} == {"passed"}

    monkeypatch.setattr("lambda_worker.protocol.versions", lambda: {"python": "2.7", "dask": "1.0"})
    result, said = results()["versions in dask-lambda-1769"]
    assert result == "failed"
    assert "client 2.7" in said
    monkeypatch.undo()

    with dask.config.set({"dask-lambda.function": "gone", "dask-lambda.bucket": "gone-too"}):
        found = results()
        assert found["function gone"][0] == "failed"
        assert found["bucket gone-too"] == ("failed", "it does not exist")

    environment["AWS_ACCESS_KEY_ID"] = "AKIASTRANGER"
    found = results()
    assert found["credentials"][0] == "failed"
    assert found["everything else"][0] == "skipped"

    environment.clear()
    assert results()["credentials"][0] == "failed"


def test_doctor_says_when_nothing_is_deployed(cli: Cli) -> None:
    done = cli("doctor")
    assert "computations use the embedded AWS" in done.output
    assert "-> dask-lambda deploy" in done.output


def test_logs_need_something_that_logs(cli: Cli) -> None:
    assert "dask-lambda deploy" in cli("logs", code=1).output
    assert "is no time" in cli("logs", "--since", "yesterday", code=2).output


def test_logs_that_are_followed_come_once_each_as_they_are_written(aws: LocalAWS) -> None:
    account, function = Account.of_local(aws), "followed"
    group, begin = {"logGroupName": f"/aws/lambda/{function}"}, int(time.time() * 1000)
    stream = {**group, "logStreamName": "2026/11/25/[$LATEST]5d3f"}

    def write(*messages: str) -> None:
        now = int(time.time() * 1000)
        events = [{"timestamp": now + n, "message": text} for n, text in enumerate(messages)]
        account.call("logs", "PutLogEvents", **stream, logEvents=events)

    later = [(), ("third",), ("fourth", "fifth")]

    def sleep(seconds: float) -> None:
        if not later:
            raise KeyboardInterrupt
        if messages := later.pop(0):
            write(*messages)

    account.call("logs", "CreateLogGroup", **group)
    try:
        account.call("logs", "CreateLogStream", **stream)
        write("first", "second")
        lines = follow(account, [function, "without-a-log"], begin, sleep=sleep)
        read = [next(lines).text for _ in range(5)]
        assert read == ["first", "second", "third", "fourth", "fifth"]
        with pytest.raises(KeyboardInterrupt):
            next(lines)
    finally:
        account.call("logs", "DeleteLogGroup", **group)


def test_files_of_the_users_own_are_left_alone(cli: Cli, deployed: dict[str, Any]) -> None:
    path = configuration_path()
    assert oct(os.stat(path).st_mode & 0o777) == "0o600"
    mine = path.with_name("dask-lambda.yaml")
    mine.write_text("dask-lambda:\n  function: other\n")
    cli("destroy", "--yes")
    assert not path.exists()
    assert mine.exists()
    cli("deploy", "--worker-only", "--memory", "1769", "--yes")
    settings = dask.config.collect([str(path.parent)], env={})
    assert settings["dask-lambda"]["function"] == "other"


# -- all commands ------------------------------------------------------------------------------


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """All commands that do something, and how they are called."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_every_command_answers_in_json() -> None:
    found = dict(commands(main))
    assert {"deploy", "env build", "runs list", "local stop", "cost", "clean"} <= set(found)
    without = [
        name
        for name, command in found.items()
        if not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert without == []


def test_the_guide_lists_every_command_and_exit_code() -> None:
    text = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text("utf-8")
    codes = set(re.findall(r"^\| (\d) \| ", text, re.MULTILINE))
    assert codes == {"0", "1", "2", str(NOTHING_DEPLOYED), str(NOT_RUNNING), str(DIFFERS)}
    for name in ("deploy", "status", "destroy", "hello", "doctor", "logs", "env build", "env show"):
        assert f"`{name}`" in text or f"dask-lambda {name}`" in text, name


@pytest.mark.parametrize(
    ("seconds", "result"), [(0, "passed"), (-120, "warning"), (120, "warning"), (-400, "failed")]
)
def test_a_clock_that_is_wrong_is_found(seconds: float, result: str) -> None:
    date = formatdate(time.time() + seconds, usegmt=True)  # as AWS's answers have it
    check = doctor._clock({"ResponseMetadata": {"HTTPHeaders": {"date": date}}})
    assert check.result == result
    assert ("NTP" in check.advice) == (result != "passed")


def test_workers_can_read_what_is_compressed() -> None:
    assert requirements(["pandas"]) == ["pandas"]
    with dask.config.set({"dask-lambda.compression": "zstd"}):
        assert requirements(["pandas"]) == ["pandas", "zstandard"]
