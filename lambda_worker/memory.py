"""How much memory there is, and how it is shared out.  May import: nothing.

::

    function memory = runtime    interpreter, libraries, and the buffers of S3's client
                    + cache      sealed inputs, kept for the next groups and invocations
                    + prefetch   inputs that are on their way, or wait for the task that reads them
                    + uploads    copies of outputs that are on their way
                    + tasks      the rest: what the tasks read, make, and need to do so

A single input or output may be larger than its share: it then travels alone.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Python with dask.array, NumPy, SciPy and obstore takes 75 MB before the first task; the parts
#: of large objects that are on their way (:mod:`lambda_worker.store`) take up to 64 MB each way.
RUNTIME_BYTES = 208 * 2**20
#: Of what is left (of a quarter of the memory, where that is more).
CACHE_SHARE = 0.15
PREFETCH_SHARE = 0.25
UPLOADS_SHARE = 0.15


@dataclass(frozen=True, slots=True)
class Shares:
    """Bytes for each purpose."""

    cache: int
    prefetch: int
    uploads: int
    tasks: int


def share_out(memory_mb: int) -> Shares:
    """Divide the memory of a function."""
    memory = memory_mb * 2**20
    left = max(memory - RUNTIME_BYTES, memory // 4)
    cache, prefetch, uploads = (
        int(left * share) for share in (CACHE_SHARE, PREFETCH_SHARE, UPLOADS_SHARE)
    )
    return Shares(cache, prefetch, uploads, left - cache - prefetch - uploads)


#: Where Linux says how much memory a container may take (control groups, versions 2 and 1).
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Return the bytes of memory that this machine, or the container on it, has."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in _LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is "max"
            found.append(int(Path(limit).read_text("ascii")))
    return min(found)
