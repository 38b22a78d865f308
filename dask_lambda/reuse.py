"""Which results of earlier sessions stand for tasks of a graph.  Pure.

May import: splitting, entangled, plan, graph, kernels, the ground.

A task need not run if its result is there, or if nothing that runs reads it.  Results are found by
fingerprint (:mod:`dask_lambda.fingerprint`), so they are results of the same task; but a task may
make something else each time it runs.  Two rules keep all readers at one version of it:

* What was made from a version that is gone is not used beside what is made from a new one.  An
  intermediate result is deleted when its last reader is done, so this is so only where somebody
  has removed objects, or where another graph is computed under the same name.
* A group of tasks whose outputs could come from two attempts is not run as a whole
  (:func:`apart`): it is not to be seen from the objects which attempt wrote which of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dask_lambda.entangled import entangled
from dask_lambda.graph import Graph
from dask_lambda.kernels import Catalogue
from dask_lambda.plan import Group, kind_of, topological
from dask_lambda.splitting import split
from lambda_worker.protocol import Key, Reference


@dataclass(frozen=True, slots=True)
class Reuse:
    """What is left to do.

    Attributes
    ----------
    graph : Graph
        With the results that are reused among ``stored``, and without what only they needed.
    reused : dict
        Key to label of those results that something reads, or that were asked for.
    stale : frozenset of str
        Labels of results that are there and must not be used any more.
    skipped : tuple of key
        Tasks that do not run, each after those that it reads.
    """

    graph: Graph
    reused: dict[Key, str]
    stale: frozenset[str]
    skipped: tuple[Key, ...]


def reuse(graph: Graph, labels: Mapping[Key, str], there: Mapping[str, Reference]) -> Reuse:
    """Put results that are there in the place of tasks.

    Parameters
    ----------
    graph : Graph
    labels : dict
        Key to label, for the tasks that have a fingerprint.
    there : dict
        Label to result.
    """
    found = {key: labels[key] for key in graph.tasks if labels.get(key) in there}
    if not found:
        return Reuse(graph, {}, frozenset(), ())
    order = topological(graph, set())
    stale: set[Key] = set()
    while True:
        used, run = _needed(graph, found.keys() - stale)
        fresh = _made_anew(graph, order, run) & found.keys()
        if fresh <= stale:
            break
        stale |= fresh
    tasks = {key: task for key, task in graph.tasks.items() if key in run}
    read = {d for key in run for d in graph.dependencies(key)}
    read |= {graph.resolve(key) for key in graph.outputs}
    return Reuse(
        replace(
            graph,
            tasks=tasks,
            literals={key: value for key, value in graph.literals.items() if key in read},
            stored={
                **{key: value for key, value in graph.stored.items() if key in read},
                **{key: there[found[key]] for key in used},
            },
        ),
        reused={key: found[key] for key in used},
        stale=frozenset(found[key] for key in stale),
        skipped=tuple(key for key in order if key not in run),
    )


def _needed(graph: Graph, found: Iterable[Key]) -> tuple[set[Key], set[Key]]:
    """Return which results are used, and which tasks have to run."""
    available = set(found)
    used, run = set[Key](), set[Key]()
    stack = [graph.resolve(key) for key in graph.outputs]
    while stack:
        key = stack.pop()
        if key in used or key in run or key not in graph.tasks:
            continue
        if key in available:
            used.add(key)
        else:
            run.add(key)
            stack.extend(graph.dependencies(key))
    return used, run


def _made_anew(graph: Graph, order: Sequence[Key], run: set[Key]) -> set[Key]:
    """Return tasks whose results depend on what may come out differently this time."""
    catalogue = Catalogue()
    changed: set[Key] = set()
    for key in order:
        if (
            key in run and not catalogue.kernel(key, graph.tasks[key]).known
        ) or not changed.isdisjoint(graph.dependencies(key)):
            changed.add(key)
    return changed


def all_kept(group: Group, repeated: frozenset[Key]) -> Group:
    """Return a group that commits what each of its tasks makes.

    Parameters
    ----------
    group : Group
    repeated : frozenset of key
        Cheap tasks that each group runs for itself: no group commits them.
    """
    outputs = [key for key in group.tasks if key in group.outputs or key not in repeated]
    return replace(group, outputs=tuple(outputs), kind=kind_of(group.tasks, outputs))


def apart(graph: Graph, repeated: frozenset[Key], groups: Iterable[Group]) -> list[Group]:
    """Split groups until no two outputs of one depend on what may differ from run to run.

    Parameters
    ----------
    graph : Graph
    repeated : frozenset of key
        As for :func:`dask_lambda.splitting.split`.
    groups : iterable of Group
    """
    done: list[Group] = []
    waiting = list(groups)[::-1]
    while waiting:
        group = waiting.pop()
        parts = split(graph, repeated, group) if entangled(graph, group) else []
        if parts:
            waiting.extend(reversed(parts))
        else:
            done.append(group)
    return done
