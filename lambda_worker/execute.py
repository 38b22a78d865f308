"""Running the tasks of one group.  May import: :mod:`lambda_worker.protocol`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import dask._task_spec  # noqa: F401  tasks are unpickled into it: load it at the cold start

from lambda_worker.protocol import Body, Key


class TaskError(Exception):
    """A task raised: carries its key; the exception is the cause."""

    def __init__(self, key: Key):
        super().__init__(key)
        self.key = key


def run_group(body: Body, values: dict[Key, Any]) -> Iterator[tuple[int, Any]]:
    """Run a group's tasks in order, yielding each output as soon as it is there.

    Parameters
    ----------
    body : Body
    values : dict
        The inputs, by the names in ``body.inputs``.  It is emptied on the way: a value is
        dropped when its last reader has run.

    Yields
    ------
    (place, value)
        Place among ``body.outputs``.

    Raises
    ------
    TaskError
        From the exception that a task raised.
    """
    readers = Counter(dependency for task in body.tasks for dependency in task.dependencies)
    places: dict[Key, list[int]] = {}
    for place, key in enumerate(body.outputs):
        places.setdefault(key, []).append(place)
    for task in body.tasks:
        try:
            result = task(values)
        except BaseException as error:  # SystemExit too: it must not end the environment
            raise TaskError(task.key) from error
        for dependency in task.dependencies:
            readers[dependency] -= 1
            if not readers[dependency]:
                values.pop(dependency, None)
        if readers[task.key]:
            values[task.key] = result
        for place in places.get(task.key, ()):
            yield place, result
        del result
