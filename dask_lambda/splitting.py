"""What to do with a group that was too large for an execution environment.  Pure.

May import: plan, graph, the ground.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dask_lambda.graph import Graph
from dask_lambda.plan import Group, kind_of
from lambda_worker.protocol import Key


def split(graph: Graph, repeated: frozenset[Key], group: Group) -> list[Group]:
    """Replace a group that was too large by two that do the same; nothing if it is one task.

    Groups with several outputs that share no task are divided by outputs, which also takes less
    memory; others are cut in two, where the least is passed on from the first to the second.

    Parameters
    ----------
    graph : Graph
    repeated : frozenset of key
        Tasks that each group runs for itself: both parts may, and neither passes them on.
    group : Group
    """
    outputs = group.outputs
    tasks = [key for key in group.tasks if key in outputs or key not in repeated]
    if len(tasks) < 2:
        return []
    reads = {key: _seen_through(graph, repeated, key) for key in tasks}
    if len(outputs) > 1:
        half = len(outputs) // 2
        halves = (outputs[:half], outputs[half:])
        parts = [_needed(reads, found) for found in halves]
        if not set(parts[0]) & set(parts[1]):
            return [
                _part(graph, repeated, group, part, found)
                for part, found in zip(parts, halves, strict=True)
            ]
    readers: dict[Key, int] = {}
    for place, key in enumerate(tasks):
        for d in reads[key]:
            readers[d] = place
    first = max(1, len(tasks) // 4)
    cuts = range(first, len(tasks) - first + 1) if len(tasks) > 2 else (1,)
    passed = {
        cut: [key for key in tasks[:cut] if readers.get(key, -1) >= cut and key not in outputs]
        for cut in cuts
    }
    cut = min(cuts, key=lambda cut: (len(passed[cut]), abs(2 * cut - len(tasks))))
    before = set(tasks[:cut])
    written = [*passed[cut], *(key for key in outputs if key in before)]
    rest = [key for key in outputs if key not in before]
    return [
        _part(graph, repeated, group, tasks[:cut], written),
        _part(graph, repeated, group, tasks[cut:], rest),
    ]


def _needed(reads: Mapping[Key, set[Key]], outputs: Sequence[Key]) -> list[Key]:
    """Return those of some tasks, in their order, that the outputs need."""
    wanted = set(outputs)
    for key in reversed(list(reads)):
        if key in wanted:
            wanted |= reads[key]
    return [key for key in reads if key in wanted]


def _seen_through(graph: Graph, repeated: frozenset[Key], key: Key) -> set[Key]:
    """Return what a task reads, itself or by way of tasks that are run again for it."""
    reads: set[Key] = set()
    stack = [key]
    while stack:
        for d in graph.dependencies(stack.pop()):
            if d not in reads:
                reads.add(d)
                if d in repeated:
                    stack.append(d)
    return reads


def _part(
    graph: Graph,
    repeated: frozenset[Key],
    group: Group,
    tasks: Sequence[Key],
    outputs: Sequence[Key],
) -> Group:
    """Return a group with some of a group's tasks, and the repeated ones that they need."""
    inside = set(tasks)
    for key in reversed(group.tasks):  # what is repeated comes before its readers
        if key in inside:
            inside |= graph.dependencies(key) & repeated
    chosen = [key for key in group.tasks if key in inside]
    made = set(group.tasks).union(group.inputs)
    reads = dict.fromkeys(d for key in chosen for d in graph.dependencies(key))
    return replace(
        group,
        tasks=tuple(chosen),
        inputs=tuple(d for d in reads if d in made and d not in inside),
        outputs=tuple(outputs),
        kind=kind_of(chosen, outputs),
        seconds=None,
    )
