"""Long sums, cut so that early terms need not wait for late ones.  Pure.

May import: cost_model, estimates, graph, the ground.

A block of a factorisation is solved from the sum of many products, of which those with the first
columns can be made long before that with the last one.  Run together with what reads the sum, they
would all be on the longest path; run one by one, each would be stored, and read again by the
one that adds them up.  So the sum is cut into prefixes: the last product alone stays with its
reader, the two before it are added to the prefix before them, then four, then eight at a time.  By
the time the last product can be made, the prefix is there.

The additions are the same in the same order, so no bit is different
(:func:`lambda_worker.folds.split_fold`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dask._task_spec import GraphNode

from dask_lambda.cost_model import CostModel
from dask_lambda.estimates import Estimates
from dask_lambda.graph import Graph
from lambda_worker.folds import find_folds, split_fold
from lambda_worker.protocol import Key

#: Sums of fewer terms stay whole.
MIN_TERMS = 4
#: The longest prefix that is added at once: storing it is then a small part of the work.
MAX_TERMS = 8


def cut_folds(
    graph: Graph,
    order: Sequence[Key],
    keep: frozenset[Key],
    estimates: Estimates,
    model: CostModel,
) -> tuple[Graph, Estimates]:
    """Cut the sums whose terms become available one after the other, and take long to make.

    Parameters
    ----------
    graph : Graph
    order : sequence of key
        Its tasks, each after those that it reads.
    keep : frozenset of key
        Tasks whose values are needed in the end.
    estimates : Estimates
    model : CostModel

    Returns
    -------
    Graph, Estimates
        The same if there is nothing to cut, else with the prefixes as tasks of their own.
    """
    readers: dict[Key, int] = {}
    height: dict[Key, int] = {}
    long: list[Key] = []
    for key in order:
        reads = [d for d in graph.dependencies(key) if d in graph.tasks]
        height[key] = max((height.get(d, 0) + 1 for d in reads), default=0)
        for d in reads:
            readers[d] = readers.get(d, 0) + 1
        if len(reads) > MIN_TERMS:
            long.append(key)
    added: dict[Key, GraphNode] = {}
    seconds: dict[Key, float] = {}
    nbytes: dict[Key, int] = {}
    for key in long:
        task = graph.tasks[key]
        for fold in find_folds(task):
            terms = [graph.resolve(term) for term in fold.terms]
            heights = [height.get(term, 0) for term in terms]
            if (
                len(terms) <= MIN_TERMS
                or heights != sorted(heights)
                or heights[0] == heights[-1]
                or len(set(terms)) < len(terms)
                or estimates.nbytes[terms[0]] < model.fold_bytes
                or any(readers.get(term) != 1 or term in keep for term in terms)
                or _terms_time(graph, terms, estimates, model) < model.fold_seconds
            ):
                continue
            size = estimates.nbytes[terms[0]]
            for prefix, count, whole in _cut(task, fold.terms, key):
                added[prefix.key], added[key] = prefix, whole
                nbytes[prefix.key] = size
                seconds[prefix.key] = 3 * size * count / model.speed.bytes
            task = added[key]
    if not added:
        return graph, estimates
    return (
        replace(graph, tasks={**graph.tasks, **added}),
        replace(
            estimates,
            seconds={**estimates.seconds, **seconds},
            nbytes={**estimates.nbytes, **nbytes},
        ),
    )


def _terms_time(
    graph: Graph, terms: Sequence[Key], estimates: Estimates, model: CostModel
) -> float:
    """Return how long it takes to make all terms in one place."""
    work, reads = 0.0, set[Key]()
    for term in terms:
        if term in graph.tasks:
            work += estimates.seconds[term]
            reads |= graph.dependencies(term)
        else:
            reads.add(term)
    sizes = [estimates.nbytes[key] for key in reads]
    large = [size for size in sizes if not model.is_inline(size)]
    return model.group_time(work, len(large), sum(large), 0, 0)


def _cut(task: Any, terms: Sequence[Key], key: Key) -> Iterator[tuple[Any, int, Any]]:
    """Yield each prefix with the number of its terms, and the task, which reads the last one."""
    sizes = [1]
    while sum(sizes) < len(terms):
        sizes.append(min(2 * sizes[-1], MAX_TERMS, len(terms) - sum(sizes)))
    left = len(terms)
    reader, whole = task, None
    for number, size in enumerate(sizes[:-1]):
        left -= size
        fold = next(f for f in find_folds(reader) if f.terms[0] == terms[0])
        prefix, reader = split_fold(reader, fold, _prefix_key(key, number), left)
        if whole is None:
            whole = reader
        else:
            yield reader, size, whole
        reader = prefix
    yield reader, sizes[-1], whole


def _prefix_key(key: Key, number: int) -> Key:
    if isinstance(key, tuple):
        return (f"{key[0]}-prefix", *key[1:], number)
    return (f"{key}-prefix", number)
