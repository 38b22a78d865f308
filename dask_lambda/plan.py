"""What one invocation runs.  Pure: no I/O, no clock.

May import: grouping, folding, estimates, kernels, cost_model, graph, errors, dask.order.

A :class:`Group` is what one invocation runs as a whole: some tasks in their order, and the outputs
that it commits.  With ``mode="none"`` a group is one task ("one node, one invocation"); with
"auto" tasks run together where that saves time (:mod:`dask_lambda.grouping`).  What only puts
finished blocks together (``finalize`` of arrays and bags, the last concatenation of dataframes)
is left to the client.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dask.order import order
from dask.utils import key_split

from dask_lambda.cost_model import CostModel
from dask_lambda.errors import CyclicGraphError
from dask_lambda.estimates import Estimates, guess
from dask_lambda.folding import cut_folds
from dask_lambda.graph import Graph, is_finaliser, short
from dask_lambda.grouping import Grouping
from dask_lambda.units import Decision
from lambda_worker.protocol import Key

PlanMode = Literal["auto", "none"]
#: Where a group runs: as an invocation of Lambda's, or on machines of the user's own.
Where = Literal["lambda", "local"]
#: Of groups of one run, which have it of the same form.
Priority = int | tuple[Any, ...]


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
    priority : int or tuple
        Smaller is sooner, among the groups of a run that are ready.
    retries : int
        How often to try again after the tasks' own failures: an exception, a time-out, no
        memory left.
    kind : str
        Groups of one kind do the same to blocks of about the same size, and so take about the
        same time.
    seconds : float, optional
        How long that is expected to be on a worker, with inputs and outputs; None if nobody
        knows.
    memory : int
        Bytes that the user says it needs; 0 if nothing is said.
    timeout : float, optional
        Seconds after which its tasks are interrupted, if that is less than the function allows.
    where : {"lambda", "local"}
    """

    tasks: tuple[Key, ...]
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]
    priority: Priority = 0
    retries: int = 0
    kind: str = ""
    seconds: float | None = None
    memory: int = 0
    timeout: float | None = None
    where: Where = "lambda"

    @property
    def is_local(self) -> bool:
        """Whether it runs outside of Lambda."""
        return self.where == "local"


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
    graph : Graph
        What is run: the graph that was planned, perhaps with some long sums cut
        (:mod:`dask_lambda.folding`).
    repeated : frozenset of key
        Tasks that each group that reads them runs for itself.
    mode : {"auto", "none"}
    decisions : tuple of Decision
        Why tasks run together, or why not.
    """

    groups: tuple[Group, ...]
    keep: frozenset[Key]
    client: tuple[Key, ...]
    fetch: frozenset[Key]
    graph: Graph = field(compare=False, repr=False)
    repeated: frozenset[Key] = frozenset()
    mode: PlanMode = "none"
    decisions: tuple[Decision, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """Say in a few lines what runs together, and why two tasks were merged or not."""
        tasks = sum(len(group.tasks) for group in self.groups)
        lines = [f"{tasks:,} tasks in {len(self.groups):,} groups (plan: {self.mode})"]
        kinds: dict[tuple[str, Where], list[Group]] = {}
        for group in self.groups:
            kinds.setdefault((group.kind, group.where), []).append(group)
        for (kind, where), groups in kinds.items():
            size = sum(len(group.tasks) for group in groups) / len(groups)
            known = [group.seconds for group in groups if group.seconds is not None]
            about = f", {sum(known) / len(known):.3f} s each" if known else ""
            place = ", not on Lambda" if where == "local" else ""
            lines.append(f"  {len(groups):,} x {kind or '?'}: {size:.3g} tasks{about}{place}")
        lines += [f"  {decision}" for decision in self.decisions]
        return "\n".join(lines)


def make_plan(
    graph: Graph,
    *,
    mode: PlanMode = "none",
    finalise: bool = True,
    retries: Callable[[Key], int] | int = 0,
    estimates: Estimates | None = None,
    model: CostModel | None = None,
    memory: Callable[[Key], int] | None = None,
    places: Callable[[Key], Where] | None = None,
    cut: bool = True,
) -> Plan:
    """Decide what each invocation runs, and what the client runs itself.

    Parameters
    ----------
    graph : Graph
    mode : {"auto", "none"}
        How tasks are grouped: "none" gives each its own invocation, "auto" lets those run
        together for which the cost model says that it saves time.
    finalise : bool
        Whether finalisers may run on the client; False when results are to stay in S3.
    retries : callable or int
        Retries of each task.
    estimates : Estimates, optional
        Default: :func:`dask_lambda.estimates.guess`.
    model : CostModel, optional
    memory : callable, optional
        Bytes that tasks are said to need, or 0; those that need any run alone, and tasks with
        different retries never run together.
    places : callable, optional
        Where each task runs, if not all run on Lambda.
    cut : bool
        Whether long sums are cut; False if :func:`cut_graph` has done it.

    Raises
    ------
    CyclicGraphError
        If the graph has a cycle.
    """
    with _uncollected():
        return _make_plan(graph, mode, finalise, retries, estimates, model, memory, places, cut)


def cut_graph(graph: Graph, *, finalise: bool, estimates: Estimates, model: CostModel) -> Graph:
    """Cut the long sums of a graph as :func:`make_plan` would."""
    with _uncollected():
        client, _, keep = _wanted(graph, finalise)
        return cut_folds(graph, topological(graph, client), keep, estimates, model)[0]


def _make_plan(
    graph: Graph,
    mode: PlanMode,
    finalise: bool,
    retries: Callable[[Key], int] | int,
    estimates: Estimates | None,
    model: CostModel | None,
    memory: Callable[[Key], int] | None,
    places: Callable[[Key], Where] | None,
    cut: bool,
) -> Plan:
    client, fetch, keep = _wanted(graph, finalise)
    retries_of = retries if callable(retries) else (lambda _: retries)
    decisions: list[Decision] = []
    repeated: frozenset[Key] = frozenset()
    if mode == "none":
        groups, positions = _single(graph, client, retries_of)
    else:
        model = model or CostModel()
        tasks = topological(graph, client)
        if estimates is None:
            estimates = guess(graph, tasks, model.speed)
        uniform = memory is None and places is None and not callable(retries)

        def together(key: Key) -> Hashable:
            return retries_of(key), _alone(key, memory), places and places(key)

        signature = None if uniform else together
        if cut:
            before = graph
            graph, estimates = cut_folds(graph, tasks, keep, estimates, model)
            if graph is not before:
                tasks = topological(graph, client)
        grouping = Grouping(graph, tasks, set(keep), estimates, model, signature)
        groups = _prioritised(graph, grouping.groups(), retries_of, estimates)
        decisions, repeated = grouping.decisions, grouping.repeated
        positions = {key: i for i, key in enumerate(topological(graph, set()))} if client else {}
    if memory is not None:
        groups = [
            replace(group, memory=memory(group.tasks[0])) if len(group.tasks) == 1 else group
            for group in groups
        ]
    if places is not None:
        groups = [replace(group, where=places(group.outputs[-1])) for group in groups]
    return Plan(
        groups=tuple(groups),
        keep=keep,
        client=tuple(sorted(client, key=positions.__getitem__)),
        fetch=frozenset(fetch),
        graph=graph,
        repeated=repeated,
        mode=mode,
        decisions=tuple(decisions),
    )


def _wanted(graph: Graph, finalise: bool) -> tuple[set[Key], set[Key], frozenset[Key]]:
    """Return the tasks of the client, what it needs, and which of that has to be made."""
    outputs = {graph.resolve(key) for key in graph.outputs}
    client = _client_tasks(graph, outputs) if finalise else set()
    fetch = outputs - client
    for key in client:
        fetch |= graph.dependencies(key) - client
    # Objects are named after the repr of their key: of keys that are equal but not alike, such as
    # ("x", 0) and ("x", np.int64(0)), the one that the groups use.
    own = {key: key for nodes in (graph.tasks, graph.stored) for key in nodes if key in fetch}
    fetch = {own.get(key, key) for key in fetch}
    return client, fetch, frozenset(key for key in fetch if key in graph.tasks)


def _alone(key: Key, memory: Callable[[Key], int] | None) -> Hashable:
    return key if memory is not None and memory(key) else None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the garbage collector.

    Planning makes many objects that live on, and no cycles; the collector would look through all
    of them and the graph, again and again, for half of the time that planning takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _single(
    graph: Graph, client: set[Key], retries: Callable[[Key], int]
) -> tuple[list[Group], Mapping[Key, int]]:
    """Give each task a group of its own, in Dask's order, which holds little at a time."""
    # The whole graph and not its tasks alone: order() follows the nodes' own dependencies, and
    # would not see through an alias that is not there.
    positions = _order(graph.source)
    groups = []
    for key in sorted(graph.tasks, key=positions.__getitem__):
        if key not in client:
            inputs = tuple(d for d in graph.dependencies(key) if d in graph.tasks)
            position = positions[key]
            groups.append(Group((key,), inputs, (key,), position, retries(key), key_split(key)))
    return groups, positions


