"""Which tasks run together: what every plan keeps, and what the planner is there for."""

from __future__ import annotations

import itertools
import operator
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, List, Task, TaskRef
from dask.array.core import Array
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_lambda.cost_model import CostModel
from dask_lambda.estimates import Estimates, guess
from dask_lambda.graph import Graph, materialise, normalise
from dask_lambda.kernels import Speed
from dask_lambda.plan import Group, Plan, make_plan, topological
from dask_lambda.splitting import split
from tests.helpers import check_plan, graph_of, run_plan

MB = 2**20


def plan_of(graph: Graph, **kwargs: Any) -> Plan:
    """The plan of a graph, checked."""
    plan = make_plan(graph, mode="auto", **kwargs)
    check_plan(graph, plan)
    return plan


def combine(*args: Any) -> Any:
    return ("combined", *args)


def two(*args: Any) -> Any:
    return ("first", *args), ("second", *args)


# -- whatever the graph and the estimates are ----------------------------------------------------


@st.composite
def graphs(draw: Any) -> tuple[dict[Any, Any], list[Any]]:
    """Graphs of layers of blocks, as arrays are, with views, items, data and unknown functions."""
    dsk: dict[Any, Any] = {}
    layers = draw(st.integers(1, 5))
    for layer in range(layers):
        rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        what = draw(
            st.sampled_from(["known", "known", "sum", "mixed", "view", "item", "make", "data"])
        )
        for row, column in itertools.product(range(rows), range(columns)):
            key = (f"layer-{layer}", row, column)
            earlier = st.sampled_from(list(dsk)) if dsk else st.nothing()
            reads = draw(st.lists(earlier, max_size=4, unique=True)) if dsk else []
            match what:
                case "known" if reads:
                    listed = List(*map(TaskRef, reads))
                    dsk[key] = Task(key, operator.is_, TaskRef(reads[0]), listed)
                case "sum" if len(reads) > 1:
                    dsk[key] = Task(key, _identity, List(*map(TaskRef, reads)))
                case "view" if reads:
                    dsk[key] = Task(key, operator.not_, TaskRef(reads[0]))
                case "item" if reads:
                    maker = ("two", *key)
                    dsk[maker] = Task(maker, two, *map(TaskRef, reads))
                    dsk[key] = Task(key, operator.getitem, TaskRef(maker), 1)
                case "make":
                    dsk[key] = Task(key, operator.truth, row + column)
                case "data":
                    dsk[key] = DataNode(key, ("data", row, column))
                case _:
                    dsk[key] = Task(key, combine, *map(TaskRef, reads))
        if draw(st.integers(0, 3)) == 0:
            target = draw(st.sampled_from(list(dsk)))
            dsk[f"alias-{layer}"] = Alias(f"alias-{layer}", target)
    names = st.sampled_from(list(dsk))
    wanted = draw(st.lists(names, min_size=1, max_size=5))
    if draw(st.booleans()):
        dsk["list"] = List(*map(TaskRef, wanted))
        wanted = ["list"]
    return dsk, wanted


def _identity(values: list[Any]) -> list[Any]:
    return values


@st.composite
def estimates_of(draw: Any, graph: Graph) -> Estimates:
    sizes = st.sampled_from([0, 100, 10_000, 10**6, 10**8, 2 * 10**9])
    times = st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 3.0, 100.0])
    nodes = [*graph.tasks, *graph.literals, *graph.stored]
    alike = draw(st.booleans())  # within a layer, as blocks mostly are
    seconds: dict[Any, float] = {}
    nbytes: dict[Any, int] = {}
    for key in nodes:
        layer = key[0] if alike and isinstance(key, tuple) else key
        if layer not in nbytes:
            nbytes[layer], seconds[layer] = draw(sizes), draw(times)
        nbytes[key], seconds[key] = nbytes[layer], seconds[layer]
    return Estimates(seconds, nbytes)


models = st.builds(
    CostModel,
    window=st.sampled_from([1, 2, 6, 1000]),
    memory_bytes=st.sampled_from([128 * MB, 1769 * MB, 10240 * MB]),
    inline_bytes=st.sampled_from([0, 65_536, 4_000_000]),
    group_seconds=st.sampled_from([1.0, 300.0]),
    fold_seconds=st.sampled_from([0.0, 1.0]),
    fold_bytes=st.sampled_from([0, 16 * 1024]),
    waiting_usd=st.sampled_from([1e-6, 0.01]),
)


