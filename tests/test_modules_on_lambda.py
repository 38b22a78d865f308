"""The user's own modules are on the worker when a task needs them, and nowhere afterwards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from dask import delayed

import dask_lambda
from dask_lambda import config, kept_runs, lambda_get, local_modules
from dask_lambda.errors import ConfigurationError, LocalModulesError
from tests.helpers import forget_modules, notes, report
from tests.session_calls import Calls, value

pytestmark = pytest.mark.local
uses_bucket = True

Project = Callable[..., None]
Connect = Callable[..., dask_lambda.LambdaScheduler]

SHAPES = """
from dataclasses import dataclass

import shape_helpers

@dataclass
class Square:
    side: int

def square(side):
    return Square(side)

def area(shape):
    return shape_helpers.product(shape.side, shape.side)
"""
HELPERS = "def product(a, b):\n    return a * b\n"


@pytest.fixture
def shapes(project: Project) -> Any:
    """A module of the user's own, which imports another one."""
    project({"shapes.py": SHAPES, "shape_helpers.py": HELPERS})
    return importlib.import_module("shapes")


def compute(*values: Any, **settings: Any) -> Any:
    found = dask.compute(*values, scheduler=lambda_get, **settings)
    return found[0] if len(values) == 1 else found


def test_functions_classes_and_what_their_module_imports(shapes: Any) -> None:
    assert compute(delayed(shapes.area)(delayed(shapes.square)(3))) == 9
    result = compute(delayed(shapes.square)(4))
    assert type(result) is shapes.Square
    assert result == shapes.Square(4)


@pytest.mark.usefixtures("one_task_each")
def test_values_of_a_class_travel_between_tasks_that_do_not_mention_it(shapes: Any) -> None:
    def side(shape: Any) -> int:
        return shape.side + 1

    assert compute(delayed(side)(delayed(shapes.square)(3))) == 4
    assert compute(delayed(side)(delayed(shapes.Square(5), pure=True))) == 6  # data of the graph
    assert compute(delayed(side)(shapes.Square(6))) == 7


def test_a_package_with_relative_imports_and_data(project: Project) -> None:
    inner = (
        "from importlib.resources import files\nfrom . import names\nfrom .deep.er import f\n"
        "def read():\n    return files(__package__).joinpath(names.FILE).read_text(), f()\n"
    )
    project(
        {
            "packed/__init__.py": "",
            "packed/inner.py": inner,
            "packed/names.py": "FILE = 'data/words.txt'",
            "packed/data/words.txt": "words",
            "packed/deep/er.py": "def f():\n    from ..names import FILE\n    return FILE",
        }
    )
    inner = importlib.import_module("packed.inner")
    assert compute(delayed(inner.read)()) == ("words", "data/words.txt")


def test_a_function_of_the_script_may_import_inside(shapes: Any) -> None:
    def work(side: int) -> Any:
        from shapes import Square, area

        return area(Square(side))

    assert compute(delayed(work)(5)) == 25


def test_an_edited_module_is_new_in_the_next_run_and_in_warm_environments(
    project: Project,
) -> None:
    for version in (1, 2, 1, 3):
        project(
            {
                "edited.py": f"import edited_too\ndef f():\n    return {version}, edited_too.x",
                "edited_too.py": f"x = {version}",
            }
        )
        calls = [delayed(importlib.import_module("edited").f)() for _ in range(4)]
        assert compute(*calls, plan="none") == ((version, version),) * 4


def test_what_a_later_run_loads_may_be_of_a_class_that_it_does_not_mention(shapes: Any) -> None:
    stored = delayed(shapes.square)(3).persist(scheduler=lambda_get)
    assert compute(delayed(lambda: 0)()) == 0
    assert compute(delayed(lambda shape: shape.side)(stored)) == 3


@pytest.mark.usefixtures("without_lease")
def test_modules_travel_once_for_each_run(shapes: Any, connect: Connect) -> None:
    scheduler = connect(plan="none", concurrency=1)
    calls = [delayed(shapes.area)(shapes.Square(side)) for side in range(6)]
    for gets in (1, 0):
        assert dask.compute(*calls, scheduler=scheduler) == (0, 1, 4, 9, 16, 25)
        assert report().invocations == 6
        assert report().s3_puts == 1
        assert report().s3_gets <= gets  # an environment that has them does not fetch them


@pytest.mark.usefixtures("without_lease")
def test_a_run_that_needs_none_sends_none(shapes: Any) -> None:
    assert compute(delayed(shapes.square)(1)).side == 1
    assert compute(delayed(len)([1, 2])) == 2
    assert report().s3_puts == 0


