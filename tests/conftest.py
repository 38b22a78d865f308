"""What the tests share: one embedded AWS for the whole session, and ways to look into it.

The embedded AWS is started by the first test that needs it.  A test that uses it must leave the
bucket empty: that is checked after each.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import pytest
import yaml

import dask_lambda
from dask_lambda import encode, local_start
from dask_lambda.config import Settings
from dask_lambda.lease import Lease
from dask_lambda.local import LocalAWS
from dask_lambda.local_shared import local_aws
from tests.faults.deploy import deploy as deploy_function
from tests.faults.proxy import Proxy
from tests.helpers import eventually, forget_modules, write_files

ROOT = Path(local_start.__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Send the functions of test modules to the workers by value: they have no tests there."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)


@pytest.fixture(scope="session", autouse=True)
def _no_settings_of_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hide the user's AWS settings, Dask configuration and shared embedded AWS."""
    defaults = yaml.safe_load((ROOT / "dask_lambda" / "dask_lambda.yaml").read_text("utf-8"))
    private = tmp_path_factory.mktemp("settings")
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(("AWS_", "DASK_")):
                patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("DASK_LAMBDA_STATE_DIR", str(private / "state"))
        patch.setenv("DASK_CONFIG", str(private / "dask"))
        settings = {
            "scheduler": None,
            "dask-lambda": defaults["dask-lambda"],
            "dataframe.shuffle.method": defaults["dataframe"]["shuffle"]["method"],
            "array.rechunk.method": defaults["array"]["rechunk"]["method"],
        }
        with dask.config.set(settings):
            yield


@pytest.fixture(scope="session")
def aws() -> LocalAWS:
    """The embedded AWS that ``lambda_get`` uses when nothing is configured."""
    settings = Settings.resolve()
    return local_aws(
        concurrency=settings.concurrency, memory=settings.memory, timeout=settings.timeout
    )


@pytest.fixture(scope="session")
def bucket_names(aws: LocalAWS) -> Callable[[], list[str]]:
    """``bucket_names()``: the names of all objects in the bucket, asked of S3 itself."""
    pages = aws.client("s3").get_paginator("list_objects_v2")

    def names() -> list[str]:
        found = pages.paginate(Bucket=aws.bucket)
        return [entry["Key"] for page in found for entry in page.get("Contents", [])]

    return names


@pytest.fixture(autouse=True)
def _leaves_the_bucket_empty(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test after which an object is left, in all modules that say ``uses_bucket``."""
    if not getattr(request.module, "uses_bucket", False):
        yield
        return
    names, aws = request.getfixturevalue("bucket_names"), request.getfixturevalue("aws")
    yield
    if names():
        gc.collect()  # persisted collections may hang in reference cycles
        if not eventually(lambda: not names(), 5):
            left = names()
            delete = aws.client("s3").delete_object
            for name in left:  # the next test is not to blame
                delete(Bucket=aws.bucket, Key=name)
            pytest.fail(f"objects are left in the bucket: {left}")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``project({name: content})``: files of the user's own, on ``sys.path`` and nowhere else.

    Written again they are new: what was imported of them is forgotten.
    """
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(files: dict[str, str | bytes]) -> None:
        write_files(folder, files)
        forget_modules(folder)

    yield write
    forget_modules(tmp_path)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take Ctrl-C as a terminal's programs do: jobs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def shared_proxy(aws: LocalAWS) -> Iterator[Proxy]:
    """A proxy in front of the embedded AWS, for a function that is deployed behind it."""
    with Proxy(aws.endpoint_url) as running:
        yield running


@pytest.fixture
def proxy(shared_proxy: Proxy) -> Iterator[Proxy]:
    """The same with nothing planned, before the test and after it."""
    shared_proxy.plan()
    yield shared_proxy
    shared_proxy.plan()
    shared_proxy.decide = None


@pytest.fixture
def one_task_each() -> Iterator[None]:
    """Give each task an invocation of its own."""
    with dask.config.set({"dask-lambda.plan": "none"}):
        yield


class _Unleased(Lease):
    """A lease that is never written and never looked for."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.name = ""

    def _write_once(self) -> None:
        pass


@pytest.fixture
def without_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that count requests or objects, and may take longer than a second."""
    monkeypatch.setattr(encode, "Lease", _Unleased)


@pytest.fixture(scope="session")
def deploy(aws: LocalAWS) -> Iterator[Callable[..., str]]:
    """``deploy(files, handler, timeout, environment, memory)``: another function; its name."""
    made: list[str] = []

    def deploy(*arguments: Any, **named: Any) -> str:
        made.append(deploy_function(aws, f"another-{len(made)}", *arguments, **named))
        return made[-1]

    yield deploy
    if aws.is_alive():
        functions = aws.client("lambda")
        for name in made:
            functions.delete_function(FunctionName=name)


@pytest.fixture(scope="session")
def credentials(aws: LocalAWS) -> dict[str, str]:
    """Environment variables with which boto3 and obstore may use the embedded AWS."""
    return {
        "AWS_ACCESS_KEY_ID": aws.access_key_id,
        "AWS_SECRET_ACCESS_KEY": aws.secret_access_key,
    }


@pytest.fixture(scope="session")
def aws_settings(aws: LocalAWS) -> dict[str, Any]:
    """Settings with which the embedded AWS is found as AWS would be."""
    return {
        "backend": "aws",
        "function": aws.function,
        "bucket": aws.bucket,
        "region": aws.region,
        "endpoint_url": aws.endpoint_url,
    }


@pytest.fixture
def connect(
    aws_settings: dict[str, Any], credentials: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dask_lambda.LambdaScheduler]]:
    """``connect(**settings)``: a scheduler that finds the embedded AWS as it would find AWS."""
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    made: list[dask_lambda.LambdaScheduler] = []

    def connect(**settings: Any) -> dask_lambda.LambdaScheduler:
        usual = {**aws_settings, "concurrency": 2}
        made.append(dask_lambda.LambdaScheduler(**{**usual, **settings}))
        return made[-1]

    yield connect
    for scheduler in made:
        scheduler.close()
