"""What the tasks of linear algebra take and return, from the shapes of their blocks.

Tasks are not run: shapes run through them.  Each function has a rule that gives the shape of its
result, the floating point operations and the bytes that it moves; a task takes the longer of what
these two take (the roofline model: Williams, Waterman, Patterson, CACM 52, 2009).  Counts of
operations are those of Golub and Van Loan, "Matrix Computations".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dask._task_spec import Alias, DataNode, GraphNode, NestedContainer, Task, TaskRef

from dask_lambda.estimates import Estimates
from dask_lambda.graph import Graph
from dask_lambda.plan import topological
from lambda_worker.protocol import Key, Reference

ITEM = 8


@dataclass(frozen=True, slots=True)
class Block:
    """A double precision array of which only the shape is known."""

    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)


@dataclass(frozen=True)
class Machine:
    """What the function's processor does.

    Attributes
    ----------
    vcpus : float
        Threads of the linear algebra library are as many.
    flops : float
        Of one vCPU, a second, in a product of large matrices: 25 GFlop/s (numpywren, SoCC 2020,
        measures 16 to 30).
    factor : float
        The share of it that factorisations of single blocks reach (QR, Cholesky, triangular
        solves of large blocks).
    bytes : float
        Bytes a second that an elementwise function reads and writes, on one thread, as NumPy does.
    call : float
        Seconds of a call.
    """

    vcpus: float = 1.0
    flops: float = 25e9
    factor: float = 0.5
    bytes: float = 4e9
    call: float = 20e-6


@dataclass
class Work:
    """What a task has done so far."""

    products: float = 0.0  # floating point operations
    factors: float = 0.0  # the same, in factorisations
    moved: float = 0.0  # bytes
    calls: int = 0

    def seconds(self, machine: Machine) -> float:
        """Return how long that takes."""
        rate = machine.flops * machine.vcpus
        arithmetic = self.products / rate + self.factors / (rate * machine.factor)
        return self.calls * machine.call + max(arithmetic, self.moved / machine.bytes)


@dataclass
class Shapes:
    """Runs shapes through the tasks of a graph.

    Parameters
    ----------
    stored : mapping
        The shape of each stored result, by the name of its object.
    """

    stored: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    work: Work = field(default_factory=Work)

    def run(self, task: GraphNode, values: Mapping[Key, Any]) -> tuple[Any, Work]:
        """Return the (shape of the) result of a task, and what it takes."""
        self.work = Work()
        result = self._value(task, values)
        return result, self.work

    def _value(self, part: Any, values: Mapping[Key, Any]) -> Any:
        if isinstance(part, TaskRef):
            return values[part.key]
        if isinstance(part, Alias):
            return values[part.target]
        if isinstance(part, DataNode):
            return part.value
        if isinstance(part, NestedContainer):
            return part.klass(self._value(each, values) for each in part.args)
        if isinstance(part, Task):
            arguments = [self._value(each, values) for each in part.args]
            named = {name: self._value(each, values) for name, each in part.kwargs.items()}
            return self._call(part.func, arguments, named)
        if type(part) in (list, tuple):
            return type(part)(self._value(each, values) for each in part)
        return part

    def _call(self, function: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
        if isinstance(function, partial):
            return self._call(
                function.func, [*function.args, *arguments], {**function.keywords, **named}
            )
        if hasattr(function, "first") and hasattr(function, "funcs"):  # toolz.Compose
            value = self._call(function.first, arguments, named)
            for each in function.funcs:
                value = self._call(each, [value], {})
            return value
        name = function.__name__
        if name == "_execute_subgraph":
            inner, wanted, names, *given = arguments
            return _Inner(self, inner, dict(zip(names, given, strict=True)))[wanted]
        if name == "load_reference":
            reference: Reference = arguments[0]
            return Block(self.stored[reference.name])
        self.work.calls += 1
        rule = _RULES.get(name) or _RULES.get(function.__qualname__)  # the name may be a mask
        if rule is None:
            raise NotImplementedError(f"no rule for {function}")
        return rule(self.work, *arguments, **named)


class _Inner(dict[Any, Any]):
    """Values inside of a fused task, made when they are needed."""

    def __init__(self, shapes: Shapes, tasks: Mapping[Any, GraphNode], given: Mapping[Any, Any]):
        super().__init__(given)
        self._shapes, self._tasks = shapes, tasks

    def __missing__(self, key: Any) -> Any:
        value = self[key] = self._shapes._value(self._tasks[key], self)
        return value


def true_estimates(
    graph: Graph, machine: Machine, stored: Mapping[str, tuple[int, ...]] | None = None
) -> Estimates:
    """Return what each task takes on a machine, and the size of each value.

    Parameters
    ----------
    graph : Graph
    machine : Machine
    stored : mapping, optional
        The shape of each stored result, by the name of its object.
    """
    stored = stored or {}
    shapes = Shapes(stored)
    values: dict[Key, Any] = dict(graph.literals)
    values.update((key, Block(stored[r.name])) for key, r in graph.stored.items())
    aliases = _reverse(graph.aliases)
    for key in list(values):
        for other in aliases.get(key, ()):
            values[other] = values[key]
    seconds: dict[Key, float] = {}
    for key in topological(graph, set()):
        result, work = shapes.run(graph.tasks[key], values)
        seconds[key] = work.seconds(machine)
        values[key] = result
        for other in aliases.get(key, ()):
            values[other] = result
    every = (*graph.tasks, *graph.literals, *graph.stored)
    return Estimates(seconds, {key: size_of(values[key]) for key in every})


def _reverse(aliases: Mapping[Key, Key]) -> dict[Key, list[Key]]:
    found: dict[Key, list[Key]] = {}
    for name, target in aliases.items():
        found.setdefault(target, []).append(name)
    return found


def size_of(value: Any) -> int:
    """Return the bytes of a value with blocks in it."""
    if isinstance(value, list | tuple):
        return sum(map(size_of, value))
    return getattr(value, "nbytes", ITEM)


# ---------------------------------------------------------------------------------------------
# the rules: from the work so far and the arguments to the result
# ---------------------------------------------------------------------------------------------


def _first(x: Any) -> Any:
    """Return the block of a list of one block."""
    while isinstance(x, list | tuple) and len(x) == 1:
        x = x[0]
    return x


def _dot(work: Work, a: Any, b: Any, **named: Any) -> Any:
    a, b = _first(a), _first(b)
    shape = (*a.shape[:-1], *b.shape[:-2], b.shape[-1])
    work.products += 2.0 * math.prod(shape) * a.shape[-1]
    return Block(shape)


def _matmul(work: Work, a: Any, b: Any, **named: Any) -> Any:
    """A product of which dask keeps the contracted axis, of length one, before the last."""
    out = _dot(work, a, b)
    return Block((*out.shape[:-1], 1, out.shape[-1]))


def _tensordot(work: Work, a: Any, b: Any, axes: Any, is_sparse: bool = False) -> Any:
    left, right = axes
    left, right = list(left), list(right)
    kept = [n for i, n in enumerate(a.shape) if i not in left]
    kept += [n for i, n in enumerate(b.shape) if i not in right]
    work.products += 2.0 * math.prod(kept) * math.prod(a.shape[i] for i in left)
    shape = list(kept)
    for axis in sorted(left):
        shape.insert(axis, 1)
    return Block(tuple(shape))


def _elementwise(work: Work, *arguments: Any, **named: Any) -> Any:
    blocks = [each for each in arguments if isinstance(each, Block)]
    result = max(blocks, key=lambda block: (block.ndim, block.nbytes), default=None)
    if result is None:
        return 0.0
    ndim = result.ndim
    shape = []
    for axis in range(ndim):
        lengths = [b.shape[axis - ndim] for b in blocks if b.ndim >= ndim - axis]
        shape.append(max(lengths))
    result = Block(tuple(shape))
    work.moved += result.nbytes + sum(block.nbytes for block in blocks)
    return result


def _sum(work: Work, x: Any, *rest: Any, **named: Any) -> Any:
    if isinstance(x, list | tuple) and not named:  # the builtin, perhaps with a start
        for each in (*rest, *x):
            work.moved += 3 * size_of(each)
        return x[0]
    x = _concatenated(work, x)
    work.moved += x.nbytes
    axis = named.get("axis")
    axes = range(x.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    axes = {a % x.ndim for a in axes}
    if named.get("keepdims"):
        return Block(tuple(1 if i in axes else n for i, n in enumerate(x.shape)))
    return Block(tuple(n for i, n in enumerate(x.shape) if i not in axes))


def _chunk_sum(work: Work, a: Any, axis: Any = None, keepdims: bool = False, **named: Any) -> Any:
    if isinstance(a, list):
        for each in a:
            work.moved += 3 * size_of(each)
        a = a[0]
    if keepdims:
        return a
    axes = [axis] if isinstance(axis, int) else axis
    return Block(tuple(n for i, n in enumerate(a.shape) if i not in axes))


def _concatenated(work: Work, x: Any) -> Any:
    x = _first(x)
    if isinstance(x, list | tuple):
        return _stack_on(work, x, 0 if x[0].ndim < 2 else -1)
    return x


def _stack_on(work: Work, parts: Any, axis: int) -> Any:
    first = parts[0]
    axis %= first.ndim
    length = sum(each.shape[axis] for each in parts)
    result = Block((*first.shape[:axis], length, *first.shape[axis + 1 :]))
    work.moved += 2 * result.nbytes
    return result


def _vstack(work: Work, parts: Any, **named: Any) -> Any:
    return _stack_on(work, list(parts), 0)


def _concatenate(work: Work, parts: Any, axes: Any = None, axis: int = 0, **named: Any) -> Any:
    parts = _first(parts)
    if not isinstance(parts, list | tuple):
        return parts
    return _stack_on(work, parts, axis if axes is None else axes[0])


def _qr(work: Work, a: Any, *rest: Any, **named: Any) -> Any:
    m, n = a.shape
    k = min(m, n)
    # Householder and the explicit Q: 2 (2 m n^2 - 2/3 n^3).
    work.factors += 2 * (2.0 * m * n * k - 2.0 / 3.0 * k**3)
    return Block((m, k)), Block((k, n))


def _svd(work: Work, a: Any, *rest: Any, **named: Any) -> Any:
    m, n = a.shape
    k = min(m, n)
    work.factors += 6.0 * m * n * k + 20.0 * k**3
    return Block((m, k)), Block((k,)), Block((k, n))


def _cholesky(work: Work, a: Any, *rest: Any, **named: Any) -> Any:
    work.factors += a.shape[0] ** 3 / 3.0
    return a


def _solve_triangular(work: Work, a: Any, b: Any, *rest: Any, **named: Any) -> Any:
    work.factors += float(a.shape[0]) ** 2 * b.shape[-1]
    return b


def _getitem(work: Work, x: Any, index: Any) -> Any:
    if not isinstance(x, Block):
        return x[index]
    shape: list[int] = []
    lengths = list(x.shape)
    for each in index if isinstance(index, tuple) else (index,):
        if each is None:
            shape.append(1)
        elif isinstance(each, slice):
            shape.append(len(range(*each.indices(lengths.pop(0)))))
        else:
            lengths.pop(0)
    return Block((*shape, *lengths))


def _transpose(work: Work, x: Any, axes: Any = None, **named: Any) -> Any:
    axes = range(x.ndim)[::-1] if axes is None else axes
    return Block(tuple(x.shape[i] for i in axes))


def _conj_transpose(work: Work, x: Any) -> Any:
    work.moved += 2 * x.nbytes
    return _transpose(work, x)


def _dotmany(work: Work, a: Any, b: Any, **named: Any) -> Any:
    terms = [_dot(work, x, y) for x, y in zip(a, b, strict=True)]
    work.moved += 3 * sum(term.nbytes for term in terms[1:])
    return terms[0]


def _random(work: Work, *arguments: Any, **named: Any) -> Any:
    shape = next(each for each in arguments if _is_shape(each))
    result = Block(tuple(shape))
    work.moved += 16.0 * result.nbytes  # 2 ns each
    return result


def _full(work: Work, *arguments: Any, **named: Any) -> Any:
    shape = named.get("shape") or next(each for each in arguments if _is_shape(each))
    result = Block(tuple(shape))
    work.moved += result.nbytes
    return result


def _eye(work: Work, *arguments: Any, **named: Any) -> Any:
    rows, *columns = (each for each in arguments if isinstance(each, int))
    result = Block((rows, columns[0] if columns else rows))
    work.moved += result.nbytes
    return result


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and bool(x) and all(isinstance(n, int) for n in x)


def _same(work: Work, x: Any, *rest: Any, **named: Any) -> Any:
    return x


_RULES: dict[str, Callable[..., Any]] = {
    "dot": _dot,
    "matmul": _dot,
    "_matmul": _matmul,
    "_tensordot": _tensordot,
    "dotmany": _dotmany,
    "sum": _sum,
    "_chunk_sum": _chunk_sum,
    "vstack": _vstack,
    "concatenate": _concatenate,
    "_concatenate2": _concatenate,
    "qr": _qr,
    "_wrapped_qr": _qr,
    "svd": _svd,
    "cholesky": _cholesky,
    "_cholesky_lower": _cholesky,
    "_solve_triangular_lower": _solve_triangular,
    "solve_triangular": _solve_triangular,
    "solve_triangular_safe": _solve_triangular,
    "getitem": _getitem,
    "transpose": _transpose,
    "tuple": lambda work, x: tuple(x),
    "list": lambda work, x: list(x),
    "identity": _same,
    "_identity_cast": lambda work, *items, typ: typ(items),
    "_apply_random": _random,
    "_apply_random_func": _random,
    "_conj_transpose": _conj_transpose,
    "eye": _eye,
    "_broadcast_trick_inner": _full,
    "zeros": _full,
    "ones": _full,
    "zeros_like": _full,
    **dict.fromkeys(
        [
            "sub",
            "add",
            "mul",
            "neg",
            "sign",
            "where",
            "subtract",
            "multiply",
            "truediv",
            "ge",
            "gt",
            "le",
            "lt",
            "eq",
            "ne",
            "abs",
            "sqrt",
        ],
        _elementwise,
    ),
}
