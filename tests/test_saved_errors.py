"""Saved collections: wrong input, and what was deleted or changed behind our back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest

import dask_lambda
from dask_lambda import kept_runs, load, save
from dask_lambda.errors import ConfigurationError, IntegrityError, LostDataError
from dask_lambda.kept_runs import KeptRun, Place, Saved
from lambda_worker import codec
from tests.helpers import report
from tests.saved_helpers import Names, cli, given_array, kinds, scheduler, table

__all__ = ["cli", "scheduler"]


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.ones(3), "ndarray.* cannot be saved"),
        ({"a": da.ones(3), "b": 5}, "int.* cannot be saved"),
        ({1: da.ones(3)}, "must be strings"),
        ([], "no collection in this list"),
        ([[da.ones(3)]], "list.* cannot be saved"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(x: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        save(x, "x", scheduler=dask_lambda.LambdaScheduler(backend="aws", function="f", bucket="b"))


def test_names_and_keywords_are_checked_at_once() -> None:
    with pytest.raises(ConfigurationError, match="cannot be the name"):
        save(da.ones(3), "../x")
    with pytest.raises(ConfigurationError, match="takes no 'resume'"):
        save(da.ones(3), "x", resume="y")
    with pytest.raises(TypeError, match="not by 'threads'"):
        save(da.ones(3), "x", scheduler="threads")


def test_an_unknown_name_is_answered_with_those_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="There are: none"):
        load("survey")
    record = KeptRun.new("survey-2024", Place("b", "p"), "f")
    kept_runs.write(replace(record, kind="saved", saved=Saved("saved-1", 1, "", "array")))
    with pytest.raises(ConfigurationError, match=r"is 'survey-2024' meant\? There are: survey-2"):
        load("survey")


@pytest.mark.local
def test_what_an_embedded_aws_had_has_ended_with_it(
    aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path))
    place = Place("dask-lambda-local", "dask-lambda", "us-east-1", "http://127.0.0.1:9")
    record = KeptRun.new("old", place, "f")
    kept_runs.write(replace(record, kind="saved", saved=Saved("saved-1", 1, "", "array")))
    with pytest.raises(LostDataError, match=r"nothing is left of 'old'.*dask-lambda local start"):
        load("old")


@pytest.mark.local
def test_lost_blocks_are_named_and_saving_again_computes_them(
    scheduler: Any, aws: Any, bucket_names: Names, cli: Any
) -> None:
    x = save(given_array() * 2, "x", scheduler=scheduler)
    block = next(name for name in bucket_names() if kinds([name]) == ["block"])
    aws.client("s3").delete_object(Bucket=aws.bucket, Key=block)
    for use in (x.sum(), x):
        with pytest.raises(LostDataError, match=r"block of the saved collection 'x'.*save it aga"):
            use.compute(scheduler=scheduler)
    x = save(given_array() * 2, "x", scheduler=scheduler)
    assert report().invocations == 1
    assert x.sum().compute(scheduler=scheduler) == 552
    for name in bucket_names():
        if kinds([name]) == ["saved"]:
            aws.client("s3").delete_object(Bucket=aws.bucket, Key=name)
    with pytest.raises(LostDataError, match=r"'x' is gone.*dask-lambda runs delete x"):
        load("x", scheduler=scheduler)
    x = save(given_array() * 2, "x", scheduler=scheduler)
    assert x.sum().compute(scheduler=scheduler) == 552


@pytest.mark.local
@pytest.mark.parametrize("way", ["changed", "another's"])
def test_a_description_that_is_not_ours_is_never_unpickled(
    scheduler: Any, aws: Any, bucket_names: Names, tmp_path: Path, way: str
) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "sprung",)

    save(given_array() * 2, "x", scheduler=scheduler)
    record = kept_runs.read("x")
    assert record is not None
    assert record.saved is not None
    (name,) = [each for each in bucket_names() if kinds([each]) == ["saved"]]
    s3 = aws.client("s3")
    if way == "changed":
        body = bytearray(s3.get_object(Bucket=aws.bucket, Key=name)["Body"].read())
        body[-1] ^= 1
    else:
        body = codec.dumps([Trap(), b"0" * 1000], b"another secret", name)
        size = record.saved.size
        body = (body + bytes(size))[:size]
    s3.put_object(Bucket=aws.bucket, Key=name, Body=bytes(body))
    with pytest.raises(IntegrityError, match=r"collection 'x'.*damaged.*not unpickled"):
        load("x", scheduler=scheduler)
    assert not (tmp_path / "sprung").exists()
    x = save(given_array() * 2, "x", scheduler=scheduler)  # which writes another one
    assert x.sum().compute(scheduler=scheduler) == 552
    assert kinds(bucket_names()) == ["block"] * 3 + ["manifest", "saved"]


@pytest.mark.local
def test_a_damaged_block_is_refused_and_named(
    scheduler: Any, aws: Any, bucket_names: Names
) -> None:
    x = save(given_array() * 2, "x", scheduler=scheduler)
    block = next(name for name in bucket_names() if kinds([name]) == ["block"])
    s3 = aws.client("s3")
    body = bytearray(s3.get_object(Bucket=aws.bucket, Key=block)["Body"].read())
    body[-1] ^= 1
    s3.put_object(Bucket=aws.bucket, Key=block, Body=bytes(body))
    for options in ({"scheduler": scheduler}, {"scheduler": "threads"}):
        with pytest.raises(IntegrityError, match=r"collection 'x'.*overwrite=True"):
            x.sum().compute(**options)
    x = save(given_array() * 2, "x", scheduler=scheduler, overwrite=True)
    assert x.sum().compute(scheduler=scheduler) == 552


@pytest.mark.local
def test_no_object_of_a_saved_collection_holds_the_secret(
    scheduler: Any, aws: Any, bucket_names: Names
) -> None:
    save(given_array() * 2, "x", scheduler=scheduler)
    record = kept_runs.read("x")
    assert record is not None
    text = (kept_runs.runs_directory() / "x.json").read_text()
    for name in bucket_names():
        body = aws.client("s3").get_object(Bucket=aws.bucket, Key=name)["Body"].read()
        assert record.secret not in body
        assert json.loads(text)["secret"].encode() not in body


@pytest.mark.local
def test_the_command_line_lists_and_deletes_what_is_saved(
    scheduler: Any, bucket_names: Names, cli: Any
) -> None:
    save({"x": given_array() * 2, "t": table()}, "mine", scheduler=scheduler)
    what = "x: array (6, 4) of float64; t: dataframe of 2 columns; 6 blocks"
    assert what in cli("runs", "list")
    count = len(bucket_names())
    cli("clean", "--older-than", "0s", "--kept", "--yes")
    assert len(bucket_names()) == count
    assert "saved collection" in cli("clean", "--older-than", "0s", "--saved", "--dry-run")
    assert f"deleted mine, {count} objects" in cli("runs", "delete", "mine", "--yes")
    assert not bucket_names()
    with pytest.raises(ConfigurationError, match="no saved collection 'mine'"):
        load("mine", scheduler=scheduler)
