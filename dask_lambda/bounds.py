"""Below which no schedule of a graph on Lambda can be.  Pure.

May import: aws_model, timeline, estimates, plan, graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from dask_lambda.aws_model import AwsModel
from dask_lambda.estimates import Estimates
from dask_lambda.plan import Plan, topological
from dask_lambda.timeline import references
from lambda_worker.protocol import Key


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower bounds on the time of a run, in seconds.

    Attributes
    ----------
    chain_seconds : float
        The longest chain of tasks, without anything else: with unlimited workers and a network
        that takes no time.
    critical_path_seconds : float
        The same with what even one worker that runs the whole chain cannot avoid: one request of
        the client and one warm invocation at the median; before a task that reads data from S3 the
        first byte and the bytes of the largest, at the burst rate; after a result that stays in S3
        its commit.
    bandwidth_seconds : float
        Data that is read at least once, and results that are written once, through the networks of
        all environments of the window, which begin with full buckets.
    work_seconds : float
        All tasks, divided by the window.
    """

    chain_seconds: float
    critical_path_seconds: float
    bandwidth_seconds: float
    work_seconds: float

    @property
    def seconds(self) -> float:
        """The largest of them."""
        return max(self.critical_path_seconds, self.bandwidth_seconds, self.work_seconds)


def lower_bounds(
    plan: Plan,
    truth: Estimates,
    aws: AwsModel,
    window: int,
    inline_bytes: int = 65536,
) -> Bounds:
    """Compute the lower bounds of a run.

    Parameters
    ----------
    plan : Plan
        Only for its graph, what the client runs itself, and what is kept.
    truth : Estimates
    aws : AwsModel
    window : int
        Invocations at the same time.
    inline_bytes : int
        Results up to this size need no commit.
    """
    graph, client = plan.graph, set(plan.client)
    chain: dict[Key, float] = {}
    path: dict[Key, float] = {}
    read: dict[Key | str, int] = {}
    work = 0.0
    for key in topological(graph, set()):
        if key in client:
            continue
        seconds = truth.seconds[key]
        work += seconds
        before = start = 0.0
        largest = 0
        for d in graph.dependencies(key):
            if d in chain:
                before = max(before, chain[d])
                start = max(start, path[d])
            else:
                size = read[d] = truth.nbytes[d]
                largest = max(largest, size)
        for name, size in references(graph.tasks[key]):
            read[name] = size
            largest = max(largest, size)
        if largest > inline_bytes:
            start = max(
                start, aws.get.median + largest / min(aws.burst_bytes, aws.read_rate(largest))
            )
        chain[key] = before + seconds
        path[key] = start + seconds
    written = 0
    longest = 0.0
    for key in chain:
        finish = path[key]
        if key in plan.keep and truth.nbytes[key] > inline_bytes:
            written += truth.nbytes[key]
            rate = min(aws.burst_bytes, aws.write_rate(truth.nbytes[key]))
            finish += aws.put.median + truth.nbytes[key] / rate
        longest = max(longest, finish)
    compulsory = written + sum(read.values())
    return Bounds(
        chain_seconds=max(chain.values(), default=0.0),
        critical_path_seconds=aws.client_seconds + aws.invoke.median + longest,
        bandwidth_seconds=aws.link().transfer(0.0, compulsory / window),
        work_seconds=work / window,
    )
