"""What happens inside one simulated invocation.  Pure.  May import: aws_model, plan, graph.

The worker runs one task at a time.  Meanwhile it fetches the inputs of the tasks to come, in the
order of need, several at the same time and ahead by a bounded number of bytes, and uploads the
outputs of the tasks that are done; both share the network of the environment.  Values that arrived
in the request are there at once, and so are those that the environment kept in its cache.

An invocation is computed in one go: its requests to S3 are ordered among themselves, and
nothing outside has a part in them.
"""

from __future__ import annotations

import heapq
import random
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dask._task_spec import GraphNode

from dask_lambda.aws_model import AwsModel, Link
from dask_lambda.graph import Graph
from dask_lambda.plan import Group
from lambda_worker.protocol import MAX_INLINE_TOTAL_BYTES, Key, Reference

_UPLOAD = -1
_NEVER = float("inf")


class Step(NamedTuple):
    """One task of a group."""

    seconds: float  #: inside it
    reads: tuple[Key, ...]  #: what it is the first of its group to need from elsewhere
    loads: tuple[tuple[str, int], ...]  #: references that it loads itself: object and bytes
    outputs: tuple[Key, ...]  #: what is committed when it is done


@dataclass(slots=True)
class Environment:
    """One execution environment: what outlives an invocation."""

    number: int
    link: Link
    cache: OrderedDict[Key, int] = field(default_factory=OrderedDict)
    cached: int = 0  # bytes in the cache

    def recall(self, key: Key) -> bool:
        """Tell whether the cache holds a value, which is thereby the last one used."""
        if key in self.cache:
            self.cache.move_to_end(key)
            return True
        return False

    def remember(self, key: Key, nbytes: int, limit: int) -> None:
        """Put a value into the cache, at the expense of those that were used least recently."""
        if nbytes > limit:
            return
        self.cache[key] = nbytes
        self.cached += nbytes
        while self.cached > limit:
            self.cached -= self.cache.popitem(last=False)[1]


@dataclass(slots=True)
class Timeline:
    """One invocation inside the handler: when it ends, what it waits for, what it requests.

    Attributes
    ----------
    end : float
        When the last output is committed.
    waiting, compute, upload : float
        Seconds until inputs arrive, while no task can run; inside the tasks; after the last task,
        for outputs that are still on their way.
    seconds : list of float
        Inside the tasks of each group.
    inline : set of key
        Outputs that travel in the reply.
    """

    end: float
    waiting: float = 0.0
    compute: float = 0.0
    upload: float = 0.0
    gets: int = 0
    puts: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    cache_hits: int = 0
    seconds: list[float] = field(default_factory=list)
    inline: set[Key] = field(default_factory=set)
    inline_bytes: int = 0


def steps_of(
    graph: Graph, group: Group, seconds: Mapping[Key, float], rank: Mapping[Key, int]
) -> list[Step]:
    """Say what a group's tasks do, in their order.

    Parameters
    ----------
    graph : Graph
    group : Group
    seconds : mapping
        Of each task.
    rank : mapping
        Of each key: inputs of one task are fetched in this order.
    """
    seen: set[Key] = set(group.tasks)
    outputs = set(group.outputs)
    steps = []
    for key in group.tasks:
        reads = graph.dependencies(key) - seen
        seen |= reads
        steps.append(
            Step(
                seconds[key],
                tuple(sorted(reads, key=rank.__getitem__)) if len(reads) > 1 else tuple(reads),
                tuple(references(graph.tasks[key])),
                (key,) if key in outputs else (),
            )
        )
    return steps


