"""A function that runs lambda_worker and does to itself what the proxy tells it.

Deployed beside ``lambda_worker`` (:mod:`tests.faults.deploy`).  The proxy adds a field ``"fault"``
to the request, for :class:`tests.faults.proxy.Strike`; everything else reaches lambda_worker
unchanged.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from typing import Any

from lambda_worker import handler as worker
from lambda_worker import store

if os.environ.get("FAULTS_SMALL_PARTS"):  # so that objects travel in parts that are not large
    kb = 1024
    store.Parts = partial(  # type: ignore[misc, assignment]
        store.Parts, read_above=100 * kb, read=64 * kb, write_above=200 * kb, write=128 * kb
    )


def die() -> None:
    """End this process at once, as for a lack of memory or a crash of native code."""
    os.kill(os.getpid(), signal.SIGKILL)


def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    """Serve one Invoke, with the fault that the event names.

    ``{"kind": "kill", "seconds": s}`` ends the process after so many seconds of the work, at the
    latest when all is committed and before the reply; ``"sleep"`` sleeps before the work, shortly
    (a straggler) or past the function's time-out.
    """
    fault = event.pop("fault", None)
    if fault is None:
        return worker.handler(event, context)
    if fault["kind"] == "sleep":
        time.sleep(fault["seconds"])
        return worker.handler(event, context)
    if fault["seconds"] <= 0:
        die()
    timer = threading.Timer(fault["seconds"], die)
    timer.daemon = True
    timer.start()
    worker.handler(event, context)
    die()
    raise AssertionError("this process was killed")
