"""What was saved is loaded in another session as it was, and by nobody else."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from hypothesis import given, settings
from hypothesis import strategies as st

import dask_lambda
from dask_lambda import kept_runs, load, save
from dask_lambda.description import Description, versions
from dask_lambda.errors import (
    ConfigurationError,
    IntegrityError,
    LostDataError,
    VersionMismatchError,
)
from dask_lambda.kept_runs import KeptRun, Place, Saved
from lambda_worker import codec, protocol
from lambda_worker.protocol import Reference
from tests.helpers import report

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


# -- another session ------------------------------------------------------------------------------

PROGRAM = """
import sys
import dask, numpy as np
from dask_lambda import LambdaScheduler, last_report, load

function, bucket, endpoint = sys.argv[1:]
with LambdaScheduler(backend="aws", function=function, bucket=bucket, region="us-east-1",
                     endpoint_url=endpoint, concurrency=2) as scheduler:
    x = load("array")
    assert last_report() is None
    assert x.chunks == ((2, 2, 2), (4,)), x.chunks
    assert x.dtype == np.dtype("f4"), x.dtype
    assert float((x + 1).sum().compute()) == 576.0
    assert last_report().bytes_read < 5000
    found = load("tables")
    table, keys = found["table"], found["keys"]
    assert table.known_divisions and table.npartitions == 3
    assert str(table.divisions[0]) == "2024-01-01 00:00:00"
    assert str(table.dtypes["key"]) == "category"
    assert table.value.sum().compute() == 15.0
    assert keys.compute().tolist() == list("ababab")
    bag, total = load("bag")
    assert bag.npartitions == 3
    assert dask.compute(bag, total) == ([0, 1, 4, 9, 16, 25], 55)
    assert load("delayed").compute(scheduler="threads") == 3