def test_modules_that_show_up_later_in_a_run_are_added(shapes: Any, project: Project) -> None:
    project({"late.py": "import shapes\ndef f(area):\n    return shapes.Square(area)"})
    late = importlib.import_module("late")
    areas = [delayed(shapes.area)(delayed(shapes.square)(side)) for side in (1, 2)]
    found = compute(*map(delayed(late.f), areas), plan="none")
    assert [shape.side for shape in found] == [1, 4]


def test_an_open_run_has_the_modules_of_each_call_that_is_added(
    shapes: Any, project: Project
) -> None:
    def side(shape: Any) -> int:
        return shape.side

    with dask_lambda.LambdaScheduler() as scheduler:
        call = Calls(scheduler.session())
        square, _ = first = call(shapes.square, 3)
        assert value(first).side == 3
        assert value(call(side, square)) == 3
        project({"late.py": "import shapes\ndef f(area):\n    return shapes.Square(area)"})
        late = importlib.import_module("late")
        assert value(call(late.f, call(shapes.area, square)[0])).side == 9
        put = call.session.put("put", late.f(4)).result(60)
        assert value(call(side, put)) == 4
        call.session.close()


def by_computed_name(name: str) -> Any:
    return importlib.import_module(name).area(importlib.import_module(name).square(3))


def test_what_cannot_be_seen_is_included_and_what_is_excluded_is_missed(shapes: Any) -> None:
    with dask.config.set({"dask-lambda.modules": {}}):
        call = delayed(by_computed_name)("shapes")
        with pytest.raises(ModuleNotFoundError) as caught:
            compute(call)
        assert "dask_lambda.config.modules.include('shapes')" in notes(caught.value)
        config.modules.include("shapes")
        assert compute(call) == 9
        config.modules.exclude(shapes)
        with pytest.raises(ModuleNotFoundError) as caught:
            compute(delayed(shapes.square)(3))
        assert "dask-lambda.modules.exclude keeps it" in notes(caught.value)
        assert compute(delayed(shapes.square)(3), modules={}).side == 3
        with pytest.raises(ConfigurationError, match="not found here"):
            compute(call, modules={"include": ["shapes_of_nobody"]})


def test_too_large_modules_are_refused_before_anything_is_sent(
    shapes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_modules, "MAX_BYTES", 20)
    with pytest.raises(LocalModulesError, match=r"shapes\.py"):
        compute(delayed(shapes.square)(3))
    assert report().invocations == 0


def test_a_package_that_is_nowhere_is_named() -> None:
    def load() -> None:
        import package_that_nobody_has  # noqa: F401

    with pytest.raises(ModuleNotFoundError) as caught:
        compute(delayed(load)())
    assert "'package_that_nobody_has' is not installed on the worker" in notes(caught.value)


@pytest.fixture
def records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aws: Any, bucket_names: Any
) -> Iterator[None]:
    """Records of kept runs, of which no modules stay."""
    monkeypatch.setenv("DASK_LAMBDA_STATE_DIR", str(tmp_path / "state"))
    yield
    assert kept_runs.names()
    names = bucket_names()
    for name in names:
        aws.client("s3").delete_object(Bucket=aws.bucket, Key=name)
    assert not [name for name in names if "modules-" in name]


@pytest.mark.usefixtures("records", "one_task_each")
def test_what_an_earlier_session_has_kept_may_be_of_a_class_that_nobody_mentions_any_more(
    shapes: Any, connect: Connect, tmp_path: Path
) -> None:
    shape = delayed(shapes.square)(3)
    assert shape.compute(scheduler=connect(resume="shapes", keep=True)).side == 3
    forget_modules(tmp_path)

    result = delayed(lambda shape: shape.side + 1)(shape)
    assert result.compute(scheduler=connect(resume="shapes", keep=True)) == 4
    assert report().reused == 1
    assert report().retries == 1  # the worker had missed the module, and then it was sent


@pytest.mark.usefixtures("records")
def test_what_an_earlier_session_has_saved_may_be_of_a_class_of_ones_own(
    shapes: Any, connect: Connect, tmp_path: Path
) -> None:
    dask_lambda.save(delayed(shapes.square)(3), "a-square", scheduler=connect())
    forget_modules(tmp_path)

    scheduler = connect()
    loaded = dask_lambda.load("a-square", scheduler=scheduler)
    result = delayed(lambda shape: shape.side + 1)(loaded)
    assert result.compute(scheduler=scheduler) == 4
    assert report().retries == 1
