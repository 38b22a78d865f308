"""Whatever runs twice, every reader sees one version of it, and nothing is left behind.

The tasks are not deterministic: each attempt makes another value.
"""

from __future__ import annotations

import operator
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dask._task_spec import Task, TaskRef

from dask_lambda import LambdaScheduler
from dask_lambda.errors import IntegrityError
from dask_lambda.graph import normalise
from dask_lambda.objects import told_outputs
from dask_lambda.plan import Group, Plan
from dask_lambda.run import RunFailed, RunSucceeded
from lambda_worker import protocol
from lambda_worker.protocol import Reference, Value
from tests.faults.proxy import Action, Duplicate, Proxy, Request, Reset

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
SMALL, MEDIUM, LARGE = 100, 200_000, 68 * 2**20
BOTH_SECONDS = 20.0


def draw(directory: Path, name: str, size: int, together: bool) -> tuple[str, bytes]:
    """Make a value that no other attempt makes; ``together``: when two attempts have begun."""
    drawn = uuid.uuid4().hex
    (directory / f"{name}.{drawn}").touch()
    deadline = time.monotonic() + BOTH_SECONDS
    while together and len(list(directory.glob(f"{name}.*"))) < 2:
        assert time.monotonic() < deadline, "there is no second attempt"
        time.sleep(0.005)
    return drawn, os.urandom(size // 2) + bytes(size - size // 2)


def copy(value: Any) -> Any:
    return value


def versions(*values: Any) -> set[str]:
    return {value[0] for value in values}


def attempts(directory: Path, name: str = "draw") -> int:
    return len(list(directory.glob(f"{name}.*")))


def run(scheduler: LambdaScheduler, tasks: list[Task], groups: list[tuple[str, str]]) -> Any:
    """Run these groups of tasks (their keys, their outputs); the values of the last ones."""
    graph = normalise({task.key: task for task in tasks}, [task.key for task in tasks])
    maker = {key: place for place, (_, outputs) in enumerate(groups) for key in outputs.split()}
    made = []
    for place, (keys, outputs) in enumerate(groups):
        inside = keys.split()
        reads = dict.fromkeys(d for key in inside for d in graph.dependencies(key))
        inputs = tuple(d for d in reads if maker.get(d, place) != place)
        made.append(Group(tuple(inside), inputs, tuple(outputs.split()), place))
    read = {key for group in made for key in group.inputs}
    wanted = frozenset(key for key in maker if key not in read)
    engine = scheduler._engine(scheduler._settings({}))
    settings = scheduler._settings({})
    plan = Plan(tuple(made), wanted, (), wanted, graph, mode="none")
    started = engine.start(plan, inline_bytes=settings.inline_bytes)
    match started.events.get(timeout=120):
        case RunFailed(exception):
            raise exception
        case RunSucceeded():
            return {key: started.load(key) for key in wanted}


def tasks_of(directory: Path, sizes: tuple[int, ...], *, together: bool) -> tuple[Any, Any]:
    """A group that draws once and has as many outputs as sizes, and three groups that read them.

    With one size it has one output; with more, all of them are of the same draw.
    """
    names = [f"y{i}" for i in range(len(sizes))]
    tasks = [Task("draw", draw, directory, "draw", max(sizes), together)]
    tasks += [
        Task(name, shorten, TaskRef("draw"), size) for name, size in zip(names, sizes, strict=True)
    ]
    readers = [f"r{i}" for i in range(3)]
    for place, reader in enumerate(readers):
        reads = names if place == 2 else [names[0], names[-1]]
        tasks.append(Task(reader, versions, *map(TaskRef, reads)))
    groups = [(" ".join(["draw", *names]), " ".join(names)), *((r, r) for r in readers)]
    return tasks, groups


def shorten(value: tuple[str, bytes], size: int) -> tuple[str, bytes]:
    return value[0], value[1][:size]


def every(action: Action) -> Callable[[Request], Action]:
    """The action for each invocation of a group that draws."""

    def decide(request: Request) -> Action:
        draws = request.kind == "invoke" and not request.event["groups"][0]["inputs"]
        return action if draws else None

    return decide


SIZES = [
    (SMALL,),
    (MEDIUM,),
    (LARGE,),
    (SMALL, SMALL),
    (MEDIUM, MEDIUM),
    (SMALL, MEDIUM, SMALL),
    (MEDIUM, LARGE),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_of_two_attempts_at_the_same_time_every_reader_sees_the_same(
    proxy: Proxy, connect: Connect, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    scheduler = connect(endpoint_url=proxy.url, concurrency=2)
    proxy.decide = every(Duplicate(second=len(sizes) > 1))  # which of the answers is heard
    found = run(scheduler, *tasks_of(tmp_path, sizes, together=True))
    assert attempts(tmp_path) == 2
    assert len(set.union(*found.values())) == 1


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_after_an_attempt_whose_reply_was_lost_every_reader_sees_the_same(
    proxy: Proxy, connect: Connect, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    scheduler = connect(endpoint_url=proxy.url)
    proxy.plan(invoke=[Reset(forwarded=True), Reset(forwarded=True)])
    found = run(scheduler, *tasks_of(tmp_path, sizes, together=False))
    assert attempts(tmp_path) == 3
    assert len(set.union(*found.values())) == 1


@pytest.mark.parametrize("sizes", [(MEDIUM,), (SMALL, MEDIUM), (MEDIUM, MEDIUM)], ids=str)
def test_an_attempt_that_goes_on_unheard_beside_the_next_one_changes_nothing(
    proxy: Proxy, connect: Connect, tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    scheduler = connect(endpoint_url=proxy.url, concurrency=2)
    proxy.plan(invoke=[Reset(forwarded=True, after=0.05)])
    found = run(scheduler, *tasks_of(tmp_path, sizes, together=True))
    assert attempts(tmp_path) == 2
    assert len(set.union(*found.values())) == 1


def test_a_result_that_was_small_the_second_time_is_not_mixed_up_with_the_first(
    proxy: Proxy, connect: Connect, tmp_path: Path
) -> None:
    """The lost attempt went to S3, the next one came inline, and is moved to S3 for a reader."""

    def grow(directory: Path) -> tuple[str, bytes]:
        first = not attempts(directory)
        drawn = uuid.uuid4().hex
        (directory / f"draw.{drawn}").touch()
        return drawn, bytes(4_300_000 if first else 3_500_000)

    tasks = [
        Task("y", grow, tmp_path),
        Task("z", draw, tmp_path, "other", 3_000_000, False),
        Task("r0", versions, TaskRef("y"), TaskRef("z")),  # too much for one payload
        Task("r1", versions, TaskRef("y")),
    ]
    scheduler = connect(endpoint_url=proxy.url, inline_bytes=4_000_000, concurrency=1)
    proxy.plan(invoke=[Reset(forwarded=True)])
    found = run(scheduler, tasks, [(key, key) for key in ("y", "z", "r0", "r1")])
    assert attempts(tmp_path) == 2
    assert found["r1"] < found["r0"]
    assert len(found["r0"]) == 2


def test_a_persisted_output_of_an_entangled_group_outlives_what_its_rivals_left(
    proxy: Proxy, connect: Connect, tmp_path: Path, bucket_names: Callable[[], list[str]]
) -> None:
    scheduler = connect(endpoint_url=proxy.url, concurrency=2)
    engine = scheduler._engine(scheduler._settings({}))
    tasks = [
        Task("draw", draw, tmp_path, "draw", MEDIUM, True),
        Task("y0", copy, TaskRef("draw")),
        Task("y1", operator.itemgetter(0), TaskRef("draw")),
    ]
    graph = normalise({task.key: task for task in tasks}, ["y0", "y1"])
    keep = frozenset(["y0", "y1"])
    group = Group(("draw", "y0", "y1"), (), ("y0", "y1"))
    proxy.decide = every(Duplicate(second=True))
    plan = Plan((group,), keep, (), keep, graph, mode="auto")
    started = engine.start(plan, inline_bytes=0, keep_results=True)
    assert started.events.get(timeout=60) == RunSucceeded()
    assert len(bucket_names()) == 2
    first, second = (Reference(v.name, v.size) for v in map(started.kept.get, ("y0", "y1")) if v)
    assert engine.access.load(first)[0] == engine.access.load(second)
    for reference in (first, second):
        engine.access.forget(reference.name)


def test_what_is_kept_is_not_deleted_for_an_attempt_that_failed_late(
    connect: Connect, bucket_names: Callable[[], list[str]]
) -> None:
    """It may have written the very object that is kept, as far as its reply tells."""
    engine = (scheduler := connect())._engine(scheduler._settings({}))
    graph = normalise({"y": Task("y", bytes, MEDIUM)}, ["y"])
    keep = frozenset(["y"])
    plan = Plan((Group(("y",), (), ("y",)),), keep, (), keep, graph)
    started = engine.start(plan, inline_bytes=0, keep_results=True)
    assert started.events.get(timeout=60) == RunSucceeded()
    started.uncertain.add(started.object_name("y"))
    engine._call(engine._objects.sweep(started)).result()
    kept = started.kept["y"]
    assert bucket_names() == [kept.name]
    engine.access.forget(kept.name)


# -- a reply that comes when another attempt was first -------------------------------------------


@pytest.fixture
def discarding(connect: Connect, bucket_names: Callable[[], list[str]]) -> Any:
    """``discarding(accepted, late)``: what is left of two attempts at one output.

    Each is the name of an object that was written, or None for a value that came inline.
    """
    scheduler = connect()
    engine = scheduler._engine(scheduler._settings({}))
    graph = normalise({"y": Task("y", copy, 1)}, ["y"])
    group = Group(("y",), (), ("y",))

    def discarding(accepted: str | None, late: str | None, *, released: bool = False) -> set[str]:
        idle = Plan((), frozenset(), (), frozenset(), graph)
        run = engine.start(idle, inline_bytes=0)
        assert run.events.get(timeout=60) == RunSucceeded()
        names = {"own": run.object_name("y")}
        names |= {each: protocol.attempt_name(names["own"], each) for each in "ab"}
        values = [
            Value(names[name or "own"], 10, None if name else b"inline")
            for name in (accepted, late)
        ]
        written = [
            each for name in (accepted, late) if name for each in protocol.objects_of(names[name])
        ]

        async def discard() -> None:
            for name in dict.fromkeys(written):
                await run.store.put_new_async(name, b"sealed")
            if not released:
                run.values["y"] = values[0]
            told = told_outputs(run, group, [values[1].to_json()])
            engine._objects.discard_outputs(run, told)
            await engine._objects._empty(run)

        engine._call(discard()).result()
        known = {name: label for label, name in names.items()}
        left = {known[name] for name in bucket_names()}
        engine._call(engine._objects.delete(run.store, bucket_names())).result()
        return left

    return discarding


@pytest.mark.parametrize(
    ("accepted", "late", "left"),
    [
        ("own", "own", {"own"}),  # the second was told of the first
        (None, "own", set()),
        ("own", None, {"own"}),
        ("a", "a", {"own", "a"}),  # large, with the pointer to it
        ("a", "b", {"a"}),
        ("own", "b", {"own"}),
        (None, None, set()),
    ],
)
def test_what_a_late_attempt_has_written_is_deleted_unless_it_is_what_readers_read(
    discarding: Any, accepted: str | None, late: str | None, left: set[str]
) -> None:
    assert discarding(accepted, late) == left


@pytest.mark.parametrize("late", ["own", "a"])
def test_what_a_late_attempt_has_written_after_all_was_read_is_deleted(
    discarding: Any, late: str
) -> None:
    assert discarding(late, late, released=True) == set()


@pytest.mark.parametrize(
    "name",
    [
        "0/dask-lambda/run/other",
        "own~",
        "own~/",
        "own~/a/b",
        "own/a",
        "../own",
        "",
    ],
)
def test_a_reply_that_names_another_object_is_refused(connect: Connect, name: str) -> None:
    scheduler = connect()
    engine = scheduler._engine(scheduler._settings({}))
    graph = normalise({"y": Task("y", copy, 1)}, ["y"])
    run = engine.start(Plan((), frozenset(), (), frozenset(), graph), inline_bytes=0)
    assert run.events.get(timeout=60) == RunSucceeded()
    name = name.replace("own", run.object_name(protocol.key_label("y")))
    group = Group(("y",), (), ("y",))
    with pytest.raises(IntegrityError, match="'y'.*no version of"):
        told_outputs(run, group, [Value(name, 10).to_json()])
    assert told_outputs(run, group, [Value(run.object_name("y"), 10).to_json()])


def test_a_reply_that_cannot_be_read_is_refused(connect: Connect) -> None:
    engine = (scheduler := connect())._engine(scheduler._settings({}))
    graph = normalise({"y": Task("y", copy, 1)}, ["y"])
    run = engine.start(Plan((), frozenset(), (), frozenset(), graph), inline_bytes=0)
    assert run.events.get(timeout=60) == RunSucceeded()
    group = Group(("y",), (), ("y",))
    for records in ([], [{"name": run.object_name("y"), "size": 3, "data": "a"}]):
        with pytest.raises(IntegrityError, match="a reply .*it was not used"):
            told_outputs(run, group, records)


def test_a_reply_that_mixes_two_attempts_at_an_entangled_group_is_refused(connect: Connect) -> None:
    scheduler = connect()
    engine = scheduler._engine(scheduler._settings({}))
    graph = normalise({"y": Task("y", uuid.uuid4), "z": Task("z", copy, TaskRef("y"))}, ["y", "z"])
    run = engine.start(Plan((), frozenset(), (), frozenset(), graph), inline_bytes=0)
    assert run.events.get(timeout=60) == RunSucceeded()
    group = Group(("y", "z"), (), ("y", "z"))
    records = [Value(protocol.attempt_name(run.object_name(key)), 10).to_json() for key in "yz"]
    with pytest.raises(IntegrityError, match="several attempts at task 'z'"):
        told_outputs(run, group, records)
