"""The mixed graphs of the soak, each with a check of its values.

A case is made of a seed: its data and sizes.  The names of its tasks are its own, so that no two
cases have a task in common.
"""

from __future__ import annotations

import operator
import random
import secrets
import sys
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import dask.array as da
import dask.bag as db
import numpy as np
from dask import delayed
from dask._task_spec import Task, TaskRef
from dask.base import collections_to_expr

from dask_lambda.graph import materialise


class Wrong(Exception):
    """A run gave another value than it should."""


class Disagreement(Exception):
    """Two readers of one task have seen different values: an effect of it happened twice."""


@dataclass
class Case:
    """What a run computes.

    Attributes
    ----------
    collections : list of dask collections
        Computed together.
    check : callable
        Takes the tuple of their values; raises :class:`Wrong` or :class:`Disagreement`.
    settings : dict
        For ``compute``.
    error : type, optional
        What the run must end in, in place of values.
    persist : bool
        Persist the collections first, and compute them twice.
    small_parts : bool
        Whether to use a function for which objects of 200 kB are large.
    """

    collections: list[Any]
    check: Callable[[Sequence[Any]], None]
    settings: dict[str, Any] = field(default_factory=dict)
    error: type[Exception] | None = None
    persist: bool = False
    small_parts: bool = False


class Broken(Exception):
    """A user's exception."""


def again(collection: Any) -> Any:
    """A collection of the same values, for which each block is read by a task."""
    if isinstance(collection, db.Bag):
        return collection.map(same)
    return collection.map_blocks(same, dtype=collection.dtype)


def keys_of(collections: Sequence[Any]) -> list[Any]:
    """The keys of the tasks that ``compute`` hands to a scheduler."""
    return list(materialise(collections_to_expr(collections, True).optimize()))


def _equals(*expected: Any) -> Callable[[Sequence[Any]], None]:
    def check(values: Sequence[Any]) -> None:
        for value, right in zip(values, expected, strict=True):
            if isinstance(right, np.ndarray | np.floating):
                same = np.shape(value) == np.shape(right) and np.allclose(value, right)
            else:
                same = value == right
            if not same:
                raise Wrong(f"{value!r} in place of {right!r}"[:1000])

    return check


def _agree(tokens: Sequence[str]) -> None:
    if len(set(tokens)) != 1:
        raise Disagreement(f"readers of one task have seen {sorted(set(tokens))}")


# -- what the tasks do ---------------------------------------------------------------------------


def inc(x: int) -> int:
    return x + 1


def same(x: Any) -> Any:
    return x


def total(numbers: Sequence[int]) -> int:
    return sum(numbers)


def draw_token(_: Any = None) -> str:
    """Another value at each call."""
    return secrets.token_hex(8)


def pad(token: str, size: int) -> tuple[str, np.ndarray]:
    return token, np.zeros(size)


def draw_pair(size: int) -> tuple[Any, Any]:
    """A pair that belongs together, another one at each call."""
    token = draw_token()
    return pad(token, size), pad(token, size)


def see(place: int, *tokens: Any) -> tuple[int, list[Any]]:
    """What a reader has seen."""
    return place, list(tokens)


def seen(*readers: Any) -> list[Any]:
    return list(readers)


def noise(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size)


def flaky(directory: Path, times: int, x: int) -> int:
    """Fail so many times; workers and client share the file system."""
    (directory / uuid.uuid4().hex).touch()
    if len(list(directory.iterdir())) <= times:
        raise Broken("not yet")
    return x + 1


def break_down(x: int) -> None:
    raise Broken(f"as it should: {x}")


# -- the cases -----------------------------------------------------------------------------------


def calls(rng: random.Random, salt: str, directory: Path) -> Case:
    """Calls that have nothing to do with each other."""
    numbers = [rng.randrange(1000) for _ in range(rng.randint(6, 20))]
    made = [delayed(inc)(n, dask_key_name=f"inc-{salt}-{i}") for i, n in enumerate(numbers)]
    return Case(made, _equals(*(n + 1 for n in numbers)))


def tree(rng: random.Random, salt: str, directory: Path) -> Case:
    """A binary tree of additions."""
    numbers = [rng.randrange(1000) for _ in range(rng.choice([4, 8, 11]))]
    level = [delayed(inc)(n, dask_key_name=f"leaf-{salt}-{i}") for i, n in enumerate(numbers)]
    depth = 0
    while len(level) > 1:
        depth += 1
        level = [
            delayed(total)(level[i : i + 2], dask_key_name=f"add-{salt}-{depth}-{i}")
            for i in range(0, len(level), 2)
        ]
    return Case(level, _equals(sum(numbers) + len(numbers)))


def diamonds(rng: random.Random, salt: str, directory: Path) -> Case:
    """One becomes two becomes one, a few times."""
    start = value = rng.randrange(100)
    dsk: Any = delayed(inc)(start, dask_key_name=f"start-{salt}")
    value += 1
    for i in range(rng.randint(2, 5)):
        left = delayed(inc)(dsk, dask_key_name=f"left-{salt}-{i}")
        right = delayed(operator.neg)(dsk, dask_key_name=f"right-{salt}-{i}")
        dsk = delayed(total)([left, right, dsk], dask_key_name=f"join-{salt}-{i}")
        value = (value + 1) - value + value
    return Case([dsk], _equals(value))