def _prioritised(
    graph: Graph,
    found: Sequence[tuple[list[Key], list[Key], float]],
    retries: Callable[[Key], int],
    estimates: Estimates,
) -> list[Group]:
    """Build groups, those first that have the longest way to the end before them.

    (Hu's algorithm, "Parallel Sequencing and Assembly Line Problems", Operations Research 9, 1961;
    of those that are equally far, Dask's order.)
    """
    maker = {key: number for number, (_, outputs, _) in enumerate(found) for key in outputs}
    within = {key: number for _, outputs, _ in found for number, key in enumerate(outputs)}
    inputs: list[tuple[Key, ...]] = []
    for tasks, _, _ in found:
        inside = set(tasks)
        reads: dict[Key, None] = {}
        for task in tasks:
            for name in graph.tasks[task].dependencies:
                key = graph.resolve(name)
                if key not in inside and key in maker:
                    reads[key] = None
        # In the order in which they are made, since that of dependencies is that of hashes.
        inputs.append(tuple(sorted(reads, key=lambda key: (maker[key], within[key]))))
    dependencies = {place: {maker[key] for key in reads} for place, reads in enumerate(inputs)}
    positions = _order(dict.fromkeys(dependencies), dependencies)
    readers: list[list[int]] = [[] for _ in found]
    for place, reads_from in dependencies.items():
        for maker_place in reads_from:
            readers[maker_place].append(place)
    ahead = [0.0] * len(found)
    for place in _backwards(dependencies, readers):
        longest = max((ahead[reader] for reader in readers[place]), default=0.0)
        ahead[place] = longest + found[place][2] + HOP_SECONDS
    ranking = sorted(
        range(len(found)), key=lambda place: (-round(ahead[place], 6), positions[place])
    )
    groups = []
    for rank, place in enumerate(ranking):
        tasks, outputs, seconds = found[place]
        known = estimates.unknown.isdisjoint(tasks)
        groups.append(
            Group(
                tuple(tasks),
                inputs[place],
                tuple(outputs),
                rank,
                retries(outputs[-1]),
                kind_of(tasks, outputs),
                seconds if known else None,
            )
        )
    return groups