print("good")
"""


@pytest.mark.local
def test_another_process_loads_what_was_saved(
    scheduler: Any, aws: Any, credentials: dict[str, str]
) -> None:
    squares = db.from_sequence(range(6), npartitions=3).map(lambda x: x * x)
    with scheduler:
        save((given_array() * 2).astype("f4"), "array")
        save({"table": table(), "keys": table().key}, "tables")
        save((squares, squares.sum()), "bag")
        save(delayed(sum)([1, 2]), "delayed")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, aws.function, aws.bucket, aws.endpoint_url],
        env={**os.environ, **credentials, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "good\n", done.stderr


def unknown_chunks() -> Any:
    x = da.from_array(np.arange(12.0), chunks=4)
    return x[x > 2]


def unknown_divisions() -> Any:
    return table().clear_divisions()


CASES = {
    "array": lambda: given_array() + 1,
    "data alone": given_array,
    "unknown chunks": unknown_chunks,
    "no dimension": lambda: given_array().sum(),
    "structured": lambda: da.from_array(np.zeros(4, dtype=[("a", "i4"), ("b", "f8")]), chunks=2),
    "masked": lambda: da.ma.masked_greater(given_array(), 5),
    "table": lambda: table().assign(more=1),
    "unknown divisions": unknown_divisions,
    "series": lambda: table().value + 1,
    "index": lambda: table().index,
    "scalar": lambda: table().value.sum(),
    "bag": lambda: db.from_sequence(range(6), npartitions=3).filter(lambda x: x % 2),
    "item": lambda: db.from_sequence(range(6), npartitions=3).sum(),
    "delayed": lambda: delayed(divmod, nout=2)(7, 2),
    "delayed data": lambda: delayed([1, 2]),
}


@pytest.mark.local
def test_every_kind_of_collection_comes_back_as_it_was(scheduler: Any) -> None:
    made = {name: make() for name, make in CASES.items()}
    with dask.config.set({"dataframe.convert-string": False}):
        save(made, "all", scheduler=scheduler)
        found = load("all", scheduler=scheduler)
    values = dask.compute(found, scheduler=scheduler)[0]
    assert list(found) == list(made)
    for name, x in made.items():
        y = found[name]
        assert type(y) in type(x).mro()[:2], name  # there are kinds of delayed values
        whats = ["dtype", "ndim", "npartitions", "divisions", "known_divisions"]
        for what in ["_length"] if name.startswith("delayed") else whats:
            assert getattr(y, what, None) == getattr(x, what, None), (name, what)
        if isinstance(x, da.Array):
            assert str(y.chunks) == str(x.chunks)
            assert type(y._meta) is type(x._meta)
        expected = x.compute(scheduler="sync")
        assert type(values[name]) is type(expected)
        assert str(values[name]) == str(expected), name


@pytest.mark.local
def test_blocks_stay_in_s3_until_they_are_needed(scheduler: Any, bucket_names: Names) -> None:
    x = save(da.ones((40, 40), chunks=10) * 2, "x", scheduler=scheduler)
    assert kinds(bucket_names()) == ["block"] * 16 + ["manifest", "saved"]
    part = x[:10, :10].sum()
    assert part.compute(scheduler=scheduler) == 200
    assert report().tasks == 1 or report().invocations == 1
    assert x.compute(scheduler=scheduler).sum() == 3200
    assert report().invocations == 0
    assert x.compute(scheduler="threads").sum() == 3200


@pytest.mark.local
def test_what_was_loaded_is_used_with_other_schedulers_too(
    scheduler: Any, connect: Connect
) -> None:
    x = save(given_array() * 2, "x", scheduler=scheduler)
    with connect(retries=1) as other:
        assert x.sum().compute(scheduler=other) == 552
    scheduler.close()
    assert x.sum().compute(scheduler=scheduler) == 552
    elsewhere = connect(prefix="elsewhere")
    with pytest.raises(LostDataError, match=r"compute with the scheduler.*'dask-lambda'"):
        x.sum().compute(scheduler=elsewhere)
    with pytest.raises(ConfigurationError, match=r"prefix 'dask-lambda'.*not in.*'elsewhere'"):
        load("x", scheduler=elsewhere)


# -- saving again ---------------------------------------------------------------------------------


@pytest.mark.local
def test_what_is_saved_already_is_not_saved_again(scheduler: Any, bucket_names: Names) -> None:
    save(given_array() * 2, "x", scheduler=scheduler)
    before = bucket_names()
    again = save(given_array() * 2, "x", scheduler=scheduler)
    assert (report().invocations, report().s3_puts) == (0, 0)
    save(again, "x", scheduler=scheduler)  # itself
    assert (report().invocations, report().s3_puts) == (0, 0)
    assert bucket_names() == before


@pytest.mark.local
def test_saving_goes_on_where_it_broke_off(
    scheduler: Any, tmp_path: Path, bucket_names: Names, cli: Any
) -> None:
    switch, marks = tmp_path / "switch", tmp_path / "marks"

    @delayed
    def block(number: int) -> int:
        if number == 3 and not switch.exists():
            raise ValueError("not yet")
        with open(marks, "a") as file:
            file.write(f"{number}\n")
        return number

    x = db.from_delayed([delayed(lambda x: [x])(block(number)) for number in range(4)])
    with pytest.raises(ValueError, match="not yet") as info:
        save(x, "x", scheduler=scheduler, plan="none")
    assert "save it again under this name ('x')" in info.value.__notes__[-1]
    with pytest.raises(ConfigurationError, match="is not complete"):
        load("x", scheduler=scheduler)
    (found,) = json.loads(cli("runs", "list", "--json"))["runs"]
    assert (found["kind"], found["saved"], found["status"]) == ("saved", None, "failed")
    switch.touch()
    x = save(x, "x", scheduler=scheduler, plan="none")
    assert x.compute(scheduler=scheduler) == [0, 1, 2, 3]
    assert sorted(marks.read_text().split()) == ["0", "1", "2", "3"]
    assert kinds(bucket_names()) == ["block"] * 4 + ["manifest", "saved"]


@pytest.mark.local
def test_a_name_is_taken_until_it_is_said_to_be_overwritten(
    scheduler: Any, bucket_names: Names
) -> None:
    save(given_array() * 2, "x", scheduler=scheduler)
    record = kept_runs.read("x")
    with pytest.raises(ConfigurationError, match=r"saved under 'x' \(array \(6, 4\).*overwrite"):
        save(given_array() * 3, "x", scheduler=scheduler)
    with pytest.raises(ConfigurationError, match="overwrite"):  # the same blocks, put differently
        save((given_array() * 2).blocks[::-1], "x", scheduler=scheduler)
    assert kept_runs.read("x") == record
    new = save(given_array()[:4] * 3, "x", scheduler=scheduler, overwrite=True)
    assert new.sum().compute(scheduler=scheduler) == 360
    assert kinds(bucket_names()) == ["block"] * 2 + ["manifest", "saved"]


@pytest.mark.local
def test_what_is_overwritten_is_computed_anew(
    scheduler: Any, tmp_path: Path, bucket_names: Names
) -> None:
    """The same tasks, which find something else outside."""
    outside, switch = tmp_path / "outside", tmp_path / "switch"

    def read(number: int, fail: bool) -> str:
        if fail and not switch.exists():
            raise ValueError("not yet")
        return f"{outside.read_text()}{number}"

    def x(fail: bool = False) -> list[Any]:
        return [delayed(read)(number, fail and number == 2) for number in range(3)]

    options = {"scheduler": scheduler, "plan": "none"}
    outside.write_text("a")
    save(x(fail=False), "x", **options)
    outside.write_text("b")
    save(x(), "x", **options)
    assert report().invocations == 0
    with pytest.raises(ValueError, match="not yet"):
        save(x(fail=True), "x", **options, overwrite=True)
    assert dask.compute(*load("x", scheduler=scheduler), **options) == ("a0", "a1", "a2")
    outside.write_text("c")
    switch.touch()
    again = save(x(fail=True), "x", **options, overwrite=True)
    found = dask.compute(*again, **options)
    assert found[2] == "c2"
    assert {value[0] for value in found[:2]} <= {"b", "c"}  # what had been done was used
    assert save(x(fail=True), "x", **options)
    assert report().invocations == 0
    assert kinds(bucket_names()) == ["block"] * 3 + ["manifest", "saved"]


@pytest.mark.local
def test_the_old_collection_stays_until_the_new_one_is_complete(
    scheduler: Any, tmp_path: Path, bucket_names: Names
) -> None:
    switch = tmp_path / "switch"

    def draw() -> float:
        return random.SystemRandom().random()

    def late(x: float) -> float:
        if not switch.exists():
            raise ValueError("not yet")
        return x - 1

    one = delayed(draw)()
    plus, minus = one + 1, delayed(late)(one)
    options = {"scheduler": scheduler, "plan": "none", "optimize_graph": False}
    old = save(plus, "x", **options)
    value = old.compute(scheduler=scheduler)
    # The draw is gone: what was made from it may not stand beside what is made from a new one.
    with pytest.raises(ValueError, match="not yet"):
        save([plus, minus], "x", **options, overwrite=True)
    assert load("x", scheduler=scheduler).compute(scheduler=scheduler) == value
    switch.touch()
    new = save([plus, minus], "x", **options, overwrite=True)
    a, b = dask.compute(*new, scheduler=scheduler)
    assert a - b == pytest.approx(2)
    save([plus, minus], "x", **options)
    assert report().invocations == 0
    assert kinds(bucket_names()) == ["block"] * 2 + ["manifest", "saved"]
    with pytest.raises(LostDataError, match=r"saved collection 'x': if that was saved anew"):
        (old * 1).compute(scheduler=scheduler)
    with pytest.raises(LostDataError, match=r"saved collection 'x': if that was saved anew"):
        old.compute(scheduler="threads")


KILLED = """
import os, signal, sys, time
import dask.array as da
from dask.callbacks import Callback
from dask_lambda import LambdaScheduler, load, save

