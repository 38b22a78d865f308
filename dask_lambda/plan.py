"""What one invocation runs.  Pure: no I/O, no clock.  May import: graph, errors, dask.order.

A :class:`Group` is what one invocation runs as a whole: some tasks in their order, with the
outputs that are committed at the end.  Today a group is one task ("one node, one invocation");
the state machine and the wire format take groups of any number of tasks and outputs.  What only
puts finished blocks together (``finalize`` of arrays and bags, the last concatenation of
dataframes) is left to the client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from dask.order import order

from dask_lambda.errors import CyclicGraphError
from dask_lambda.graph import Graph, is_finaliser
from lambda_worker.protocol import Key

PlanMode = Literal["none"]


@dataclass(frozen=True, slots=True)
class Group:
    """What one invocation runs.

    Attributes
    ----------
    tasks : tuple of key
        In the order of execution.
    inputs : tuple of key
        Outputs of other groups that its tasks read.
    outputs : tuple of key
        Results to commit.
    priority : int
        Smaller is sooner, among the groups of a run that are ready.
    retries : int
        How often to try again after the tasks' own failures: an exception, a time-out, no
        memory left.
    kind : str
        Groups of one kind do the same to blocks of about the same size, and so take about the
        same time.
    seconds : float, optional
        How long that is expected to be, inside the tasks; None if nobody knows.
    """

    tasks: tuple[Key, ...]
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    priority: int = 0
    retries: int = 0
    kind: str = ""
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How a graph is run.

    Attributes
    ----------
    groups : tuple of Group
        In the order of their priority.
    keep : frozenset of key
        Outputs of groups that outlive their readers: what the client needs.
    client : tuple of key
        Tasks that the client runs at the end, in this order.
    fetch : frozenset of key
        Resolved keys whose values the client needs, for the caller or for its own tasks.
    """

    groups: tuple[Group, ...]
    keep: frozenset[Key]
    client: tuple[Key, ...]
    fetch: frozenset[Key]


def make_plan(
    graph: Graph,
    *,
    mode: PlanMode = "none",
    finalise: bool = True,
    retries: Callable[[Key], int] | int = 0,
) -> Plan:
    """Decide what each invocation runs, and what the client runs itself.

    Parameters
    ----------
    graph : Graph
    mode : {"none"}
        How tasks are grouped: "none" gives each its own invocation.
    finalise : bool
        Whether finalisers may run on the client; False when results are to stay in S3.
    retries : callable or int
        Retries of each task.

    Raises
    ------
    CyclicGraphError
        If the graph has a cycle.
    """
    dependencies = {key: graph.dependencies(key) for key in graph.tasks}
    priorities = _priorities(graph)
    outputs = {graph.resolve(key) for key in graph.outputs}
    client = _client_tasks(graph, dependencies, outputs) if finalise else set()
    fetch = outputs - client
    for key in client:
        fetch |= dependencies[key] - client
    # Objects are named after the repr of their key: of keys that are equal but not alike, such as
    # ("x", 0) and ("x", np.int64(0)), the one that the groups use.
    own = {key: key for nodes in (graph.tasks, graph.stored) for key in nodes if key in fetch}
    fetch = {own.get(key, key) for key in fetch}
    of_task = retries if callable(retries) else lambda _: retries
    tasks = graph.tasks
    groups = tuple(
        Group(
            tasks=(key,),
            inputs=tuple(d for d in dependencies[key] if d in tasks),
            outputs=(key,),
            priority=priorities[key],
            retries=of_task(key),
        )
        for key in sorted(tasks, key=priorities.__getitem__)
        if key not in client
    )
    return Plan(
        groups=groups,
        keep=frozenset(key for key in fetch if key in tasks),
        client=tuple(sorted(client, key=priorities.__getitem__)),
        fetch=frozenset(fetch),
    )


def _priorities(graph: Graph) -> Mapping[Key, int]:
    # The whole graph and not its tasks alone: order() follows the nodes' own dependencies, and
    # would not see through an alias that is not there.
    try:
        priorities: Mapping[Key, int] = order(graph.source)  # type: ignore[assignment,arg-type]
    except RuntimeError as error:  # "Cycle detected in Dask: ..."
        raise CyclicGraphError(str(error)) from error
    return priorities


def _client_tasks(
    graph: Graph, dependencies: Mapping[Key, set[Key]], outputs: set[Key]
) -> set[Key]:
    """Find the requested tasks that only put blocks together and that nothing else reads."""
    candidates = {key for key in outputs if key in graph.tasks and is_finaliser(graph.tasks[key])}
    if candidates:
        for reads in dependencies.values():
            candidates -= reads
    return candidates
