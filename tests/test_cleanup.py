"""However a program ends, S3 is asked itself what is left; what a killed one leaves is cleaned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from dask import delayed

import dask_lambda
from dask_lambda import kept_runs, lifecycle, signals
from dask_lambda.cleaning import Bucket
from dask_lambda.errors import BucketNotFoundError
from tests.helpers import eventually

pytestmark = pytest.mark.local
ROOT = Path(dask_lambda.__file__).parents[1]

Names = Callable[[], list[str]]

PROGRAM = """
import os, signal, sys, time
import numpy as np
from dask import delayed
from dask_lambda import LambdaScheduler

way, directory, function, bucket, endpoint = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
scheduler = LambdaScheduler(backend="aws", function=function, bucket=bucket, region="us-east-1",
                            endpoint_url=endpoint, concurrency=2, inline_bytes=0, plan="none")

def block(n):
    return np.full(1000, n)

def last(blocks):
    open(directory + "/seen", "w").close()
    if way == "error":
        raise ValueError("as it should")
    while way != "success" and not os.path.exists(directory + "/gate"):
        time.sleep(0.01)
    return sum(b.sum() for b in blocks)

kept = delayed(block)(7).persist(scheduler=scheduler)
blocks = [delayed(block)(n) for n in range(6)]
print(delayed(last)(blocks).compute(scheduler=scheduler), flush=True)
"""


class Client:
    """A program that computes, in a process of its own."""

    def __init__(self, way: str, directory: Path, aws: Any, credentials: dict[str, str]):
        self.directory = directory
        (directory / "tmp").mkdir()
        arguments = [way, str(directory), aws.function, aws.bucket, aws.endpoint_url]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **credentials,
                "PYTHONPATH": str(ROOT),
                "TMPDIR": str(directory / "tmp"),
            },
        )

    def wait_for_last(self) -> None:
        assert eventually((self.directory / "seen").exists, 60)

    def end(self) -> tuple[str, str]:
        """Wait for its end; what it printed."""
        try:
            return self.process.communicate(timeout=60)
        finally:
            self.process.kill()
            self.process.communicate()

    def open_gate(self) -> None:
        (self.directory / "gate").touch()

    def left(self) -> list[Any]:
        """Its temporary files, and processes that it has started."""
        found: list[Any] = list((self.directory / "tmp").iterdir())
        for other in psutil.process_iter():
            try:
                if other.environ().get("TMPDIR") == str(self.directory / "tmp"):
                    found.append(other)
            except psutil.Error:
                continue
        return found


@pytest.fixture
def client(
    tmp_path: Path, aws: Any, credentials: dict[str, str], bucket_names: Names
) -> Iterator[Callable[[str], Client]]:
    made: list[Client] = []

    def make(way: str) -> Client:
        made.append(Client(way, tmp_path, aws, credentials))
        return made[-1]

    yield make
    for each in made:
        each.open_gate()
        each.end()
    delete = aws.client("s3").delete_object
    for name in bucket_names():
        delete(Bucket=aws.bucket, Key=name)


@pytest.fixture
def cli(
    aws: Any, credentials: dict[str, str], tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line, configured for the embedded AWS as if it were AWS."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dask_lambda", *arguments],
            env={
                **os.environ,
                **credentials,
                "PYTHONPATH": str(ROOT),
                "DASK_LAMBDA_STATE_DIR": str(tmp_path / "state"),
                "DASK_DASK_LAMBDA__BACKEND": "aws",
                "DASK_DASK_LAMBDA__FUNCTION": aws.function,
                "DASK_DASK_LAMBDA__BUCKET": aws.bucket,
                "DASK_DASK_LAMBDA__REGION": aws.region,
                "DASK_DASK_LAMBDA__ENDPOINT_URL": aws.endpoint_url,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize(("way", "code"), [("success", 0), ("error", 1)])
def test_a_program_that_ends_leaves_nothing(
    client: Callable[[str], Client], bucket_names: Names, way: str, code: int
) -> None:
    program = client(way)
    out, errors = program.end()
    assert program.process.returncode == code, errors
    assert ("15000" in out) == (way == "success")
    assert ("ValueError: as it should" in errors) == (way == "error")
    assert not bucket_names()
    assert not program.left()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_a_program_that_is_stopped_leaves_nothing(
    client: Callable[[str], Client], bucket_names: Names, number: int, code: int
) -> None:
    program = client("slow")
    program.wait_for_last()
    assert len(bucket_names()) == 7
    program.process.send_signal(number)
    _, errors = program.end()
    assert program.process.returncode == code, errors
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert not bucket_names()
    assert not program.left()


def test_what_a_killed_program_leaves_is_cleaned(
    client: Callable[[str], Client], cli: Any, aws: Any, bucket_names: Names
) -> None:
    program = client("killed")
    program.wait_for_last()
    program.process.kill()
    program.end()
    assert not program.left()
    program.open_gate()  # the invocation goes on, and writes the last result
    assert eventually(lambda: len(bucket_names()) == 8)
    s3 = aws.client("s3")
    foreign = ["0/other/file", "notes.txt", f"0/dask-lambda/{'x' * 32}/a", "0/dask-lambda/short/a"]
    for name in foreign:
        s3.put_object(Bucket=aws.bucket, Key=name, Body=b"mine")
    ours = f"a/dask-lambda/{'0' * 32}/{'1' * 32}~/attempt"
    for name in (ours, "uploads/mine"):
        s3.create_multipart_upload(Bucket=aws.bucket, Key=name)

    young = cli("clean", "--older-than", "1h", "--yes", "--json")
    assert json.loads(young.stdout) == {"runs": [], "uploads": 0, "deleted": True}, young.stderr
    dry = cli("clean", "--older-than", "0s", "--dry-run")
    assert "would be deleted" in dry.stdout
    assert len(bucket_names()) == 8 + len(foreign)
    asked = cli("clean", "--older-than", "0s", "--json")
    assert asked.returncode == 2
    assert "--yes" in asked.stderr
    assert len(bucket_names()) == 8 + len(foreign)

    done = cli("clean", "--older-than", "0s", "--yes", "--json")

    answer = json.loads(done.stdout)
    assert sum(run["objects"] for run in answer["runs"]) == 8
    assert answer["uploads"] == 1
    assert sorted(bucket_names()) == sorted(foreign)
    uploads = s3.list_multipart_uploads(Bucket=aws.bucket).get("Uploads", [])
    assert [upload["Key"] for upload in uploads] == ["uploads/mine"]
    s3.abort_multipart_upload(
        Bucket=aws.bucket, Key="uploads/mine", UploadId=uploads[0]["UploadId"]
    )


@pytest.mark.parametrize("text", ["1x", "soon", "5"])
def test_times_that_are_none(cli: Any, text: str) -> None:
    done = cli("clean", "--older-than", text, "--yes")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "1d" in done.stderr


def test_kept_runs_are_cleaned_when_asked_for(
    connect: Any, cli: Any, tmp_path: Path, bucket_names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path / "state"))
    scheduler = connect(resume="mine")
    assert delayed(sum)([1, 2]).compute(scheduler=scheduler) == 3
    count = len(bucket_names())
    assert count

    def kept() -> Any:
        return json.loads(cli("runs", "list", "--json").stdout)["runs"]

    (found,) = kept()
    assert (found["name"], found["status"], found["objects"]) == ("mine", "done", count)
    assert "secret" not in json.dumps(found)
    shown = cli("runs", "show", "mine")
    assert "done" in shown.stdout
    assert "a month" in shown.stdout
    cli("clean", "--older-than", "0s", "--yes")
    assert len(bucket_names()) == count
    cleaned = cli("clean", "--older-than", "0s", "--kept", "--yes")
    assert "(mine)" in cleaned.stdout
    assert not bucket_names()
    assert not kept()

    assert delayed(sum)([1, 2]).compute(scheduler=scheduler) == 3
    deleted = cli("runs", "delete", "mine", "--yes", "--json")
    assert json.loads(deleted.stdout) == {"deleted": "mine", "objects": count}
    assert not bucket_names()
    gone = cli("runs", "show", "mine")
    assert gone.returncode == 1
    assert "there is no kept run 'mine'" in gone.stderr


def unconfigured(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a user without settings and without credentials."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("AWS_")}
    return subprocess.run(
        [sys.executable, "-m", "dask_lambda", *arguments],
        env={
            **environment,
            "PYTHONPATH": str(ROOT),
            "HOME": str(directory),
            "DASK_LAMBDA_STATE_DIR": str(directory),
            "AWS_EC2_METADATA_DISABLED": "true",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_a_bucket_there_is_nothing_to_clean(tmp_path: Path) -> None:
    done = unconfigured(tmp_path, "clean", "--older-than", "1d")
    assert done.returncode == 0
    assert "ends with it, and leaves nothing" in done.stdout


def test_without_a_bucket_no_rules_are_installed(tmp_path: Path) -> None:
    done = unconfigured(tmp_path, "lifecycle", "install", "--days", "2", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"installed": False}


def test_kept_runs_of_an_embedded_aws_that_has_ended_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path))
    place = kept_runs.Place("dask-lambda-local", "dask-lambda", "us-east-1", "http://127.0.0.1:9")
    kept_runs.write(kept_runs.KeptRun.new("old", place, "dask-lambda"))
    (kept_runs.runs_directory() / "broken.json").write_text("{}")
    listed = unconfigured(tmp_path, "runs", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    (found,) = json.loads(listed.stdout)["runs"]  # and not the broken one
    assert (found["name"], found["status"], found["objects"]) == ("old", "gone", 0)
    assert "broken.json" in listed.stderr
    assert unconfigured(tmp_path, "runs", "delete", "old", "--yes").returncode == 0
    assert kept_runs.names() == ["broken"]


def test_without_credentials_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DASK_LAMBDA__FUNCTION", "f")
    monkeypatch.setenv("DASK_DASK_LAMBDA__BUCKET", "b")
    monkeypatch.setenv("DASK_DASK_LAMBDA__REGION", "us-east-1")
    done = unconfigured(tmp_path, "clean", "--older-than", "1d")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "no AWS credentials were found: log in" in done.stderr


def test_a_bucket_that_does_not_exist_is_named(aws: Any) -> None:
    place = kept_runs.Place("not-there", "dask-lambda", "us-east-1", aws.endpoint_url)
    with pytest.raises(
        BucketNotFoundError, match=r"'not-there' does not exist.*dask-lambda\.bucket"
    ):
        Bucket(aws.client("s3"), place).runs(kept=False)


# -- lifecycle rules ------------------------------------------------------------------------------

FOREIGN: lifecycle.Rule = {
    "ID": "mine",
    "Status": "Enabled",
    "Filter": {"Prefix": "logs/"},
    "Expiration": {"Days": 30},
}


def test_there_is_a_rule_for_each_shard() -> None:
    rules = lifecycle.rules("some/prefix", 3)
    assert len({rule["ID"] for rule in rules}) == 16
    assert [rule["Filter"]["Prefix"][1:] for rule in rules] == ["/some/prefix/"] * 16
    assert {rule["Expiration"]["Days"] for rule in rules} == {3}
    assert all("AbortIncompleteMultipartUpload" in rule for rule in rules)


def test_rules_are_merged_with_those_of_others() -> None:
    rules = lifecycle.merged([FOREIGN], "p", 3)
    assert lifecycle.merged(rules, "p", 5) == [FOREIGN, *lifecycle.rules("p", 5)]
    both = lifecycle.merged(rules, "p-kept", 9)
    assert lifecycle.days_of(both, "p") == 3
    assert lifecycle.days_of(both, "p-kept") == 9
    assert lifecycle.without(both, "p-kept") == rules
    assert lifecycle.without(rules, "p") == [FOREIGN]
    assert lifecycle.days_of([FOREIGN], "p") is None
    assert lifecycle.days_of(rules[:-1], "p") is None


def test_parts_of_days_are_none() -> None:
    with pytest.raises(ValueError, match="whole days"):
        lifecycle.rules("p", 0)


def test_rules_are_installed_and_removed(cli: Any, aws: Any) -> None:
    s3 = aws.client("s3")

    def there() -> list[lifecycle.Rule]:
        return s3.get_bucket_lifecycle_configuration(Bucket=aws.bucket)["Rules"]

    def shown() -> Any:
        return json.loads(cli("lifecycle", "show", "--json").stdout)

    assert shown() == {"days": 1, "kept_days": None}  # as the embedded AWS is started
    s3.put_bucket_lifecycle_configuration(
        Bucket=aws.bucket, LifecycleConfiguration={"Rules": [*there(), FOREIGN]}
    )
    try:
        assert cli("lifecycle", "install", "--days", "7", "--kept").returncode == 0
        assert shown() == {"days": 7, "kept_days": 7}
        assert len(there()) == 33
        assert cli("lifecycle", "remove").returncode == 0
        assert shown() == {"days": None, "kept_days": None}
        assert [rule["ID"] for rule in there()] == ["mine"]
        assert cli("lifecycle", "install", "--days", "0").returncode == 2
    finally:
        s3.put_bucket_lifecycle_configuration(
            Bucket=aws.bucket,
            LifecycleConfiguration={"Rules": lifecycle.rules("dask-lambda", 1)},
        )


# -- SIGTERM --------------------------------------------------------------------------------------


@pytest.fixture
def _handler_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def _no_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers of other tests may be open."""
    monkeypatch.setattr(signals, "_users", 0)
    monkeypatch.setattr(signals, "_installed", False)


