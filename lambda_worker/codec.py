"""Values to sealed bytes and back.  May import: protocol, errors, cloudpickle, late: zstandard.

A value is pickled with protocol 5; large contiguous buffers (arrays, Arrow tables, bytearrays)
leave the pickle stream and become frames of their own.  The frames are laid out behind a small
header, each at a multiple of 64 bytes, so that loading needs no copy: an array that is loaded
is a view of the bytes that were downloaded::

    tag       32 bytes   HMAC-SHA256 of all that follows, under a key bound to the object's name
    magic      4 bytes   b"DLv1"
    count      4 bytes   number of frames, little endian
    lengths  8*n bytes   little endian; the highest bit says that the buffer was writable, the
                         next one that the frame is compressed
    frames               frame 0 is the pickle stream, the others its out-of-band buffers

A compressed frame is its length before (8 bytes, little endian), and a frame of Zstandard.

The tag comes first and is checked first: nothing is parsed, let alone unpickled, before it
verifies.  The key of the tag is ``HMAC(secret, name)``: an object with a valid tag that was
copied to another name, or comes from another run, is refused as well.
"""

from __future__ import annotations

import hmac
import mmap
import pickle
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cloudpickle

from lambda_worker.errors import IntegrityError, UnserializableError
from lambda_worker.protocol import Compression, run_of, sealing

Buffer = bytes | bytearray | memoryview

MAGIC = b"DLv1"
ALIGNMENT = 64
TAG_BYTES = 32
#: Buffers below this stay inside the pickle stream: a frame costs up to 72 bytes of layout.
MIN_FRAME_BYTES = 1024
#: OpenSSL's HMAC in one call takes a C int of bytes; in several steps it takes any number.
MAX_ONE_SHOT_BYTES = 2**31 - 1
_HEADER = struct.Struct("<4sI")
_LENGTH = struct.Struct("<Q")
_WRITABLE = 1 << 63
_COMPRESSED = 1 << 62
#: Smaller frames are not compressed: S3 takes longer to answer than to move them.
MIN_COMPRESS_BYTES = 256 * 1024
#: A frame is compressed if that leaves at most so much of it, and of some pieces of it first.
MAX_RATIO = 0.9
#: zstd's level 1, one core: 450 to 7,000 MB/s (benchmarks/compression.py); higher ones gain little.
ZSTD_LEVEL = 1
SAMPLES, SAMPLE_BYTES = 4, 64 * 1024
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

    with sealing():
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


def lay_out(frames: Sequence[memoryview], compression: Compression = "none") -> bytearray:
    """Copy frames behind a header, with room for the tag, which :func:`sign` puts in.

    Raises
    ------
    UnserializableError
        If the package that compresses is not installed.
    """
    lengths = []
    stored: list[Sequence[bytes | memoryview]] = []
    for frame in frames:
        packed = None if compression == "none" else _compressed(frame)
        flags = (0 if frame.readonly else _WRITABLE) | (_COMPRESSED if packed else 0)
        stored.append(packed or [frame])
        lengths.append(sum(memoryview(part).nbytes for part in stored[-1]) | flags)
    header = _HEADER.pack(MAGIC, len(frames)) + struct.pack(f"<{len(frames)}Q", *lengths)
    parts: list[bytes | memoryview] = [_NO_TAG, header]
    offset = TAG_BYTES + len(header)
    for each, length in zip(stored, lengths, strict=True):
        parts.append(_PADDING[: -offset % ALIGNMENT])
        parts.extend(each)
        offset = _aligned(offset) + (length & ~(_WRITABLE | _COMPRESSED))
    return bytearray().join(parts)


def sign(sealed: bytearray, secret: bytes, name: str) -> None:
    """Tag what :func:`lay_out` returned for one object name."""
    with memoryview(sealed) as view:
        sealed[:TAG_BYTES] = _tag(view[TAG_BYTES:], secret, name)


def seal(
    frames: Sequence[memoryview], secret: bytes, name: str, compression: Compression = "none"
) -> bytearray:
    """Lay frames out behind a header and tag them for one object name."""
    sealed = lay_out(frames, compression)
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
        raise damaged(name, f"is truncated: {data.nbytes} bytes")
    if not hmac.compare_digest(data[:TAG_BYTES], _tag(data[TAG_BYTES:], secret, name)):
        raise damaged(
            name,
            f"({data.nbytes} bytes) does not carry the tag of this run: it was truncated, "
            "changed, or written by somebody else",
        )


def damaged(name: str, what: str) -> IntegrityError:
    """Return the error for an object that is not what the run has written under its name."""
    return IntegrityError(
        f"object {name!r} of run {run_of(name)!r} {what}; it was not unpickled. Compute again; if "
        "this happens again, find out who else writes to the bucket"
    )


