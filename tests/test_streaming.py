"""Fetching, computing and uploading at the same time, in this process, as Lambda would call it."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask._task_spec import List, Task, TaskRef
from obstore.store import LocalStore

from lambda_worker import handler, protocol
from lambda_worker.protocol import Request
from lambda_worker.store import Store
from tests.handler_client import CONTEXT, RUN, Client, client, inc, name_of
from tests.helpers import eventually

__all__ = ["client"]


def call(client: Client, *groups: Any) -> dict[str, Any]:
    return json.loads(json.dumps(handler.handler(client.event(*groups), CONTEXT)))


def gets() -> int:
    return handler.environment.store("bucket").counts.gets


def test_the_inputs_of_later_tasks_and_groups_are_fetched_while_the_first_runs(client):
    inputs = {name: client.put(name, name) for name in "abc"}

    def wait_for_all(a):
        return a, eventually(lambda: gets() == 3)

    first = client.group(
        Task("x", wait_for_all, TaskRef("a")),
        Task("y", lambda x, b: (x, b), TaskRef("x"), TaskRef("b")),
        inputs={name: inputs[name] for name in "ba"},
    )
    second = client.group(Task("z", str.upper, TaskRef("c")), inputs={"c": inputs["c"]})
    said = client.call(first, second)
    assert client.load(said[0]["outputs"][0]) == (("a", True), "b")
    assert client.load(said[1]["outputs"][0]) == "C"


def test_an_output_is_uploaded_while_the_next_task_runs(client):
    client.inline_bytes = 0

    def is_there():
        worker = Client(handler.environment.store("bucket"))
        return eventually(lambda: name_of("x") in worker.objects())

    (said,) = client.call(client.group(Task("x", inc, 1), Task("y", is_there), outputs=["x", "y"]))
    assert [client.load(record) for record in said["outputs"]] == [2, True]


@pytest.mark.parametrize("inline_bytes", [0, 1_000_000])
def test_what_later_tasks_do_to_a_value_does_not_change_what_is_committed(client, inline_bytes):
    client.inline_bytes = inline_bytes

    def spoil(x):
        x[:] = 7
        return int(x.sum())

    tasks = [
        Task("x", np.ones, 10_000),
        Task("view", lambda x: x[::-1], TaskRef("x")),
        Task("y", spoil, TaskRef("view")),
    ]
    (said,) = client.call(client.group(*tasks, outputs=["x", "view", "y"]))
    x, view, y = (client.load(record) for record in said["outputs"])
    assert x.sum() == view.sum() == 10_000
    assert y == 70_000


def test_an_object_that_several_groups_read_is_downloaded_once_and_each_has_its_own(client):
    def fill(x):
        before = float(x.sum())
        x[:] = 7
        return before

    shared = client.put("x", np.ones(5000))
    groups = [client.group(Task(key, fill, TaskRef("x")), inputs={"x": shared}) for key in "abcd"]
    reply = call(client, *groups)
    assert [client.load(said["outputs"][0]) for said in reply["groups"]] == [5000] * 4
    assert (reply["s3"]["gets"], reply["cache_hits"]) == (1, 3)


def test_two_names_of_one_input_are_one_value_in_a_group(client):
    tasks = [
        Task("y", lambda a: a.__setitem__(0, 5), TaskRef("a")),
        Task("z", lambda b, _: b[0], TaskRef("b"), TaskRef("y")),
    ]
    group = client.group(*tasks, inputs={"a": client.put("x", np.zeros(1000))})
    body = protocol.Body(tasks, ["a", "b"], [0, 0], ["z"])
    group.body = client.inline("body-y", body.fields())
    reply = call(client, group)
    assert client.load(reply["groups"][0]["outputs"][0]) == 5
    assert reply["s3"]["gets"] == 1


def test_an_upload_that_fails_fails_its_group_only(tmp_path: Path, client):
    handler.environment._stores["bucket"] = Store(LocalStore(tmp_path))
    client.store = Store(LocalStore(tmp_path))
    client.inline_bytes = 0
    broken = next(f"k{i}" for i in range(99) if name_of(f"k{i}")[0] != name_of("x")[0])
    (tmp_path / name_of(broken)[0]).write_text("a file where a folder should be")
    said = client.call(
        client.group(Task(broken, inc, 1), Task("u", inc, 1), outputs=[broken]),
        client.group(Task("x", inc, 2)),
    )
    assert said[0]["error"]["kind"].startswith("store-")
    assert name_of(broken) in said[0]["error"]["message"]
    assert client.load(said[1]["outputs"][0]) == 3


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt()])
def test_after_a_task_that_raised_the_environment_serves_the_next_request(client, error):
    client.inline_bytes = 0

    def fail(x):
        raise error

    inputs = {f"x{i}": client.put(f"x{i}", np.zeros(1000)) for i in range(40)}
    tasks = [
        Task("a", np.ones, 5000),
        Task("b", fail, TaskRef("x0")),
        *(Task(f"c{i}", inc, TaskRef(f"x{i}")) for i in range(40)),
    ]
    said = client.call(
        client.group(*tasks, outputs=["a", "c39"], inputs=inputs),
        client.group(Task("d", inc, TaskRef("x39")), inputs={"x39": inputs["x39"]}),
    )
    assert said[0]["error"]["kind"] == "exception"
    assert client.load(said[1]["outputs"][0]).sum() == 1000
    assert name_of("a") in client.objects()
    busy = [handler.environment.fetching, handler.environment.uploading]
    assert all(pool._work_queue.empty() for pool in busy)
    assert client.result(Task("e", inc, 1)) == 2


def test_requests_leave_no_threads_behind_but_the_pools(client):
    inputs = {f"x{i}": client.put(f"x{i}", i) for i in range(30)}
    refs = [TaskRef(name) for name in inputs]
    client.run(Task("y", lambda *x: sum(x), *refs), inputs=inputs)
    before = set(threading.enumerate())
    for number in range(5):
        client.run(Task(f"y{number}", lambda *x: sum(x), *refs), inputs=inputs)
    new = [thread.name for thread in set(threading.enumerate()) - before]
    assert all(name.startswith(("fetch_", "upload_")) for name in new)
    assert len(handler.environment.fetching._threads) <= handler.FETCH_THREADS


def test_what_unpickles_into_an_exit_does_not_end_the_worker(client):
    inputs = {"x": client.inline("x", Exits())}
    error = client.run(Task("y", inc, TaskRef("x")), inputs=inputs)["error"]
    assert error["type"] == "builtins.SystemExit"
    assert client.run(Task("y", inc, Exits()))["error"]["type"] == "builtins.SystemExit"


class Exits:
    def __reduce__(self):
        return _leave, ()


def _leave():
    raise SystemExit(1)


def test_a_group_tells_what_its_tasks_took(client):
    inputs = {"x": client.put("x", np.ones(1000))}
    group = client.group(
        Task(("double", 0), np.multiply, TaskRef("x"), 2),
        Task(("double", 1), np.multiply, TaskRef("x"), 2),
        Task(
            "total",
            lambda a, b: float((a + b).sum()),
            TaskRef(("double", 0)),
            TaskRef(("double", 1)),
        ),
        outputs=["total"],
        inputs=inputs,
    )
    (said,) = call(client, group)["groups"]
    assert {name: (n, size) for name, (n, _, size) in said["tasks"].items()} == {
        "double": (2, 16_000),
        "total": (1, said["outputs"][0]["size"]),
    }
    assert said["seconds"] == pytest.approx(sum(s for _, s, _ in said["tasks"].values()))
    assert said["wait"] > 0


def test_a_tile_of_a_product_is_summed_up_as_dask_would(client):
    import functools

    from dask.array.routines import _chunk_sum

    random = np.random.default_rng(5)
    panels = {name: random.random((50, 50)) for i in range(16) for name in (f"a{i}", f"b{i}")}
    tasks = [
        Task(f"dot{i}", lambda a, b: (a @ b)[None], TaskRef(f"a{i}"), TaskRef(f"b{i}"))
        for i in range(16)
    ]
    add = functools.partial(_chunk_sum, dtype=np.dtype("f8"), axis=(0,), keepdims=False)
    tasks.append(Task("tile", add, List(*(TaskRef(f"dot{i}") for i in range(16)))))
    values: dict[Any, Any] = dict(panels)
    for task in tasks:
        values[task.key] = task(values)
    found = client.result(*tasks, inputs={n: client.put(n, p) for n, p in panels.items()})
    assert found.tobytes() == values["tile"].tobytes()


def test_without_the_package_that_compresses_a_group_fails_and_says_what_to_do(client, monkeypatch):
    request = Request(
        RUN, client.secrets, "bucket", 0, [client.group(Task("y", np.zeros, 100_000))], "zstd"
    )
    event = json.loads(json.dumps(request.to_json()))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "zstandard", None)
        (said,) = handler.handler(event, CONTEXT)["groups"]
    assert said["error"]["kind"] == "unserializable"
    assert "package 'zstandard' is not installed" in said["error"]["message"]
    (said,) = handler.handler(event, CONTEXT)["groups"]
    assert said["outputs"][0]["size"] < 10_000
    assert (client.load(said["outputs"][0]) == 0).all()
