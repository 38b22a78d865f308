"""Which groups commit all their outputs as one.  Pure.  May import: plan, kernels, graph.

The first attempt at an output wins, each output for itself: so of two attempts at a group that
run at the same time, one may win one output and the other one the next.  For tasks that always
make the same of the same this does not matter, nor for outputs that have nothing to do with each
other.  But what a function that may be anybody's has drawn or read must not reach two outputs of a
group as two different values.  Such a group is *entangled*.
"""

from __future__ import annotations

from dask_lambda.graph import Graph
from dask_lambda.kernels import kernel_of
from dask_lambda.plan import Group


def entangled(graph: Graph, group: Group) -> bool:
    """Whether a task that may not be repeatable reaches several outputs inside a group.

    Parameters
    ----------
    graph : Graph
    group : Group

    Notes
    -----
    A task reaches an output by being it, or by being read on the way to it.  Repeatable are the
    functions that :mod:`dask_lambda.kernels` knows.
    """
    if len(group.outputs) < 2:
        return False
    reached = dict.fromkeys(group.tasks, 0)  # one bit for each output
    for place, key in enumerate(group.outputs):
        reached[key] |= 1 << place
    for key in reversed(group.tasks):  # readers come after what they read
        bits = reached[key]
        if bits & (bits - 1) and not kernel_of(graph.tasks[key]).known:
            return True
        for read in graph.dependencies(key):
            if read in reached:
                reached[read] |= bits
    return False
