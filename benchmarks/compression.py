"""What compression of array data costs and saves: ``python -m benchmarks.compression``.

A Lambda moves 75 MB/s to and from S3 in the long run, so a codec pays if it saves more time on
the wire than it takes: for each codec and kind of data the table has the ratio, the MB/s of raw
data that one core compresses and decompresses, and the MB/s of raw data that writing and reading
then reach, one after the other (compress, 75 MB/s, decompress), in place of 75.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

SIZE = 32 * 2**20
WIRE = 75.0
ROUNDS = 3


def kinds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    n = SIZE // 8
    line = np.linspace(0, 20, n)
    sparse = np.zeros(n)
    sparse[random.integers(0, n, n // 20)] = random.random(n // 20)
    return {
        "random floats": random.random(n),
        "random float32": random.random(2 * n, dtype=np.float32),
        "smooth floats (sin)": np.sin(line),
        "smooth, rounded to 3 digits": np.sin(line).round(3),
        "5 % nonzero floats": sparse,
        "integers below 100, as int64": random.integers(0, 100, n),
        "counter, int64": np.arange(n),
        "bytes of text": np.frombuffer(
            (b"".join(b"row %d of the table;" % i for i in range(SIZE // 18)))[:SIZE], np.uint8
        ),
        "zeros": np.zeros(n),
    }


def codecs() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    import lz4.frame
    import zstandard

    found = {"lz4": (lz4.frame.compress, lz4.frame.decompress)}
    for level in (-1, 1, 3):
        found[f"zstd {level}"] = (
            zstandard.ZstdCompressor(level=level).compress,
            zstandard.ZstdDecompressor().decompress,
        )
    return found


def rate(work: Callable[[bytes], object], data: bytes) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work(data)
        best = min(best, time.perf_counter() - started)
    return SIZE / 1e6 / best


def main() -> None:
    print(
        f"{'data':<30} {'codec':<8} {'ratio':>6} {'pack':>6} {'unpack':>6} {'write':>6} {'read':>6}"
    )
    for kind, array in kinds().items():
        raw = array.tobytes()
        for name, (compress, decompress) in codecs().items():
            packed = compress(raw)
            assert decompress(packed) == raw
            ratio = len(packed) / len(raw)
            pack, unpack = rate(compress, raw), rate(decompress, packed)
            write = 1 / (1 / pack + ratio / WIRE)
            read = 1 / (1 / unpack + ratio / WIRE)
            print(
                f"{kind:<30} {name:<8} {ratio:>6.3f} {pack:>6.0f} {unpack:>6.0f} "
                f"{write:>6.0f} {read:>6.0f}"
            )


if __name__ == "__main__":
    main()