function, bucket, endpoint = sys.argv[1:]
scheduler = LambdaScheduler(backend="aws", function=function, bucket=bucket, region="us-east-1",
                            endpoint_url=endpoint, concurrency=1, plan="none")
def kill(key, dsk, state):
    if len(state["finished"]) > 2:
        os.kill(os.getpid(), signal.SIGKILL)

with Callback(pretask=kill):
    save(load("x", scheduler=scheduler) + 1, "x", scheduler=scheduler, overwrite=True)
"""


@pytest.mark.local
def test_a_client_that_is_killed_while_it_overwrites_loses_nothing(
    scheduler: Any, aws: Any, credentials: dict[str, str], bucket_names: Names
) -> None:
    x = save(da.zeros(16, chunks=2) + 1, "x", scheduler=scheduler)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, aws.function, aws.bucket, aws.endpoint_url],
        env={**os.environ, **credentials, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == -9, done.stderr
    record = kept_runs.read("x")
    assert record is not None
    assert record.status == "running"
    assert load("x", scheduler=scheduler).sum().compute(scheduler=scheduler) == 16
    x = save(load("x", scheduler=scheduler) + 1, "x", scheduler=scheduler, overwrite=True)
    assert report().reused > 0
    assert x.sum().compute(scheduler=scheduler) == 32
    assert kinds(bucket_names()) == ["block"] * 8 + ["manifest", "saved"]


@pytest.mark.local
def test_a_collection_is_made_longer_from_itself(scheduler: Any, bucket_names: Names) -> None:
    save(da.ones(6, chunks=2), "x", scheduler=scheduler)
    for length in (8, 10):
        longer = da.concatenate([load("x", scheduler=scheduler), da.zeros(2, chunks=2)])
        x = save(longer, "x", scheduler=scheduler, overwrite=True)
        assert report().invocations == 1
        assert x.compute(scheduler=scheduler).tolist() == [1] * 6 + [0] * (length - 6)
        assert kinds(bucket_names()) == ["block"] * (length // 2) + ["manifest", "saved"]


@pytest.mark.local
def test_what_another_run_has_persisted_is_copied(scheduler: Any, connect: Connect) -> None:
    other = connect()
    persisted = (given_array() * 2).persist(scheduler=scheduler)
    save(persisted, "x", scheduler=scheduler)
    save(load("x", scheduler=scheduler), "y", scheduler=scheduler)
    del persisted
    scheduler.close()
    assert load("x", scheduler=other).sum().compute(scheduler=other) == 552
    assert load("y", scheduler=other).sum().compute(scheduler=other) == 552


@pytest.mark.local
def test_what_cannot_be_found_again_is_saved_all_the_same(
    scheduler: Any, bucket_names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    class Moody:
        """Can be pickled, and not taken apart."""

        def __reduce_ex__(self, protocol: Any) -> Any:
            if "dask_lambda.digest" in sys._getframe(1).f_globals.get("__name__", ""):
                raise TypeError("not today")
            return Moody, ()

    x = delayed(lambda mood: type(mood).__name__)(Moody())
    assert save(x, "x", scheduler=scheduler).compute(scheduler=scheduler) == "Moody"
    assert "cannot be resumed" in caplog.text
    with pytest.raises(ConfigurationError, match="whether this is the same one cannot be told"):
        save(x, "x", scheduler=scheduler)
    x = save(x, "x", scheduler=scheduler, overwrite=True)
    assert x.compute(scheduler=scheduler) == "Moody"
    assert kinds(bucket_names()) == ["block", "manifest", "saved"]


@pytest.mark.local
def test_a_name_is_saved_or_computed_with_resume(scheduler: Any, bucket_names: Names) -> None:
    x = given_array() * 2
    save(x, "saved", scheduler=scheduler)
    with pytest.raises(ConfigurationError, match="'saved' is the name of a saved collection"):
        x.sum().compute(scheduler=scheduler, resume="saved")
    assert load("saved", scheduler=scheduler).sum().compute(scheduler=scheduler) == 552
    (x + 1).persist(scheduler=scheduler, resume="run")
    with pytest.raises(ConfigurationError, match="taken by computations with resume='run'"):
        save(x, "run", scheduler=scheduler)
    with pytest.raises(ConfigurationError, match="not a saved collection"):
        load("run", scheduler=scheduler)
    before = len(bucket_names())
    save(x + 1, "run", scheduler=scheduler, overwrite=True)
    assert len(bucket_names()) == before + 1
    assert load("run", scheduler=scheduler).sum().compute(scheduler=scheduler) == 576


# -- wrong input, and what was deleted or changed behind our back ---------------------------------


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


# -- descriptions ---------------------------------------------------------------------------------


def record_of(name: str = "x") -> KeptRun:
    record = KeptRun.new(name, Place("bucket", "prefix"), "function")
    record.saved = Saved("saved-" + "0" * 32, 0, "", "")
    return record


def round_trip(x: Any, references: list[Reference], record: KeptRun) -> Any:
    description, _ = Description.of(x)
    sealed = codec.dumps(description.to_value(record, references), record.secret, "name")
    value = codec.loads(sealed, record.secret, "name")
    again, found = Description.from_value(record, value)
    assert again == description
    assert [(r.name, r.size) for r in found] == [(r.name, r.size) for r in references]
    return again.rebuild(record, found, value["versions"])


def references_of(record: KeptRun, count: int, attempts: bool = False) -> list[Reference]:
    names = [
        protocol.object_name("prefix-kept", record.run, f"{number:032x}") for number in range(count)
    ]
    if attempts:
        names = [protocol.attempt_name(name) for name in names]
    return [Reference(name, 100 + number) for number, name in enumerate(names)]


def stored_in(x: Any) -> list[str]:
    """The names of the objects of which a collection is made, in the order of its keys."""
    graph = dict(x.__dask_graph__())
    keys = [x.key] if not hasattr(x, "npartitions") else list(dask.core.flatten(x.__dask_keys__()))
    return [graph[graph.get(key).target if key not in graph else key].args[0].name for key in keys]


axes = st.lists(
    st.lists(st.one_of(st.integers(0, 5), st.just(math.nan)), min_size=1, max_size=4).map(tuple),
    max_size=3,
).map(tuple)
dtypes = st.sampled_from(
    ["?", "i1", ">u4", "f2", "f8", "c16", "M8[ns]", "m8[s]", "S3", "U2", "O", "i4,f8"]
).map(np.dtype)


@settings(max_examples=60, deadline=None)
@given(chunks=axes, dtype=dtypes, attempts=st.booleans())
def test_arrays_of_all_chunks_and_types_are_described(
    chunks: tuple[Any, ...], dtype: Any, attempts: bool
) -> None:
    x = da.Array({}, "x", chunks, dtype=dtype)
    record = record_of()
    references = references_of(record, math.prod(map(len, chunks)), attempts)
    y = round_trip(x, references, record)
    assert str(y.chunks) == str(x.chunks)
    assert y.dtype == x.dtype
    assert y._meta.shape == x._meta.shape
    assert stored_in(y) == [each.name for each in references]


sorted_values = st.one_of(
    st.lists(st.integers(-9, 9), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.floats(-9, 9), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.text("abc", max_size=3), min_size=2, max_size=6, unique=True).map(sorted),
    st.lists(st.integers(0, 99), min_size=2, max_size=6, unique=True).map(
        lambda days: [pd.Timestamp("2024-01-01") + pd.Timedelta(days=d) for d in sorted(days)]
    ),
    st.integers(2, 6).map(lambda count: [None] * count),
)


@settings(max_examples=60, deadline=None)
@given(divisions=sorted_values, series=st.booleans())
def test_frames_of_all_divisions_are_described(divisions: list[Any], series: bool) -> None:
    dtypes = {"a": "f8", "b": "category", "c": "datetime64[ns]", "d": "string"}
    meta: Any = pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in dtypes.items()})
    meta = meta["b"] if series else meta
    keys = [("f", number) for number in range(len(divisions) - 1)]
    x = dd.from_graph(dict.fromkeys(keys, 0), meta, tuple(divisions), keys, "f")
    record = record_of()
    references = references_of(record, len(keys))
    y = round_trip(x, references, record)
    assert y.divisions == x.divisions
    assert type(y) is type(x)
    assert str(y.dtypes) == str(x.dtypes)
    graph = dict(y.__dask_graph__())
    loads = [graph[graph[key].target].args[0].name for key in y.__dask_keys__()]
    assert loads == [each.name for each in references]


def test_a_hundred_thousand_blocks_are_described_in_a_few_megabytes() -> None:
    record = record_of()
    x = da.Array({}, "x", ((1,) * 1000, (1,) * 100), dtype="f8")
    references = references_of(record, 100_000)
    value = Description.of(x)[0].to_value(record, references)
    assert len(codec.dumps(value, record.secret, "name")) < 5e6
    assert round_trip(x, references, record).npartitions == 100_000


def test_collections_of_one_description_have_keys_of_their_own() -> None:
    record = record_of()
    x = [da.Array({}, "x", ((2, 2),), dtype="f8")] * 2
    a, b = round_trip(x, references_of(record, 4), record)
    assert a.name != b.name
    assert len({*stored_in(a), *stored_in(b)}) == 4


def test_other_versions_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    record = record_of()
    description, _ = Description.of(da.Array({}, "x", ((2,),), dtype="f8"))
    references = references_of(record, 1)
    value = description.to_value(record, references)
    description.rebuild(record, references, {**versions(), "dask": "1.0"})
    assert not caplog.text
    description.rebuild(record, references, {**versions(), "numpy": "0.5.1"})
    assert "'x' was saved with numpy 0.5.1 (here " in caplog.text
    broken = replace(description, forms=(replace(description.forms[0], pickled=b"cnowhere\nX\n."),))
    with pytest.raises(VersionMismatchError, match=r"saved with python 2\.7 \(here "):
        broken.rebuild(record, references, {**versions(), "python": "2.7"})
    with pytest.raises(VersionMismatchError, match="was saved in format 99"):
        Description.from_value(record, {**value, "format": 99})
