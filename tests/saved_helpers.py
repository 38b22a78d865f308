"""What the tests of saved collections share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

import dask_lambda

ROOT = Path(dask_lambda.__file__).parents[1]

Connect = Callable[..., dask_lambda.LambdaScheduler]
Names = Callable[[], list[str]]


@pytest.fixture
def scheduler(
    connect: Connect,
    aws: Any,
    bucket_names: Names,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dask_lambda.LambdaScheduler]:
    """A scheduler with records of its own; what it leaves is removed afterwards."""
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path / "state"))
    yield connect()
    if names := [{"Key": name} for name in bucket_names()]:
        aws.client("s3").delete_objects(Bucket=aws.bucket, Delete={"Objects": names})


@pytest.fixture
def cli(aws: Any, credentials: dict[str, str]) -> Callable[..., str]:
    """``cli(*arguments)``: what the command prints."""
    settings = {
        "BACKEND": "aws",
        "FUNCTION": aws.function,
        "BUCKET": aws.bucket,
        "REGION": aws.region,
        "ENDPOINT_URL": aws.endpoint_url,
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dask_lambda", *arguments],
            env={
                **os.environ,
                **credentials,
                **{f"DASK_DASK_LAMBDA__{name}": value for name, value in settings.items()},
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def kinds(names: list[str]) -> list[str]:
    """The labels of objects, sorted, with a word for each that is not the same each time."""
    labels = [name.rpartition("/")[2] for name in names]
    return sorted("block" if len(label) == 32 else label.partition("-")[0] for label in labels)


def given_array() -> da.Array:
    return da.from_array(np.arange(24.0).reshape(6, 4), chunks=(2, 4))


def table() -> Any:
    index = pd.date_range("2024-01-01", periods=6, name="day")
    values = {"key": pd.Categorical(list("ababab")), "value": np.arange(6.0)}
    return dd.from_pandas(pd.DataFrame(values, index=index), npartitions=3)
