"""The pytest plugin that puts one cluster in the place of distributed's, and picks the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

# distributed.utils_test resets the configuration before each test to what it was at its import.
import dask_lambda  # noqa: F401

# isort: split
import distributed.utils_test

from tests.conformance.listing import reasons
from tests.distributed_conformance import clusters
from tests.distributed_conformance.rules import note_arguments, rule
from tests.distributed_conformance.source import is_fetched, provide_missing_imports

LIST = Path(__file__).with_name("deselected.toml")
#: On top of it, for the file that is fetched.
FETCHED = Path(__file__).with_name("deselected_fetched.toml")

#: The fixtures: ``c``, ``loop``, ...
pytest_plugins = ["distributed.utils_test"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--cluster", choices=["lambda", "worker", "distributed"], default="lambda")
    group.addoption("--only-deselected", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    factories = {"lambda": clusters.on_lambda, "worker": clusters.one_worker}
    factory = factories.get(config.getoption("--cluster"))
    stand_in = None
    if factory is not None:
        stand_in = clusters.StandIn(factory)
        stand_in.install()
    note_arguments()
    provide_missing_imports(Path(config.args[0]))
    # Workers on Lambda have neither the tests nor what is made for them.
    cloudpickle.register_pickle_by_value(distributed.utils_test)
    config.pluginmanager.register(Selection(stand_in), "distributed_conformance")


class Selection:
    """Leaves tests out, says at the end why, and fails what never met the cluster."""

    def __init__(self, stand_in: clusters.StandIn | None):
        self._stand_in = stand_in
        self._left_out: Counter[str] = Counter()
        self._stale: list[str] = []
        self._check = stand_in is not None

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        for module in {item.module for item in items}:
            cloudpickle.register_pickle_by_value(module)
        names = {item: item.path.stem + item.nodeid[item.nodeid.index("::") :] for item in items}
        why = {item: reason for item in items if (reason := rule(item))}
        listed, self._stale = reasons(names, LIST)
        why.update(listed)
        if is_fetched(Path(config.args[0])):
            listed, stale = reasons(names, FETCHED)
            why.update(listed)
            if stale:
                raise pytest.UsageError(f"{FETCHED.name} lists what is not there: {stale}")
        self._left_out = Counter(why.values())
        if config.option.only_deselected:
            self._check = False
            keep = [item for item in items if item in why]
        else:
            keep = [item for item in items if item not in why]
        kept = set(keep)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = keep

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._before = self._stand_in.started if self._stand_in else 0
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        result = yield
        if self._check and self._stand_in.started == self._before:
            pytest.fail("It started no cluster of ours: it says nothing, so list it", pytrace=False)
        return result

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._left_out:
            return  # with pytest -n other processes choose the tests
        terminalreporter.section("tests that are left out, and why")
        for reason, tests in self._left_out.most_common():
            terminalreporter.write_line(f"{tests:5}  {reason}")
        terminalreporter.write_line(f"{self._left_out.total():5}")
        if self._stale:
            terminalreporter.write_line(
                f"{len(self._stale)} names in {LIST.name} are of tests that this file does not have"
            )