def fan_in(rng: random.Random, salt: str, directory: Path) -> Case:
    """Many become one."""
    count = rng.randint(12, 30)
    parts = [delayed(inc)(i, dask_key_name=f"part-{salt}-{i}") for i in range(count)]
    return Case(
        [delayed(total)(parts, dask_key_name=f"all-{salt}")], _equals(count * (count + 1) // 2)
    )


def _matrix(rng: random.Random, salt: str, n: int, chunk: int) -> tuple[np.ndarray, da.Array]:
    x = np.random.default_rng(rng.randrange(2**32)).integers(-9, 9, (n, n)).astype(float)
    return x, da.from_array(x, chunks=chunk, name=f"x-{salt}")


def matmul(rng: random.Random, salt: str, directory: Path) -> Case:
    """A product of matrices in blocks."""
    n = rng.choice([2, 3])
    x, dx = _matrix(rng, salt, 20 * n, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", da.PerformanceWarning)
        product = dx @ dx.T
    return Case([product, product.sum()], _equals(x @ x.T, (x @ x.T).sum()))


def cholesky(rng: random.Random, salt: str, directory: Path) -> Case:
    """A Cholesky factorisation in blocks."""
    n = 15 * rng.choice([2, 3])
    x, _ = _matrix(rng, salt, n, 15)
    spd = x @ x.T + n * 100 * np.eye(n)
    made = da.linalg.cholesky(da.from_array(spd, chunks=15, name=f"spd-{salt}"), lower=True)
    return Case([made], _equals(np.linalg.cholesky(spd)))


def literals(rng: random.Random, salt: str, directory: Path) -> Case:
    """Blocks that the client uploads."""
    x = np.random.default_rng(rng.randrange(2**32)).random((40, 5000))
    dx = da.from_array(x, chunks=(10, 5000), name=f"literal-{salt}")
    return Case([(dx * 2).sum(axis=0), dx.max()], _equals((x * 2).sum(axis=0), x.max()))


def large(rng: random.Random, salt: str, directory: Path) -> Case:
    """Objects that travel in parts."""
    sizes = [rng.choice([20_000, 40_000, 90_000]) for _ in range(4)]
    seeds = [rng.randrange(2**32) for _ in sizes]
    made = [
        delayed(noise)(seed, size, dask_key_name=f"noise-{salt}-{i}")
        for i, (seed, size) in enumerate(zip(seeds, sizes, strict=True))
    ]
    joined = delayed(np.concatenate)(made, dask_key_name=f"joined-{salt}")
    expected = np.concatenate([noise(*each) for each in zip(seeds, sizes, strict=True)])
    top = delayed(np.max)(joined, dask_key_name=f"max-{salt}")
    return Case([joined, top], _equals(expected, expected.max()), small_parts=True)


def results(rng: random.Random, salt: str, directory: Path) -> Case:
    """Groups with several outputs: steps of a row that are all wanted."""
    count = rng.randint(3, 6)
    x = np.random.default_rng(rng.randrange(2**32)).random(1000 * count)
    a = da.from_array(x, chunks=1000, name=f"row-{salt}")
    b = a.map_blocks(np.sqrt, dtype=float)
    c = b.map_blocks(np.cos, dtype=float)
    return Case(
        [b, c, c.sum(), b.mean()],
        _equals(np.sqrt(x), np.cos(np.sqrt(x)), np.cos(np.sqrt(x)).sum(), np.sqrt(x).mean()),
    )


def bag(rng: random.Random, salt: str, directory: Path) -> Case:
    """A bag, folded."""
    numbers = [rng.randrange(10**6) for _ in range(60)]
    made = db.from_sequence([(salt, n) for n in numbers], npartitions=6).map(operator.itemgetter(1))
    return Case([made.sum(), made.max()], _equals(sum(numbers), max(numbers)))


def tokens(rng: random.Random, salt: str, directory: Path) -> Case:
    """Tasks that are not deterministic, each with several readers, some of them large."""
    sources, readers = [], []
    size = rng.choice([1, 1, 20_000])
    for i in range(rng.randint(2, 4)):
        token = delayed(draw_token)(dask_key_name=f"token-{salt}-{i}")
        source = delayed(pad)(token, size, dask_key_name=f"padded-{salt}-{i}")
        sources.append(delayed(operator.itemgetter(0))(source, dask_key_name=f"first-{salt}-{i}"))
        sources[-1:] = [sources[-1], token]
        for j in range(3):
            picked = delayed(operator.itemgetter(0))(source, dask_key_name=f"pick-{salt}-{i}-{j}")
            readers.append(delayed(see)(i, picked, token, dask_key_name=f"see-{salt}-{i}-{j}"))
    everybody = delayed(seen)(*readers, dask_key_name=f"seen-{salt}")

    def check(values: Sequence[Any]) -> None:
        *given, all_seen = values
        for i in range(len(given) // 2):
            of_readers = [t for place, drawn in all_seen if place == i for t in drawn]
            if len(of_readers) != 6:
                raise Wrong(f"{len(of_readers)} tokens were seen, not 6")
            _agree([given[2 * i], given[2 * i + 1], *of_readers])

    return Case([*sources, everybody], check)


def pairs(rng: random.Random, salt: str, directory: Path) -> Case:
    """Groups with several outputs that belong together: the halves of random pairs."""
    halves: list[Any] = []
    count = rng.randint(2, 5)
    for i in range(count):
        pair = delayed(draw_pair)(rng.choice([1, 1, 30_000]), dask_key_name=f"pair-{salt}-{i}")
        halves += [
            delayed(operator.itemgetter(j))(pair, dask_key_name=f"half-{salt}-{i}-{j}")
            for j in range(2)
        ]
    readers = [
        delayed(see)(n, half, dask_key_name=f"reader-{salt}-{n}") for n, half in enumerate(halves)
    ]
    everybody = delayed(seen)(*readers, dask_key_name=f"seen-{salt}")

    def check(values: Sequence[Any]) -> None:
        *given, all_seen = values
        of_readers = [drawn[0] for _, drawn in all_seen]
        for i in range(count):
            mine = slice(2 * i, 2 * i + 2)
            _agree([token for token, _ in (*given[mine], *of_readers[mine])])

    return Case([*halves, everybody], check)


def raising(rng: random.Random, salt: str, directory: Path) -> Case:
    """A task that raises, with or without retries."""
    good = [delayed(inc)(i, dask_key_name=f"good-{salt}-{i}") for i in range(5)]
    bad = delayed(break_down)(good[rng.randrange(5)], dask_key_name=f"bad-{salt}")
    everything = delayed(seen)(*good, bad, dask_key_name=f"all-{salt}")
    return Case([everything], _equals(None), {"retries": rng.choice([0, 2])}, error=Broken)


def retried(rng: random.Random, salt: str, directory: Path) -> Case:
    """Tasks that raise at first."""
    made, expected = [], []
    for i in range(4):
        place = directory / f"{salt}-{i}"
        place.mkdir()
        times = rng.randint(0, 2)
        expected.append(i + 1)
        made.append(delayed(flaky)(place, times, i, dask_key_name=f"flaky-{salt}-{i}"))
    total_ = delayed(total)(made, dask_key_name=f"sum-{salt}")
    # Twice for the task itself, and twice for what is injected.
    return Case([*made, total_], _equals(*expected, sum(expected)), {"retries": 4})


def persisted(rng: random.Random, salt: str, directory: Path) -> Case:
    """A collection that is persisted, and computed twice."""
    x = np.random.default_rng(rng.randrange(2**32)).random((30, 200))
    dx = da.from_array(x, chunks=(10, 200), name=f"kept-{salt}") + 1
    return Case([dx], _equals(x + 1), persist=True)


def persisted_tokens(rng: random.Random, salt: str, directory: Path) -> Case:
    """Blocks that are not deterministic, persisted: whoever loads them sees the same."""
    graph = {(f"token-{salt}", i): Task((f"token-{salt}", i), draw_token) for i in range(4)}
    graph.update(
        {
            (f"copy-{salt}", i): Task((f"copy-{salt}", i), see, i, TaskRef((f"token-{salt}", i)))
            for i in range(4)
        }
    )
    token, copy = (db.Bag(graph, f"{name}-{salt}", 4) for name in ("token", "copy"))

    def check(values: Sequence[Any]) -> None:
        first, copies = values
        text = "".join(first)
        for i, (place, drawn) in enumerate(zip(copies[::2], copies[1::2], strict=True)):
            if place != i:
                raise Wrong(f"block {place} in place of {i}")
            _agree([drawn[0], text[16 * i : 16 * (i + 1)]])

    return Case([token, copy], check, persist=True)


GRAPHS: dict[str, Callable[[random.Random, str, Path], Case]] = {
    "calls": calls,
    "tree": tree,
    "diamonds": diamonds,
    "fan-in": fan_in,
    "matmul": matmul,
    "cholesky": cholesky,
    "literals": literals,
    "large": large,
    "results": results,
    "bag": bag,
    "tokens": tokens,
    "pairs": pairs,
    "raising": raising,
    "retried": retried,
    "persisted": persisted,
    "persisted tokens": persisted_tokens,
}


def make(name: str, seed: int, directory: Path) -> Case:
    """Make a case.

    Parameters
    ----------
    name : str
        One of :data:`GRAPHS`.
    seed : int
    directory : Path
        Where its tasks may leave files.
    """
    salt = f"{seed}-{uuid.uuid4().hex[:8]}"
    return GRAPHS[name](random.Random(f"{seed}/{name}"), salt, directory)


# The workers have no tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
