"""Callbacks and diagnostics see a run as they see one of Dask's own schedulers."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import dask
import dask.array as da
import pytest
from dask import delayed
from dask.callbacks import Callback
from dask.diagnostics import CacheProfiler, Profiler, ProgressBar, ResourceProfiler
from dask.utils import key_split

from dask_lambda import lambda_get

pytestmark = pytest.mark.local
uses_bucket = True


class Recorder(Callback):
    """Write down all that a callback is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.values: dict[Any, Any] = {}
        self.states: list[dict[str, Any]] = []
        self.graph: Any = None

    def _start(self, dsk: Any) -> None:
        self.events.append(("start",))

    def _start_state(self, dsk: Any, state: Any) -> None:
        self.events.append(("start_state",))
        self.graph = dsk
        self.states.append({name: len(value) for name, value in state.items()})

    def _pretask(self, key: Any, dsk: Any, state: Any) -> None:
        assert key in state["running"]
        assert key not in state["ready"]
        assert key in dsk
        self.events.append(("pretask", key))

    def _posttask(self, key: Any, value: Any, dsk: Any, state: Any, worker: Any) -> None:
        assert key in state["finished"]
        assert key not in state["running"]
        self.events.append(("posttask", key))
        self.values[key] = value

    def _finish(self, dsk: Any, state: Any, failed: bool) -> None:
        self.events.append(("finish", failed))
        self.states.append({name: len(value) for name, value in state.items()})


def inc(x: Any) -> Any:
    return x + 1


def graphs() -> dict[str, Any]:
    shared = {
        "a": 1,
        "b": (inc, "a"),
        "c": (inc, "b"),
        "d": (sum, ["a", "b", "c"]),
        "alias": "d",
        "e": (inc, "alias"),
        "unused": (inc, "e"),
    }
    return {
        "a chain with an alias": (shared, ["e", "b"]),
        "an alias as the result": (shared, "alias"),
        "a literal as the result": (shared, ["a"]),
        "nested keys": (shared, [["c", "e"], ["d"]]),
    }


@pytest.mark.parametrize(("dsk", "keys"), graphs().values(), ids=graphs())
def test_callbacks_hear_the_same_as_from_dask(dsk: Any, keys: Any) -> None:
    with Recorder() as theirs:
        expected = dask.get(dsk, keys)
    with Recorder() as ours:
        assert lambda_get(dsk, keys) == expected
    assert Counter(ours.events) == Counter(theirs.events)
    assert ours.values == theirs.values
    assert ours.states == theirs.states
    assert ours.events[:2] == [("start",), ("start_state",)]
    assert ours.events[-1] == ("finish", False)
    seen = set()
    for event in ours.events:
        if event[0] == "posttask":
            assert ("pretask", event[1]) in seen
        seen.add(event)


def test_callbacks_hear_of_a_collection_with_its_finaliser() -> None:
    x = (da.ones((4, 4), chunks=2) + 1).sum(axis=0)
    with Recorder() as theirs:
        x.compute(scheduler="sync")
    with Recorder() as ours:
        x.compute(scheduler=lambda_get)
    # The finaliser's key is another one at each call of compute.
    assert Counter(key_split(e[1]) for e in ours.events[2:-1]) == Counter(
        key_split(e[1]) for e in theirs.events[2:-1]
    )
    values = {str(value) for value in theirs.values.values()}
    assert {str(value) for value in ours.values.values()} == values
    assert ours.states == theirs.states


def test_callbacks_hear_of_persisted_blocks() -> None:
    kept = (da.arange(4, chunks=2) + 1).persist(scheduler=lambda_get)
    with Recorder() as ours:
        assert kept.compute(scheduler=lambda_get).tolist() == [1, 2, 3, 4]
    assert ours.events[-1] == ("finish", False)
    counts = Counter(event[0] for event in ours.events)
    assert counts["pretask"] == counts["posttask"] == len(ours.graph)


def test_callbacks_hear_of_a_failure() -> None:
    dsk = {"a": (inc, 1), "b": (inc, (inc, None)), "c": (sum, ["a", "b"])}
    with Recorder() as ours, pytest.raises(TypeError):
        lambda_get(dsk, "c")
    assert ours.events[-1] == ("finish", True)
    assert ("posttask", "b") not in ours.events
    with Recorder() as ours, pytest.raises(KeyError):
        lambda_get(dsk, "missing")
    assert ours.events == [("start",), ("finish", True)]


def test_a_callback_that_raises_ends_the_run() -> None:
    def refuse(*args: Any) -> None:
        raise LookupError("not this one")

    dsk = {("a", i): (inc, i) for i in range(8)}
    with Callback(posttask=refuse), pytest.raises(LookupError, match="not this one"):
        lambda_get(dsk, list(dsk))
    assert lambda_get(dsk, ("a", 1)) == 2


def test_a_callback_may_be_given_for_one_call_or_for_all() -> None:
    x = delayed(inc)(1)
    ours = Recorder()
    assert x.compute(scheduler=lambda_get, callbacks=[ours._callback]) == 2
    assert ("posttask", x.key) in ours.events
    before = len(ours.events)
    ours.register()
    try:
        x.compute(scheduler=lambda_get)
    finally:
        ours.unregister()
    assert len(ours.events) == 2 * before
    x.compute(scheduler=lambda_get)
    assert len(ours.events) == 2 * before


def test_the_progress_bar_reaches_its_end() -> None:
    out = io.StringIO()
    with ProgressBar(out=out, dt=0.01):
        da.ones(8, chunks=2).sum().compute(scheduler=lambda_get)
    assert "100% Completed" in out.getvalue()


def test_the_profiler_has_a_line_for_each_task() -> None:
    x = delayed(inc)(delayed(inc)(1))
    with dask.config.set({"optimization.fuse.active": False}), Profiler() as profiler:
        x.compute(scheduler=lambda_get, optimize_graph=False)
    assert {line.key for line in profiler.results} == set(x.dask)
    assert all(line.end_time >= line.start_time for line in profiler.results)


def test_the_resource_profiler_runs_beside() -> None:
    with ResourceProfiler(dt=0.01) as profiler:
        delayed(inc)(1).compute(scheduler=lambda_get)
    assert profiler.results


def test_the_cache_profiler_sees_the_values() -> None:
    def size(value: Any) -> int:
        return int(value)

    dsk = {"a": (inc, 1), "b": (inc, "a"), "c": (inc, "b")}
    with CacheProfiler(metric=size) as theirs:
        dask.get(dsk, "c")
    with CacheProfiler(metric=size) as ours:
        lambda_get(dsk, "c")
    assert [(line.key, line.metric) for line in ours.results] == [
        (line.key, line.metric) for line in theirs.results
    ]
    assert all(line.free_time >= line.cache_time for line in ours.results)


def test_the_opportunistic_cache_saves_invocations() -> None:
    pytest.importorskip("cachey")
    from dask.cache import Cache

    from dask_lambda import last_report

    dsk = {"a": (inc, 1), "b": (inc, "a")}
    with Cache(1e6, 0):
        assert lambda_get(dsk, "b") == 3
        assert lambda_get(dsk, "b") == 3
        report = last_report()
    assert report is not None
    assert report.invocations == 0
