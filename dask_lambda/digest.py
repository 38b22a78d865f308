"""Hashes of objects by what they are, the same in every session.  Pure, but for files it hashes.

May import: libraries, the ground, dask's task specification.

``dask.tokenize`` is not enough here.  It takes a function that can be imported by its name, whose
source may have changed since; one that can not, by what cloudpickle makes of it, which holds file
names and line numbers; and a class by a number that is drawn anew in each process.  So functions
and classes that are not a library's are taken by what is in them: code, defaults, closures, and the
globals that the code names.  Libraries' are taken by name and the library's version.  All
other objects are taken by what they would be pickled from.
"""

from __future__ import annotations

import copyreg
import hashlib
import importlib.util
import marshal
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

from dask._task_spec import Alias, DataNode, GraphNode, NestedContainer, Task, _execute_subgraph
from dask._task_spec import TaskRef as _TaskRef

from dask_lambda.libraries import absolute, distributions_of, is_library, mentioned, of_library
from lambda_worker.protocol import Key, Reference

#: Bytes of a fingerprint: no two differing tasks will ever have the same by chance.
DIGEST_BYTES = 16
#: Dask's readers of files by path: their keys tell of the state of the file.
_READERS = ("dask.dataframe.io", "dask.dataframe.dask_expr.io")
#: Of a class, what says nothing about what it does.
_PASSIVE = frozenset(
    {
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "_abc_impl"),
        *("__annotations__", "__annotations_cache__", "__annotate_func__", "__firstlineno__"),
        *("__static_attributes__", "__dataclass_fields__", "__dataclass_params__"),
        *("__match_args__", "__classcell__", "__type_params__"),
    }
)


class NoDigest(Exception):
    """An object that is not the same thing in another session, or not seen to be."""


def reads_of(node: Any) -> list[Key]:
    """Return the keys that a task reads, in the order in which it mentions them."""
    if isinstance(node, _TaskRef):
        return [node.key]
    if isinstance(node, Alias):
        return [node.target]
    if not isinstance(node, Task) or not node.dependencies:
        return []
    if node.func is not _execute_subgraph:
        return [key for each in (*node.args, *node.kwargs.values()) for key in reads_of(each)]
    inner, outkey, names, *outer = node.args
    outside = dict(zip(names, outer, strict=True))
    found: list[Key] = []
    seen = {outkey}
    stack = [outkey]
    while stack:
        name = stack.pop()
        if name in outside:
            found += reads_of(outside[name])
            continue
        fresh = [key for key in dict.fromkeys(reads_of(inner[name])) if key not in seen]
        seen.update(fresh)
        stack.extend(reversed(fresh))
    return found


