"""Environments that begin as a copy of a snapshot (Lambda SnapStart).

May import: nothing of the package.

When a version of such a function is published, Lambda imports the handler once, and keeps memory
and disk.  Each environment of the version begins as a copy of them.  What was drawn at random
before is then the same in a thousand workers, so :func:`renew` draws anew what tasks may use
without a seed of their own.  The handler calls it at the first invocation of an environment, before
anything of the request is unpickled.  Nothing but this package runs between the restoration and
that, so a runtime hook (package snapshot_restore_py) would renew nothing earlier that matters; and
its time would be billed with each restoration.

What else this package and what it imports hold after the import was looked through:

* Thread pools have no thread, and no bucket is open: both begin with the first request.  So there
  is no connection that the copies would share, and no state of TLS.
* ``secrets``, ``uuid.uuid4`` and ``os.urandom`` ask the kernel each time, which Lambda gives other
  random numbers after a restoration ("Handling uniqueness with Lambda SnapStart", developer guide).
* ``tempfile`` draws names that are the same in all copies; but each has a disk of its own, and no
  file is opened that exists.
* The hash seed is the same for all workers anyway (``protocol.HASH_SEED``).  Multiprocessing's key
  and the id of the process are the same in all copies, and do not leave the environment.
* Dask, NumPy, SciPy, cloudpickle and obstore keep no other generator, and Dask's identifiers are
  ``uuid4``.  Generators that modules of the user's make when they are imported
  (``rng = numpy.random.default_rng()``) are theirs: nobody can find them all.  Modules that travel
  with a run are imported after the restoration, so this matters for those that
  ``DASK_LAMBDA_PREIMPORT`` names, and what these import.
"""

from __future__ import annotations

import os
import random
import sys

#: Environment variable in which Lambda says how an environment began, and what it says then.
VARIABLE = "AWS_LAMBDA_INITIALIZATION_TYPE"
SNAP_START = "snap-start"


def from_snapshot() -> bool:
    """Whether this environment begins as a copy of a snapshot, or is what one will be taken of."""
    return os.environ.get(VARIABLE) == SNAP_START


def prepare() -> None:
    """Load what the first invocation will need, so that the snapshot holds it."""
    if from_snapshot():
        import http.client  # noqa: F401  by which credentials are asked for


def renew() -> None:
    """Draw anew what copies of a snapshot must not have in common.

    That is the state of the global generators of Python and NumPy, which functions use that are
    given neither a generator nor a seed (``random.random``, ``numpy.random.normal``, SciPy's
    distributions).
    """
    random.seed()
    # If nobody has loaded it yet, it will be seeded when somebody does.
    if (loaded := sys.modules.get("numpy.random")) is not None:
        loaded.seed()
