"""A run in virtual time: the real planner and state machine, and a model of AWS.  Pure.

May import: timeline, aws_model, estimates, state, plan, graph, report, the ground.

:func:`simulate` is what :mod:`dask_lambda.dispatch` is to the world: it carries out the state
machine's instructions and feeds back events, but a heap of times stands in for the world.  So the
decisions are those of a real run, and only the durations are modelled: the client does one thing
after the other, requests and replies take their time, environments start, are reused or refused
(:class:`dask_lambda.aws_model.AwsModel`), and inside one invocation a timeline says when what is
fetched, computed and committed (:mod:`dask_lambda.timeline`).

What is left out: the memory that tasks need, S3's limit of requests for a prefix, buffers inside
tasks (chunks of ``from_array``), and the client's own preparation of the graph.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dask_lambda.aws_model import AwsModel
from dask_lambda.bounds import Bounds, lower_bounds
from dask_lambda.estimates import Estimates
from dask_lambda.events import (
    Accept,
    Discard,
    Done,
    Event,
    Failure,
    FailureKind,
    GroupsAdded,
    InvocationEnded,
    Invoke,
    Release,
    RunEnded,
    TimePassed,
    Wake,
)
from dask_lambda.graph import Graph
from dask_lambda.plan import Group, Plan
from dask_lambda.policy import Policy
from dask_lambda.report import RunCounts, RunReport
from dask_lambda.state import State
from dask_lambda.timeline import Environment, Step, Timeline, Worker, steps_of
from lambda_worker.protocol import MAX_INLINE_TOTAL_BYTES, MAX_PAYLOAD_BYTES, Key
from lambda_worker.store import Counts

#: As in the engine (dask_lambda.dispatch, dask_lambda.encode).
FETCHES = 32
UPLOADS = 16
DELETE_DELAY = 0.25
DELETE_BATCH = 1000
MAX_HELD_BYTES = 256 * 2**20
MAX_SPILLS = 4
#: Base64 makes four bytes of three.
BASE64 = 4 / 3
#: The longest that Lambda lets a function run, in seconds.
MAX_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Invocation:
    """One invocation that Lambda accepted; times in seconds since the run began.

    Attributes
    ----------
    environment : int
    start, end : float
        Of the handler, without the start of the environment.
    cold : float
        How long the environment took to start before that; 0 if it was warm.
    groups : tuple of Group
    waiting, compute, upload : float
        Until inputs arrived, while no task could run; inside the tasks; until the last output was
        committed, when no task was left.
    gets, puts, bytes_read, bytes_written : int
        Its requests to S3.
    """

    environment: int
    start: float
    end: float
    cold: float
    groups: tuple[Group, ...]
    waiting: float
    compute: float
    upload: float
    gets: int
    puts: int
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Simulation:
    """What a simulated run did.

    Attributes
    ----------
    report : RunReport
        The same that a real run gives.
    timeline : tuple of Invocation
        In the order in which they began.
    bounds : Bounds
        Below which no schedule can be.
    """

    report: RunReport
    timeline: tuple[Invocation, ...]
    bounds: Bounds

    @property
    def critical_path_seconds(self) -> float:
        """See :class:`dask_lambda.bounds.Bounds`."""
        return self.bounds.critical_path_seconds

    @property
    def bandwidth_seconds(self) -> float:
        """See :class:`dask_lambda.bounds.Bounds`."""
        return self.bounds.bandwidth_seconds

    @property
    def ratio(self) -> float:
        """The time over the largest of the lower bounds."""
        return self.report.wall_seconds / self.bounds.seconds


def simulate(
    plan: Plan,
    truth: Estimates | Callable[[Graph], Estimates],
    aws: AwsModel,
    *,
    window: int = 1000,
    inline_bytes: int = 65536,
    keep_results: bool = False,
    batch: bool | None = None,
    split: Callable[[Group], Sequence[Group]] | None = None,
    policy: Policy | None = None,
    seed: int = 0,
    speculate: bool = True,
) -> Simulation:
    """Run a graph in virtual time; what would run outside of Lambda is taken for what runs there.

    Parameters
    ----------
    plan : Plan
        With the graph that it is about.
    truth : Estimates, or callable
        What each task really takes on the function's processor, and the size of each value: of
        tasks, literals and stored results; or a function of the plan's graph that returns this.
    aws : AwsModel
    window : int
        Invocations in flight.
    inline_bytes : int
        Results up to this size travel in the reply.
    keep_results : bool
        Results stay in S3, as with ``persist``, in place of being fetched by the client.
    batch : bool, optional
        Whether groups may share an invocation; default: unless the plan's mode is "none".
    split : callable, optional
        See :class:`dask_lambda.events.GroupsAdded`.
    policy : Policy, optional
        Of the state machine.
    seed : int
        Of all that is random; the same seed gives the same run.
    speculate : bool
        Whether stragglers are duplicated.
    """
    if not isinstance(truth, Estimates):
        truth = truth(plan.graph)
    if any(group.is_local for group in plan.groups):
        plan = replace(plan, groups=tuple(replace(it, where="lambda") for it in plan.groups))
    run = _Run(
        plan.graph, plan, truth, aws, window, inline_bytes, keep_results, policy, seed, speculate
    )
    if batch is None:
        batch = plan.mode != "none"
    return run.simulate(batch, split)


def trace_estimates(graph: Graph, trace: Mapping[str, tuple[float, float]]) -> Estimates:
    """Return what a real run measured as the truth about a graph.

    Parameters
    ----------
    graph : Graph
    trace : mapping
        Key prefix (:func:`dask.utils.key_split`) to the mean seconds and bytes of its tasks.

    Raises
    ------
    KeyError
        For a task whose prefix is not in the trace.
    """
    from dask.utils import key_split

    from dask_lambda.kernels import size_of

    of_task = {key: trace[key_split(key)] for key in graph.tasks}
    nbytes = {key: int(size) for key, (_, size) in of_task.items()}
    nbytes.update((key, size_of(value)) for key, value in graph.literals.items())
    nbytes.update((key, reference.size) for key, reference in graph.stored.items())
    return Estimates({key: seconds for key, (seconds, _) in of_task.items()}, nbytes)


@dataclass(slots=True)
class _Flight:
    """An invocation on its way."""

    instruction: Invoke
    inline: set[Key]
    inline_bytes: int  # that the worker may send back for one value
    steps: list[list[Step]] = field(default_factory=list)
    listing: int = 0  # bytes of its list of groups, where that is an object of its own
    timeline: Timeline | None = None
    failure: Failure | None = None


@dataclass
class _Run:
    graph: Graph
    plan: Plan
    truth: Estimates
    aws: AwsModel
    window: int
    inline_bytes: int
    keep_results: bool
    policy: Policy | None
    seed: int
    speculate: bool
    events: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    client: float = 0.0  # when the client's processor is free
    uplink: float = 0.0
    downlink: float = 0.0
    literals: dict[Key, float] = field(default_factory=dict)  # when an upload is done
    values: dict[Key, bool] = field(default_factory=dict)  # whether a value travels inline
    held: int = 0
    spent: float = 0.0
    trash: int = 0
    delete_soon: bool = False
    ended: RunEnded | None = None
    counts: RunCounts = field(default_factory=RunCounts)
    own: Counts = field(default_factory=Counts)
    timeline: list[Invocation] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        every = dict.fromkeys((*self.graph.source, *self.graph.tasks))
        self.rank = {key: i for i, key in enumerate(every)}
        self.state = State(self.window, self.policy, self.seed)
        readers = Counter(key for group in self.plan.groups for key in group.inputs)
        shared = {key for key, count in readers.items() if count > 1}
        shared.update(self.graph.stored, self.graph.literals)
        self.worker = Worker(self.aws, self.truth.nbytes, shared, self.random)
        self.idle = [Environment(i, self.aws.link()) for i in range(self.aws.warm_environments)]
        self.environments = len(self.idle)
        self.busy = 0
        self.starts = self.aws.scaling_burst  # tokens: environments that may be started now
        self.started_at = 0.0
        self.counter = 0
        self.replies: deque[_Flight] = deque()
        self.fetching = [0.0] * FETCHES
        self.uploading = [0.0] * UPLOADS
        self.last_fetch = 0.0

    def simulate(self, batch: bool, split: Any) -> Simulation:
        if not self.keep_results:
            stored = self.plan.fetch & self.graph.stored.keys()
            for key in sorted(stored, key=self.rank.__getitem__):
                self._fetch(0.0, self.truth.nbytes[key])
        added = GroupsAdded(
            "run",
            self.plan.groups,
            self.plan.keep,
            split=split,
            batch=batch,
            speculate=self.speculate,
        )
        self._tell(added, 0.0)
        while self.events:
            at, _, happen = heapq.heappop(self.events)
            happen(at)
        assert self.ended is not None, "nothing is left to happen, and the run has not ended"
        return Simulation(
            self._report(),
            tuple(sorted(self.timeline, key=lambda i: (i.start, i.environment))),
            lower_bounds(self.plan, self.truth, self.aws, self.window),
        )

    def _at(self, at: float, happen: Callable[[float], None]) -> None:
        self.counter += 1
        heapq.heappush(self.events, (at, self.counter, happen))

    # -- the client ------------------------------------------------------------------------------

    def _tell(self, event: Event, at: float) -> None:
        """Let the state machine decide, and carry out what it says."""
        for instruction in self.state.handle(event, at):
            match instruction:
                case Invoke():
                    if self.ended is None:
                        self._send(instruction, at)
                    else:  # cannot happen with one run
                        raise AssertionError("an ended run goes on")
                case Accept(_, group, inline):
                    self.counts.tasks += len(group.tasks)
                    for key in group.outputs:
                        self._take(key, key in inline, at)
                case Discard(_, group, inline):
                    self.trash += sum(key not in inline for key in group.outputs)
                case Release(_, keys):
                    self._release(keys, at)
                case RunEnded():
                    self.ended = instruction
                    self.ended_at = at
                case Wake(time):
                    self._at(time, lambda at: self._tell(TimePassed(at), at))

    def _work(self, at: float) -> float:
        """Use the client's processor for one half of an invocation."""
        at = max(at, self.client)
        self.client = self.worker.occupy(at, self.aws.client_seconds / 2)
        return self.client

    def _send(self, instruction: Invoke, at: float) -> None:
        aws, nbytes = self.aws, self.truth.nbytes
        at = self._work(at)
        inline_bytes = self.inline_bytes if self.held < MAX_HELD_BYTES else 0
        flight = _Flight(instruction, set(), inline_bytes)
        sizes: dict[Key, int] = {}
        travelling = 0  # a value that two groups read is sent to each
        tasks = 0
        for group in instruction.groups:
            tasks += len(group.tasks)
            flight.steps.append(steps_of(self.graph, group, self.truth.seconds, self.rank))
            for step in flight.steps[-1]:
                for key in step.reads:
                    if key in self.graph.literals:
                        at = max(at, self._literal(key, at))
                    if self.values.get(key, False):
                        size = nbytes[key] + aws.seal_bytes
                        sizes[key] = size
                        travelling += size
        body = tasks * aws.request_bytes
        largest = sorted(sizes, key=lambda key: -sizes[key])
        moved: list[Key] = []
        while travelling + body > MAX_INLINE_TOTAL_BYTES and len(moved) < len(largest):
            moved.append(largest[len(moved)])
            travelling -= sizes[moved[-1]]
        if len(moved) > MAX_SPILLS:
            travelling += sum(sizes[key] for key in moved)
            moved = []
        for key in moved:
            at = max(at, self._upload(at, sizes.pop(key)))
            self.held -= nbytes[key] + aws.seal_bytes
            self.values[key] = False
        flight.inline = set(sizes)
        payload = BASE64 * travelling + body
        if payload > MAX_PAYLOAD_BYTES:
            flight.listing = int(payload)
            at = max(at, self._upload(at, flight.listing))
            payload = aws.request_bytes
        self.uplink = max(self.uplink, at) + payload / aws.client_bytes
        self._at(self.uplink, lambda at: self._arrive(flight, at))

    def _received(self, flight: _Flight, at: float) -> None:
        """Let a reply wait until the client has time."""
        self.replies.append(flight)
        if len(self.replies) == 1:
            self._at(max(at, self.client), self._next_reply)

    def _next_reply(self, at: float) -> None:
        if self.client > at:  # it has sent something meanwhile
            self._at(self.client, self._next_reply)
            return
        self._receive(self.replies.popleft(), at)
        if self.replies:
            self._at(max(at, self.client), self._next_reply)

    def _receive(self, flight: _Flight, at: float) -> None:
        """Take a reply."""
        at = self._work(at)
        instruction, timeline, failure = flight.instruction, flight.timeline, flight.failure
        groups = instruction.groups
        self.counts.retries += bool(instruction.tries) and not instruction.speculative
        if failure is not None:
            self.counts.throttles += failure.kind is FailureKind.THROTTLED
            outcomes: tuple[Done | Failure, ...] = (failure,) * len(groups)
        else:
            assert timeline is not None
            outcomes = tuple(Done(seconds, timeline.inline) for seconds in timeline.seconds)
            self.counts.compute_seconds += timeline.compute
        usd = self.counts.usd(self.own, self.aws.prices)
        usd, self.spent = usd - self.spent, usd
        whole = failure is not None
        self._tell(InvocationEnded(instruction.invocation, outcomes, whole, usd), at)

    def _take(self, key: Key, inline: bool, at: float) -> None:
        size = self.truth.nbytes[key] + self.aws.seal_bytes
        self.values[key] = inline
        if inline:
            self.held += size
        elif key in self.plan.fetch and not self.keep_results:
            self._fetch(at, size)

    def _release(self, keys: Sequence[Key], at: float) -> None:
        for key in keys:
            if self.values.pop(key):
                self.held -= self.truth.nbytes[key] + self.aws.seal_bytes
            else:
                self.trash += 1
        if self.trash >= DELETE_BATCH:
            self._delete(at)
        elif self.trash and not self.delete_soon:
            self.delete_soon = True
            self._at(at + DELETE_DELAY, self._delete_now)

    def _delete_now(self, at: float) -> None:
        self.delete_soon = False
        if self.ended is None:
            self._delete(at)

    def _delete(self, at: float) -> None:
        self.own.deletes += -(-self.trash // DELETE_BATCH)
        self.trash = 0

    def _literal(self, key: Key, at: float) -> float:
        """Upload a literal that does not travel inline, once; return when it is there."""
        if key not in self.literals:
            size = self.truth.nbytes[key]
            if size <= self.inline_bytes:
                self.values[key] = True
                self.literals[key] = at
            else:
                self.literals[key] = self._upload(at, size + self.aws.seal_bytes)
                self.trash += 1
        return self.literals[key]

    def _upload(self, at: float, nbytes: int) -> float:
        aws = self.aws
        start = max(at, self.uploading[0])
        delay = (aws.client_put or aws.put).sample(self.random)
        self.uplink = max(self.uplink, start) + nbytes / aws.client_bytes
        heapq.heapreplace(self.uploading, self.uplink + delay)
        self.own.puts += aws.puts(nbytes)
        self.own.bytes_written += nbytes
        return self.uplink + delay

    def _fetch(self, at: float, nbytes: int) -> None:
        """Fetch a result."""
        aws = self.aws
        first = max(at, self.fetching[0]) + (aws.client_get or aws.get).sample(self.random)
        self.downlink = max(self.downlink, first) + nbytes / aws.client_bytes
        heapq.heapreplace(self.fetching, self.downlink)
        self.last_fetch = max(self.last_fetch, self.downlink)
        self.own.gets += aws.gets(nbytes)
        self.own.bytes_read += nbytes

    # -- Lambda ----------------------------------------------------------------------------------

    def _arrive(self, flight: _Flight, at: float) -> None:
        """A request arrives at Lambda."""
        aws = self.aws
        latency = aws.invoke.sample(self.random)
        if aws.error_probability and self.random.random() < aws.error_probability:
            self._refuse(flight, FailureKind.TRANSIENT, at)
            return
        if self.idle:
            environment, cold = self.idle.pop(), 0.0
        elif self._may_start(at):
            environment = Environment(self.environments, aws.link(at))
            self.environments += 1
            cold = aws.cold_start.sample(self.random) + aws.import_seconds
        else:
            self._refuse(flight, FailureKind.THROTTLED, at)
            return
        self.busy += 1
        start = self.worker.occupy(at + latency / 2, aws.server_seconds)
        start = self.worker.occupy(start, cold) if cold else start
        if flight.listing:
            start += aws.get.sample(self.random) + flight.listing / aws.stream_bytes
        timeline = self.worker.run(
            environment, start, flight.steps, flight.inline, flight.inline_bytes
        )
        timeline.gets += bool(flight.listing)
        timeline.bytes_read += flight.listing
        end = timeline.end
        died = aws.death_probability and self.random.random() < aws.death_probability
        if died:
            end = start + (end - start) / 2
            flight.failure = Failure(FailureKind.DEATH)
        elif end - start > MAX_SECONDS:
            end, died = start + MAX_SECONDS, True
            flight.failure = Failure(FailureKind.TIMEOUT)
        flight.timeline = timeline
        self._count(flight.instruction, environment, start, end, cold, timeline)
        again = max(end, start + aws.request_interval)
        self._at(again, lambda at: self._free(None if died else environment))
        reply = aws.request_bytes + BASE64 * timeline.inline_bytes
        self._at(end + latency / 2, lambda at: self._answer(flight, reply, at))

    def _may_start(self, at: float) -> bool:
        """Start an environment, if Lambda lets us."""
        aws = self.aws
        if self.busy >= aws.concurrency:
            return False
        refilled = self.starts + (at - self.started_at) * aws.scaling_rate
        self.starts, self.started_at = min(aws.scaling_burst, refilled), at
        if self.starts < 1.0:
            return False
        self.starts -= 1.0
        return True

    def _free(self, environment: Environment | None) -> None:
        self.busy -= 1
        if environment is not None:
            self.idle.append(environment)

    def _refuse(self, flight: _Flight, kind: FailureKind, at: float) -> None:
        flight.failure = Failure(kind)
        answer = at + self.aws.refuse.sample(self.random)
        self._at(answer, lambda at: self._answer(flight, 0.0, at))

    def _answer(self, flight: _Flight, nbytes: float, at: float) -> None:
        self.downlink = max(self.downlink, at) + nbytes / self.aws.client_bytes
        self._at(self.downlink, lambda at: self._received(flight, at))

    # -- the sum ---------------------------------------------------------------------------------

    def _count(
        self,
        instruction: Invoke,
        environment: Environment,
        start: float,
        end: float,
        cold: float,
        timeline: Timeline,
    ) -> None:
        counts = self.counts
        counts.invocations += 1
        counts.speculative += instruction.speculative
        counts.cold_starts += bool(cold)
        counts.add_billed(math.ceil((end - start + cold) * 1e3), self.aws.memory_mb)
        counts.cache_hits += timeline.cache_hits
        workers = counts.workers
        workers.gets += timeline.gets
        workers.puts += timeline.puts
        workers.bytes_read += timeline.bytes_read
        workers.bytes_written += timeline.bytes_written
        self.timeline.append(
            Invocation(
                environment.number,
                start,
                end,
                cold,
                instruction.groups,
                timeline.waiting,
                timeline.compute,
                timeline.upload,
                timeline.gets,
                timeline.puts,
                timeline.bytes_read,
                timeline.bytes_written,
            )
        )

    def _report(self) -> RunReport:
        assert self.ended is not None
        end = max(self.ended_at, self.last_fetch)
        if self.keep_results:
            for key in sorted(self.plan.keep & self.values.keys(), key=self.rank.__getitem__):
                if self.values[key]:
                    end = max(end, self._upload(end, self.truth.nbytes[key]))
        else:
            self.trash += sum(not inline for inline in self.values.values())
        self._delete(end)
        for key in self.plan.client:
            end += self.truth.seconds[key]
        failed = self.ended.failure is not None
        return self.counts.report(self.own, end, failed=failed, prices=self.aws.prices)
