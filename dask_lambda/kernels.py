"""What the functions of Dask, NumPy and SciPy cost: a guess from the sizes of what they read.

Pure.  May import: the ground, dask's task specification.

A task's functions (after fusion there may be several in it) fall into families, of which each
has a formula.  The guesses are rough: shapes are not known here, only bytes, and blocks are taken
for square.  They decide whether tasks are run together, not what they compute; and after the first
run the measured ratio corrects them (:mod:`dask_lambda.estimates`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from dask._task_spec import DataNode, GraphNode, Task, _execute_subgraph

from lambda_worker.protocol import Key

#: Bytes of a number of which only the count is known.
ITEM = 8
#: A reduction of a block larger than this leaves so much less of it.
REDUCED_BYTES, REDUCED = 2**20, 256
#: What follows the first item of a tuple (R behind Q, the singular values behind U) is smaller.
LATER_ITEMS = 64
#: What calling a function costs.
CALL_SECONDS = 20e-6


@dataclass(frozen=True)
class Speed:
    """What one vCPU of a worker does.

    Attributes
    ----------
    flops : float
        Multiplications and additions a second in a product of large double precision matrices:
        25 GFlop/s is what OpenBLAS reaches on one core of the processors that Lambda has
        (numpywren, SoCC 2020, measures 16 to 30).
    bytes : float
        Bytes a second that an elementwise function reads and writes.
    """

    flops: float = 25e9
    bytes: float = 1e9

    @classmethod
    def of(cls, memory_mb: int) -> Speed:
        """Return the speed of a function: 1,769 MB are one vCPU, and BLAS uses all of them."""
        return cls(flops=cls.flops * max(1.0, memory_mb / 1769))


class Family(Enum):
    """What a function does, as far as its cost is concerned."""

    UNKNOWN = "unknown"  #: the user's own, or anything that is not in the tables
    VIEW = "view"  #: part of a value, or the same data in another order
    ITEM = "item"  #: one item of a tuple, such as Q of (Q, R)
    CREATE = "create"  #: makes a block of nothing
    BROADCAST = "broadcast"  #: the same, as one element that is repeated
    ELEMENTWISE = "elementwise"
    REDUCE = "reduce"
    JOIN = "join"  #: puts blocks together
    PRODUCT = "product"  #: of matrices
    FACTOR = "factor"  #: O(n^3) for n^2 numbers, at half the speed of a product


_LIBRARIES = frozenset({"numpy", "scipy", "operator", "_operator", "toolz", "cytoolz", "builtins"})
#: Of the libraries, what calls the user's code, or does I/O.
_UNKNOWN_NAMES = {
    *("map", "filter", "reduce", "sorted", "iter", "next", "getattr", "vars"),
    *("open", "print", "input", "eval", "exec", "compile"),
    *("vectorize", "methodcaller", "attrgetter", "fromfile", "tofile", "memmap", "load", "save"),
    *("savez", "savez_compressed", "loadtxt", "savetxt", "genfromtxt"),
}
_UNKNOWN_MODULES = ("numpy.random", "dask.bag", "numpy.lib._npyio", "numpy.ctypeslib", "scipy.io")
#: Of dask.array, what calls the user's code or a foreign array.
_UNKNOWN_DASK = {
    *("getter", "getter_nofancy", "getter_inline", "load_chunk", "store_chunk", "load_store_chunk"),
    *("apply_infer_dtype", "apply_gufunc"),
}
_NAMES = {
    Family.VIEW: "getitem transpose reshape squeeze swapaxes moveaxis _identity_cast identity "
    "_vindex_slice expand_dims broadcast_to rollaxis itemgetter",
    Family.CREATE: "zeros ones full empty eye arange linspace _apply_random _apply_random_func tri "
    "_rng_from_bitgen identity_matrix fromfunction",
    Family.BROADCAST: "_broadcast_trick_inner",
    Family.REDUCE: "sum prod min max any all mean_chunk mean_combine mean_agg moment_chunk "
    "moment_agg moment_combine nansum nanmin nanmax argmin argmax arg_chunk arg_combine arg_agg "
    "chunk_min chunk_max norm count_nonzero numel",
    Family.JOIN: "concatenate concatenate3 _concatenate2 concatenate_shaped stack vstack hstack "
    "block concatenate_arrays list tuple dict",
    Family.PRODUCT: "dot tensordot _tensordot matmul _matmul einsum chunk_einsum vdot inner outer "
    "gufunc_matmul",
    Family.FACTOR: "cholesky _cholesky_lower solve_triangular solve_triangular_safe "
    "_solve_triangular_lower _wrapped_qr qr svd lu inv solve lstsq eig eigh pinv det",
}
_FAMILIES = {name: family for family, names in _NAMES.items() for name in names.split()}


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a layer of tasks does.

    Attributes
    ----------
    families : tuple of Family
        Of its functions.
    walks : bool
        Whether its tasks hold data or the sizes of what they make.
    """

    families: tuple[Family, ...]
    walks: bool

    @property
    def known(self) -> bool:
        """Whether it is in the tables; then it is also repeatable, and reads nothing outside."""
        return Family.UNKNOWN not in self.families

    @property
    def is_item(self) -> bool:
        """Whether it takes one item out of a tuple."""
        return self.families == (Family.ITEM,)

    def output_bytes(self, task: GraphNode, reads: Sequence[int]) -> int | None:
        """Guess the size of a task's result.

        Parameters
        ----------
        task : GraphNode
        reads : sequence of int
            Bytes of what it reads.
        """
        made = _made_bytes(task) if self.walks else 0
        size = max(reads, default=0)
        if Family.JOIN in self.families:
            size = sum(reads)
        size = max(size, made)
        if not size:
            return None
        if self.is_item and isinstance(task, Task) and task.args[1]:
            size //= LATER_ITEMS
        if Family.REDUCE in self.families and Family.PRODUCT not in self.families:
            size = size // REDUCED if size > REDUCED_BYTES else size
        return size

    def seconds(self, reads: Sequence[int], output: int, speed: Speed) -> float:
        """Guess how long a task takes.

        Parameters
        ----------
        reads : sequence of int
            Bytes of what it reads.
        output : int
            Bytes of its result.
        speed : Speed
        """
        moved = sum(reads) + output
        largest = max([output, *reads])
        total = CALL_SECONDS
        for family in self.families:
            match family:
                case Family.PRODUCT:
                    two = sorted(reads)[-2:] or [output]
                    numbers = two[0] / ITEM * (two[-1] / ITEM) * (output / ITEM)
                    total += 2 * math.sqrt(numbers) / speed.flops
                case Family.FACTOR:
                    total += 2 * (largest / ITEM) ** 1.5 / speed.flops
                case Family.CREATE:
                    total += 2 * largest / speed.bytes
                case Family.ELEMENTWISE | Family.REDUCE | Family.JOIN:
                    total += moved / speed.bytes
        return total


