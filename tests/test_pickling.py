"""The functions of a run are pickled once, and mean the same on the other side."""

from __future__ import annotations

import pickle
import subprocess
import sys
from operator import add
from pathlib import Path

import numpy as np
import pytest
from dask._task_spec import Task, TaskRef

from dask_lambda.pickling import FunctionCache
from lambda_worker import protocol
from lambda_worker.protocol import Reference


def in_band(buffer: pickle.PickleBuffer) -> bool:
    return True


def dumps(functions: FunctionCache, value: object) -> bytes:
    return functions.dumps(value, buffer_callback=in_band)


def adder(n: int):
    return lambda x: x + n


def test_tasks_that_share_a_function_run_as_before():
    functions, square = FunctionCache(), lambda x: x * x
    tasks = [Task(i, square, TaskRef("x")) for i in range(3)]
    again = [pickle.loads(dumps(functions, task)) for task in tasks]
    assert [task({"x": 7}) for task in again] == [49, 49, 49]
    assert [task.key for task in again] == [0, 1, 2]


def test_a_function_is_looked_at_once(monkeypatch: pytest.MonkeyPatch):
    seen = []
    reduced = FunctionCache._reduced
    monkeypatch.setattr(FunctionCache, "_reduced", lambda *a: seen.append(a[1]) or reduced(*a))
    functions, one, two = FunctionCache(), adder(1), adder(2)
    for task in [Task("a", one, 1), Task("b", two, 1), Task("c", one, 2), Task("d", two, 2)]:
        dumps(functions, task)
    assert seen == [one, two]


def test_functions_of_the_same_code_stay_apart():
    functions = FunctionCache()
    made = [pickle.loads(dumps(functions, Task(n, adder(n), 10)))() for n in range(20)]
    assert made == [10 + n for n in range(20)]


SPAWNING = """
import multiprocessing, sys
from dask_lambda.pickling import FunctionCache

def twice(x):
    return 2 * x

class Number:
    value = 21

def pickled(_):
    return FunctionCache().dumps((twice, Number), buffer_callback=lambda buffer: True)

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (data,) = pool.map(pickled, [0])
    sys.stdout.buffer.write(data)
"""


def test_what_a_script_defines_travels_also_from_a_process_that_was_spawned(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(SPAWNING, "utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, timeout=120, check=True)
    twice, number = pickle.loads(done.stdout)
    assert twice(number.value) == 42


@pytest.mark.parametrize("size", [0, 100_000], ids=["pickled once", "too long for that"])
def test_code_keeps_the_name_of_its_file(size: int):
    held = bytes(size)

    def outer():
        def inner():
            return held

        return inner

    loaded = pickle.loads(dumps(FunctionCache(), outer))
    assert loaded.__code__.co_filename == __file__
    assert loaded().__code__.co_filename == __file__


def test_what_can_be_imported_is_pickled_by_name():
    functions = FunctionCache()
    for _ in range(2):
        assert pickle.loads(dumps(functions, pickle.loads)) is pickle.loads
        assert pickle.loads(dumps(functions, np.full_like)) is np.full_like
        assert pickle.loads(dumps(functions, add)) is add


def test_a_recursive_function_calls_itself():
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    functions = FunctionCache()
    for _ in range(2):
        assert pickle.loads(dumps(functions, Task("f", factorial, 5)))() == 120


def test_large_data_of_a_function_leaves_the_stream_each_time():
    data = np.ones(100_000)
    functions, total = FunctionCache(), lambda: float(data.sum())
    for _ in range(2):
        buffers: list[pickle.PickleBuffer] = []
        stream = functions.dumps(Task("t", total), buffer_callback=buffers.append)
        assert len(stream) < 10_000
        assert len(buffers) == 1
        assert pickle.loads(stream, buffers=buffers)() == 100_000


def test_references_in_a_function_are_found_each_time():
    reference = Reference("0/prefix/run/label", 10)
    functions, name = FunctionCache(), lambda: reference.name
    for _ in range(2):
        with protocol.collect_references() as found:
            dumps(functions, Task("t", name))
        assert {each.name for each in found} == {reference.name}
