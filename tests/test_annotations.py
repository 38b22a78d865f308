"""What users say about their tasks reaches the plan, or is refused before anything is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import pytest
from dask import delayed

from dask_lambda import LambdaScheduler, lambda_get
from dask_lambda.errors import ConfigurationError, OutOfMemoryError
from dask_lambda.plan import Plan
from tests.helpers import report

Connect = Callable[..., LambdaScheduler]


def inc(x: Any) -> Any:
    return x + 1


def explained(collection: Any, **settings: Any) -> Plan:
    return LambdaScheduler(**settings).explain(collection)


def together(plan: Plan) -> list[list[str]]:
    """The names of the tasks of each group."""
    return sorted(sorted(map(str, group.tasks)) for group in plan.groups)


def row(**annotations: dict[str, Any]) -> Any:
    """Three tasks that each read the one before, with annotations by name."""
    value: Any = 1
    for name in ("first", "second", "third"):
        with dask.annotate(**annotations.get(name, {})):
            value = delayed(inc)(value, dask_key_name=name)
    return value


# -- the plan ------------------------------------------------------------------------------------


def test_without_annotations_a_row_of_tasks_is_one_group() -> None:
    assert together(explained(row())) == [["first", "second", "third"]]


def test_a_task_that_says_how_much_memory_it_needs_is_alone() -> None:
    plan = explained(row(second={"memory": "1 GB"}))
    assert together(plan) == [["first"], ["second"], ["third"]]


def test_tasks_with_retries_of_their_own_are_apart() -> None:
    plan = explained(row(third={"retries": 4}))
    assert together(plan) == [["first", "second"], ["third"]]
    assert {group.tasks[0]: group.retries for group in plan.groups} == {"first": 0, "third": 4}


def test_the_annotations_of_a_task_count_for_more_than_those_of_the_computation() -> None:
    with dask.annotate(retries=2):
        plan = explained(row(third={"retries": 4}), retries=1)
    assert {group.tasks[0]: group.retries for group in plan.groups} == {"first": 2, "third": 4}


def test_how_long_tasks_take_decides_what_runs_together() -> None:
    def wide(**annotations: Any) -> Any:
        with dask.annotate(**annotations):
            parts = [delayed(inc)(i, dask_key_name=f"part-{i}") for i in range(4)]
        return delayed(sum)(parts, dask_key_name="total")

    assert len(explained(wide()).groups) == 5
    assert len(explained(wide(seconds=100)).groups) == 5
    assert len(explained(wide(seconds=1e-3)).groups) == 1
    assert len(explained(wide(), default_task_seconds={"part": 1e-3}).groups) == 1
    said = wide(seconds=100)
    assert len(explained(said, default_task_seconds={"part": 1e-3}).groups) == 5


def test_the_seconds_of_a_group_are_those_that_were_said() -> None:
    said = {name: {"seconds": 20} for name in ("first", "second", "third")}
    (group,) = explained(row(**said)).groups
    assert group.seconds == pytest.approx(60, abs=1)


def test_what_is_large_stays_where_it_is_made() -> None:
    def wide(**annotations: Any) -> Any:
        with dask.annotate(seconds=1, **annotations):
            parts = [delayed(inc)(i, dask_key_name=f"part-{i}") for i in range(8)]
        return delayed(sum)(parts, dask_key_name="total")

    assert len(explained(wide(nbytes=1000)).groups) == 9
    assert len(explained(wide(nbytes="1 kB")).groups) == 9
    assert len(explained(wide(nbytes="800 MB")).groups) == 1


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("seconds", "20", "seconds"),
        ("seconds", -1, "seconds"),
        ("seconds", float("nan"), "seconds"),
        ("seconds", True, "seconds"),
        ("nbytes", "many", "bytes"),
        ("nbytes", [1], "bytes"),
        ("memory", "5 parsecs", "bytes"),
    ],
)
def test_what_is_no_number_is_refused_with_the_task_that_says_so(
    name: str, value: Any, what: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"{name}=.*'second' is not a number of {what}"):
        explained(row(second={name: value}))
    with (
        dask.annotate(**{name: value}),
        pytest.raises(ConfigurationError, match=rf"{name}=.* is not a number of {what}"),
    ):
        explained(row())


# -- on Lambda -----------------------------------------------------------------------------------


@pytest.mark.local
@pytest.mark.parametrize("plan", ["auto", "none"])
def test_a_task_that_needs_more_memory_than_the_function_has_is_refused(plan: str) -> None:
    collection = row(second={"memory": "5 GB"})
    with pytest.raises(OutOfMemoryError, match=r"'second' declares 4,768 MB.*1,769 MB"):
        collection.compute(scheduler=lambda_get, plan=plan)
    with (
        dask.annotate(memory="5 GB"),
        pytest.raises(OutOfMemoryError, match=r"4,768 MB.*1,769 MB"),
    ):
        row().compute(scheduler=lambda_get, plan=plan)


@pytest.mark.local
def test_nothing_is_sent_when_a_task_is_refused() -> None:
    row().compute(scheduler=lambda_get)
    before = report()
    with pytest.raises(OutOfMemoryError):
        row(third={"memory": "5 GB"}).compute(scheduler=lambda_get)
    after = report()
    assert after is before or after.invocations == 0


@pytest.mark.local
@pytest.mark.parametrize("text", ["lots", "5 parsecs", [1]])
def test_memory_that_is_no_number_of_bytes_is_refused(text: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"memory=.*'second'"):
        row(second={"memory": text}).compute(scheduler=lambda_get)


@pytest.mark.local
def test_tasks_that_say_how_much_memory_they_need_run() -> None:
    assert (
        row(second={"memory": "1 GB"}, third={"memory": 10**8}).compute(scheduler=lambda_get) == 4
    )
    assert report().invocations == 3


def fails(directory: Path, name: str, times: int, x: Any) -> Any:
    (directory / f"{name}.{len(list(directory.iterdir()))}").touch()
    if len(list(directory.glob(f"{name}.*"))) <= times:
        raise ValueError(name)
    return x + 1


@pytest.mark.local
def test_retries_are_of_the_tasks_that_say_so_and_others_are_not_run_again(tmp_path: Path) -> None:
    value: Any = 1
    for name, times in (("a", 0), ("b", 2), ("c", 0)):
        with dask.annotate(retries=times):
            value = delayed(fails)(tmp_path, name, times, value, dask_key_name=name)
    assert value.compute(scheduler=lambda_get) == 4
    runs = Counter(path.name.partition(".")[0] for path in tmp_path.iterdir())
    assert runs == {"a": 1, "b": 3, "c": 1}


@pytest.mark.local
def test_annotated_layers_of_arrays_give_what_they_give_without() -> None:
    with dask.annotate(seconds=0.1, retries=1):
        x = da.ones((8, 8), chunks=4) * 3
    with dask.annotate(memory="100 MB"):
        y = x.sum(axis=0)
    assert y.compute(scheduler=lambda_get).tolist() == [24.0] * 8
