"""From what Dask hands a scheduler to a plain graph.  May import: dask, the ground, errors.

A scheduler is called with an ``Expr``, a ``HighLevelGraph``, a dict of task specifications, or
a dict that still holds legacy tuples.  :func:`materialise` turns each into a dict of nodes, and
:func:`normalise` that into a :class:`Graph`: only what the requested keys need, with the nodes
sorted by what has to happen for them (tasks run, literals are at hand, stored results are in S3,
aliases are mere names).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

from dask._task_spec import (
    Alias,
    DataNode,
    GraphNode,
    NestedContainer,
    Task,
    _execute_subgraph,
    convert_legacy_graph,
)
from dask.core import flatten

from dask_lambda.errors import CyclicGraphError, MissingKeyError
from lambda_worker.protocol import Key, Reference, load_reference

#: Tasks that only put finished blocks together: they run on the client, which needs the blocks
#: anyway; on Lambda they would read and write all of the result once more.
FINALISERS = frozenset(
    {
        ("dask.array.core", "finalize"),
        ("dask.bag.core", "finalize"),
        ("dask.dataframe.core", "_concat"),
        ("dask.delayed", "finalize"),
        ("dask._task_spec", "_identity_cast"),
    }
)


@dataclass(slots=True)
class Graph:
    """A culled graph whose nodes are sorted by kind.

    Attributes
    ----------
    tasks : dict
        Key to task: what has to be run, on Lambda or on the client.
    literals : dict
        Key to value: data that the graph itself holds.
    stored : dict
        Key to :class:`~lambda_worker.protocol.Reference`: results that are in S3 already.
    aliases : dict
        Key to key: other names of the above; never of each other.
    outputs : frozenset
        Requested keys, as they were asked for.
    source : dict
        The whole culled graph as Dask knows it, for callbacks.
    """

    tasks: dict[Key, GraphNode]
    literals: dict[Key, Any]
    stored: dict[Key, Reference]
    aliases: dict[Key, Key]
    outputs: frozenset[Key]
    source: dict[Key, GraphNode]

    def resolve(self, key: Key) -> Key:
        """Return the key of the node that a key means."""
        return self.aliases.get(key, key)

    def dependencies(self, key: Key) -> set[Key]:
        """Return the resolved keys that a task reads."""
        aliases = self.aliases
        if not aliases:
            return set(self.tasks[key].dependencies)
        return {aliases.get(d, d) for d in self.tasks[key].dependencies}


def materialise(dsk: Any) -> dict[Key, GraphNode]:
    """Turn whatever a scheduler is called with into a dict of task specifications.

    Parameters
    ----------
    dsk : Expr, HighLevelGraph or mapping
        An optimised expression, or a graph of task specifications or legacy tuples.
    """
    mapping = dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__()
    return convert_legacy_graph(dict(mapping))


def normalise(nodes: dict[Key, GraphNode], keys: Any) -> Graph:
    """Sort what the requested keys need by what has to happen for it.

    Parameters
    ----------
    nodes : dict
        What :func:`materialise` returned.
    keys : key or (nested) list of keys

    Raises
    ------
    MissingKeyError
        If a requested key, or a dependency of one, is not in the graph.
    CyclicGraphError
        If aliases run in a circle (other cycles show when the graph is ordered).
    """
    wanted = list(flatten(keys)) if isinstance(keys, list) else [keys]
    source = _cull(nodes, wanted)
    graph = Graph({}, {}, {}, {}, frozenset(wanted), source)
    for key, node in source.items():
        if isinstance(node, Alias):
            graph.aliases[key] = _alias_target(source, key)
        elif isinstance(node, DataNode):
            graph.literals[key] = node.value
        elif (reference := _stored(node)) is not None:
            graph.stored[key] = reference
        else:
            graph.tasks[key] = under(key, node)
    return graph


def is_finaliser(node: GraphNode) -> bool:
    """Tell whether a task only puts its inputs together."""
    if not isinstance(node, NestedContainer) and not node.dependencies:
        return False
    return isinstance(node, Task) and _is_passive(node)


def _is_passive(argument: Any) -> bool:
    """Tell whether no user's work is done in an argument: tasks may nest in lists and tasks."""
    if not isinstance(argument, Task):
        return True
    if not isinstance(argument, NestedContainer):
        function = argument.func
        name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if name not in FINALISERS:
            return False
    return all(map(_is_passive, (*argument.args, *argument.kwargs.values())))


def _cull(nodes: dict[Key, GraphNode], wanted: Iterable[Key]) -> dict[Key, GraphNode]:
    culled: dict[Key, GraphNode] = {}
    stack: list[tuple[Key, Key | None]] = [(key, None) for key in wanted]
    while stack:
        key, reader = stack.pop()
        if key in culled:
            continue
        node = nodes.get(key)
        if node is None:
            what = "was requested" if reader is None else f"is read by task {short(reader)}"
            raise MissingKeyError(f"key {short(key)} {what}, but it is not in the graph")
        culled[key] = node
        stack.extend((dependency, key) for dependency in node.dependencies)
    return culled


def _alias_target(nodes: dict[Key, GraphNode], key: Key) -> Key:
    seen = [key]
    node = nodes[key]
    while isinstance(node, Alias):
        if node.target in seen:
            path = " -> ".join(map(short, [*seen, node.target]))
            raise CyclicGraphError(f"Cycle detected in Dask: {path}")
        seen.append(node.target)
        node = nodes[node.target]
    return seen[-1]


def under(key: Key, node: GraphNode) -> GraphNode:
    """Return a task under a key that it may not know: lists have none of their own."""
    if node.key == key:
        return node
    node = copy(node)
    node.key = key  # type: ignore[assignment]
    return node


def _stored(node: GraphNode | None) -> Reference | None:
    """Return the reference that a task loads, if that is all that it does.

    Dask may have fused the load with mere names.
    """
    while isinstance(node, Task) and node.func is _execute_subgraph:
        inner, outkey = node.args[:2]
        node = inner.get(outkey)
        while isinstance(node, Alias):
            node = inner.get(node.target)
    if isinstance(node, Task) and node.func is load_reference and not node.dependencies:
        reference = node.args[0]
        if isinstance(reference, Reference):
            return reference
    return None


def short(key: Key, width: int = 200) -> str:
    """Return a key for people: keys may be of any length."""
    text = repr(key)
    return text if len(text) <= width else f"{text[: width - 3]}..."
