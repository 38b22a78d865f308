"""What tasks are expected to take and to return, before they run.  Pure.

May import: kernels, graph, the ground.

There are three sources, and the first that knows wins: what the user says (an annotation
``seconds`` or ``nbytes`` of the task, or ``dask-lambda.default-task-seconds`` for its key prefix);
what tasks of the same key prefix took earlier in this process (:mod:`dask_lambda.history`); and
the guess of :mod:`dask_lambda.kernels` for functions of Dask, NumPy and the like.  Of a user's own
function that was never seen nothing is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dask.utils import key_split

from dask_lambda import kernels
from dask_lambda.graph import Graph
from lambda_worker.protocol import Key

#: Seconds of a task about which nothing is known: distributed's ``unknown-task-duration``.
UNKNOWN_SECONDS = 0.5
#: Its result: small enough to travel inline.
UNKNOWN_BYTES = 8 * 1024

#: What is known of how long a task takes: the user says so, it was measured earlier in this
#: process, it follows from the function and the sizes of its blocks, or nothing.
Basis = Literal["said", "measured", "guessed", "unknown"]


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


def guess(
    graph: Graph,
    order: Iterable[Key],
    speed: kernels.Speed,
    unknown_bytes: Mapping[Key, int] | None = None,
) -> Estimates:
    """Guess from the functions alone.

    Parameters
    ----------
    graph : Graph
    order : iterable of key
        The tasks, each after those that it reads.
    speed : Speed
    unknown_bytes : mapping, optional
        Results of tasks of which nothing is known, where they are not :data:`UNKNOWN_BYTES`.
    """
    supposed = unknown_bytes or {}
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
        if not kernel.known:
            size = supposed.get(key, size)
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
    ratio: Callable[[str], tuple[float, float] | None] = lambda prefix: None,
    said_seconds: Callable[[Key], float | None] | None = None,
    said_nbytes: Callable[[Key], int | None] | None = None,
    default_seconds: Mapping[str, float] | None = None,
) -> Estimates:
    """Correct a guess by what was measured and what the user says.

    Parameters
    ----------
    guessed : Estimates
    graph : Graph
    ratio : callable, optional
        Of a key prefix: measured over guessed, of seconds and of bytes, or None
        (:meth:`dask_lambda.history.History.ratio`).
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
            found = prefixes[layer] = prefix, ratio(prefix)
        prefix, measured = found
        if measured is not None:
            seconds[key] *= measured[0]
            nbytes[key] = int(nbytes[key] * measured[1])
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
