"""One invocation, from the instruction to what became of its groups.

May import: objects, run, events, failures, config, cost, the ground.  To be used in the engine's
thread.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from dask_lambda import failures
from dask_lambda.cost import Architecture, Prices
from dask_lambda.events import Done, Failure, FailureKind, Invoke
from dask_lambda.objects import told_outputs
from dask_lambda.plan import Group
from dask_lambda.run import Result, Run, Sealed, fetch_sealed

if TYPE_CHECKING:
    from dask_lambda.invoke import Reply

logger = logging.getLogger("dask_lambda")

REFUSALS = (FailureKind.THROTTLED, FailureKind.RATE_LIMITED)


class Backend(Protocol):
    """Where invocations and objects go."""

    #: With ``open``, ``close``, ``check`` and ``invoke``, as LambdaInvoker; from the usual function
    #: to those with more memory.
    invokers: Sequence[Any]
    bucket_name: str
    bucket: Any  #: an obstore store
    prefix: str
    window: int
    function: str
    region: str
    endpoint_url: str | None
    local: Any  #: likewise for what does not run on Lambda, or None (dask_lambda.standalone)
    keys: tuple[str, str] | None  #: of the embedded AWS
    lasting: bool  #: whether what is in the bucket outlives this process

    def is_alive(self) -> bool:
        """Whether it can still be reached, as far as is known without asking it."""

    def check(self) -> None:
        """Raise an error that says why it cannot be reached any more, if that is known."""

    def refresh(self) -> None:
        """Look for credentials anew, since AWS says that these have expired."""

    def affordable(self, window: int, /) -> int:
        """Return how many of so many invocations may be in flight; warn if they are fewer."""


class Sender:
    """Sends the invocations of one engine.

    Parameters
    ----------
    backend : Backend
    prices : Prices
    architecture : {"x86_64", "arm64"}, optional
        Of the functions; default: what they say themselves.
    """

    def __init__(self, backend: Backend, prices: Prices, architecture: Architecture | None = None):
        self._backend = backend
        self._prices = prices
        self._warned: set[str] = set()
        self._architecture = architecture

    def invoker(self, instruction: Invoke) -> Any:
        """Return who serves an invocation."""
        if instruction.local:
            return self._backend.local
        return self._backend.invokers[instruction.rung]

    def architecture(self, invoker: Any) -> Architecture:
        """Return on which processor a function runs, as far as is known."""
        return self._architecture or getattr(invoker, "architecture", None) or "x86_64"

    def usd_second(self, invoker: Any, memory_mb: int) -> float:
        """Return what a second of a function costs.

        Parameters
        ----------
        invoker : LambdaInvoker
        memory_mb : int
            Of the function, unless it has said something else.
        """
        price = self._prices.gb_second(self.architecture(invoker))
        return (invoker.memory_mb or memory_mb) / 1024 * price

    async def send(
        self, run: Run, instruction: Invoke, inline_bytes: int
    ) -> Sequence[Done | Failure] | Failure:
        """Send an invocation; return what became of each group, or of it as a whole.

        Parameters
        ----------
        run : Run
        instruction : Invoke
        inline_bytes : int
            Results up to this size travel in the reply.

        Raises
        ------
        StoreError
            If the payload needs S3, and S3 fails.
        DaskLambdaError
            If there can be no payload, or the reply is not believed.
        """
        groups = instruction.groups
        invoker = self.invoker(instruction)
        for group in groups:
            if failure := self._too_large(run, group, invoker.memory_mb):
                return failure  # of several groups: each is then tried alone
        modules = run.encoder.modules
        known = len(modules.roots)
        payload = await run.encoder.payload(groups, run.values, inline_bytes)
        if run.over:  # cancelled or failed meanwhile: do not spend money
            return Failure(FailureKind.FATAL)
        sent = time.monotonic()
        with run.encoder.lease.held():
            reply: Reply
            if instruction.local:
                reply = await invoker.invoke(payload, run.ended)
            else:
                reply = await invoker.invoke(payload)
        if instruction.local:
            self._count_local(run, instruction, reply)
        elif (
            reply.ran and reply.content is None and reply.billed_ms is None
        ):  # nobody says how long
            run.unbilled += (time.monotonic() - sent) * self.usd_second(invoker, run.memory_mb)
        memory_mb = invoker.memory_mb or run.memory_mb
        if not instruction.local:
            self._count(run, instruction, reply, memory_mb, self.architecture(invoker))
        if reply.ran:
            usd = self._usd(instruction, reply, invoker, memory_mb)
            run.note_attempt(groups, usd, reply.log)
        content = reply.content
        if content is not None and "differing" in content:
            self._warn(invoker.function, content["differing"])
        if content is None or "refused" in content:
            if reply.ran:
                run.lost.update(run.object_name(k) for g in groups for k in g.outputs)
            if content is not None:
                failure = failures.from_refusal(content["refused"])
            else:
                assert reply.failure is not None
                failure = reply.failure
                if not reply.answered:
                    await asyncio.to_thread(self._backend.check)
            return failure
        if "error" in content:  # the worker could not read the list of groups
            return failures.from_record(content["error"])
        if len(content["groups"]) != len(groups):
            said = f"{len(content['groups'])} groups in a reply to {len(groups)}"
            return failures.from_foreign_reply(said.encode(), invoker.function)
        outcomes: list[Done | Failure] = []
        seconds = content["milliseconds"] / 1e3 / len(groups)  # batches are of one kind
        for group, record in zip(groups, content["groups"], strict=True):
            run.uncertain.update(filter(run.encoder.owns, record.get("left", ())))
            if "error" in record:  # perhaps after one of its outputs was written
                run.uncertain.update(map(run.object_name, group.outputs))
                error = record["error"]
                leased = run.encoder.lease.was_due(sent)
                failure = failures.from_record(
                    error, leased=leased, local=instruction.local, missing=modules.advice
                )
                if error.get("loading") and modules.supply(error["module"], known):
                    failure = replace(failure, kind=FailureKind.TRANSIENT)
                outcomes.append(failure)
            else:
                run.counts.compute_seconds += record["seconds"]
                outcomes.append(Done(seconds, await self._result(run, group, record, content)))
        return outcomes

    def _warn(self, function: str, packages: dict[str, Any]) -> None:
        """Say once that a function has slightly other versions."""
        text = failures.describe_differing(function, packages)
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    @staticmethod
    def _too_large(run: Run, group: Group, memory_mb: int | None) -> Failure | None:
        """Refuse a task that needs more than the function's memory, before it is paid for."""
        if len(group.tasks) > 1 or memory_mb is None:
            return None
        nbytes = sum(run.values[key].size for key in group.inputs)
        local = group.is_local
        for what, needed in (("its inputs take", nbytes), ("it is said to need", group.memory)):
            if needed > memory_mb * 2**20:
                return failures.from_needs(needed, memory_mb, what, local=local)
        return None

    @staticmethod
    def _count(
        run: Run,
        instruction: Invoke,
        reply: Reply,
        memory_mb: int,
        architecture: Architecture,
    ) -> None:
        counts = run.counts
        if reply.failure is not None and reply.failure.kind in REFUSALS:
            counts.throttles += 1
        elif reply.ran:
            counts.invocations += 1
            counts.speculative += instruction.speculative
        if instruction.tries and not instruction.speculative:
            counts.retries += 1
        if reply.content is not None:
            counts.add_reply(reply.content, reply.billed_ms, architecture)
        elif reply.billed_ms is not None:
            counts.add_billed(reply.billed_ms, memory_mb, architecture)
        if reply.restored:
            counts.add_restore(memory_mb)

    @staticmethod
    def _count_local(run: Run, instruction: Invoke, reply: Reply) -> None:
        run.counts.retries += bool(instruction.tries)
        if reply.content is not None:
            run.counts.add_work(reply.content)

    def _usd(self, instruction: Invoke, reply: Reply, invoker: Any, memory_mb: int) -> float:
        """Return what an invocation cost, as far as it is known."""
        if reply.content is None and reply.billed_ms is None:
            return 0.0
        content = reply.content or {}
        milliseconds = reply.billed_ms or math.ceil(content.get("milliseconds", 0))
        if instruction.local:  # but for S3
            milliseconds = 0
        s3 = content.get("s3", {})
        return milliseconds / 1e3 * self.usd_second(invoker, memory_mb) + self._prices.cost(
            invocations=0 if instruction.local else 1,
            gb_seconds=0.0,
            puts=s3.get("puts", 0),
            lists=s3.get("lists", 0),
            gets=s3.get("gets", 0),
            restored_gb=memory_mb / 1024 if reply.restored else 0.0,
        )

    @staticmethod
    async def _result(
        run: Run, group: Group, record: dict[str, Any], content: dict[str, Any]
    ) -> Result:
        """Read what a worker says of a group that is done."""
        told = told_outputs(run, group, record["outputs"])
        sealed = None
        if run.watch_values and not run.over:
            value = told[0][1]
            if value.data is None:
                sealed = await fetch_sealed(run.store, value, run.secret)
            else:
                sealed = Sealed(value.data, run.secret, value.name)
        return Result(
            told,
            record.get("tasks", {}),
            sealed,
            record.get("types", ()),
            content["cold"],
            content.get("peak_memory", 0),
        )
