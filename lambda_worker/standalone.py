"""The handler outside of Lambda: in processes and threads of machines of the user's own.

May import: all of lambda_worker.

A request means the same everywhere: whoever serves it reads the objects that it names, runs the
tasks, and commits the outputs under the names that it gives.  There are two ways to have one
served.  :func:`main` is the program of a process that the client starts: requests and replies go
through its pipes, and it ends with the client.  An :class:`Errand` is a function for anybody's
executor.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.util import Finalize
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple, TextIO

from lambda_worker.handler import Environment, serve
from lambda_worker.memory import machine_memory
from lambda_worker.modules import LocalModules

#: Bytes of a log that are handed back: as many as Lambda's ``LogType=Tail``.
TAIL_BYTES = 4096
#: Bytes of the number that comes before each message in a pipe.
LENGTH_BYTES = 8
#: What a process says when it can serve.
READY = b"ready"


@dataclass(frozen=True, slots=True)
class Context:
    """What the handler asks of Lambda's context."""

    memory_limit_in_mb: int
    aws_request_id: str


class Answer(NamedTuple):
    """What comes back for a request."""

    reply: bytes  #: JSON
    log: bytes  #: the end of what was logged and printed meanwhile


class Tail(io.TextIOBase):
    """Keeps the end of what is written.

    Parameters
    ----------
    through : file, optional
        Where it is written besides.
    """

    def __init__(self, through: TextIO | None = None):
        self._through = through
        self._kept = bytearray()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of what is kept."""
        return "utf-8"

    def fileno(self) -> int:
        """Return the descriptor of where it is written."""
        if self._through is None:
            raise io.UnsupportedOperation("fileno")
        return self._through.fileno()

    def writable(self) -> bool:
        """Whether it takes text: yes."""
        return True

    def write(self, text: str) -> int:
        """Keep a text, and write it where all text goes."""
        if self._through is not None:
            self._through.write(text)
            self._through.flush()
        self.note(text)
        return len(text)

    def note(self, text: str) -> None:
        """Keep a text, of which nobody else hears."""
        self._kept += text.encode("utf-8", "backslashreplace")
        del self._kept[:-TAIL_BYTES]

    def take(self) -> bytes:
        """Return what was kept, and forget it."""
        kept, self._kept = bytes(self._kept), bytearray()
        return kept


def answer(event: dict[str, Any], environment: Environment, tail: Tail) -> Answer:
    """Serve one request."""
    context = Context(machine_memory() // 2**20, str(uuid.uuid4()))
    reply = serve(event, context, environment)
    return Answer(json.dumps(reply).encode(), tail.take())


# ---------------------------------------------------------------------------------------------
# in anybody's executor
# ---------------------------------------------------------------------------------------------


class _NoModules:
    """For threads of the client's own process, in which its modules are found anyway."""

    def use(self, digest: str | None, fetch: Callable[[], Any]) -> None:
        """Do nothing."""

    def held(self, digest: str | None) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()


class SharedModules:
    """The user's own modules in a process that may serve several requests at a time.

    Requests that need the same modules are served together, others wait.
    """

    def __init__(self) -> None:
        self._modules = LocalModules()
        self._unpacking = threading.Lock()
        self._changed = threading.Condition()
        self._digest: str | None = None
        self._users = 0
        Finalize(None, self._modules.close, exitpriority=10)

    def use(self, digest: str | None, fetch: Callable[[], Any]) -> None:
        """See :class:`LocalModules`; while they are :meth:`held`."""
        with self._unpacking:
            self._modules.use(digest, fetch)

    @contextmanager
    def held(self, digest: str | None) -> Iterator[None]:
        """Wait until these modules may be used, and keep others away."""
        with self._changed:
            self._changed.wait_for(lambda: not self._users or self._digest == digest)
            self._digest = digest
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()


@cache
def _modules_of_process() -> SharedModules:
    return SharedModules()


class _Opened(NamedTuple):
    pid: int
    bucket: Any
    environments: list[Environment]  #: those of threads that use it


#: The buckets that clients in this process have opened, by their tokens.
_opened: dict[str, _Opened] = {}
_of_thread = threading.local()


class ForkedError(RuntimeError):
    """A process was forked from the client's, which S3's client does not survive."""