def references(part: Any, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Yield name and size of the stored results that a task holds and loads by itself."""
    if isinstance(part, Reference):
        yield part.name, part.size
    elif isinstance(part, GraphNode):
        yield from references(getattr(part, "args", ()), depth + 1)
    elif depth < 8 and isinstance(part, tuple | list) and len(part) <= 64:
        for each in part:
            if isinstance(each, GraphNode | tuple | list | dict | Reference):
                yield from references(each, depth + 1)
    elif depth < 8 and isinstance(part, dict):
        yield from references(list(part.values()), depth + 1)


class Worker:
    """Runs invocations on environments, in virtual time.

    Parameters
    ----------
    aws : AwsModel
    nbytes : mapping
        Of each value.
    shared : collection of key
        Values that more than one group reads.
    inline_bytes : int
        Results up to this size travel in the reply.
    random : random.Random
    """

    def __init__(
        self,
        aws: AwsModel,
        nbytes: Mapping[Key, int],
        shared: Collection[Key],
        random: random.Random,
    ):
        self._aws = aws
        self._shares = aws.shares
        self._nbytes = nbytes
        self._shared = shared
        self._random = random
        self._cores = [0.0] * aws.cores if aws.cores else None

    def occupy(self, at: float, seconds: float) -> float:
        """Use one of the shared processors, if there are such; return when that is done."""
        if self._cores is None or not seconds:
            return at + seconds
        end = max(at, self._cores[0]) + seconds
        heapq.heapreplace(self._cores, end)
        return end

    def run(
        self,
        environment: Environment,
        start: float,
        groups: Sequence[Sequence[Step]],
        inline: Collection[Key],
        inline_bytes: int,
    ) -> Timeline:
        """Run one invocation.

        Parameters
        ----------
        environment : Environment
        start : float
            When the handler begins.
        groups : sequence of sequences of Step
        inline : collection of key
            Values that came in the request.
        inline_bytes : int
            Results up to this size travel in the reply.
        """
        aws, nbytes = self._aws, self._nbytes
        now = start
        slow = 1.0
        if aws.straggler_probability and self._random.random() < aws.straggler_probability:
            slow = aws.straggler_factor
        record = Timeline(start)
        traffic = _Traffic(aws, self._shares.prefetch, environment.link, start, self._random)
        needs = self._needs(environment, groups, inline, traffic, record)
        room = MAX_INLINE_TOTAL_BYTES
        if self._cores is not None:  # shared processors are booked as time goes on: all at once
            outputs = sum(nbytes[key] for steps in groups for step in steps for key in step.outputs)
            moved = sum(traffic.sizes) + (outputs if outputs > inline_bytes else 0)
            seconds = len(groups) * aws.group_seconds + moved / aws.server_bytes
            now = self.occupy(now, seconds)
        place = 0
        for steps in groups:
            inside = 0.0
            if self._cores is None:
                now += aws.group_seconds
            for step in steps:
                ready = now
                if (need := needs[place]) is not None:
                    ready = max(now, traffic.wait_for(need))
                    traffic.consume(need, ready)
                place += 1
                for name, size in step.loads:  # by the task itself: nobody fetches them ahead
                    ready = self._load(environment, traffic, record, name, size, ready)
                record.waiting += ready - now
                seconds = step.seconds * slow
                now = ready + seconds
                inside += seconds
                for key in step.outputs:
                    size = nbytes[key] + aws.seal_bytes
                    if size <= inline_bytes and size <= room:
                        room -= size
                        record.inline.add(key)
                        record.inline_bytes += size
                    else:
                        traffic.upload(now, size)
                        record.puts += aws.puts(size)
                        record.bytes_written += size
            record.compute += inside
            record.seconds.append(inside)
        record.end = max(now, traffic.finish())
        record.upload = record.end - now
        return record

    def _needs(
        self,
        environment: Environment,
        groups: Sequence[Sequence[Step]],
        inline: Collection[Key],
        traffic: _Traffic,
        record: Timeline,
    ) -> list[range | None]:
        """List all that is to be fetched; return for each task which of it that task needs."""
        aws, nbytes, shared = self._aws, self._nbytes, self._shared
        limit = self._shares.cache
        place: dict[Key, int] = {}  # of what this invocation fetches
        needs: list[range | None] = []
        for steps in groups:
            for step in steps:
                first = len(traffic.sizes)
                waits = -1
                for key in step.reads:
                    if key in inline:
                        continue
                    if environment.recall(key):
                        record.cache_hits += 1
                        waits = max(waits, place.get(key, -1))
                        continue
                    size = nbytes[key] + aws.seal_bytes
                    place[key] = len(traffic.sizes)
                    traffic.sizes.append(size)
                    record.gets += aws.gets(size)
                    record.bytes_read += size
                    if key in shared:
                        environment.remember(key, size, limit)
                stop = len(traffic.sizes)
                if stop > first:
                    needs.append(range(first, stop))
                else:
                    needs.append(range(waits, waits + 1) if waits >= 0 else None)
        return needs

    def _load(
        self,
        environment: Environment,
        traffic: _Traffic,
        record: Timeline,
        name: str,
        size: int,
        at: float,
    ) -> float:
        if environment.recall(name):
            record.cache_hits += 1
            return at
        environment.remember(name, size, self._shares.cache)
        record.gets += self._aws.gets(size)
        record.bytes_read += size
        return traffic.download(at, size)


class _Traffic:
    """The S3 requests of one invocation: what is fetched, in order, and what is uploaded.

    A request waits for its first byte, and then its bytes go through the environment's link, in
    the order in which the first bytes come.
    """

    def __init__(self, aws: AwsModel, limit: int, link: Link, start: float, random: random.Random):
        self.sizes: list[int] = []  # of what is to be fetched
        self._aws = aws
        self._limit = limit  # of what is fetched ahead
        self._link = link
        self._random = random
        self._arrivals: list[float] = []  # of what was fetched, infinite while it is not there
        self._issued = 0
        self._held = 0  # bytes that are fetched, or being fetched, and not needed yet
        self._consumed = 0
        self._slots = [start] * aws.requests_in_flight  # when the idle connections became idle
        self._uploads = [start] * aws.requests_in_flight
        self._gate = start  # nothing is issued before: there was no room
        self._started = False
        self._pending: list[tuple[float, int, int, float]] = []  # first byte, place, bytes, delay
        self._last = start

    def wait_for(self, need: range) -> float:
        """Return when all of some fetches have arrived."""
        if not self._started:
            self._started = True
            self._issue()
        arrivals = self._arrivals
        last = need[-1]
        while self._issued <= last:
            if not self._slots:
                self._pop()
            elif not self._issue():
                self._issue_one()  # needed now, whether there is room or not
        ready = 0.0
        for place in need:
            while arrivals[place] == _NEVER:
                self._pop()
            ready = max(ready, arrivals[place])
        return ready

    def consume(self, need: range, at: float) -> None:
        """Note that a task has begun, so that there is room for what comes next."""
        pending = self._pending
        while pending and pending[0][0] <= at:
            self._pop()
        blocked = bool(self._slots) and self._issued < len(self.sizes)
        for place in need:
            if place >= self._consumed:
                self._held -= self.sizes[place]
        self._consumed = max(self._consumed, need[-1] + 1)
        if blocked:
            self._gate = at
            self._issue()

    def upload(self, at: float, nbytes: int) -> None:
        """Upload an output that is ready at a time."""
        aws = self._aws
        at = max(at + nbytes / aws.codec_bytes, self._uploads[0])
        delay = aws.put.sample(self._random)
        if nbytes > aws.parts.write_above:
            delay += sum(aws.put.sample(self._random) for _ in range(3))
        # The connection is free again at about this time; the link knows it better, but later.
        heapq.heapreplace(self._uploads, at + delay + nbytes / aws.write_rate(nbytes))
        heapq.heappush(self._pending, (at, _UPLOAD, nbytes, delay))

    def download(self, at: float, nbytes: int) -> float:
        """Fetch something now and wait for it."""
        first = at + self._aws.get.sample(self._random)
        while self._pending and self._pending[0][0] <= first:
            self._pop()
        return self._through(first, nbytes, self._aws.read_rate(nbytes))

    def finish(self) -> float:
        """Return when the last upload is done."""
        while self._pending:
            self._pop()
        return self._last

    def _issue(self) -> bool:
        """Start as many fetches as there are connections and room for."""
        issued = False
        limit = self._limit
        sizes = self.sizes
        while (
            self._slots
            and self._issued < len(sizes)
            and (not self._held or self._held + sizes[self._issued] <= limit)
        ):
            self._issue_one()
            issued = True
        return issued

    def _issue_one(self) -> None:
        size = self.sizes[self._issued]
        at = max(heapq.heappop(self._slots), self._gate)
        first = at + self._aws.get.sample(self._random)
        heapq.heappush(self._pending, (first, self._issued, size, 0.0))
        self._arrivals.append(_NEVER)
        self._issued += 1
        self._held += size

    def _pop(self) -> None:
        """Let the request pass whose first byte comes first."""
        first, place, nbytes, delay = heapq.heappop(self._pending)
        if place == _UPLOAD:
            rate = self._aws.write_rate(nbytes)
            self._last = max(self._last, self._through(first, nbytes, rate) + delay)
            return
        done = self._through(first, nbytes, self._aws.read_rate(nbytes))
        self._arrivals[place] = done + nbytes / self._aws.codec_bytes
        heapq.heappush(self._slots, done)
        self._issue()

    def _through(self, first: float, nbytes: int, rate: float) -> float:
        return max(self._link.transfer(first, nbytes), first + nbytes / rate)
