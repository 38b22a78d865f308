"""The smallest scheduler that serialises everything: what Lambda cannot do, this cannot do either.

Every task is pickled, sent to another process and run there, and every value is pickled between
tasks, so a test that fails here needs memory shared between tasks and client: locks, counters,
targets to store into, warnings to catch. It is a yardstick for Dask's tests and nothing else.
"""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cloudpickle
from dask._task_spec import Alias, DataNode, convert_legacy_graph, cull
from dask.core import flatten, toposort
from dask.local import nested_get


class PicklingScheduler:
    """A Dask scheduler (``PicklingScheduler().get``) with one process and no shared memory.

    Attributes
    ----------
    tasks
        how many tasks it has run: as many as there would be invocations, one to a task
    """

    def __init__(self) -> None:
        self.tasks = 0
        self._pool: ProcessPoolExecutor | None = None

    def get(self, dsk: Any, keys: Any, **kwargs: Any) -> Any:
        graph = convert_legacy_graph(
            dict(dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__())
        )
        wanted = list(flatten([keys])) if isinstance(keys, list) else [keys]
        graph = cull(graph, wanted)
        pickled: dict[Hashable, bytes] = {}
        for key in toposort(graph, {key: graph[key].dependencies for key in graph}):
            node = graph[key]
            if isinstance(node, Alias):
                pickled[key] = pickled[node.target]
            elif isinstance(node, DataNode):
                pickled[key] = _dumps(node.value)
            else:
                inputs = {name: pickled[name] for name in node.dependencies}
                pickled[key] = self._run(_dumps(node), inputs)
        return nested_get(keys, {key: pickle.loads(pickled[key]) for key in wanted})

    def _run(self, node: bytes, inputs: dict[Hashable, bytes]) -> bytes:
        self.tasks += 1
        try:
            return self._submit(node, inputs)
        except BrokenProcessPool:  # tests of distributed end every child of the test process
            self.close()
            return self._submit(node, inputs)

    def _submit(self, node: bytes, inputs: dict[Hashable, bytes]) -> bytes:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(max_workers=1, mp_context=context)
        return self._pool.submit(_run_pickled, node, inputs).result()

    def close(self) -> None:
        """End the process; the next task starts another."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _run_pickled(node: bytes, inputs: dict[Hashable, bytes]) -> bytes:
    """Run one task in the other process."""
    return _dumps(pickle.loads(node)({key: pickle.loads(value) for key, value in inputs.items()}))


def _dumps(value: Any) -> bytes:
    """Protocol 5 keeps a writable array writable and a read-only one read-only."""
    return cloudpickle.dumps(value, protocol=5)
