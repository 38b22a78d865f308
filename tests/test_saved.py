"""What was saved is loaded in another session as it was, and by nobody else."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.bag as db
import numpy as np
import pytest
from dask import delayed

from dask_lambda import kept_runs, load, save
from dask_lambda.errors import ConfigurationError, LostDataError
from tests.helpers import report
from tests.saved_helpers import ROOT, Connect, Names, cli, given_array, kinds, scheduler, table

__all__ = ["cli", "scheduler"]


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