def with_some_split(plan: Plan, which: Iterable[int]) -> Plan:
    """The same plan after some of its groups were too large."""
    groups: list[Group] = []
    for place, group in enumerate(plan.groups):
        parts = split(plan.graph, plan.repeated, group) if place in which else []
        assert parts == [] or len(parts) == 2
        assert sorted(map(repr, group.outputs)) == sorted(
            repr(key) for part in parts or [group] for key in part.outputs if key in group.outputs
        )
        groups += parts or [group]
    return replace(plan, groups=tuple(replace(g, priority=i) for i, g in enumerate(groups)))


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_every_plan_of_any_graph_can_be_run_and_means_what_the_graph_means(data: Any) -> None:
    dsk, wanted = data.draw(graphs())
    graph = normalise(materialise(dsk), wanted)
    retries = data.draw(st.sampled_from([0, 2, lambda key: hash(repr(key)[-3]) % 2]))
    memory = data.draw(st.sampled_from([None, None, lambda key: 10 * ("0)" in repr(key))]))
    plan = plan_of(
        graph,
        finalise=data.draw(st.booleans()),
        retries=retries,
        estimates=data.draw(estimates_of(graph)),
        model=data.draw(models),
        memory=memory,
    )
    for group in plan.groups:
        of_each = {retries(key) if callable(retries) else retries for key in group.tasks}
        assert of_each == {group.retries}
        if memory is not None:
            needed = [memory(key) for key in group.tasks]
            assert not any(needed) or len(needed) == 1, "what needs memory runs alone"
            assert group.memory == max(needed)
    expected = dict(zip(wanted, dask.get(dict(dsk), wanted), strict=True))
    assert run_plan(plan) == expected
    # What is too large is split, whichever groups are and however often.
    while data.draw(st.booleans()) and any(len(group.tasks) > 1 for group in plan.groups):
        which = data.draw(st.sets(st.sampled_from(range(len(plan.groups))), min_size=1))
        plan = with_some_split(plan, which)
        check_plan(graph, plan)
        assert run_plan(plan) == expected


# -- what the planner is there for ---------------------------------------------------------------


def blocks(name: str, rows: int, columns: int | None = None, size: int = 512) -> Array:
    """An array of large blocks that take no memory, as data of the graph."""
    columns = rows if columns is None else columns
    block = np.broadcast_to(np.float64(1), (size, size))
    dsk = {(name, i, j): block for i in range(rows) for j in range(columns)}
    return Array(dsk, name, ((size,) * rows, (size,) * columns), dtype="f8")


def outputs(plan: Plan) -> list[Any]:
    return [key for group in plan.groups for key in group.outputs]


def reads(plan: Plan) -> int:
    """How many values are handed to groups, data and inputs."""
    graph = plan.graph
    found = [
        {d for key in group.tasks for d in graph.dependencies(key)} - set(group.tasks)
        for group in plan.groups
    ]
    return sum(map(len, found))


def homes(plan: Plan) -> dict[Any, set[int]]:
    found: dict[Any, set[int]] = defaultdict(set)
    for place, group in enumerate(plan.groups):
        for key in group.tasks:
            found[key].add(place)
    return found


@pytest.fixture(scope="module")
def product() -> Graph:
    with dask.config.set({"array.chunk-size": "1 GiB"}):
        return graph_of(blocks("a", 16) @ blocks("b", 16))


@pytest.mark.filterwarnings("ignore:Increasing number of chunks")
def test_a_product_of_16_x_16_tiles_writes_its_256_blocks_and_nothing_else(product: Graph) -> None:
    for window in (6, 64, 1000):
        plan = plan_of(product, model=CostModel(window=window))
        assert sorted(outputs(plan)) == sorted(product.resolve(key) for key in product.outputs)
        assert len(outputs(plan)) == 256


def test_with_few_invocations_at_a_time_a_product_reads_each_panel_less_often(
    product: Graph,
) -> None:
    plan = plan_of(product, model=CostModel(window=64))
    assert len(plan.groups) <= 64
    assert reads(plan) <= 4096
    assert reads(plan_of(product, model=CostModel(window=1000))) <= 2 * 4096


