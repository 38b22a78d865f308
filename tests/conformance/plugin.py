"""The pytest plugin that puts one scheduler in the place of all of Dask's, and picks the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.base
import dask.local
import dask.multiprocessing
import dask.threaded
import pytest

from tests.conformance.listing import reasons
from tests.conformance.reference import PicklingScheduler
from tests.conformance.selection import SELECTIONS

LIST = Path(__file__).with_name("deselected.toml")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--selection", choices=list(SELECTIONS), default="sample")
    group.addoption("--scheduler", choices=["lambda", "sync", "pickle"], default="lambda")
    group.addoption("--only-deselected", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    get = get_named(config.getoption("--scheduler"))
    use_everywhere(get)
    scheduler = getattr(get, "__self__", None)
    if hasattr(scheduler, "close"):
        config.add_cleanup(scheduler.close)
    config.pluginmanager.register(TaskCounts(scheduler))


# ------------------------------------------------------------------------------ the scheduler


def get_named(name: str) -> Callable[..., Any]:
    if name == "sync":
        return dask.local.get_sync
    if name == "pickle":
        return PicklingScheduler().get
    # Imported here, so that the other two need nothing of ours.
    from tests.conformance.counting import CountingScheduler

    return CountingScheduler().get


def use_everywhere(get: Callable[..., Any]) -> None:
    """Make `get` the scheduler, however a test asks for one.

    ``assert_eq`` computes with ``scheduler="sync"`` whatever is configured, and some tests name a
    scheduler of their own or call ``dask.get``, hence more than the configuration.
    """
    dask.config.set(
        {
            "scheduler": "sync",
            # Dask's defaults need a disk or a network between the tasks.
            "dataframe.shuffle.method": "tasks",
            "array.rechunk.method": "tasks",
        }
    )
    for name in dask.base.named_schedulers:
        dask.base.named_schedulers[name] = get
    # The test modules are imported after this, and import these names.
    dask.get = dask.threaded.get = dask.multiprocessing.get = dask.local.get_sync = get


# ------------------------------------------------------------------------------ the selection


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    listed = listed_tests(items)
    if config.option.only_deselected:
        keep = [item for item in items if item in listed]
    else:
        keep = [item for item in sampled(items, config.option.selection) if item not in listed]
    kept = set(keep)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = keep


def test_name(item: pytest.Item) -> str:
    """``dask.bag.tests.test_bag::test_fold[x]``: the same wherever Dask is installed."""
    return item.module.__name__ + item.nodeid[item.nodeid.index("::") :]


def listed_tests(items: list[pytest.Item]) -> set[pytest.Item]:
    """The tests that ``deselected.toml`` lists.

    Raises
    ------
    pytest.UsageError
        if a module was collected and does not have a test that is listed for it
    """
    listed, stale = reasons({item: test_name(item) for item in items}, LIST)
    if stale:
        raise pytest.UsageError(f"{LIST.name} lists tests that do not exist: {', '.join(stale)}")
    return set(listed)


def sampled(items: list[pytest.Item], selection: str) -> Iterator[pytest.Item]:
    """Every n-th test of each module, n by module or by the package that it is in."""
    steps = SELECTIONS[selection]
    seen: Counter[str] = Counter()
    for item in items:
        module = item.module.__name__
        step = next(
            (n for name, n in steps.items() if f"{module}.".startswith(f"{name}.")),
            1,  # a module that was asked for by name
        )
        if seen[module] % step == 0:
            yield item
        seen[module] += 1


# ------------------------------------------------------------------------------ the counts


class TaskCounts:
    """Says at the end how many tasks each module ran, where the scheduler counts ``.tasks``."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._tests: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        before = getattr(self._scheduler, "tasks", 0)
        try:
            return (yield)
        finally:
            # Reports carry this home from other processes too (pytest -n 2).
            tasks = getattr(self._scheduler, "tasks", 0) - before
            item.user_properties.append(("conformance", (item.module.__name__, tasks)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            module, tasks = dict(report.user_properties)["conformance"]
            self._tests[module] += 1
            self._tasks[module] += tasks
            self._seconds[module] += report.duration

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("tests, tasks and seconds by module")
        for module, tests in self._tests.items():
            terminalreporter.write_line(
                f"{tests:7,} {self._tasks[module]:9,} {self._seconds[module]:8.1f}  {module}"
            )
        terminalreporter.write_line(
            f"{self._tests.total():7,} {self._tasks.total():9,} {self._seconds.total():8.1f}"
        )
