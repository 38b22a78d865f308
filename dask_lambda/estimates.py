"""What tasks are expected to take and to return, before they run.  Pure.

May import: kernels, graph, the ground.

There are three sources, and the first that knows wins: what the user says (an annotation
``seconds`` or ``nbytes`` of the task, or ``dask-lambda.default-task-seconds`` for its key prefix);
what tasks of the same key prefix took earlier in this process (:class:`History`); and the guess
of :mod:`dask_lambda.kernels` for functions of Dask, NumPy and the like.  Of a user's own function
that was never seen nothing is known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dask.utils import key_split

from dask_lambda import kernels
from dask_lambda.graph import Graph
from lambda_worker.protocol import Key

#: Seconds of a task about which nothing is known: distributed's ``unknown-task-duration``.
UNKNOWN_SECONDS = 0.5
#: Its result: small enough to travel inline.
UNKNOWN_BYTES = 8 * 1024
#: How many measurements of a prefix its mean remembers.
SAMPLES = 32


@dataclass(frozen=True, slots=True)
class Estimates:
    """What is expected of each node of a graph.

    Attributes
    ----------
    seconds : mapping of key to float
        Of each task, inside its function, on one vCPU.
    nbytes : mapping of key to int
        Of the value of each task, literal and stored result.
    unknown : frozenset of key
        Tasks whose seconds nobody knows; ``seconds`` holds :data:`UNKNOWN_SECONDS` for them.
    """

    seconds: Mapping[Key, float]
    nbytes: Mapping[Key, int]
    unknown: frozenset[Key] = frozenset()


@dataclass(slots=True)
class _Measured:
    count: float = 0.0
    seconds: float = 0.0  # per unit of the guess
    nbytes: float = 0.0


class History:
    """What tasks took earlier in this process, by key prefix.  May be used by several threads.

    What is remembered is the ratio of the measured to the guessed, so that it also helps where
    blocks are larger or smaller than they were.
    """

    def __init__(self) -> None:
        self._prefixes: dict[str, _Measured] = {}
        self._lock = threading.Lock()

    def observe(
        self, prefix: str, count: int, seconds: tuple[float, float], nbytes: tuple[float, float]
    ) -> None:
        """Take note of some tasks of one prefix.

        Parameters
        ----------
        prefix : str
        count : int
        seconds, nbytes : (float, float)
            The measured and the guessed sums over these tasks.
        """
        with self._lock:
            known = self._prefixes.setdefault(prefix, _Measured())
            known.count = min(known.count + count, SAMPLES)
            weight = min(1.0, count / known.count)
            known.seconds += weight * (seconds[0] / max(seconds[1], 1e-12) - known.seconds)
            known.nbytes += weight * (nbytes[0] / max(nbytes[1], 1.0) - known.nbytes)

    def learn(
        self, guessed: Estimates, tasks: Iterable[Key], measured: Mapping[str, Sequence[float]]
    ) -> None:
        """Take note of what a worker measured for the tasks of one group.

        Parameters
        ----------
        guessed : Estimates
            What :func:`guess` said.
        tasks : iterable of key
        measured : mapping
            Key prefix to the number of tasks, their seconds, and the bytes of their results.
        """
        sums = {prefix: [0.0, 0.0] for prefix in measured}
        for key in tasks:
            if (found := sums.get(key_split(key))) is not None:
                found[0] += guessed.seconds[key]
                found[1] += guessed.nbytes[key]
        for prefix, (count, seconds, nbytes) in measured.items():
            guesses = sums[prefix]
            self.observe(prefix, int(count), (seconds, guesses[0]), (nbytes, guesses[1]))

    def ratio(self, prefix: str) -> tuple[float, float] | None:
        """Return measured over guessed, of seconds and of bytes, or None if nothing is known."""
        known = self._prefixes.get(prefix)
        return None if known is None else (known.seconds, known.nbytes)


def guess(graph: Graph, order: Iterable[Key], speed: kernels.Speed) -> Estimates:
    """Guess from the functions alone.

    Parameters
    ----------
    graph : Graph
    order : iterable of key
        The tasks, each after those that it reads.
    speed : Speed
    """
    nbytes: dict[Key, int] = {key: kernels.size_of(v) for key, v in graph.literals.items()}
    nbytes.update((key, reference.size) for key, reference in graph.stored.items())
    seconds: dict[Key, float] = {}
    unknown: set[Key] = set()
    catalogue = kernels.Catalogue()
    aliases = graph.aliases
    for key in order:
        task = graph.tasks[key]
        kernel = catalogue.kernel(key, task)
        reads = [nbytes[aliases.get(d, d)] for d in task.dependencies]
        size = kernel.output_bytes(task, reads)
        if size is None:
            size = max([UNKNOWN_BYTES, *reads]) if kernel.known else UNKNOWN_BYTES
        nbytes[key] = size
        if kernel.known:
            seconds[key] = kernel.seconds(reads, size, speed)
        else:
            seconds[key] = UNKNOWN_SECONDS
            unknown.add(key)
    return Estimates(seconds, nbytes, frozenset(unknown))


def estimate(
    guessed: Estimates,
    graph: Graph,
    *,
    history: History | None = None,
    said_seconds: Callable[[Key], float | None] | None = None,
    said_nbytes: Callable[[Key], int | None] | None = None,
    default_seconds: Mapping[str, float] | None = None,
) -> Estimates:
    """Correct a guess by what was measured and what the user says.

    Parameters
    ----------
    guessed : Estimates
    graph : Graph
    history : History, optional
    said_seconds, said_nbytes : callable, optional
        The annotations of a task, if it has any.
    default_seconds : mapping, optional
        Key prefix to seconds.
    """
    seconds, nbytes = dict(guessed.seconds), dict(guessed.nbytes)
    known: set[Key] = set()
    prefixes: dict[Any, tuple[str, tuple[float, float] | None]] = {}
    for key in graph.tasks:
        layer = key[0] if type(key) is tuple else key
        if (found := prefixes.get(layer)) is None:
            prefix = key_split(key)
            ratio = history.ratio(prefix) if history is not None else None
            found = prefixes[layer] = prefix, ratio
        prefix, ratio = found
        if ratio is not None:
            seconds[key] *= ratio[0]
            nbytes[key] = int(nbytes[key] * ratio[1])
            known.add(key)
        if default_seconds and prefix in default_seconds:
            seconds[key] = default_seconds[prefix]
            known.add(key)
        if said_seconds is not None and (said := said_seconds(key)) is not None:
            seconds[key] = said
            known.add(key)
        if said_nbytes is not None and (size := said_nbytes(key)) is not None:
            nbytes[key] = size
    return Estimates(seconds, nbytes, guessed.unknown - known)
