"""Several tasks in one invocation, on Lambda: what is too long is split, failures stay apart."""

from __future__ import annotations

import operator
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import pytest
from dask._task_spec import Task, TaskRef

from dask_lambda import LambdaScheduler
from dask_lambda.errors import FunctionTimeoutError, WorkerDiedError
from tests.helpers import report

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]


def note(directory: Path, name: str) -> None:
    """Leave a file for each time that a task is started."""
    (directory / f"{name}.{uuid.uuid4().hex}").touch()


def starts(directory: Path) -> Counter[str]:
    return Counter(path.name.partition(".")[0] for path in directory.iterdir())


def work(directory: Path, name: str, seconds: float, *before: Any) -> str:
    note(directory, name)
    time.sleep(seconds)
    return "".join([*before, name])


def row(directory: Path, **seconds: float) -> dict[str, Task]:
    """Tasks that each read the one before; as one group, since nothing is gained by two."""
    dsk: dict[str, Task] = {}
    last: list[str] = []
    for name, each in seconds.items():
        dsk[name] = Task(name, work, directory, name, each, *map(TaskRef, last))
        last = [name]
    return dsk


# -- too long ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hasty(deploy: Deploy) -> str:
    """A function with little time."""
    return deploy(timeout=3)


def test_tasks_that_are_too_long_together_are_run_one_after_the_other(
    hasty: str, connect: Connect, tmp_path: Path
) -> None:
    scheduler = connect(function=hasty)
    assert scheduler.get(row(tmp_path, a=1.7, b=1.7), "b") == "ab"
    assert starts(tmp_path)["a"] == 2  # with b, and alone
    assert report().invocations == 3


def test_a_task_that_is_too_long_by_itself_fails_after_the_others_were_split_off(
    hasty: str, connect: Connect, tmp_path: Path
) -> None:
    scheduler = connect(function=hasty)
    with pytest.raises(FunctionTimeoutError, match="'b'"):
        scheduler.get(row(tmp_path, a=0, b=60, c=0), "c")
    assert starts(tmp_path)["c"] == 0


def test_one_of_several_results_may_be_too_long(
    hasty: str, connect: Connect, tmp_path: Path
) -> None:
    """Both parts' results arrive, and what both need is passed from one to the other."""
    scheduler = connect(function=hasty)
    dsk = row(tmp_path, a=1.7, b=1.7)
    assert scheduler.get(dsk, ["a", "b"]) in (["a", "ab"], ("a", "ab"))


# -- several groups in an invocation -------------------------------------------------------------


def once(directory: Path, name: str, fail: Callable[[], Any]) -> str:
    """Fail the first time."""
    note(directory, name)
    if starts(directory)[name] == 1:
        fail()
    return name


def raises() -> None:
    raise ValueError("the first time")


def dies() -> None:
    os._exit(3)


def crowd(directory: Path, fail: Callable[[], Any]) -> dict[Any, Task]:
    """Eight tasks of a kind, of which the fourth fails once."""
    dsk = {f"work-{i}": Task(f"work-{i}", work, directory, str(i), 0) for i in range(8)}
    dsk["work-3"] = Task("work-3", once, directory, "3", fail)
    return dsk


#: Somebody says that they are short, so that they share an invocation where only one may run.
SHORT = {"concurrency": 1, "default_task_seconds": {"work": 1e-3}}


def test_small_groups_share_an_invocation(connect: Connect, tmp_path: Path) -> None:
    dsk = {f"work-{i}": Task(f"work-{i}", work, tmp_path, str(i), 0) for i in range(8)}
    assert list(connect(**SHORT).get(dsk, list(dsk))) == list("01234567")
    assert report().invocations == 1
    assert report().tasks == 8


def test_one_group_of_an_invocation_fails_and_the_others_results_are_kept(
    connect: Connect, tmp_path: Path
) -> None:
    dsk = crowd(tmp_path, raises)
    scheduler = connect(**SHORT, retries=1)
    assert list(scheduler.get(dsk, list(dsk))) == list("01234567")
    assert starts(tmp_path) == {**dict.fromkeys("01234567", 1), "3": 2}
    assert report().invocations == 2
    assert report().retries == 1


def test_one_group_of_an_invocation_fails_for_good_with_its_own_name(
    connect: Connect, tmp_path: Path
) -> None:
    dsk = crowd(tmp_path, raises)
    with pytest.raises(ValueError, match="the first time") as caught:
        connect(**SHORT).get(dsk, list(dsk))
    assert "'work-3'" in "".join(caught.value.__notes__)


def test_when_an_environment_dies_under_several_groups_each_is_tried_alone(
    connect: Connect, tmp_path: Path
) -> None:
    dsk = crowd(tmp_path, dies)
    assert list(connect(**SHORT).get(dsk, list(dsk))) == list("01234567")
    assert max(starts(tmp_path).values()) == 2
    assert report().invocations == 1 + 8


def test_the_group_under_which_environments_die_is_named(connect: Connect, tmp_path: Path) -> None:
    dsk = crowd(tmp_path, raises)
    dsk["work-3"] = Task("work-3", dies)
    with pytest.raises(WorkerDiedError, match="'work-3'"):
        connect(**SHORT).get(dsk, list(dsk))


def test_readers_in_the_same_invocation_wait_for_nobody(connect: Connect) -> None:
    """A tree of additions is one invocation, and gives what it should."""
    dsk: dict[Any, Any] = {("leaf", i): Task(("leaf", i), operator.neg, i) for i in range(64)}
    level: list[Any] = list(dsk)
    while len(level) > 1:
        pairs = list(zip(level[::2], level[1::2], strict=True))
        level = [(f"sum{len(pairs)}", i) for i in range(len(pairs))]
        for key, pair in zip(level, pairs, strict=True):
            dsk[key] = Task(key, operator.add, *map(TaskRef, pair))
    assert connect().get(dsk, level[0]) == dask.get(dsk, level[0]) == -sum(range(64))
    assert report().invocations == 1
    assert report().tasks == 127
