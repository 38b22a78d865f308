"""Dask's callbacks, called as Dask's own schedulers call them.  May import: dask, graph.

Progress bars and profilers look into a state of waiting, ready, running and finished keys.  Dask
makes and changes it with two functions of :mod:`dask.local`, which are used here as well, in the
caller's thread, as the engine tells of tasks that start and finish.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from dask._task_spec import Alias, GraphNode
from dask.callbacks import unpack_callbacks
from dask.local import finish_task, start_state_from_dask
from dask.order import order

from dask_lambda.graph import Graph
from lambda_worker.protocol import Key

#: What ``posttask`` is told about the worker: Dask's own schedulers pass a thread or process id.
WORKER = "lambda"


class Callbacks:
    """The callbacks that are active during one call of ``get``.

    Parameters
    ----------
    active : sequence of tuples of five
        As :func:`dask.callbacks.local_callbacks` gives them.
    nodes : dict
        The graph, before it is culled.  Callbacks see it first, and may put values in (Dask's
        opportunistic cache does).

    Attributes
    ----------
    wants_values : bool
        Whether one of them may look at the results of tasks, which then have to be fetched.
    """

    def __init__(self, active: Sequence[Any], nodes: dict[Key, GraphNode]):
        self._nodes = nodes
        self._started: list[Any] = []
        self._told: dict[Key, bool] = {}  # of which tasks: whether they are done
        self._active = active
        self._graph: Graph | None = None
        _, self._start_state, self._pretask, self._posttask, _ = unpack_callbacks(active)
        self.wants_values = any(not _ignores_values(f) for f in self._posttask)
        self.state: dict[str, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._active)

    def start(self) -> None:
        """Tell that a computation starts."""
        for callback in self._active:
            if callback[0]:
                callback[0](self._nodes)
            self._started.append(callback)

    def begin(self, graph: Graph) -> None:
        """Make the state, once the graph is known."""
        self._graph = graph
        self._results = set(graph.outputs)
        self._priorities = order(graph.source)  # type: ignore[arg-type]
        self.state = start_state_from_dask(
            graph.source, keys=self._results, sortkey=self._priorities.get
        )
        for callback in self._start_state:
            callback(graph.source, self.state)
        self._local = {
            key
            for key, node in graph.source.items()
            if isinstance(node, Alias) or key in graph.stored
        }
        self._follow([key for key in self.state["ready"] if key in self._local])

    def task_started(self, key: Key) -> None:
        """Tell that a task was sent off, once."""
        if key in self._told:
            return
        self._told[key] = False
        assert self._graph is not None
        ready = self.state["ready"]
        for place in range(len(ready) - 1, -1, -1):  # the next one is usually the last
            if ready[place] == key:
                del ready[place]
                break
        self.state["running"].add(key)
        for callback in self._pretask:
            callback(key, self._graph.source, self.state)

    def task_finished(self, key: Key, value: Any) -> None:
        """Tell that a task is done, once."""
        if self._told.get(key):
            return
        self._finish(key, value)
        self._follow([k for k in self.state["dependents"][key] if k in self._local])

    def finish(self, failed: bool) -> None:
        """Tell that the computation is over."""
        for callback in self._started:
            if callback[4]:
                callback[4](
                    self._nodes if self._graph is None else self._graph.source, self.state, failed
                )

    def _finish(self, key: Key, value: Any) -> None:
        assert self._graph is not None
        self._told[key] = True
        self.state["cache"][key] = value
        finish_task(self._graph.source, key, self.state, self._results, self._priorities.get)
        for callback in self._posttask:
            callback(key, value, self._graph.source, self.state, WORKER)

    def _follow(self, keys: list[Key]) -> None:
        """Go through nodes that need no invocation: aliases and stored results."""
        assert self._graph is not None
        ready = self.state["ready"]
        while keys:
            key = keys.pop()
            if key not in ready:
                continue
            node = self._graph.source[key]
            value = self.state["cache"].get(node.target) if isinstance(node, Alias) else None
            self.task_started(key)
            self._finish(key, value)
            keys.extend(k for k in self.state["dependents"][key] if k in self._local)


def _ignores_values(callback: Callable[..., Any]) -> bool:
    diagnostics = sys.modules.get("dask.diagnostics")
    if diagnostics is None:
        return False
    known = (diagnostics.ProgressBar, diagnostics.Profiler, diagnostics.ResourceProfiler)
    owner = getattr(callback, "__self__", None)
    return type(owner) in known
