"""What a task computes, as a name that a later session finds again.  Pure.

May import: digest, graph, kernels, the ground.

A fingerprint is a hash of a task's function and arguments, and of the fingerprints of what it
reads.  No key is part of it: ``dask.delayed`` draws new ones in each session.  Two sessions that
run the same program agree on it, whatever their hash seeds; and it differs as soon as a result
might, since results are found by it.

Notes
-----
Nothing is known of what a task reads from outside (a file, a data base, the clock).  But where
Dask's own readers hold a file, the file system is asked whether it has changed, and where they hold
a path only, their key is taken in, for which Dask has asked it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from dask.utils import key_split

from dask_lambda.digest import Hasher, NoDigest, reads_of
from dask_lambda.graph import Graph
from dask_lambda.kernels import Catalogue
from lambda_worker.protocol import Key


@dataclass(slots=True)
class Fingerprints:
    """The fingerprints of one graph.

    Attributes
    ----------
    of : dict
        Key to fingerprint, in hexadecimal digits: tasks, literals and stored results.
    reasons : dict
        Name of a layer to the number of its tasks that have none, and why.  Those that have none
        only because of what they read are not among them.
    """

    of: dict[Key, str] = field(default_factory=dict)
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)


def fingerprints(graph: Graph, base: tuple[Graph, Fingerprints] | None = None) -> Fingerprints:
    """Compute the fingerprints of all tasks of a graph, and of what they read.

    It does not matter which tasks Dask has fused, which depends on the hash seed: a fused task has
    the fingerprint of the last one in it.  Tasks that are the same are numbered, so that their
    results are two objects.  If nothing is known of their function, their readers are told apart as
    well: two calls of a function that draws a number are two draws.  The numbers follow the order
    in which the graph's outputs and the arguments of tasks mention them, so that the same program
    gives the same ones.

    Parameters
    ----------
    graph : Graph
    base : (Graph, Fingerprints), optional
        The graph from which this one was made, in another way of computing the same
        (:mod:`dask_lambda.folding`): its tasks keep their fingerprints.
    """
    found = Fingerprints()
    digests: dict[Key, bytes | None] = {}
    stack = [graph.resolve(key) for key in graph.source if key in graph.outputs][::-1]
    if base is not None:
        of = base[1].of
        for nodes in (base[0].tasks, base[0].literals, base[0].stored):
            digests.update((key, bytes.fromhex(of[key]) if key in of else None) for key in nodes)
        found.of.update(of)
        stack = [key for key in graph.tasks if key not in digests]
    hasher = Hasher(lambda key: digests.get(graph.resolve(key)))
    counts: dict[bytes, int] = defaultdict(int)  # of equal tasks
    catalogue = Catalogue()
    reads: dict[Key, list[Key]] = {}
    while stack:
        key = stack[-1]
        if key in digests:
            stack.pop()
            continue
        if key not in reads:
            task = graph.tasks.get(key)
            reads[key] = [graph.resolve(d) for d in reads_of(task)] if task is not None else []
            missing = [d for d in reads[key] if d not in digests]
            if missing:
                stack.extend(reversed(missing))
                continue
        stack.pop()
        known = all(digests[d] is not None for d in reads.pop(key))
        digest = _digest_of(graph, key, hasher, found) if known else None
        digests[key] = digest
        if digest is None:
            continue
        if base is not None:  # a part of a sum is not the user's own task that is the same
            digest = digests[key] = hasher.pack(b"part", digest)
        if key in graph.tasks:
            number = counts[digest]
            counts[digest] += 1
            label = hasher.pack(digest, b"%d" % number) if number else digest
            if not catalogue.kernel(key, graph.tasks[key]).known:
                digests[key] = label
            digest = label
        found.of[key] = digest.hex()
    return found


def _digest_of(graph: Graph, key: Key, hasher: Hasher, found: Fingerprints) -> bytes | None:
    try:
        if key in graph.stored:
            return hasher.pack(b"stored", graph.stored[key].name.encode())
        if key in graph.literals:
            return hasher.pack(b"data", hasher.walk(graph.literals[key]))
        return hasher.task(graph.tasks[key])
    except Exception as error:  # noqa: BLE001  objects of all kinds are looked into
        name = key_split(key)
        count, reason = found.reasons.get(name, (0, f"{type(error).__name__}: {error}"))
        if isinstance(error, NoDigest):
            reason = str(error)
        found.reasons[name] = count + 1, reason[:300]
        return None
