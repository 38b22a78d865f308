"""Medians and ratios as text.  May import: the standard library, measure, workloads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.peers.measure import OURS, Outcome
from benchmarks.peers.workloads import WORKLOADS

MEGABYTE = 1e6
#: Name in the table, and name in the server's counts.
REQUESTS = {"PUT": "put", "GET": "get", "LIST": "list", "HEAD": "head", "DELETE": "delete"}
HEADINGS = ("rounds", "seconds", "ratio", *REQUESTS, "MB in", "MB out", "peak MB", "invocations")


def seconds(outcome: Outcome) -> float:
    """Return the median of the rounds."""
    return statistics.median(each["seconds"] for each in outcome.rounds)


def s3(outcome: Outcome, name: str) -> float:
    """Return the median of one of the server's counts."""
    return statistics.median(each["s3"].get(name, 0) for each in outcome.rounds)


def ratio(ours: Outcome, other: Outcome) -> float | None:
    """Return our seconds over the other's: the median over the rounds that both did.

    Of a system that did fewer calls it is for each call.
    """
    theirs = {each["round"]: each["seconds"] for each in other.rounds}
    both = [e["seconds"] / theirs[e["round"]] for e in ours.rounds if e["round"] in theirs]
    return statistics.median(both) * items(other) / items(ours) if both else None


def items(outcome: Outcome) -> int:
    """Return the number of calls or leaves, 1 if the workload has none."""
    return outcome.size.get(WORKLOADS[outcome.workload].items, 1)


def report_agrees(outcome: Outcome) -> bool:
    """Whether our own run report counts what the server counted, in all rounds."""
    return all(
        each["report"]["s3_puts"] == each["s3"].get("put", 0)
        and each["report"]["s3_gets"] == each["s3"].get("get", 0) + each["s3"].get("head", 0)
        and each["report"]["s3_deletes"] == each["s3"].get("delete", 0)
        and each["report"]["s3_lists"] == each["s3"].get("list", 0)
        and each["report"]["invocations"] == each["invocations"]
        for each in outcome.rounds
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the table of one workload."""
    first = outcomes[0]
    ours = next((each for each in outcomes if each.system == OURS), None)
    rows = [("", *HEADINGS)]
    remarks = []
    for outcome in outcomes:
        if outcome.rounds:
            rows.append((outcome.system, *_cells(ours, outcome)))
        if outcome.rounds and outcome.size != first.size:
            what, count = WORKLOADS[outcome.workload].items, items(outcome)
            each = seconds(outcome) / count * 1e3
            remarks.append(f"  {outcome.system}: {count} {what} only, {each:.0f} ms for each")
        for text in (outcome.problem, outcome.note if outcome.rounds else ""):
            if text:
                remarks.append(f"  {outcome.system}: {text}")
    if ours is not None and ours.rounds and not report_agrees(ours):
        remarks.append(f"  {OURS}: its run report counts other requests than the server")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [WORKLOADS[first.workload].describe(first.size)]
    for name, *cells in rows:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"  {name:<{widths[0]}}  " + "  ".join(padded))
    return "\n".join([*lines, *remarks])


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Return one table of all workloads, as in ``docs/benchmarks.md``."""
    headings = ("system", "seconds", "ratio", "S3 PUT", "GET, HEAD, LIST", "MB to S3", "MB from S3")
    lines = [
        "| workload | " + " | ".join((*headings, "peak MB")) + " |",
        "|---" * (len(headings) + 2) + "|",
    ]
    previous = ""
    for outcome in outcomes:
        if not outcome.rounds:
            continue
        same = [each for each in outcomes if each.workload == outcome.workload]
        ours = next((each for each in same if each.system == OURS), None)
        cells = dict(zip(HEADINGS, _cells(ours, outcome), strict=True))
        remarks = [
            f"invocations: {cells['invocations']}" if cells["invocations"] else "",
            f"{items(outcome)} only" if outcome.size != same[0].size else "",
            "1 round" if len(outcome.rounds) == 1 else "",
        ]
        title = WORKLOADS[outcome.workload].describe(same[0].size)
        reads = sum(s3(outcome, name) for name in ("get", "head", "list"))
        values = (
            "" if outcome.workload == previous else title,
            ", ".join(filter(None, (outcome.system, *remarks))),
            cells["seconds"],
            cells["ratio"],
            cells["PUT"],
            f"{reads:,.0f}",
            cells["MB in"],
            cells["MB out"],
            cells["peak MB"],
        )
        lines.append(f"| {' | '.join(values)} |")
        previous = outcome.workload
    return "\n".join(lines)


def _cells(ours: Outcome | None, outcome: Outcome) -> list[str]:
    found = None if ours is None or ours is outcome else ratio(ours, outcome)
    peak = statistics.median(each["peak_bytes"] for each in outcome.rounds)
    invocations = [e["invocations"] for e in outcome.rounds if e["invocations"] is not None]
    return [
        str(len(outcome.rounds)),
        f"{seconds(outcome):.2f}",
        "" if found is None else f"{found:.{2 if found >= 0.1 else 3}f}",
        *(f"{s3(outcome, name):,.0f}" for name in REQUESTS.values()),
        f"{s3(outcome, 'bytes_in') / MEGABYTE:,.1f}",
        f"{s3(outcome, 'bytes_out') / MEGABYTE:,.1f}",
        f"{peak / MEGABYTE:,.0f}",
        f"{statistics.median(invocations):,.0f}" if invocations else "",
    ]
