"""What the tests of executors share: executors over the embedded AWS, and functions to call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from dask_lambda import LambdaExecutor

WAIT = 60  # seconds, for what takes some milliseconds
LARGE = 100_000  # float64 numbers: too many to travel in a reply

# As what is in test modules: a module that travels would be an object in the bucket.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def _keys(credentials: dict[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in credentials.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def executor(aws_settings: dict[str, Any], _keys: None) -> Iterator[LambdaExecutor]:
    with LambdaExecutor(4, **aws_settings) as shared:
        yield shared


@pytest.fixture
def make(aws_settings: dict[str, Any], _keys: None) -> Iterator[Callable[..., LambdaExecutor]]:
    """``make(max_workers)``: an executor of the test's own."""
    made: list[LambdaExecutor] = []

    def make(max_workers: int = 2, **others: Any) -> LambdaExecutor:
        made.append(LambdaExecutor(max_workers, **{**aws_settings, **others}))
        return made[-1]

    yield make
    for each in made:
        each.shutdown(wait=True, cancel_futures=True)


class Gate:
    """Lets calls wait until it is opened; workers are processes of this machine."""

    def __init__(self, path: Path):
        self.path = path

    def open(self) -> None:
        self.path.touch()

    def __call__(self, value: Any = None, *others: Any) -> Any:
        while not self.path.exists():
            time.sleep(0.01)
        return value


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "open")
    yield gate
    gate.open()


class Marks:
    """Files that calls leave, to tell that they ran."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def __call__(self, name: Any) -> Any:
        (self.folder / str(name)).touch()
        return name

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    return Marks(tmp_path / "marks")


def double(x: Any) -> Any:
    return 2 * x


def add(a: Any, b: Any = 0) -> Any:
    return a + b


def fail(x: Any) -> Any:
    raise ValueError(f"no {x}")


def ones(size: int) -> Any:
    return np.ones(size)


def joined(parts: list[list[int]]) -> list[int]:
    return [x for part in parts for x in part]


def client_gets(executor: LambdaExecutor) -> int:
    """How many objects this process has read."""
    gets: int = executor._calling.session()._run.store.counts.gets
    return gets