@pytest.mark.parametrize("window", [6, 1000])
def test_a_cholesky_decomposition_of_16_x_16_tiles_reads_and_writes_little(window: int) -> None:
    graph = graph_of(da.linalg.cholesky(blocks("a", 16)))
    plan = plan_of(graph, model=CostModel(window=window))
    assert len(plan.groups) <= 376
    assert len(outputs(plan)) <= 376
    assert reads(plan) <= 1735


def test_a_tree_of_a_thousand_additions_is_a_few_dozen_groups() -> None:
    level = [f"leaf-{i}" for i in range(1024)]
    dsk: dict[Any, Any] = {key: DataNode(key, i) for i, key in enumerate(level)}
    depth = 0
    while len(level) > 1:
        names = [f"sum{depth}-{i}" for i in range(len(level) // 2)]
        for i, name in enumerate(names):
            left, right = level[2 * i : 2 * i + 2]
            dsk[name] = Task(name, operator.add, TaskRef(left), TaskRef(right))
        level, depth = names, depth + 1
    plan = plan_of(normalise(dsk, level[0]))
    assert len(plan.groups) <= 70
    assert outputs(plan)[-1] == level[0]


def chain(length: int, function: Callable[..., Any] = operator.neg) -> dict[Any, Any]:
    dsk: dict[Any, Any] = {("step-0", 0): DataNode(("step-0", 0), 1)}
    for i in range(1, length + 1):
        dsk[f"step-{i}", 0] = Task((f"step-{i}", 0), function, TaskRef((f"step-{i - 1}", 0)))
    return dsk


@pytest.mark.parametrize("function", [operator.neg, combine])
def test_a_chain_is_one_group_whatever_its_functions_are(function: Callable[..., Any]) -> None:
    plan = plan_of(normalise(chain(8, function), ("step-8", 0)))
    assert [len(group.tasks) for group in plan.groups] == [8]


def test_tasks_of_unknown_functions_side_by_side_are_not_put_in_series() -> None:
    dsk: dict[Any, Any] = {f"work-{i}": Task(f"work-{i}", combine, i) for i in range(8)}
    dsk["end"] = Task("end", combine, *map(TaskRef, list(dsk)))
    plan = plan_of(normalise(dsk, "end"))
    together = Counter(key[:4] for group in plan.groups for key in group.tasks if key != "end")
    assert together["work"] == 8
    for group in plan.groups:
        assert sum(key.startswith("work") for key in group.tasks) <= 1


def test_short_tasks_side_by_side_are_put_in_series_if_somebody_says_that_they_are_short() -> None:
    dsk: dict[Any, Any] = {f"work-{i}": Task(f"work-{i}", combine, i) for i in range(8)}
    dsk["end"] = Task("end", combine, *map(TaskRef, list(dsk)))
    graph = normalise(dsk, "end")
    estimates = guess(graph, topological(graph, set()), Speed())
    told = replace(estimates, seconds=dict.fromkeys(estimates.seconds, 1e-3), unknown=frozenset())
    plan = plan_of(graph, estimates=told)
    assert len(plan.groups) == 1
    assert plan.groups[0].seconds is not None


def test_the_seconds_of_a_group_with_an_unknown_task_are_not_known() -> None:
    dsk = {"a": Task("a", combine, 1), "b": Task("b", operator.neg, TaskRef("a"))}
    (group,) = plan_of(normalise(dsk, "b")).groups
    assert group.seconds is None


def test_the_items_of_a_tuple_join_the_task_that_makes_it() -> None:
    dsk: dict[Any, Any] = {}
    for i in range(4):
        dsk["data", i] = Task(("data", i), combine, i)  # or qr itself would be repeated
        dsk["qr", i] = Task(("qr", i), np.linalg.qr, TaskRef(("data", i)))
        for item in (0, 1):
            key = (f"item{item}", i)
            dsk[key] = Task(key, operator.getitem, TaskRef(("qr", i)), item)
        dsk["use", i] = Task(("use", i), combine, TaskRef(("item0", i)))
    dsk["stack"] = Task("stack", combine, *(TaskRef(("item1", i)) for i in range(4)))
    wanted = ["stack", *(("use", i) for i in range(4))]
    found = homes(plan_of(normalise(dsk, [*wanted, *(("data", i) for i in range(4))])))
    for i in range(4):
        assert found["qr", i] == found["item0", i] == found["item1", i]


def test_no_qr_factor_of_an_array_is_stored_together_with_the_other() -> None:
    plan = plan_of(graph_of(da.linalg.qr(blocks("a", 8, 1))[1]), model=CostModel(window=1000))
    made = {key for key in outputs(plan) if "qr" in str(key[0])}
    assert not any(plan.graph.tasks[key].func is np.linalg.qr for key in made)


def test_random_blocks_are_made_anew_by_each_reader() -> None:
    x = da.random.default_rng(1).random((2000, 2000), chunks=(500, 500))
    plan = plan_of(graph_of(x @ x), model=CostModel(window=6))
    assert plan.repeated
    assert not any("random" in str(key[0]) for key in outputs(plan))
    assert all(not group.inputs for group in plan.groups)


def test_a_requested_block_is_stored_once_though_it_could_be_made_anew() -> None:
    x = da.random.default_rng(1).random((1000, 1000), chunks=(500, 500))
    graph = graph_of(x)
    keys = list(graph.outputs)
    y = Task("y", operator.neg, TaskRef(keys[0]))
    z = Task("z", operator.pos, TaskRef(keys[0]))
    plan = plan_of(normalise({**graph.source, "y": y, "z": z}, [*keys, "y", "z"]))
    assert outputs(plan).count(keys[0]) == 1


def test_functions_of_the_users_are_never_run_twice() -> None:
    for function in (combine, np.vectorize(combine), np.frompyfunc(combine, 1, 1)):
        dsk: dict[Any, Any] = {"a": Task("a", function, 1)}
        dsk |= {f"b-{i}": Task(f"b-{i}", operator.neg, TaskRef("a")) for i in range(5)}
        graph = normalise(dsk, [f"b-{i}" for i in range(5)])
        nothing = dict.fromkeys(graph.tasks, 0.0)
        sizes = dict.fromkeys(graph.tasks, 10**9)  # as much to gain as there may be
        plan = plan_of(graph, estimates=Estimates(nothing, sizes))
        assert len(homes(plan)["a"]) == 1


def test_tasks_with_other_retries_are_in_other_groups() -> None:
    dsk = chain(6)
    plan = plan_of(
        normalise(dsk, ("step-6", 0)), retries=lambda key: 3 if key[0] == "step-3" else 0
    )
    assert [(len(group.tasks), group.retries) for group in plan.groups] == [(2, 0), (1, 3), (3, 0)]


def test_a_task_that_is_said_to_need_memory_stays_alone_and_is_not_repeated() -> None:
    dsk: dict[Any, Any] = {"zeros": Task("zeros", np.zeros, 8)}
    dsk |= {f"use-{i}": Task(f"use-{i}", operator.neg, TaskRef("zeros")) for i in range(3)}
    graph = normalise(dsk, [f"use-{i}" for i in range(3)])
    assert "zeros" in plan_of(graph).repeated
    plan = plan_of(graph, memory=lambda key: 100 if key == "zeros" else 0)
    assert plan.groups[0].tasks == plan.groups[0].outputs == ("zeros",)
    assert not plan.repeated


def test_a_view_is_not_repeated_by_readers_with_other_retries() -> None:
    dsk: dict[Any, Any] = {
        "data": Task("data", combine, 1),
        "view": Task("view", np.transpose, TaskRef("data")),
        "other": Task("other", combine, TaskRef("data")),
        **{f"use-{i}": Task(f"use-{i}", combine, TaskRef("view")) for i in range(3)},
    }
    graph = normalise(dsk, ["other", *(f"use-{i}" for i in range(3))])
    sizes, times = dict.fromkeys(dsk, 100 * MB), dict.fromkeys(dsk, 1e-6)
    estimates = Estimates(times, sizes)
    assert plan_of(graph, estimates=estimates).repeated == {"view"}
    plan = plan_of(graph, estimates=estimates, retries=lambda key: int(key == "use-1"))
    assert not plan.repeated


def held(plan: Plan, group: Group, nbytes: dict[Any, int]) -> int:
    """The most that a group holds: what was made and is still needed, and what a task reads."""
    last = {d: key for key in group.tasks for d in plan.graph.dependencies(key)}
    there: set[Any] = set()
    most = 0
    for key in group.tasks:
        there |= plan.graph.dependencies(key) | {key}
        most = max(most, sum(nbytes[k] for k in there))
        there = {k for k in there if last.get(k) not in (None, key)}
    return most


@pytest.mark.parametrize("fan", [2, 3, 10])
def test_blocks_that_are_put_together_are_not_made_where_they_do_not_fit(fan: int) -> None:
    dsk: dict[Any, Any] = {}
    for i in range(fan):
        dsk["data", i] = DataNode(("data", i), i)
        dsk["part", i] = Task(("part", i), operator.neg, TaskRef(("data", i)))
    parts = [TaskRef(("part", i)) for i in range(fan)]
    dsk["whole"] = Task("whole", np.concatenate, List(*parts))
    dsk["end"] = Task("end", np.sum, TaskRef("whole"))
    graph = normalise(dsk, "end")
    nbytes = dict.fromkeys([*graph.tasks, *graph.literals], 100 * MB)
    nbytes["whole"], nbytes["end"] = fan * 100 * MB, 8
    estimates = Estimates(dict.fromkeys(graph.tasks, 1e-3), nbytes)
    for memory in (512, 1024, 2048, 10240):
        model = CostModel(memory_bytes=memory * MB)
        plan = plan_of(graph, estimates=estimates, model=model)
        # A task that does not fit by itself may have others with it that do not need more.
        alone = max(held(plan, Group((key,), (), (key,)), nbytes) for key in graph.tasks)
        for group in plan.groups:
            assert held(plan, group, nbytes) <= max(model.room, alone)
    assert len(plan.groups) == 1  # there is room for it at last


def test_the_terms_of_a_sum_run_together_though_not_all_of_them_would_fit() -> None:
    graph = graph_of(blocks("a", 1, 16) @ blocks("b", 16, 1))
    model = CostModel(memory_bytes=50 * MB, window=1)
    block = 8 * 512**2
    assert model.room < 16 * block
    assert len(plan_of(graph, model=model).groups) == 1


def test_no_group_is_planned_to_take_longer_than_the_bound() -> None:
    graph = normalise(chain(20), ("step-20", 0))
    estimates = Estimates(dict.fromkeys(graph.tasks, 1.0), dict.fromkeys(graph.source, 10))
    plan = plan_of(graph, estimates=estimates, model=CostModel(group_seconds=5.0))
    assert 4 <= len(plan.groups) < 20
    assert all(group.seconds is not None and group.seconds <= 5.0 for group in plan.groups)


def test_with_plan_none_each_task_is_a_group() -> None:
    graph = normalise(chain(5), ("step-5", 0))
    plan = make_plan(graph, mode="none")
    check_plan(graph, plan)
    assert [len(group.tasks) for group in plan.groups] == [1] * 5


# -- why -----------------------------------------------------------------------------------------


def test_a_plan_says_what_was_merged_and_what_was_not_and_why(product: Graph) -> None:
    text = plan_of(product, model=CostModel(window=64)).describe()
    assert "5,376 tasks in 64 groups (plan: auto)" in text
    assert "4,096 x chunk_sum merged into chunk_sum-partial: path" in text
    assert "blocks of 2 x 2 take" in text
    short = plan_of(product, model=CostModel(group_seconds=0.06)).describe()
    assert "4 x chunk_sum not merged into chunk_sum-partial: it would hold" in short
    assert "and 0.06 s" in short


def test_each_decision_of_a_plan_of_single_tasks_is_left_out() -> None:
    plan = make_plan(normalise(chain(2), ("step-2", 0)))
    assert plan.describe().splitlines()[0] == "2 tasks in 2 groups (plan: none)"
    assert plan.decisions == ()


# -- the same graph is planned in the same way ---------------------------------------------------

SAME = """
import dask.array as da
from tests.test_grouping import blocks, described
from dask_lambda.graph import materialise, normalise
r = da.random.default_rng(7).random((2048, 2048), chunks=512)
q, _ = da.linalg.qr(blocks("t", 6, 1))
for x in (da.linalg.cholesky(blocks("c", 6)), blocks("a", 4) @ r, q, r.rechunk(600).sum(axis=0)):
    # Dask's own optimisation follows the hash seed
    graph = normalise(materialise(x.__dask_graph__()), x.__dask_keys__())
    print(described(graph))
"""


def described(graph: Graph) -> str:
    lines = []
    for window in (2, 1000):
        for group in make_plan(graph, mode="auto", model=CostModel(window=window)).groups:
            lines.append(repr((group.tasks, group.outputs, sorted(map(repr, group.inputs)))))
    return "\n".join(lines)


def test_the_same_graph_is_planned_in_the_same_way_under_any_hash_seed() -> None:
    root = Path(__file__).parents[1]
    found = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SAME],
            check=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
    assert found.pop().count("\n") > 100