#: What a step from group to group takes besides the tasks, for the length of paths.
HOP_SECONDS = 0.1


def kind_of(tasks: Sequence[Key], outputs: Sequence[Key]) -> str:
    """Name a group after its last layer and its size."""
    name = key_split(outputs[-1])
    return name if len(tasks) == 1 else f"{name} ({len(tasks)})"


def _backwards(
    dependencies: Mapping[int, set[int]], readers: Sequence[Sequence[int]]
) -> Iterable[int]:
    """Yield groups, each after all that read from it."""
    waiting = [len(found) for found in readers]
    ready = [place for place, count in enumerate(waiting) if not count]
    while ready:
        place = ready.pop()
        yield place
        for maker in dependencies[place]:
            waiting[maker] -= 1
            if not waiting[maker]:
                ready.append(maker)


def topological(graph: Graph, without: set[Key]) -> list[Key]:
    """Return tasks, each after those that it reads, and near them.

    Raises
    ------
    CyclicGraphError
        If there is no such order.
    """
    done: set[Key] = set(without)
    ordered: list[Key] = []
    active: set[Key] = set()
    tasks = graph.tasks
    wanted = {graph.resolve(key) for key in graph.outputs}
    wanted |= {d for key in without for d in graph.dependencies(key)}
    for first in _sorted(key for key in wanted if key in tasks):
        stack = [first]
        while stack:
            key = stack[-1]
            if key in done:
                stack.pop()
                continue
            missing = [d for d in graph.dependencies(key) if d in tasks and d not in done]
            if missing and key in active:
                raise CyclicGraphError(f"Cycle detected in Dask: {short(missing[0])}, {short(key)}")
            if missing:
                active.add(key)
                stack += _sorted(missing, reverse=True)
                continue
            stack.pop()
            active.discard(key)
            done.add(key)
            ordered.append(key)
    return ordered


def _sorted(keys: Iterable[Key], reverse: bool = False) -> list[Key]:
    keys = list(keys)
    try:
        return sorted(keys, reverse=reverse)  # type: ignore[type-var]
    except TypeError:  # of several kinds
        return sorted(keys, key=repr, reverse=reverse)


def _order(nodes: Mapping[Any, Any], dependencies: Mapping[Any, Any] | None = None) -> Any:
    try:
        return order(nodes, dependencies)
    except RuntimeError as error:  # "Cycle detected in Dask: ..."
        raise CyclicGraphError(str(error)) from error


def _client_tasks(graph: Graph, outputs: set[Key]) -> set[Key]:
    """Find the requested tasks that only put blocks together and that nothing else reads."""
    candidates = {key for key in outputs if key in graph.tasks and is_finaliser(graph.tasks[key])}
    if candidates:
        for key in graph.tasks:
            candidates -= graph.dependencies(key)
    return candidates
