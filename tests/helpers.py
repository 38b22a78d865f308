"""What several test modules use."""

from __future__ import annotations

import importlib
import pickle
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import cloudpickle
from dask._task_spec import Alias
from dask.base import collections_to_expr

from dask_lambda import RunReport, last_report
from dask_lambda.graph import Graph, materialise, normalise
from dask_lambda.kernels import kernel_of
from dask_lambda.plan import Group, Plan
from lambda_worker.execute import GroupRun
from lambda_worker.protocol import Body


def report() -> RunReport:
    """The report of the last run, which there was."""
    found = last_report()
    assert found is not None
    return found


def shown(value: object) -> str:
    """What ``str`` gives, without addresses: a test has the same name in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def notes(error: BaseException) -> str:
    """The notes of an exception, which hold the remote traceback."""
    return "\n".join(getattr(error, "__notes__", []))


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    """Whether a condition becomes true within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def check_plan(graph: Graph, plan: Plan, *, known: bool = True) -> None:
    """Check what every plan of a graph must keep, however its tasks are grouped.

    ``graph`` is what was planned; ``plan.graph`` may hold tasks of the planner's own besides.
    Only functions that are ``known`` may be run twice.
    """
    tasks, resolve = plan.graph.tasks, plan.graph.resolve
    homes: dict[Any, list[int]] = defaultdict(list)
    makers: dict[Any, int] = {}
    for place, group in enumerate(plan.groups):
        assert group.tasks
        assert group.outputs, "a group of which nobody needs anything"
        for names in (group.tasks, group.inputs, group.outputs):
            assert len(set(names)) == len(names)
        assert set(group.outputs) <= set(group.tasks)
        for key in group.tasks:
            homes[key].append(place)
        for key in group.outputs:
            assert key not in makers, f"{key} is an output of two groups"
            makers[key] = place
    # Every task runs, and those that run more than once may do so.
    assert set(homes) == set(tasks) - set(plan.client)
    assert set(graph.tasks) <= set(tasks)
    requested = {resolve(key) for key in graph.outputs}
    for key, places in homes.items():
        if len(places) > 1:
            assert kernel_of(tasks[key]).known or not known, (
                f"{key} is run twice and may be anybody's function"
            )
            assert key in plan.repeated
            assert key in plan.keep or key not in makers, f"{key} is stored and made anew"
    # What is needed in the end is made and kept.
    assert plan.keep <= makers.keys()
    assert plan.fetch - plan.graph.literals.keys() - plan.graph.stored.keys() == plan.keep
    at_hand = set(plan.fetch)
    for key in plan.client:
        assert {resolve(d) for d in tasks[key].dependencies} <= at_hand
        at_hand.add(key)
    assert requested <= at_hand
    # A group reads what is there: data, its inputs, and its own tasks before.
    data = plan.graph.literals.keys() | plan.graph.stored.keys()
    for group in plan.groups:
        there, used = set(group.inputs), set()
        for key in group.tasks:
            reads = {resolve(d) for d in tasks[key].dependencies}
            assert reads <= there | data, f"{key} runs before what it reads"
            used |= reads
            there.add(key)
        assert set(group.inputs) <= used, "an input that nobody reads"
        assert not set(group.inputs) & set(group.tasks)
    # Each output has a reader elsewhere or is wanted, and no two groups wait for each other.
    read_by = defaultdict(set)
    for place, group in enumerate(plan.groups):
        for key in group.inputs:
            read_by[key].add(place)
            assert makers[key] != place
    for key in makers:
        assert key in plan.keep or read_by[key], f"{key} is stored for nobody"
    sorter = TopologicalSorter(
        {place: {makers[key] for key in group.inputs} for place, group in enumerate(plan.groups)}
    )
    assert len(tuple(sorter.static_order())) == len(plan.groups)
    # What has to come first has the smaller priority.
    priorities = [group.priority for group in plan.groups]
    assert priorities == sorted(set(priorities))


def run_plan(plan: Plan) -> dict[Any, Any]:
    """Run a plan in this process as the workers would; the values of the requested keys.

    Each group's tasks are pickled, and see only what the group is given.
    """
    graph = plan.graph
    values: dict[Any, Any] = dict(graph.literals)
    waiting = list(plan.groups)
    while waiting:
        group = next(g for g in waiting if values.keys() >= set(g.inputs))
        waiting.remove(group)
        values.update(run_group(graph, group, values))
    for key in plan.client:
        task = graph.tasks[key]
        values[key] = task({d: values[graph.resolve(d)] for d in task.dependencies})
    return {key: values[graph.resolve(key)] for key in graph.outputs}


def run_group(graph: Graph, group: Group, values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Run one group on given values; its outputs."""
    inside = set(group.tasks)
    tasks: list[Any] = []
    inputs: dict[Any, Any] = {}
    for key in group.tasks:
        for name in graph.tasks[key].dependencies:
            target = graph.resolve(name)
            if target not in inside:
                inputs[name] = values[target]
            elif name != target:
                tasks.append(Alias(name, target))
        tasks.append(graph.tasks[key])
    sealed = cloudpickle.dumps((tasks, inputs))
    tasks, inputs = pickle.loads(sealed)
    body = Body(tasks, list(inputs), list(range(len(inputs))), list(group.outputs))
    run = GroupRun(body, lambda name, reader: inputs[name])
    return {group.outputs[output.place]: output.value for output in run.outputs()}


def graph_of(collection: Any) -> Graph:
    """The graph with which a scheduler is called for a collection."""
    expression = collections_to_expr([collection], True).optimize()
    return normalise(materialise(expression), expression.__dask_keys__())


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files, by their paths relative to a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def forget_modules(*folders: Path) -> None:
    """Have Python import anew what it imported from below some folders."""
    below = tuple(str(folder) for folder in folders)
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        places = [file] if file else list(getattr(module, "__path__", ()))
        if any(str(place).startswith(below) for place in places):
            found.append(name)
    for name in found:
        del sys.modules[name]
    importlib.invalidate_caches()
