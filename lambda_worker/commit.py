"""Committing the outputs of tasks: the first attempt wins.  May import: store, codec, protocol.

Two attempts at a task may write the same output, one of them perhaps given up long ago.  Readers
must see one value only.  A small output is committed by one conditional PUT.  A large one is
written under a name of this attempt's own, and committed by a small pointer to it, for which the
same holds; who comes second deletes what it wrote and tells the name of the first.

That makes each output one value.  Where several outputs of a group must be of one attempt, each
attempt writes all of them under names of its own, and the client takes the first that it hears of.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

from lambda_worker import codec, protocol
from lambda_worker.errors import IntegrityError
from lambda_worker.protocol import Value
from lambda_worker.store import Store

#: A pointer is smaller; an object of up to this size may be one.
MAX_POINTER_BYTES = 2048
#: How often such an object is fetched before it is taken for a value of its own.
POINTER_LOOKS = 2


def commit(
    store: Store,
    name: str,
    laid_out: bytearray,
    secret: bytes,
    left: set[str],
    attempt: str = "",
) -> Value:
    """Commit an output.

    Parameters
    ----------
    store : Store
    name : str
        Of the output.
    laid_out : bytearray
        What :func:`lambda_worker.codec.lay_out` returned.  It is signed here.
    secret : bytes
    left : set of str
        While an object is in the bucket, or may be, to which nothing points, its name is in here.
    attempt : str
        Of an entangled group: its version of the output stands beside those of others.

    Returns
    -------
    Value
        Where the committed output is: this one, or the one that came first.
    """
    size = len(laid_out)
    if attempt:
        own = protocol.attempt_name(name, attempt)
        codec.sign(laid_out, secret, own)
        left.add(own)
        if store.is_large(size):
            store.put(own, laid_out)
        else:
            store.put_new(own, laid_out)
        left.discard(own)
        return Value(own, size)
    if not store.is_large(size):
        codec.sign(laid_out, secret, name)
        other = store.put_new(name, laid_out)
        return Value(name, size) if other is None else _first(store, name, other, secret)
    own = protocol.attempt_name(name)
    codec.sign(laid_out, secret, own)
    left.add(own)
    store.put(own, laid_out)
    pointer = memoryview(json.dumps([own, size]).encode())
    sealed = codec.seal([pointer], secret, protocol.pointer_name(name))
    other = store.put_new(name, sealed)
    first = Value(own, size) if other is None else _first(store, name, other, secret)
    if first.name != own:  # else it is our own pointer, of which S3 was told twice
        store.delete(own)
    left.discard(own)
    return first


def _first(store: Store, name: str, size: int, secret: bytes) -> Value:
    """Describe the output that was there first: an object of its own, or what one points to."""
    if size <= MAX_POINTER_BYTES:
        for _ in range(POINTER_LOOKS):
            with suppress(IntegrityError):  # a small value, or damaged on the way
                return pointed(store.get(name, size), secret, name)
    return Value(name, size)


def pointed(data: Any, secret: bytes, name: str) -> Value:
    """Return what a pointer to an output points to.

    Raises
    ------
    IntegrityError
        If it is none: a small value, whose tag is bound to another name, or damaged.
    """
    frames = codec.unseal(data, secret, protocol.pointer_name(name))
    target, size = json.loads(bytes(frames[0]))
    return Value(target, size)
