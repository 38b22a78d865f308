"""Groups in the making, and why they are made.  Pure.  May import: the ground, dask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dask.utils import key_split

from lambda_worker.protocol import Key


@dataclass(frozen=True, slots=True)
class Decision:
    """Why some tasks run together, or why they do not.

    Attributes
    ----------
    what : str
        "repeat", "join", "merge" or "tile".
    producer, consumer : str
        Layers, as key prefixes.
    count : int
        How many producers it is about.
    done : bool
    why : str
        In seconds, as the cost model has them.
    """

    what: str
    producer: str
    consumer: str
    count: int
    done: bool
    why: str

    def __str__(self) -> str:
        verb = {"repeat": "repeated in", "join": "joined to", "merge": "merged into", "tile": "in"}
        sign = "" if self.done else "not "
        return (
            f"{self.count:,} x {self.producer} {sign}{verb[self.what]} {self.consumer}: {self.why}"
        )


@dataclass(slots=True)
class Unit:
    """A group in the making; numbers stand for tasks and data."""

    tasks: list[int]
    reads: set[int]  # what it gets from elsewhere
    repeats: set[int]  # what it makes itself, though others make it too
    work: float  # seconds, without the repeats
    peak: float  # bytes
    written: float  # bytes of its outputs, those that do not travel inline
    writes: int
    start: float = 0.0
    finish: float = 0.0
    seconds: float = 0.0  # of its invocation
    usd: float = 0.0


def layer(key: Key) -> Any:
    """Return what the keys of one layer have in common."""
    return key[0] if type(key) is tuple and key else key_split(key)


def indices(key: Key) -> tuple[int, ...]:
    """Return a block's place in its array."""
    if type(key) is not tuple or not all(isinstance(index, int) for index in key[1:]):
        return ()
    return key[1:]
