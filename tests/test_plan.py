"""What each invocation runs, and what is left to the client."""

from __future__ import annotations

from operator import add

import dask
import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, List, Task, TaskRef
from dask.local import nested_get
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_lambda.errors import CyclicGraphError
from dask_lambda.graph import Graph, materialise, normalise
from dask_lambda.plan import Plan, make_plan
from lambda_worker.protocol import Reference, load_reference


def inc(x):
    return x + 1


def plan_of(dsk, keys, **kwargs) -> Plan:
    return make_plan(normalise(materialise(dsk), keys), **kwargs)


def outputs(plan: Plan) -> list:
    return [key for group in plan.groups for key in group.outputs]


# -- groups --------------------------------------------------------------------------------------


def test_each_task_is_a_group_that_commits_its_value():
    plan = plan_of({"x": (inc, 1), "y": (inc, "x")}, "y")
    x, y = plan.groups
    assert (x.tasks, x.inputs, x.outputs) == (("x",), (), ("x",))
    assert (y.tasks, y.inputs, y.outputs) == (("y",), ("x",), ("y",))


def test_groups_are_listed_by_priority_and_inputs_come_first():
    dsk = {i: Task(i, inc, TaskRef(i // 2)) for i in range(1, 64)}
    dsk[0] = Task(0, inc, 0)
    plan = plan_of(dsk, list(range(32, 64)))
    priorities = [group.priority for group in plan.groups]
    assert priorities == sorted(set(priorities))
    seen = set()
    for group in plan.groups:
        assert seen.issuperset(group.inputs)
        seen.update(group.outputs)


def test_two_chains_are_run_one_after_the_other_so_that_little_is_held():
    dsk = {"end": (add, "a2", "b2")}
    for chain in "ab":
        dsk |= {
            f"{chain}0": (inc, 0),
            f"{chain}1": (inc, f"{chain}0"),
            f"{chain}2": (inc, f"{chain}1"),
        }
    order = outputs(plan_of(dsk, "end"))
    assert [key[0] for key in order[:6]] in (list("aaabbb"), list("bbbaaa"))


def test_data_and_stored_results_are_no_inputs_from_other_groups():
    stored = Task("s", load_reference, Reference("0/p/run/s", 1))
    (group,) = plan_of({"d": DataNode("d", 1), "s": stored, "y": (add, "d", "s")}, "y").groups
    assert group.inputs == ()


def test_an_input_under_two_names_is_one_input():
    dsk = {"x": (inc, 1), "a": "x", "b": "x", "y": (add, "a", "b")}
    _, y = plan_of(dsk, "y").groups
    assert y.inputs == ("x",)


def test_retries_are_of_each_task():
    dsk = {"x": (inc, 1), "y": (inc, "x")}
    plan = plan_of(dsk, "y", retries=lambda key: 3 if key == "x" else 0)
    assert {group.outputs[0]: group.retries for group in plan.groups} == {"x": 3, "y": 0}
    assert [group.retries for group in plan_of(dsk, "y", retries=2).groups] == [2, 2]


# -- what is kept and fetched --------------------------------------------------------------------


def test_only_what_was_requested_is_kept_and_fetched():
    plan = plan_of({"x": (inc, 1), "y": (inc, "x"), "z": (inc, "y")}, ["x", "z"])
    assert plan.keep == plan.fetch == {"x", "z"}


def test_a_requested_alias_is_fetched_under_the_name_of_its_target():
    plan = plan_of({"x": (inc, 1), "a": "x"}, "a")
    assert plan.keep == plan.fetch == {"x"}


def test_requested_data_is_fetched_from_the_graph_and_no_group_keeps_it():
    plan = plan_of({"x": 5, "y": "x"}, ["x", "y"])
    assert plan.groups == ()
    assert plan.keep == set()
    assert plan.fetch == {"x"}


def test_a_key_that_is_asked_for_in_another_spelling_is_fetched_under_the_graphs_own():
    dsk = {("x", 0): (inc, 1), "y": (inc, ("x", 0))}
    plan = plan_of(dsk, [("x", np.int64(0)), "y"])
    assert {repr(key) for key in plan.fetch} == {repr(key) for key in outputs(plan)}


def test_an_empty_graph_is_an_empty_plan():
    plan = plan_of({}, [])
    assert plan == Plan((), frozenset(), (), frozenset(), plan.graph)


# -- finalisers ----------------------------------------------------------------------------------


def test_a_requested_list_is_put_together_by_the_client():
    plan = plan_of({"x": (inc, 1), "y": (inc, 2), "l": ["x", "y", 7]}, "l")
    assert plan.client == ("l",)
    assert sorted(outputs(plan)) == ["x", "y"]
    assert plan.keep == plan.fetch == {"x", "y"}


def test_a_list_that_another_task_reads_is_put_together_on_lambda():
    plan = plan_of({"x": (inc, 1), "l": ["x", 7], "s": (sum, "l")}, ["l", "s"])
    assert plan.client == ()
    assert sorted(outputs(plan)) == ["l", "s", "x"]


def test_a_list_that_another_task_reads_through_an_alias_is_put_together_on_lambda():
    plan = plan_of({"x": (inc, 1), "l": ["x", 7], "a": "l", "s": (sum, "a")}, ["l", "s"])
    assert plan.client == ()


def test_a_list_that_was_not_requested_is_put_together_on_lambda():
    plan = plan_of({"x": (inc, 1), "l": ["x", 7], "s": (sum, "l")}, "s")
    assert plan.client == ()


def test_a_requested_list_of_tasks_runs_them_on_lambda():
    plan = plan_of({"l": [(inc, 1), (inc, 2)]}, "l")
    assert plan.client == ()
    assert outputs(plan) == ["l"]


def test_results_that_stay_in_s3_are_put_together_on_lambda():
    plan = plan_of({"x": (inc, 1), "l": ["x", 7]}, "l", finalise=False)
    assert plan.client == ()
    assert plan.fetch == {"l"}


def test_the_client_fetches_stored_results_that_its_own_tasks_read():
    stored = Task("s", load_reference, Reference("0/p/run/s", 1))
    plan = plan_of({"s": stored, "l": List(TaskRef("s"), 1)}, "l")
    assert plan.client == ("l",)
    assert plan.fetch == {"s"}
    assert plan.keep == set()


# -- cycles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dsk",
    [
        pytest.param({"x": (inc, "x")}, id="itself"),
        pytest.param({"x": (inc, "y"), "y": (inc, "x")}, id="two"),
        pytest.param({"x": (inc, "y"), "y": (inc, "z"), "z": (inc, "y")}, id="behind"),
        pytest.param({"x": Alias("x", "y"), "y": Task("y", inc, TaskRef("x"))}, id="alias"),
        pytest.param(
            {
                "x": (add, "y", "ok"),
                "ok": (inc, 1),
                "a": Alias("a", "y"),
                "y": Task("y", inc, TaskRef("z")),
                "z": Task("z", inc, TaskRef("a")),
            },
            id="behind an alias",
        ),
    ],
)
def test_a_cycle_is_refused_before_anything_runs(dsk):
    with pytest.raises(CyclicGraphError, match=r"[Cc]ycle"):
        plan_of(dsk, "x")


def test_a_cycle_that_nobody_needs_does_not_matter():
    dsk = {"x": (inc, 1), "y": (inc, "z"), "z": (inc, "y")}
    assert outputs(plan_of(dsk, "x")) == ["x"]


# -- the plan means what the graph means ---------------------------------------------------------


def execute(graph: Graph, plan: Plan) -> dict:
    """Run a plan with plain Python, group by group, seeing only what an invocation sees."""
    values = dict(graph.literals)
    there = set()
    for group in plan.groups:
        assert there.issuperset(group.inputs)
        inner = {k: values[k] for k in group.inputs} | dict(graph.literals)
        for key in group.tasks:
            task = graph.tasks[key]
            inner[key] = task({d: inner[graph.resolve(d)] for d in task.dependencies})
        for key in group.outputs:
            assert key not in there, "a value is made once"
            there.add(key)
            values[key] = inner[key]
    assert plan.keep <= there
    at_hand = {key: values[key] for key in plan.fetch}
    for key in plan.client:
        task = graph.tasks[key]
        at_hand[key] = task({d: at_hand[graph.resolve(d)] for d in task.dependencies})
    return {key: at_hand[graph.resolve(key)] for key in graph.outputs}


def combine(*args):
    return ("combined", *args)


@st.composite
def graphs(draw):
    """Random graphs of legacy tuples, task specifications, lists, aliases and data."""
    dsk = {}
    for i in range(draw(st.integers(1, 14))):
        key = draw(st.sampled_from([f"k{i}", ("k", i), i]))
        some = draw(st.lists(st.sampled_from(list(dsk)), max_size=4)) if dsk else []
        match draw(st.sampled_from(["legacy", "task", "list", "nested", "alias", "data", "dict"])):
            case "legacy":
                dsk[key] = (combine, *some, 1.5)
            case "task":
                dsk[key] = Task(key, combine, *map(TaskRef, some))
            case "list":
                dsk[key] = List(*map(TaskRef, some), "text")
            case "nested":
                dsk[key] = (combine, [[*some], (combine, *some)])
            case "dict":
                dsk[key] = Task(key, combine, List(*map(TaskRef, some)))
            case "alias" if some:
                dsk[key] = Alias(key, some[0])
            case _:
                dsk[key] = DataNode(key, ("data", i))
    names = st.sampled_from(list(dsk))
    keys = draw(st.one_of(names, st.lists(st.one_of(names, st.lists(names)), max_size=4)))
    return dsk, keys


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(graphs(), st.booleans())
def test_running_the_plan_gives_what_dask_gives(drawn, finalise):
    dsk, keys = drawn
    graph = normalise(materialise(dsk), keys)
    values = execute(graph, make_plan(graph, finalise=finalise))
    assert nested_get(keys, values) == dask.get(dsk, keys)