def lend(token: str, bucket: Any) -> None:
    """Let what is served in this very process use a client's own way to a bucket."""
    _opened[token] = _Opened(os.getpid(), bucket, [])


def take_back(token: str) -> None:
    """Undo :func:`lend`."""
    if (opened := _opened.pop(token, None)) is not None:
        for environment in opened.environments:
            environment.close()


@dataclass(frozen=True, slots=True)
class Errand:
    """A request for somebody's executor, as a function without arguments.

    Its representation, which executors may log, says nothing of what it holds.

    Attributes
    ----------
    payload : bytes
    bucket : str
        Its name.
    open : callable
        Opens the bucket, in a process that is not the client's.
    token : str
        Of the client: threads of its own process use the bucket that it has opened.
    """

    payload: bytes = field(repr=False)
    bucket: str = field(repr=False)
    open: Callable[[], Any] = field(repr=False)
    token: str = field(repr=False)

    @property
    def __name__(self) -> str:
        return "dask-lambda"

    def __call__(self) -> Answer:
        """Serve the request in this thread.

        Raises
        ------
        ForkedError
        """
        opened = _opened.get(self.token)
        if opened is not None and opened.pid != os.getpid():
            raise ForkedError("this process was forked from the client's")
        modules = _NoModules() if opened else _modules_of_process()
        found = getattr(_of_thread, "environment", None)
        if found is None or found[0] != self.token:
            if found is not None:  # of another client
                found[1].close()
            tail = Tail()
            environment = Environment(log=tail.note, modules=modules)
            found = _of_thread.environment = self.token, environment, tail
            environment.use(self.bucket, opened.bucket if opened else self.open())
            if opened:
                opened.environments.append(environment)
        _, environment, tail = found
        event = json.loads(self.payload)
        with modules.held((event.get("modules") or {}).get("digest")):
            done = answer(event, environment, tail)
        if _has_expired(done.reply):
            _of_thread.environment = None
        return done


def _has_expired(reply: bytes) -> bool:
    """Whether credentials have expired, so that they have to be looked for anew."""
    return b'"kind": "store-expired"' in reply


# ---------------------------------------------------------------------------------------------
# in a process of the client's
# ---------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What a process is told first: pickled, since it holds a function."""

    bucket: str
    open: Callable[[], Any]
    memory_mb: int  #: that it may take
    folder: str  #: for temporary files: removed with the process

    def __repr__(self) -> str:  # what opens the bucket may hold a key
        return f"Settings({self.bucket!r}, ..., {self.memory_mb}, {self.folder!r})"


def main() -> None:
    """Serve what comes through standard input, until that ends; then end at once.

    Signals of the terminal are for the client: this process is in a session of its own.
    """
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what is printed must not get between the replies
    tail = Tail(sys.stderr)
    sys.stdout = sys.stderr = tail
    first = _read(requests)
    settings = Settings(*pickle.loads(first))
    environment = Environment(settings.memory_mb, tail.note)
    environment.use(settings.bucket, settings.open())
    inbox: SimpleQueue[bytes] = SimpleQueue()
    listening = requests, inbox, settings.folder
    threading.Thread(target=_listen, args=listening, daemon=True).start()
    _write(replies, READY)
    while True:
        done = answer(json.loads(inbox.get()), environment, tail)
        _write(replies, done.log)
        _write(replies, done.reply)
        if _has_expired(done.reply):
            environment.use(settings.bucket, settings.open())


def _listen(requests: BinaryIO, inbox: SimpleQueue[bytes], folder: str) -> None:
    """Read requests; end the process, whatever it does, when there can be no more."""
    try:
        while True:
            inbox.put(_read(requests))
    except (EOFError, OSError):
        shutil.rmtree(folder, ignore_errors=True)  # if the client cannot, since it was killed
        os._exit(0)


def _read(source: BinaryIO) -> bytes:
    size = int.from_bytes(_exactly(source, LENGTH_BYTES), "big")
    return _exactly(source, size)


def _exactly(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _write(target: BinaryIO, message: bytes) -> None:
    target.write(framed(message))
    target.flush()


def framed(message: bytes) -> bytes:
    """Return a message with its length before it."""
    return len(message).to_bytes(LENGTH_BYTES, "big") + message
