"""Pickling the tasks of one run.  May import: the ground, cloudpickle.

A graph has many tasks and few functions.  A function of a script or a notebook is pickled by value,
which takes longer than all the rest of a small task; so each is pickled once for the run, and its
bytes are put into every task that calls it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from types import FunctionType
from typing import Any

import cloudpickle

from lambda_worker import protocol

#: A longer function (one that refers to large data, say) is pickled with each of its tasks, so that
#: the data can leave the stream (:func:`lambda_worker.codec.serialize`).
MAX_FUNCTION_BYTES = 16 * 1024


class FunctionCache:
    """Pickles objects, and each function among them once."""

    def __init__(self) -> None:
        # By id; the function itself is held, so that its id stays its own.
        self._functions: dict[int, tuple[FunctionType, Any]] = {}

    def dumps(
        self, value: object, *, buffer_callback: Callable[[pickle.PickleBuffer], bool]
    ) -> bytes:
        """Do what ``cloudpickle.dumps`` does, with protocol 5."""
        with io.BytesIO() as file:
            _Pickler(file, buffer_callback, self).dump(value)
            return file.getvalue()

    def reduced(self, function: FunctionType, reduce: Callable[[Any], Any]) -> Any:
        """Return how to pickle a function: by name, as its bytes, or (None) as it comes."""
        found = self._functions.get(id(function))
        if found is None:
            found = self._functions[id(function)] = function, _reduced(function, reduce)
        return found[1]


class _Pickler(cloudpickle.Pickler):
    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], bool],
        functions: FunctionCache,
    ):
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._functions = functions

    def reducer_override(self, obj: Any) -> Any:
        reduce = super().reducer_override
        if type(obj) is FunctionType:
            reduced = self._functions.reduced(obj, reduce)
            if reduced is not None:
                return reduced
        return reduce(obj)


def _reduced(function: FunctionType, reduce: Callable[[Any], Any]) -> Any:
    if reduce(function) is NotImplemented:  # it can be imported: by name
        return NotImplemented
    with protocol.collect_references() as references:
        stream = cloudpickle.dumps(function, protocol=5)
    if references or len(stream) > MAX_FUNCTION_BYTES:
        return None  # a request has to name the secrets of the references in it
    return pickle.loads, (stream,)