def frames_of(sealed: Any, name: str) -> list[memoryview]:
    """Return the frames of a sealed object that :func:`verify` has accepted, decompressed.

    Parameters
    ----------
    sealed : buffer
        If it is writable (a bytearray) the frames are views of it; if it is not, frames that
        were writable at the sender are copied once, so that a task may change the arrays it is
        given, as with Dask's other schedulers.

    Raises
    ------
    IntegrityError
        If there is no sense in the layout.
    """
    data = memoryview(sealed).cast("B")
    lengths = _lengths(data, name)
    offset = TAG_BYTES + _HEADER.size + 8 * len(lengths)
    frames = []
    for length in lengths:
        writable, compressed = length & _WRITABLE, length & _COMPRESSED
        length &= ~(_WRITABLE | _COMPRESSED)
        offset = _aligned(offset)
        frame = data[offset : offset + length]
        if frame.nbytes < length:
            raise damaged(name, "is shorter than its frames")
        if compressed:
            frame = _decompressed(frame, name)
        if not writable:
            frame = frame.toreadonly()
        elif frame.readonly:
            frame = memoryview(bytearray(frame))
        frames.append(frame)
        offset += length
    if frames and frames[0].obj is data.obj and any(f.obj is not data.obj for f in frames):
        frames[0] = memoryview(bytes(frames[0]))  # so that it does not keep all of data alive
    return frames


def is_compressed(sealed: Any, name: str) -> bool:
    """Whether :func:`frames_of` would make more of a verified object than there is."""
    return any(length & _COMPRESSED for length in _lengths(memoryview(sealed).cast("B"), name))


def _lengths(data: memoryview, name: str) -> Sequence[int]:
    """Return the lengths of the frames, with their flags."""
    start = TAG_BYTES + _HEADER.size
    if data.nbytes < start:
        raise damaged(name, f"is truncated: {data.nbytes} bytes")
    magic, count = _HEADER.unpack_from(data, TAG_BYTES)
    if magic != MAGIC:
        raise damaged(name, f"has another format: {magic!r}, not {MAGIC!r}")
    if not 0 < count <= (data.nbytes - start) // 8:
        raise damaged(name, f"has no room for {count} frames")
    return struct.unpack_from(f"<{count}Q", data, start)


def unseal(sealed: Any, secret: bytes, name: str) -> list[memoryview]:
    """Verify a sealed object and return its frames; see :func:`frames_of`.

    Raises
    ------
    IntegrityError
        If the tag does not belong to these bytes, this secret and this name.
    """
    verify(sealed, secret, name)
    return frames_of(sealed, name)


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


# ---------------------------------------------------------------------------------------------
# compression
# ---------------------------------------------------------------------------------------------


def allocate(size: int) -> Any:
    """Return a writable buffer of zeros, whose pages cost nothing before they are written to."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise UnserializableError(
            "data is to be compressed with zstd, or was, but the package 'zstandard' is not "
            "installed here: install it on the client and for the Lambda function, or set "
            "dask-lambda.compression to 'none'"
        ) from error
    return zstandard


def _compressed(frame: memoryview) -> list[bytes] | None:
    """Return the stored form of a frame, if it is worth it."""
    size = frame.nbytes
    if size < MIN_COMPRESS_BYTES:
        return None
    compressor = _zstandard().ZstdCompressor(level=ZSTD_LEVEL)
    step = (size - SAMPLE_BYTES) // (SAMPLES - 1)
    sample = b"".join(frame[i * step : i * step + SAMPLE_BYTES] for i in range(SAMPLES))
    if len(compressor.compress(sample)) > MAX_RATIO * len(sample):
        return None
    packed = compressor.compress(frame)
    return [_LENGTH.pack(size), packed] if len(packed) <= MAX_RATIO * size else None


def _decompressed(stored: memoryview, name: str) -> memoryview:
    """Decompress a frame into a buffer of the length that is stored with it, never more."""
    zstandard = _zstandard()
    size = _LENGTH.unpack_from(stored)[0] if stored.nbytes >= _LENGTH.size else 0
    try:
        buffer = memoryview(allocate(size))
    except (ValueError, OverflowError, OSError) as error:  # nothing, or more than can be
        raise damaged(name, f"has a compressed frame of {size} bytes") from error
    reader = zstandard.ZstdDecompressor().stream_reader(stored[_LENGTH.size :])
    filled = 0
    try:
        while filled < size and (read := reader.readinto(buffer[filled:])):
            filled += read
        complete = filled == size and not reader.read(1)
    except zstandard.ZstdError:
        complete = False
    if not complete:
        raise damaged(name, f"has a compressed frame that is not {size} bytes long")
    return buffer
