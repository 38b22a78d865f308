"""Values to sealed bytes and back.  May import: :mod:`lambda_worker.errors`, cloudpickle.

A value is pickled with protocol 5; large contiguous buffers (arrays, Arrow tables, bytearrays)
leave the pickle stream and become frames of their own.  The frames are laid out behind a small
header, each at a multiple of 64 bytes, so that loading needs no copy: an array that is loaded
is a view of the bytes that were downloaded::

    tag       32 bytes   HMAC-SHA256 of all that follows, under a key bound to the object's name
    magic      4 bytes   b"DLv1"
    count      4 bytes   number of frames, little endian
    lengths  8*n bytes   little endian; the highest bit says that the buffer was writable
    frames               frame 0 is the pickle stream, the others its out-of-band buffers

The tag comes first and is checked first: nothing is parsed, let alone unpickled, before it
verifies.  The key of the tag is ``HMAC(secret, name)``: an object with a valid tag that was
copied to another name, or comes from another run, is refused as well.
"""

from __future__ import annotations

import hmac
import pickle
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cloudpickle

from lambda_worker.errors import IntegrityError

Buffer = bytes | bytearray | memoryview

MAGIC = b"DLv1"
ALIGNMENT = 64
TAG_BYTES = 32
#: Buffers below this stay inside the pickle stream: a frame costs up to 72 bytes of layout.
MIN_FRAME_BYTES = 1024
#: OpenSSL's HMAC in one call takes a C int of bytes; in several steps it takes any number.
MAX_ONE_SHOT_BYTES = 2**31 - 1
_HEADER = struct.Struct("<4sI")
_WRITABLE = 1 << 63
_NO_TAG = bytes(TAG_BYTES)
_PADDING = bytes(ALIGNMENT)


_dumps: Callable[..., bytes] = partial(cloudpickle.dumps, protocol=5)


def serialize(value: object, dumps: Callable[..., bytes] = _dumps) -> list[memoryview]:
    """Pickle a value into frames.

    Parameters
    ----------
    value : object
    dumps : callable
        Pickles with protocol 5, and takes a ``buffer_callback``.

    Returns
    -------
    list of memoryview
        The pickle stream, then its out-of-band buffers: flat, contiguous, and read-only exactly
        where the original buffer was.
    """
    buffers: list[memoryview] = []

    def out_of_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            view = buffer.raw()
        except BufferError:  # not contiguous: let pickle copy it into the stream
            return True
        if view.nbytes < MIN_FRAME_BYTES:
            return True
        buffers.append(view)
        return False

    stream = dumps(value, buffer_callback=out_of_band)
    return [memoryview(stream), *buffers]


def deserialize(frames: Sequence[memoryview]) -> Any:
    """Rebuild a value from its frames, without copying them."""
    return pickle.loads(frames[0], buffers=frames[1:])


def sealed_size(frames: Sequence[memoryview]) -> int:
    """Return how many bytes :func:`seal` makes of frames."""
    size = TAG_BYTES + _HEADER.size + 8 * len(frames)
    for frame in frames:
        size = _aligned(size) + frame.nbytes
    return size


def lay_out(frames: Sequence[memoryview]) -> bytearray:
    """Copy frames behind a header, with room for the tag, which :func:`sign` puts in."""
    lengths = [f.nbytes | (0 if f.readonly else _WRITABLE) for f in frames]
    header = _HEADER.pack(MAGIC, len(frames)) + struct.pack(f"<{len(frames)}Q", *lengths)
    parts: list[bytes | memoryview] = [_NO_TAG, header]
    offset = TAG_BYTES + len(header)
    for frame in frames:
        parts.append(_PADDING[: -offset % ALIGNMENT])
        parts.append(frame)
        offset = _aligned(offset) + frame.nbytes
    return bytearray().join(parts)


def sign(sealed: bytearray, secret: bytes, name: str) -> None:
    """Tag what :func:`lay_out` returned for one object name."""
    with memoryview(sealed) as view:
        sealed[:TAG_BYTES] = _tag(view[TAG_BYTES:], secret, name)


def seal(frames: Sequence[memoryview], secret: bytes, name: str) -> bytearray:
    """Lay frames out behind a header and tag them for one object name."""
    sealed = lay_out(frames)
    sign(sealed, secret, name)
    return sealed


def verify(sealed: Any, secret: bytes, name: str) -> None:
    """Check that a sealed object is what was sealed under this secret and this name.

    Raises
    ------
    IntegrityError
        If the tag does not belong to these bytes, this secret and this name.
    """
    data = memoryview(sealed).cast("B")
    if data.nbytes < TAG_BYTES + _HEADER.size:
        raise IntegrityError(f"object {name!r} is truncated: {data.nbytes} bytes")
    if not hmac.compare_digest(data[:TAG_BYTES], _tag(data[TAG_BYTES:], secret, name)):
        raise IntegrityError(
            f"object {name!r} ({data.nbytes} bytes) does not carry the tag of this run: it was "
            "truncated, changed, or written by somebody else; it was not loaded"
        )


def open_verified(sealed: Any, name: str) -> list[memoryview]:
    """Return the frames of a sealed object that :func:`verify` has accepted.

    Parameters
    ----------
    sealed : buffer
        If it is writable (a bytearray) the frames are views of it; if it is not, frames that
        were writable at the sender are copied once, so that a task may change the arrays it is
        given, as with Dask's other schedulers.
    """
    data = memoryview(sealed).cast("B")
    magic, count = _HEADER.unpack_from(data, TAG_BYTES)
    if magic != MAGIC:
        raise IntegrityError(f"object {name!r} has another format: {magic!r}, not {MAGIC!r}")
    offset = TAG_BYTES + _HEADER.size
    lengths = struct.unpack_from(f"<{count}Q", data, offset)
    offset += 8 * count
    frames = []
    for length in lengths:
        writable, length = bool(length & _WRITABLE), length & ~_WRITABLE
        offset = _aligned(offset)
        frame = data[offset : offset + length]
        if not writable:
            frame = frame.toreadonly()
        elif frame.readonly:
            frame = memoryview(bytearray(frame))
        frames.append(frame)
        offset += length
    if frames[0].obj is data.obj and any(frame.obj is not data.obj for frame in frames):
        frames[0] = memoryview(bytes(frames[0]))  # so that it does not keep all of data alive
    return frames


def unseal(sealed: Any, secret: bytes, name: str) -> list[memoryview]:
    """Verify a sealed object and return its frames; see :func:`open_verified`.

    Raises
    ------
    IntegrityError
        If the tag does not belong to these bytes, this secret and this name.
    """
    verify(sealed, secret, name)
    return open_verified(sealed, name)


def dumps(value: object, secret: bytes, name: str) -> bytearray:
    """Pickle and seal a value under an object name."""
    return seal(serialize(value), secret, name)


def loads(sealed: Any, secret: bytes, name: str) -> Any:
    """Verify and unpickle what :func:`dumps` returned; see :func:`unseal`."""
    return deserialize(unseal(sealed, secret, name))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _tag(body: memoryview, secret: bytes, name: str) -> bytes:
    key = hmac.digest(secret, name.encode(), "sha256")
    if body.nbytes <= MAX_ONE_SHOT_BYTES:
        return hmac.digest(key, body, "sha256")
    return hmac.new(key, body, "sha256").digest()
