"""Which embedded AWS a process uses: its own, or one that is kept running for several.

May import: the standard library, :mod:`dask_lambda.local`, local_start, local_process, errors.  A
process has one at most for each set of settings.  The one that is kept running (``dask-lambda local
start``) is described in a state file of the user's; it is alive as long as its supervisor holds a
lock, so that a stale file deceives nobody.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dask_lambda.errors import ConfigurationError, LocalAWSError
from dask_lambda.local import LocalAWS
from dask_lambda.local_process import lock_is_held, terminate
from dask_lambda.local_start import fingerprint, worker_code

__all__ = ["local_aws", "shared_status", "start_shared", "state_directory", "stop_shared"]

logger = logging.getLogger("dask_lambda")

_singleton_lock = threading.Lock()
_singletons: dict[tuple[tuple[str, Any], ...], LocalAWS] = {}


def local_aws(*, log_level: int = logging.INFO, **settings: Any) -> LocalAWS:
    """Return this process's embedded AWS, and start it if necessary.

    The one that is kept running by ``dask-lambda local start`` is used if its code, its
    environment and the given settings match; else one is started that ends with this process.

    Parameters
    ----------
    log_level : int
        As for :meth:`LocalAWS.start`.
    **settings
        As for :meth:`LocalAWS.start`.  The same settings return the same object.

    Returns
    -------
    LocalAWS

    Raises
    ------
    LocalAWSError
        It could not be started.
    """
    if "detach" in settings:
        raise ConfigurationError("local_aws() ends with its process: use start_shared()")
    name = tuple(sorted(settings.items()))
    with _singleton_lock:
        aws = _singletons.get(name)
        if aws is None or not aws.is_alive():
            aws = _matching_shared(settings, log_level) or LocalAWS.start(
                **settings, log_level=log_level
            )
            _singletons[name] = aws
        return aws


def _matching_shared(settings: dict[str, Any], log_level: int) -> LocalAWS | None:
    try:
        shared = shared_status()
    except OSError as error:
        logger.debug("no shared embedded AWS: %s", error)
        return None
    if shared is None:
        return None
    code = settings.get("code")
    differs = _differences(shared, worker_code() if code is None else code)
    differs += _setting_differences(shared, settings)
    if differs:
        logger.log(
            log_level,
            "the embedded AWS that is kept running at %s is not used: %s",
            shared.endpoint_url,
            "; ".join(differs),
        )
        return None
    return shared


def _forget_after_fork() -> None:
    """A forked child looks for its own."""
    global _singleton_lock
    _singleton_lock = threading.Lock()
    _singletons.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


def state_directory() -> Path:
    """Return the directory of the shared one's state file.

    ``DASK_LAMBDA_STATE_DIR``, or ``dask-lambda`` in ``XDG_RUNTIME_DIR`` or in the user's cache
    directory.
    """
    if explicit := os.environ.get("DASK_LAMBDA_STATE_DIR"):
        return Path(explicit)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "dask-lambda"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "dask-lambda"


def start_shared(**settings: Any) -> LocalAWS:
    """Return the embedded AWS that is kept running for all of the user's processes.

    Parameters
    ----------
    **settings
        As for :meth:`LocalAWS.start`.

    Raises
    ------
    LocalAWSError
        It could not be started, or one is running with other settings or other code.
    """
    with _state_locked():
        shared = shared_status()
        if shared is not None:
            code = settings.get("code")
            differs = _differences(shared, worker_code() if code is None else code)
            differs += _setting_differences(shared, settings)
            if differs:
                raise LocalAWSError(
                    f"an embedded AWS is running at {shared.endpoint_url}, but {differs[0]}: "
                    "stop it first (dask-lambda local stop)"
                )
            return shared
        aws = LocalAWS.start(**{**settings, "detach": True})
        try:
            _write_state(aws._state())
        except BaseException:  # Ctrl-C among them: nobody would know of it, so it must not run on
            aws.stop()
            raise
        return aws


def shared_status() -> LocalAWS | None:
    """Return the embedded AWS that is kept running, or None.

    A state file whose process is gone is removed.
    """
    path = state_directory() / "local.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        shared = LocalAWS(json.loads(text))
    except (ValueError, KeyError, TypeError):  # another version's
        shared = None
    if shared is not None and lock_is_held(shared.directory):
        return shared
    path.unlink(missing_ok=True)
    return None


def stop_shared() -> bool:
    """Stop the one that is kept running; return whether there was one."""
    with _state_locked():
        shared = shared_status()
        if shared is None:
            return False
        terminate(shared.pid, shared.directory)
        (state_directory() / "local.json").unlink(missing_ok=True)
        return True


def _write_state(state: dict[str, Any]) -> None:
    path = state_directory() / "local.json"
    with tempfile.NamedTemporaryFile(  # created with mode 0600
        "w", dir=path.parent, prefix=".local-", delete=False, encoding="utf-8"
    ) as file:
        json.dump(state, file, indent=1)
    os.replace(file.name, path)


@contextmanager
def _state_locked() -> Iterator[None]:
    """Let one process at a time start or stop the shared one."""
    import fcntl

    directory = state_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _differences(shared: LocalAWS, code: bytes) -> list[str]:
    ours = fingerprint(code)
    return [
        f"its {name.replace('_', ' ')} differs from this process's"
        for name, value in ours.items()
        if shared._fingerprint.get(name) != value
    ]


def _setting_differences(shared: LocalAWS, settings: dict[str, Any]) -> list[str]:
    actual = {
        "concurrency": shared.concurrency,
        "memory": shared.memory,
        "timeout": shared.timeout,
        "port": int(shared.endpoint_url.rpartition(":")[2]),
        "directory": shared.directory.parent,
    }
    return [
        f"its {name} is {actual[name]}, not {value}"
        for name, value in settings.items()
        if name in actual and value is not None and actual[name] != value
    ]
