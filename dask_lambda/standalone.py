"""Invocations that are no Lambda's: tasks that run on machines of the user's own.

May import: failures, events, invoke (for :class:`Reply`), replies, the ground.

What is sent to Lambda is sent to a local process instead, byte for byte, and served there by the
same handler, which reads and writes the same objects in S3.  So to the engine this is one more
invoker.  There are two kinds: processes of our own, and whatever executor the user gives.

Processes of our own are started when they are needed, up to a number, and kept until the engine is
closed.  They are no ``ProcessPoolExecutor``: its processes would import the user's script, which
need not be written for that, and the death of one would be the failure of all.  They end when their
standard input does, so with the client, however that ends.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from dask_lambda import failures, replies
from dask_lambda.events import Failure, FailureKind
from dask_lambda.invoke import Reply
from lambda_worker import standalone
from lambda_worker.memory import machine_memory
from lambda_worker.protocol import HASH_SEED

#: How long a process without work may take to end, in seconds.
END_SECONDS = 1.0
#: A ``distributed`` cluster has a queue of its own, and may grow with it.
CLUSTER_SLOTS = 1000

#: The program of a process.  It finds modules where this process does.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
    "from lambda_worker.standalone import main; main()"
)


class LocalInvoker(Protocol):
    """What the engine asks of either kind."""

    slots: int  #: invocations at the same time
    memory_mb: int | None  #: of the machine, for all of them; None if it is not known
    function: str  #: for messages

    async def close(self) -> None:
        """End what is going on, and let go of everything."""

    async def invoke(self, payload: bytes, unwanted: asyncio.Event) -> Reply:
        """Have a request served, or not if that is unwanted before.

        Whatever is served returns after the end of that, and so after the last object is written.
        """


_UNWANTED = Failure(FailureKind.CANCELLED)


async def _first(doing: asyncio.Future[Any], unwanted: asyncio.Event) -> bool:
    """Wait for the end of some work, or until it is unwanted; tell whether it has ended."""
    waiting = asyncio.ensure_future(unwanted.wait())
    try:
        await asyncio.wait((doing, waiting), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return doing.done()


# ---------------------------------------------------------------------------------------------
# processes of our own
# ---------------------------------------------------------------------------------------------


class _Ended(Exception):
    """A process is not there any more."""


class _Process:
    """One process that serves requests, one at a time."""

    def __init__(self, process: asyncio.subprocess.Process, folder: str):
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._folder = process, folder
        self._requests, self._replies = process.stdin, process.stdout

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and not self._replies.at_eof()

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, bucket: str, open_bucket: Callable[[], Any], memory_mb: int) -> _Process:
        """Start one.

        Raises
        ------
        _Ended
            If it ended before it was ready.
        """
        folder = tempfile.mkdtemp(prefix="lambda_worker-")
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                _PROGRAM,
                json.dumps(sys.path),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONHASHSEED": HASH_SEED, "TMPDIR": folder},
                start_new_session=True,  # Ctrl-C is for the client, which decides what it means
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        started = cls(process, folder)
        settings = standalone.Settings(bucket, open_bucket, memory_mb, folder)
        try:
            await started._send(pickle.dumps(tuple(settings)))
            await started._receive()
        except BaseException:
            await started.kill()
            raise
        return started

    async def ask(self, payload: bytes) -> standalone.Answer:
        """Have a request served.

        Raises
        ------
        _Ended
        """
        await self._send(payload)
        log = await self._receive()
        return standalone.Answer(await self._receive(), log)

    async def _send(self, message: bytes) -> None:
        try:
            self._requests.write(standalone.framed(message))
            await self._requests.drain()
        except OSError:
            raise _Ended from None

    async def _receive(self) -> bytes:
        try:
            head = await self._replies.readexactly(standalone.LENGTH_BYTES)
            return await self._replies.readexactly(int.from_bytes(head, "big"))
        except (asyncio.IncompleteReadError, OSError):
            raise _Ended from None

    async def end(self) -> int:
        """Let it end, since nobody has work for it; return its exit code."""
        self._requests.close()
        try:
            code = await asyncio.wait_for(self._process.wait(), END_SECONDS)
        except TimeoutError:
            return await self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        return code

    async def kill(self) -> int:
        """End it whatever it does; return its exit code."""
        with suppress(ProcessLookupError):
            self._process.kill()
        self._requests.close()
        code = await self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        return code


class ProcessInvoker:
    """Runs invocations in processes of this machine.  To be used in one event loop.

    Parameters
    ----------
    bucket : str
        Its name.
    open_bucket : callable
        Opens the bucket in a process; pickled, and handed over through its standard input.
    slots : int
        Processes at the same time.
    """

    function = "a process of this machine"

    def __init__(self, bucket: str, open_bucket: Callable[[], Any], slots: int):
        self.slots = slots
        self.memory_mb = machine_memory() // 2**20
        self._start = partial(_Process.start, bucket, open_bucket, self.memory_mb // slots)
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()

    @property
    def pids(self) -> list[int]:
        """Return the ids of the processes."""
        return [process.pid for process in (*self._idle, *self._busy)]

    async def close(self) -> None:
        """End all processes."""
        idle, self._idle = self._idle, []
        busy, self._busy = self._busy, set()
        await asyncio.gather(*(p.kill() for p in busy), *(p.end() for p in idle))

    async def invoke(self, payload: bytes, unwanted: asyncio.Event) -> Reply:
        """Have a request served; the process that serves it is killed if that is unwanted."""
        doing = asyncio.ensure_future(self._serve(payload))
        try:
            if await _first(doing, unwanted):
                return doing.result()
        finally:
            doing.cancel()
            await asyncio.gather(doing, return_exceptions=True)
        return Reply(None, _UNWANTED)

    async def _serve(self, payload: bytes) -> Reply:
        """Have a request served in a process that has nothing else to do, or a new one."""
        process = None
        while self._idle and process is None:
            process = self._idle.pop()
            if not process.is_alive:  # somebody has ended it, and nothing is lost
                await process.kill()
                process = None
        try:
            process = process or await self._start()
        except (_Ended, OSError) as error:
            return Reply(None, failures.from_local_start(str(error)), ran=False)
        self._busy.add(process)
        try:
            answer = await process.ask(payload)
        except _Ended:
            code = await process.end()  # which may take it a moment
            return Reply(None, failures.from_local_death(code))
        except BaseException:  # nobody wants it any more
            await process.kill()
            raise
        finally:
            self._busy.discard(process)
        self._idle.append(process)
        return _read(answer)


# ---------------------------------------------------------------------------------------------
# the user's executor
# ---------------------------------------------------------------------------------------------


class ExecutorInvoker:
    """Runs invocations on an executor that is the user's, who also closes it.

    Parameters
    ----------
    bucket : str
        Its name.
    opened : obstore store
        The bucket, for threads of this process.
    open_bucket : callable
        Opens the bucket in another process; pickled, and handed over through the executor.
    executor : concurrent.futures.Executor or distributed.Client
    """

    def __init__(
        self, bucket: str, opened: Any, open_bucket: Callable[[], Any], executor: Executor | Any
    ):
        self.function = f"the executor {type(executor).__name__}"
        self.memory_mb: int | None = machine_memory() // 2**20
        self.slots = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
        if hasattr(executor, "get_executor"):  # a client of distributed, whose machines may be any
            self.memory_mb, self.slots = None, CLUSTER_SLOTS
            executor = executor.get_executor(pure=False)
        # It says of nothing whether it has begun.
        self._may_cancel = self.memory_mb is not None
        self._executor = executor
        self._bucket, self._open = bucket, open_bucket
        self._token = str(uuid.uuid4())
        standalone.lend(self._token, opened)

    async def close(self) -> None:
        """Let go of the executor."""
        standalone.take_back(self._token)

    async def invoke(self, payload: bytes, unwanted: asyncio.Event) -> Reply:
        """Have a request served by the executor, unless that is unwanted before it has begun."""
        errand = standalone.Errand(payload, self._bucket, self._open, self._token)
        try:
            future: Future[standalone.Answer] = self._executor.submit(errand)
            doing = asyncio.wrap_future(future)
            if not await _first(doing, unwanted) and self._may_cancel:
                future.cancel()
            answer = await doing
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            if unwanted.is_set():
                return Reply(None, _UNWANTED, ran=False)
            return Reply(None, failures.from_executor(self.function, "it was cancelled"))
        except Exception as error:  # noqa: BLE001  of an executor that may be anybody's
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker":
                return Reply(None, failures.from_executor(self.function, text, died=True))
            return Reply(None, failures.from_executor(self.function, text))
        return _read(answer)


def _read(answer: standalone.Answer) -> Reply:
    log = base64.b64encode(answer.log).decode("ascii")
    content = json.loads(answer.reply)
    try:
        replies.check(content)
    except replies.NotAReply as error:
        failure = failures.from_foreign_reply(answer.reply, "a local process", str(error))
        return Reply(None, failure, log=log)
    return Reply(content, log=log)


def open_local(
    executor: Any, bucket: str, opened: Any, open_bucket: Callable[[], Any], slots: int
) -> ProcessInvoker | ExecutorInvoker | None:
    """Return where tasks run locally, as the setting ``local-executor`` says; None for nowhere.

    Parameters
    ----------
    executor : {"auto", "processes", "none"} or executor
    bucket, opened, open_bucket
        As for :class:`ExecutorInvoker`.
    slots : int
        Processes of our own.
    """
    if executor == "none":
        return None
    if isinstance(executor, str):
        return ProcessInvoker(bucket, open_bucket, slots)
    return ExecutorInvoker(bucket, opened, open_bucket, executor)
