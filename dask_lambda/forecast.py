"""What a run is expected to do and to cost, before anything of it is sent.  Pure.

May import: simulate, aws_model, splitting, estimates, plan, graph, kernels, cost, report, the
ground.

The plan is the one that a run would have now.  It is run three times in virtual time
(:mod:`dask_lambda.simulate`): with what its tasks are expected to take and return, and with the two
ends of what they may.  How far these are apart depends on what is known of each task
(:data:`SPREAD`): of a function that was never seen, next to nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from html import escape
from typing import Any

from dask.utils import key_split

from dask_lambda import kernels
from dask_lambda.aws_model import AwsModel
from dask_lambda.cost import Prices
from dask_lambda.estimates import Basis, Estimates
from dask_lambda.graph import Graph
from dask_lambda.plan import Plan
from dask_lambda.simulate import Invocation, simulate
from dask_lambda.splitting import split
from lambda_worker.lease import AFTER, EVERY
from lambda_worker.protocol import Key

#: The seconds of a task may be so many times less, or more, than expected (assumed, and compared
#: with runs by benchmarks/estimates.py).  Where what was measured and what is guessed are further
#: apart than a guess may be wrong, as with blocks of another size, the range holds both.
SPREAD: dict[Basis, float] = {"said": 1.25, "measured": 3.0, "guessed": 5.0, "unknown": 100.0}
#: The result of a task of which nothing is known may be so large; it then goes through S3.
LARGE_BYTES = 2**20
#: Buffers inside tasks (chunks of ``from_array``) from this size on are objects of their own, as
#: dask_lambda.encode has it.
MIN_UPLOAD_BYTES = 256 * 1024
#: Which environment gets which invocation is chance, and with it whether it has an input already:
#: so much less, or more, may be read.
READING_SPREAD = 1.1
#: A run of which an invocation takes so many seconds has a lease (dask_lambda.lease): one PUT.
LEASE_SECONDS = 1.0

#: For people.
BASES: dict[Basis, str] = {
    "said": "as you say",
    "measured": "as measured in this process",
    "guessed": "as guessed from function and sizes",
    "unknown": "unknown",
}


@dataclass(frozen=True, slots=True)
class Range:
    """A figure of which one end is expected to be exceeded, and the other not."""

    low: float
    expected: float
    high: float

    @classmethod
    def of(cls, low: float, expected: float, high: float) -> Range:
        """Return the range of three figures, whichever is the largest."""
        return cls(min(low, expected, high), expected, max(low, expected, high))

    def wider(self, factor: float) -> Range:
        """Return the range of a count that may be so many times less, or more."""
        return Range(math.floor(self.low / factor), self.expected, math.ceil(self.high * factor))


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to do, each as a range (:class:`Range`).

    Attributes
    ----------
    tasks, groups : int
        What runs, and in how many groups: that is certain.
    invocations, cold_starts : Range
    compute_seconds : Range
        Inside the tasks, over all workers.
    wall_seconds : Range
        From the call to the result.  Without the client's own preparation of the graph.
    billed_gb_seconds : Range
    s3_puts, s3_gets : Range
        Requests of client and workers.
    bytes_written, bytes_read : Range
        To and from S3.
    cost_usd : Range
    basis : dict
        How many tasks' seconds are known how: "said", "measured", "guessed", "unknown".
    unknown : dict
        Key prefix to the number of tasks of which nothing is known.
    prices : str
        Whose prices these are.
    where : {"aws", "local"}
        Where it would run; on the embedded AWS the seconds are this machine's.
    memory_mb : int
        Of the function.
    notes : tuple of str
        What else there is to know.
    """

    tasks: int
    groups: int
    invocations: Range
    cold_starts: Range
    compute_seconds: Range
    wall_seconds: Range
    billed_gb_seconds: Range
    s3_puts: Range
    s3_gets: Range
    bytes_written: Range
    bytes_read: Range
    cost_usd: Range
    basis: dict[Basis, int]
    unknown: dict[str, int]
    prices: str
    where: str
    memory_mb: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of built-in types."""
        return {**asdict(self), "notes": list(self.notes)}

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Range):
                form = _FORMS.get(each.name, "{:,.0f}")
                shown = (form.format(v) for v in (value.low, value.expected, value.high))
                low, expected, high = shown
                yield each.name.replace("_", " "), low, expected, high

    def _says(self) -> Iterator[str]:
        place = "the embedded AWS" if self.where == "local" else "AWS"
        yield f"{self.tasks:,} tasks in {self.groups:,} groups, on {place}, {self.memory_mb:,} MB"
        known = ", ".join(f"{BASES[name]}: {n:,}" for name, n in self.basis.items())
        yield f"seconds of tasks: {known or 'nothing runs'}"
        if self.unknown:
            names = ", ".join(f"{name} ({n:,})" for name, n in _most(self.unknown))
            yield (
                f"nothing is known of: {names}; say what one takes "
                '(default_task_seconds={"name": seconds}), or run a few of them first'
            )
        yield f"prices: {self.prices}"
        yield from self.notes

    def __str__(self) -> str:
        rows = [("", "low", "expected", "high"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = [
            "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join(["estimate", *table, *(f"  {line}" for line in self._says())])

    def _repr_html_(self) -> str:
        head = "<tr><th></th><th>low</th><th>expected</th><th>high</th></tr>"
        cells = "".join(
            f"<tr><td style='text-align:left'>{escape(row[0])}</td>"
            + "".join(f"<td>{escape(figure)}</td>" for figure in row[1:])
            + "</tr>"
            for row in self._rows()
        )
        says = "".join(f"<li>{escape(line)}</li>" for line in self._says())
        return f"<table><caption>estimate</caption>{head}{cells}</table><ul>{says}</ul>"


_FORMS = {
    "cost_usd": "{:.6f}",
    **dict.fromkeys(("compute_seconds", "wall_seconds", "billed_gb_seconds"), "{:,.3f}"),
}


def _most(counts: Mapping[str, int], limit: int = 10) -> list[tuple[str, int]]:
    return Counter(counts).most_common(limit)


def forecast(
    plan: Plan,
    basis: Mapping[Key, Basis],
    guessed: Estimates,
    expected: Callable[[Mapping[Key, int]], Estimates],
    aws: AwsModel,
    busy: AwsModel,
    prices: Prices,
    *,
    where: str,
    window: int,
    inline_bytes: int,
    keep_results: bool = False,
    speculate: bool = True,
    timeout: float = 900.0,
) -> Estimate:
    """Estimate what a run of a plan does.

    Parameters
    ----------
    plan : Plan
    basis : mapping
        What is known of the seconds of each task of its graph.
    guessed : Estimates
        From the functions alone.
    expected : callable
        Returns what is expected of the graph, given the sizes of results of which nothing is known.
    aws : AwsModel
        Of the function, with the prices of its processor.
    busy : AwsModel
        The same on a bad day, for the upper end.
    prices : Prices
    where : {"aws", "local"}
    window : int
        Invocations in flight.
    inline_bytes : int
        Results up to this size travel in the reply.
    keep_results : bool
        Results stay in S3.
    speculate : bool
    timeout : float
        Of the function, in seconds.
    """
    usual = expected({})
    supposed = dict.fromkeys((key for key in plan.graph.tasks if key in usual.unknown), LARGE_BYTES)
    least = replace(usual, nbytes=_shrunk(plan.graph, usual.nbytes, basis))
    most = expected(supposed)
    odd = _odd(usual, guessed, basis)
    scenarios = (
        (_end(least, guessed, basis, odd, min, timeout), aws.without_chance(), window),
        (usual, aws, window if where == "local" else 0),
        (_end(most, guessed, basis, odd, max, timeout), busy, 0),
    )
    smaller = partial(split, plan.graph, plan.repeated) if plan.mode != "none" else None
    buffers = _held(plan)
    reports, others = [], []
    for truth, model, warm in scenarios:
        simulation = simulate(
            plan,
            truth,
            model.replace(warm_environments=warm),
            window=window,
            inline_bytes=inline_bytes,
            keep_results=keep_results,
            split=smaller,
            speculate=speculate,
        )
        reports.append(simulation.report)
        others.append(_lease(simulation.timeline, buffers))
    if guessed.unknown:  # the user's own functions may need the user's own modules: one archive
        others[-1].s3_puts += 1
        others[-1].s3_gets += reports[-1].invocations
    both = list(zip(reports, others, strict=True))
    counts: dict[str, Range] = {}
    for name in COUNTED:
        counts[name] = Range.of(*(getattr(r, name) + getattr(o, name, 0) for r, o in both))
    for name in ("s3_gets", "bytes_read"):
        counts[name] = counts[name].wider(READING_SPREAD)
    counts["cost_usd"] = Range.of(*(r.cost_usd + o.usd(prices) for r, o in both))
    run = [key for group in plan.groups for key in group.tasks]
    known = Counter(basis.get(key, "guessed") for key in run)
    unknown = Counter(key_split(key) for key in run if basis.get(key) == "unknown")
    return Estimate(
        tasks=len(run),
        groups=len(plan.groups),
        **counts,
        basis={name: known[name] for name in BASES if known[name]},
        unknown=dict(_most(unknown, len(unknown))),
        prices=prices.source,
        where=where,
        memory_mb=aws.memory_mb,
        notes=tuple(_notes(plan, [report.failed for report in reports])),
    )


COUNTED = (
    *("invocations", "cold_starts", "compute_seconds", "wall_seconds", "billed_gb_seconds"),
    *("s3_puts", "s3_gets", "bytes_written", "bytes_read"),
)


def _odd(usual: Estimates, guessed: Estimates, basis: Mapping[Key, Basis]) -> set[Key]:
    """Return the tasks of known functions that took much more, or less, than is guessed."""
    most = SPREAD["guessed"]
    return {
        key
        for key, seconds in usual.seconds.items()
        if basis.get(key) == "measured"
        and key not in guessed.unknown
        and not seconds / most <= guessed.seconds[key] <= seconds * most
    }


def _end(
    usual: Estimates,
    guessed: Estimates,
    basis: Mapping[Key, Basis],
    odd: set[Key],
    end: Callable[[float, float], float],
    timeout: float,
) -> Estimates:
    """Return one end of what tasks may take and return.

    No task takes more than an invocation may, unless it is expected to.
    """
    direction = end(-1, 1)
    seconds, nbytes = {}, dict(usual.nbytes)
    for key, each in usual.seconds.items():
        longer = each * SPREAD[basis.get(key, "guessed")] ** direction
        if key in odd:
            longer = end(longer, guessed.seconds[key] * SPREAD["guessed"] ** direction)
            nbytes[key] = int(end(nbytes[key], guessed.nbytes[key]))
        seconds[key] = longer if each > timeout else min(longer, timeout)
    return Estimates(seconds, nbytes, usual.unknown)


def _shrunk(
    graph: Graph, nbytes: Mapping[Key, int], basis: Mapping[Key, Basis]
) -> Mapping[Key, int]:
    """Return the sizes with those of reductions smaller: what is left may be a number."""
    catalogue = kernels.Catalogue()
    return {
        key: size // kernels.REDUCED
        if basis.get(key) == "guessed"
        and kernels.Family.REDUCE in catalogue.kernel(key, graph.tasks[key]).families
        else size
        for key, size in nbytes.items()
    }


@dataclass(slots=True)
class _Others:
    """Requests that the simulator leaves out: for buffers inside tasks, and for the lease."""

    s3_puts: int = 0
    s3_gets: int = 0
    bytes_written: int = 0
    bytes_read: int = 0

    def usd(self, prices: Prices) -> float:
        """Return what they cost, in US dollars."""
        return prices.cost(invocations=0, gb_seconds=0, puts=self.s3_puts, gets=self.s3_gets)


def _lease(timeline: Sequence[Invocation], buffers: _Others) -> _Others:
    """Add what it takes to know whether the run goes on (:mod:`lambda_worker.lease`)."""
    found = replace(buffers)
    found.s3_puts += any(each.end - each.start + each.cold > LEASE_SECONDS for each in timeline)
    for each in timeline:
        looks = max(0.0, each.cold + each.end - each.start - AFTER + EVERY) // EVERY
        between = sum(len(group.tasks) for group in each.groups) - 1
        found.s3_gets += min(int(looks), between)
    return found


def _held(plan: Plan) -> _Others:
    held, seen = _Others(), set()
    catalogue = kernels.Catalogue()
    tasks = plan.graph.tasks
    for group in plan.groups:
        read = set()
        for key in group.tasks:
            if not catalogue.kernel(key, tasks[key]).walks:
                continue
            for buffer in kernels.held(tasks[key]):
                nbytes = kernels.size_of(buffer)
                if nbytes < MIN_UPLOAD_BYTES or id(buffer) in read:
                    continue
                read.add(id(buffer))
                held.s3_gets += 1
                held.bytes_read += nbytes
                if id(buffer) not in seen:
                    seen.add(id(buffer))
                    held.s3_puts += 1
                    held.bytes_written += nbytes
    return held


def _notes(plan: Plan, failed: Sequence[bool]) -> Iterator[str]:
    if failed[1]:
        yield "with the expected figures a task exceeds the time that Lambda allows: it would fail"
    elif failed[2]:
        yield "with the high figures a task exceeds the time that Lambda allows: it would fail"
    local = sum(len(group.tasks) for group in plan.groups if group.is_local)
    if local:
        yield f"{local:,} tasks do not run on Lambda, but are reckoned here as if they did"