def kernel_of(task: GraphNode) -> Kernel:
    """Classify a task by the functions in it."""
    families: list[Family] = []
    data = False
    for part in _parts(task):
        if isinstance(part, Family):
            families.append(part)
        else:
            data = True
    walks = data or bool({Family.CREATE, Family.BROADCAST} & set(families))
    return Kernel(tuple(families), walks)


class Catalogue:
    """Classifies the tasks of a graph, each kind of them once."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    def kernel(self, key: Key, task: GraphNode) -> Kernel:
        """Return the kernel of a task: that of the tasks of its layer with the same function."""
        layer = key[0] if type(key) is tuple and key else key
        kind = layer, id(getattr(task, "func", None)), len(task.dependencies)
        found = self._kernels.get(kind)
        if found is None:
            found = self._kernels[kind] = kernel_of(task)
        return found


def held(task: GraphNode) -> Iterator[Any]:
    """Yield the arrays that a task holds itself, such as a chunk of ``from_array``."""
    return (part for part in _parts(task) if not isinstance(part, Family))


def size_of(value: Any) -> int:
    """Return about how many bytes a literal has, without looking into large ones."""
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    if isinstance(value, bytes | bytearray | str):
        return len(value)
    return 256


def _parts(part: Any) -> Iterator[Family | Any]:
    """Yield the family of each function in a task, and the arrays that it holds."""
    if isinstance(part, DataNode):
        part = part.value
    if isinstance(part, Task):
        if part.func is _execute_subgraph:
            for inner in part.args[0].values():
                yield from _parts(inner)
            return
        if _is_item(part):
            yield Family.ITEM
            return
        yield from _of_function(part.func)
        if getattr(part.func, "__module__", "") == "dask.array.random":
            return  # the generator that it holds is made anew from its seed
        yield from _parts(part.args)
        yield from _parts(part.kwargs)
    elif isinstance(part, list | tuple):
        if len(part) <= 64:
            for each in part:
                if isinstance(each, list | tuple | dict | Task | DataNode) or callable(each):
                    yield from _parts(each)
                elif hasattr(each, "nbytes"):
                    yield each
    elif isinstance(part, dict):
        yield from _parts(list(part.values()))
    elif hasattr(part, "nbytes"):
        yield part
    elif callable(part) and not isinstance(part, type):
        yield from _of_function(part)


def _is_item(task: Task) -> bool:
    name = getattr(task.func, "__name__", "")
    return name == "getitem" and len(task.args) == 2 and type(task.args[1]) is int


def _of_function(function: Any) -> Iterator[Family]:
    if _is_partial(function):
        name = getattr(function.func, "__name__", "")
        yield from _of_function(function.func)
        if _FAMILIES.get(name) is Family.BROADCAST:
            return  # of which the function that it holds makes one element
        for each in (*function.args, *function.keywords.values()):
            if callable(each) and not isinstance(each, type):
                yield from _of_function(each)
        return
    if (functions := getattr(function, "funcs", None)) is not None and hasattr(function, "first"):
        for each in (function.first, *functions):  # toolz.Compose
            yield from _of_function(each)
        return
    name = getattr(function, "__name__", type(function).__name__)
    module = getattr(function, "__module__", None) or ""
    library = module.partition(".")[0]
    if module.startswith(_UNKNOWN_MODULES):
        yield Family.UNKNOWN
    elif library in _LIBRARIES:
        kind = type(function).__name__  # numpy.vectorize has the name of the user's function
        calls = not _UNKNOWN_NAMES.isdisjoint((name, kind))
        calls = calls or name.endswith("(vectorized)")  # of numpy.frompyfunc
        yield Family.UNKNOWN if calls else _FAMILIES.get(name, Family.ELEMENTWISE)
    elif module.startswith("dask.array"):
        if name in _UNKNOWN_DASK:
            yield Family.UNKNOWN
        elif name == "_chunk_sum":  # of blocks that are there: an addition
            yield Family.ELEMENTWISE
        else:
            yield _FAMILIES.get(name, Family.ELEMENTWISE)
    elif module == "dask._task_spec":
        yield Family.VIEW
    else:
        yield Family.UNKNOWN


def _is_partial(function: Any) -> bool:
    """Tell partial functions, also those of toolz, which Dask gives the names of what they make."""
    return isinstance(function, partial) or (
        type(function).__name__ == "curry" and hasattr(function, "keywords")
    )


def _made_bytes(task: GraphNode) -> int:
    """Return the bytes of the largest block that a task holds, or makes of nothing."""
    return max(_sizes(task), default=0)


def _sizes(part: Any) -> Iterator[int]:
    if isinstance(part, DataNode):
        part = part.value
    if isinstance(part, Task):
        if part.func is _execute_subgraph:
            for inner in part.args[0].values():
                yield from _sizes(inner)
            yield from _sizes(list(part.args[3:]))
            return
        function: Any = part.func
        yield from _sizes(part.kwargs.get("shape"))
        while _is_partial(function):
            yield from _sizes(function.keywords.get("shape"))
            function = function.func
        name = getattr(function, "__name__", "")
        if name == "arange" and len(part.args) > 3 and isinstance(part.args[3], int):
            yield part.args[3] * ITEM
        elif name == "linspace" and len(part.args) > 2 and isinstance(part.args[2], int):
            yield part.args[2] * ITEM
        elif name == "eye" and len(part.args) > 1:
            yield from _sizes(tuple(part.args[:2]))
        else:
            yield from _sizes(list(part.args))
    elif isinstance(part, tuple) and part and all(type(n) is int and n >= 0 for n in part):
        yield math.prod(part) * ITEM  # a shape
    elif isinstance(part, list | tuple):
        for each in part[:64]:
            yield from _sizes(each)
    else:
        size = getattr(part, "nbytes", None)
        if isinstance(size, int):
            yield size