class Hasher:
    """Hashes objects by their structure.

    What an object's digest is made of is, in the end, atoms: a short object is its own digest.

    Parameters
    ----------
    digest_of : callable
        The digest of what a task reads.
    """

    def __init__(self, digest_of: Callable[[Key], bytes | None]) -> None:
        self._digest_of = digest_of
        self._memo: dict[int, tuple[Any, bytes]] = {}  # id -> the object, held; its digest
        self._active: dict[int, int] = {}  # id of what is being walked -> depth
        self._low = 0  # the least depth to which what was walked refers back
        self._made: list[dict[Key, bytes]] = []  # digests inside of fused tasks, innermost last
        self._uses = 0  # of keys

    @staticmethod
    def pack(*parts: bytes) -> bytes:
        """Hash some digests."""
        # Version 2 of marshal's format knows no references to objects that were met before.
        return hashlib.blake2b(marshal.dumps(parts, 2), digest_size=DIGEST_BYTES).digest()

    def task(self, task: GraphNode) -> bytes:
        """Hash a task whose inputs are hashed."""
        self._made, self._active, self._low = [], {}, 0
        return self._node(task)

    def walk(self, thing: Any) -> bytes:
        """Hash any object."""
        kind = type(thing)
        atom = _ATOMS.get(kind)
        if atom is not None:
            return atom(thing)
        if isinstance(thing, GraphNode | _TaskRef):
            return self._node(thing)
        place = id(thing)
        known = self._memo.get(place)
        if known is not None:
            return known[1]
        depth = self._active.get(place)
        if depth is not None:  # it holds itself
            self._low = min(self._low, depth)
            return b"up%d" % (len(self._active) - depth)
        own = self._active[place] = len(self._active)
        uses, outer, self._low = self._uses, self._low, own
        try:
            digest = _HANDLERS.get(kind, Hasher._other)(self, thing)
        finally:
            del self._active[place]
            whole = self._low >= own  # else it is known only together with what is around it
            self._low = min(outer, self._low) if not whole else outer
        if whole and uses == self._uses:
            self._memo[place] = thing, digest
        return digest

    def _all(self, things: Iterable[Any]) -> list[bytes]:
        walk = self.walk
        return [walk(each) for each in things]

    # -- tasks -----------------------------------------------------------------------------------

    def _node(self, node: Any) -> bytes:
        if isinstance(node, _TaskRef):
            return self._read(node.key)
        if isinstance(node, Alias):
            return self._read(node.target)
        if isinstance(node, DataNode):
            return self.pack(b"data", self.walk(node.value))
        if not isinstance(node, Task):
            raise NoDigest(f"{type(node).__name__} is no kind of task that is known here")
        if isinstance(node, NestedContainer):
            return self.pack(b"container", type(node).__name__.encode(), *self._all(node.args))
        if node.func is _execute_subgraph:
            return self._fused(*node.args)
        parts = [b"task", self.walk(node.func), *self._all(node.args)]
        for name in sorted(node.kwargs):
            parts += [b"=" + name.encode(), self.walk(node.kwargs[name])]
        if _module_of(node.func).startswith(_READERS):
            parts.append(self._file_read(node))
        return self.pack(*parts)

    def _file_read(self, node: Task) -> bytes:
        """Return what says whether a file has changed that a task reads by its path."""
        system = getattr(node.func, "fs", None)
        first = node.args[0] if node.args else None
        if system is not None and isinstance(first, dict) and "piece" in first:  # of Parquet
            paths = first["piece"][0]
            paths = [paths] if isinstance(paths, str) else paths
            return self.walk([system.ukey(path) for path in paths])
        return repr(node.key).encode("utf-8", "backslashreplace")

    def _fused(self, inner: Any, outkey: Key, names: Any, *outer: Any) -> bytes:
        """Hash a fused task: each task in it as if it were on its own, one after the other."""
        made = {name: self.walk(each) for name, each in zip(names, outer, strict=True)}
        self._made.append(made)
        try:
            stack = [outkey]
            while stack:
                key = stack[-1]
                if key not in made:
                    missing = [d for d in reads_of(inner[key]) if d not in made]
                    if missing:
                        stack.extend(reversed(missing))
                        continue
                    made[key] = self._node(inner[key])
                stack.pop()
        finally:
            self._made.pop()
        return made[outkey]

    def _read(self, key: Key) -> bytes:
        self._uses += 1
        digest = self._made[-1].get(key) if self._made else self._digest_of(key)
        if digest is None:
            raise NoDigest(f"it reads {key!r} in an unknown way")
        return digest

    # -- containers ------------------------------------------------------------------------------

    def _sequence(self, things: list[Any] | tuple[Any, ...]) -> bytes:
        return self.pack(type(things).__name__.encode(), *self._all(things))

    def _dict(self, things: dict[Any, Any]) -> bytes:
        """Hash a dict in its order, which a task may depend on."""
        return self.pack(b"dict", *self._all(each for item in things.items() for each in item))

    def _set(self, things: Iterable[Any]) -> bytes:
        return self.pack(type(things).__name__.encode(), *sorted(self._all(things)))

    def _buffer(self, thing: Any) -> bytes:
        view = thing.raw() if isinstance(thing, pickle.PickleBuffer) else memoryview(thing)
        if not view.c_contiguous:
            view = memoryview(view.tobytes())
        return self.pack(b"buffer", _digest(view))

    def _array(self, array: Any) -> bytes:
        parts = [b"array", self.walk(array.dtype), repr(array.shape).encode()]
        if array.dtype.hasobject:
            return self.pack(*parts, *self._all(array.ravel().tolist()))
        if array.flags.f_contiguous and not array.flags.c_contiguous:  # which is not the same to
            array = array.T  # the last bit
            parts.append(b"F")
        data = memoryview(array.copy(order="C").reshape(-1).view("u1")) if array.size else b""
        if array.size and array.flags.c_contiguous:
            data = memoryview(array.reshape(-1).view("u1"))
        return self.pack(*parts, _digest(data))

    # -- functions, classes, modules -------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> bytes:
        if (known := _library_name(function)) is not None:
            return known
        code = function.__code__
        parts = [b"function", _PYTHON, self.walk(code)]
        parts.append(self.walk(function.__defaults__))
        parts.append(self.walk(function.__kwdefaults__))
        for cell in function.__closure__ or ():
            try:
                parts.append(self.walk(cell.cell_contents))
            except ValueError:  # nothing in it yet
                parts.append(b"empty")
        if function.__dict__:
            parts.append(self.walk({k: function.__dict__[k] for k in sorted(function.__dict__)}))
        named = mentioned(code)
        for name in named.names:
            if name in function.__globals__:
                value = function.__globals__[name]
                parts.append(name.encode())
                if isinstance(value, types.ModuleType):
                    parts.append(self._module(value, named.attributes))
                else:
                    parts.append(self.walk(value))
        parts += [_source(name, function.__globals__) for name in named.imports]
        return self.pack(*parts)

    def _code(self, code: types.CodeType) -> bytes:
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
        return self.pack(
            b"code",
            code.co_code,
            code.co_exceptiontable,
            repr((names, counts)).encode(),
            *self._all(code.co_consts),
        )

    def _module(self, module: types.ModuleType, attributes: Iterable[str] | None = None) -> bytes:
        """Hash a module: a user's own by those of its contents that are named."""
        name = module.__name__
        if is_library(name):
            return b"module " + _with_version(name)
        if attributes is None:
            return _source(name, {})
        parts = [b"module", name.encode()]
        for each in attributes:
            if each in vars(module) and not each.startswith("__"):
                value = vars(module)[each]
                inner = isinstance(value, types.ModuleType)
                parts.append(each.encode())
                parts.append(self._inner(value, attributes) if inner else self.walk(value))
        return self.pack(*parts)

    def _inner(self, module: types.ModuleType, attributes: Iterable[str]) -> bytes:
        if id(module) in self._active:  # modules may import one another
            return module.__name__.encode()
        self._active[id(module)] = len(self._active)
        try:
            return self._module(module, attributes)
        finally:
            del self._active[id(module)]

    def _class(self, kind: type) -> bytes:
        if (known := _library_name(kind)) is not None:
            return known
        parts = [b"class", kind.__qualname__.encode(), *self._all(kind.__bases__)]
        if type(kind) is not type:
            parts.append(self.walk(type(kind)))
        for name in sorted(vars(kind)):
            if name not in _PASSIVE:
                parts += [name.encode(), self.walk(vars(kind)[name])]
        return self.pack(*parts)

    def _wrapped(self, thing: Any) -> bytes:
        return self.pack(type(thing).__name__.encode(), self.walk(thing.__func__))

    def _property(self, thing: property) -> bytes:
        return self.pack(b"property", *self._all((thing.fget, thing.fset, thing.fdel)))

    def _cached_property(self, thing: Any) -> bytes:
        return self.pack(b"cached_property", self.walk(thing.func))

    def _descriptor(self, thing: Any) -> bytes:
        return b"descriptor " + thing.__name__.encode()

    def _mapping_proxy(self, thing: Any) -> bytes:
        return self._dict(dict(thing))

    def _file(self, thing: Any) -> bytes:
        """Hash a file that a task will open, by what its file system says of it."""
        state = thing.fs.ukey(thing.path)
        how = (thing.path, thing.mode, thing.compression, thing.encoding, thing.errors)
        return self.pack(b"file", self.walk(thing.fs), *self._all(how), self.walk(state))

    def _reference(self, thing: Reference) -> bytes:
        return b"stored " + thing.name.encode()

    # -- anything else ---------------------------------------------------------------------------

    def _other(self, thing: Any) -> bytes:
        """Hash an object by what it would be pickled from."""
        if isinstance(thing, type):
            return self._class(thing)
        if isinstance(thing, types.ModuleType):
            return self._module(thing)
        kind = type(thing)
        if kind.__module__.startswith("numpy") and kind.__name__ == "ndarray":
            return self._array(thing)
        if kind.__name__ == "curry" and hasattr(thing, "keywords"):  # of toolz
            return self.pack(b"curry", *self._all((thing.func, thing.args, thing.keywords)))
        if kind.__module__ == "fsspec.core" and kind.__name__ == "OpenFile":
            return self._file(thing)
        token = getattr(thing, "__dask_tokenize__", None)
        if token is not None and not _is_file_system(kind):  # their tokens hold process ids
            return self.pack(b"token", self.walk(kind), self.walk(token()))
        reduce = copyreg.dispatch_table.get(kind)
        try:
            reduced: Any = thing.__reduce_ex__(5) if reduce is None else reduce(thing)
        except Exception as error:
            raise NoDigest(f"a {kind.__name__} cannot be taken apart: {error}") from error
        if isinstance(reduced, str):
            return self._by_name(thing, reduced)
        make, arguments, *rest = reduced
        rest += [None] * (4 - len(rest))
        state, items, pairs, _ = rest
        parts = [b"object", self.walk(kind), self.walk(make), self.walk(tuple(arguments))]
        parts.append(self.walk(state))
        parts += self._all(items) if items is not None else ()
        if pairs is not None:
            parts += self._all(each for item in pairs for each in item)
        return self.pack(*parts)

    def _by_name(self, thing: Any, name: str) -> bytes:
        module: str = pickle.whichmodule(thing, name)  # type: ignore[attr-defined]
        parts = [b"name", f"{module}:{name}".encode()]
        if is_library(module):
            parts.append(_with_version(module))
        else:
            parts.append(type(thing).__name__.encode())
            if (inner := getattr(thing, "__wrapped__", None)) is not None:  # by lru_cache
                parts.append(self.walk(inner))
        return self.pack(*parts)