@pytest.mark.usefixtures("_handler_as_before", "_no_other_users")
def test_sigterm_is_taken_while_an_engine_is_open(connect: Any) -> None:
    one, two = connect(), connect()
    for scheduler in (one, two):
        delayed(sum)([1]).compute(scheduler=scheduler)
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends it at once
    one.close()
    two.close()


@pytest.mark.usefixtures("_handler_as_before", "_no_other_users")
def test_the_last_engine_puts_the_handler_back(connect: Any) -> None:
    one, two = connect(), connect()
    for scheduler in (one, two):
        delayed(sum)([1]).compute(scheduler=scheduler)
    taken = signal.getsignal(signal.SIGTERM)
    assert taken is not signal.SIG_DFL
    one.close()
    assert signal.getsignal(signal.SIGTERM) is taken
    two.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.usefixtures("_handler_as_before", "_no_other_users")
def test_a_programs_own_handler_and_other_threads_are_left_alone(connect: Any) -> None:
    def compute() -> None:
        scheduler = connect()
        delayed(sum)([1]).compute(scheduler=scheduler)
        scheduler.close()

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def own(number: int, frame: Any) -> None:
        """Do something of the program's own."""

    signal.signal(signal.SIGTERM, own)
    compute()
    assert signal.getsignal(signal.SIGTERM) is own
