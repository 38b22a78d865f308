"""Pickling the tasks of one run.  May import: libraries, the ground, cloudpickle.

A graph has many tasks and few functions.  A function of a script or a notebook is pickled by value,
which takes longer than all the rest of a small task; so each is pickled once for the run, and its
bytes are put into every task that calls it.

On the way it is noted which modules a worker will import: those of functions, classes and modules
that are pickled by name, and those that the code of functions imports that are pickled by value.

Code that is pickled by value keeps the name of its file, for the tracebacks of what fails on
Lambda: cloudpickle puts a constant there since 3.1.3.
"""

from __future__ import annotations

import io
import pickle
import sys
import weakref
from collections.abc import Callable
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from dask_lambda.libraries import absolute, mentioned
from lambda_worker import protocol

#: A longer function (one that refers to large data, say) is pickled with each of its tasks, so that
#: the data can leave the stream (:func:`lambda_worker.codec.serialize`).
MAX_FUNCTION_BYTES = 16 * 1024
#: So many are remembered: a session may live long, and its functions be made anew for each call.
MAX_FUNCTIONS = 1000
#: What the script is called in a process that multiprocessing has spawned.
_SPAWNED_MAIN = "__mp_main__"
#: What is no function of Python's and is pickled by name all the same.
_NAMED = (BuiltinFunctionType, type(lru_cache(abs)))

#: What cloudpickle writes for the file of any code.
_NO_FILE = "<dynamic-code>"


class FunctionCache:
    """Pickles objects, and each function among them once.

    Parameters
    ----------
    note : callable, optional
        Called with the name of each module that is mentioned, often or once.
    """

    def __init__(self, note: Callable[[str], None] = lambda module: None) -> None:
        # By id.  They are not held, nor is what they refer to, such as futures.
        self._functions: dict[int, tuple[weakref.ref[FunctionType], Any]] = {}
        self.note = note
        main = sys.modules.get("__main__")
        if main is not None and main.__name__ == _SPAWNED_MAIN:  # no worker has that script
            cloudpickle.register_pickle_by_value(main)

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
        if found is None or found[0]() is not function:  # that one is gone, and its id used anew
            if len(self._functions) >= MAX_FUNCTIONS:
                self._functions.clear()
            reduced = self._reduced(function, reduce)
            found = self._functions[id(function)] = weakref.ref(function), reduced
        return found[1]

    def _reduced(self, function: FunctionType, reduce: Callable[[Any], Any]) -> Any:
        if reduce(function) is NotImplemented:  # it can be imported: by name
            self._note_module_of(function)
            return NotImplemented
        self._note_imports(function)
        with protocol.collect_references() as references, io.BytesIO() as file:
            _Observer(file, None, self).dump(function)
            stream = file.getvalue()
        if references or len(stream) > MAX_FUNCTION_BYTES:
            return None  # a request has to name the secrets of the references in it
        return pickle.loads, (stream,)

    def observe(self, obj: Any, reduced: Any) -> None:
        """Note the modules of what is about to be pickled, knowing how."""
        if isinstance(obj, FunctionType):
            if reduced is NotImplemented:
                self._note_module_of(obj)
            else:
                self._note_imports(obj)
        elif isinstance(obj, type):
            if reduced is NotImplemented:
                self._note_module_of(obj)
        elif isinstance(obj, ModuleType):
            if not _is_by_value(obj.__name__):
                self.note(obj.__name__)
        elif isinstance(obj, _NAMED) and not _is_by_value(str(obj.__module__)):
            self._note_module_of(obj)

    def _note_module_of(self, thing: Any) -> None:
        module = getattr(thing, "__module__", None)
        if isinstance(module, str):
            self.note(module)

    def _note_imports(self, function: FunctionType) -> None:
        for name in mentioned(function.__code__).imports:
            self.note(absolute(name, function.__globals__))


class _Observer(cloudpickle.Pickler):
    """Does what cloudpickle does, has the cache look at it, and keeps the names of files."""

    def __init__(
        self,
        file: io.BytesIO,
        buffer_callback: Callable[[pickle.PickleBuffer], bool] | None,
        functions: FunctionCache,
    ):
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._functions = functions

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is CodeType:
            make, arguments = self.dispatch_table[CodeType](obj)
            return make, tuple(obj.co_filename if it == _NO_FILE else it for it in arguments)
        reduced = super().reducer_override(obj)
        if issubclass(type(obj), _OBSERVED):  # which evaluates no lazy proxy
            self._functions.observe(obj, reduced)
        return reduced


class _Pickler(_Observer):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is FunctionType:
            reduce = super(_Observer, self).reducer_override
            reduced = self._functions.reduced(obj, reduce)
            return reduce(obj) if reduced is None else reduced
        return super().reducer_override(obj)


_OBSERVED = (type, FunctionType, ModuleType, *_NAMED)


def _is_by_value(module: str) -> bool:
    """Whether what is in a module is pickled by value, since its user said so."""
    registered = cloudpickle.list_registry_pickle_by_value()
    while registered and module:
        if module in registered:
            return True
        module = module.rpartition(".")[0]
    return False