def _digest(data: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"s" + data if len(data) <= 64 else b"S" + _digest(data)


def _bytes(data: bytes) -> bytes:
    return b"b" + data if len(data) <= 64 else b"B" + _digest(data)


def _plain(tag: str) -> Callable[[Any], bytes]:
    return lambda thing: f"{tag}{thing!r}".encode()


#: Types of which an object is its own digest.
_ATOMS: dict[type, Callable[[Any], bytes]] = {
    str: _text,
    bytes: _bytes,
    int: _plain("i"),
    float: _plain("f"),
    complex: _plain("c"),
    bool: _plain("?"),
    type(None): _plain(""),
    type(...): _plain(""),
    type(NotImplemented): _plain(""),
}
_HANDLERS: dict[type, Callable[[Hasher, Any], bytes]] = {
    list: Hasher._sequence,
    tuple: Hasher._sequence,
    dict: Hasher._dict,
    set: Hasher._set,
    frozenset: Hasher._set,
    bytearray: Hasher._buffer,
    memoryview: Hasher._buffer,
    pickle.PickleBuffer: Hasher._buffer,
    types.FunctionType: Hasher._function,
    types.CodeType: Hasher._code,
    types.ModuleType: Hasher._module,
    type: Hasher._class,
    staticmethod: Hasher._wrapped,
    classmethod: Hasher._wrapped,
    property: Hasher._property,
    cached_property: Hasher._cached_property,
    types.MemberDescriptorType: Hasher._descriptor,
    types.GetSetDescriptorType: Hasher._descriptor,
    types.MappingProxyType: Hasher._mapping_proxy,
    Reference: Hasher._reference,
}

# ---------------------------------------------------------------------------------------------
# libraries and the user's own
# ---------------------------------------------------------------------------------------------

_PYTHON = repr(sys.version_info[:2]).encode()


def _with_version(module: str) -> bytes:
    return f"{module} {_version(module.partition('.')[0])}".encode()


@lru_cache(1024)
def _version(top: str) -> str:
    """Return the version of a library, by the name of its package, imported or not."""
    if top in sys.stdlib_module_names:
        return str(sys.version_info[:2])
    match distributions_of(top):
        case [(name, version)] if name == top:
            return version
        case []:
            return str(getattr(sys.modules.get(top), "__version__", ""))
        case several:
            return " ".join(f"{name} {version}" for name, version in several)


def _library_name(thing: Any) -> bytes | None:
    """Return the name of a library's function or class; None for what cannot be imported by it."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", "")
    if not isinstance(module, str) or not is_library(module):
        return None
    found: Any = sys.modules.get(module)
    for step in name.split("."):
        found = getattr(found, step, None)
    if found is not thing and not (isinstance(thing, type) and module == "builtins"):
        return None
    return f"{name} of ".encode() + _with_version(module)


def _is_file_system(kind: type) -> bool:
    return any(
        each.__module__ == "fsspec.spec" and each.__name__ == "AbstractFileSystem"
        for each in kind.__mro__
    )


def _module_of(function: Any) -> str:
    """Return where a function, or the class of what is called, is defined."""
    while (inner := getattr(function, "func", None)) is not None and callable(inner):
        function = inner
    module = getattr(function, "__module__", None)
    return module if isinstance(module, str) else ""


def _source(name: str, namespace: Mapping[str, Any]) -> bytes:
    """Return what stands for a module as a whole: a user's own by its file."""
    module = absolute(name, namespace)
    if not module:
        return b"module " + name.encode()
    if is_library(module):
        return b"module " + _with_version(module)
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        path = spec.origin if spec is not None else None
    if path is None or path in ("built-in", "frozen"):
        return b"module " + module.encode()
    if of_library(path):
        return b"module " + _with_version(module)
    with open(path, "rb") as file:
        return b"file " + _digest(file.read())
