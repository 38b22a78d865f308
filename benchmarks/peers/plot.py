"""Bars of seconds and bytes for each workload and system.  May import: matplotlib, table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.measure import SYSTEMS, Outcome
from benchmarks.peers.table import MEGABYTE, items, s3, seconds

#: Okabe and Ito's colours, which are told apart without colour vision too; and hatches, in grey.
STYLES = dict(
    zip(
        SYSTEMS,
        (("#0072B2", ""), ("#E69F00", "//"), ("#009E73", ".."), ("#CC79A7", "xx")),
        strict=True,
    )
)
PANELS = {
    "seconds": seconds,
    "MB through S3, both ways": lambda o: (s3(o, "bytes_in") + s3(o, "bytes_out")) / MEGABYTE,
}


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    workloads = list(dict.fromkeys(each.workload for each in outcomes))
    systems = [name for name in SYSTEMS if any(each.system == name for each in outcomes)]
    found = {(each.workload, each.system): each for each in outcomes}
    figure, axes = plt.subplots(
        1, len(PANELS), figsize=(11, 0.9 + 1.15 * len(workloads)), layout="constrained"
    )
    most = {name: max(items(e) for e in outcomes if e.workload == name) for name in workloads}
    height = 0.8 / len(systems)
    for axis, (label, measured) in zip(axes, PANELS.items(), strict=True):
        values = {key: measured(each) for key, each in found.items() if each.rounds}
        positive = [value for value in values.values() if value > 0]
        left = min(positive, default=1.0) / 3
        for i, system in enumerate(systems):
            colour, hatch = STYLES[system]
            for row, workload in enumerate(workloads):
                y = row + (i - (len(systems) - 1) / 2) * height
                value = values.get((workload, system))
                if value:
                    axis.barh(y, value, height * 0.9, color=colour, hatch=hatch, edgecolor="white")
                axis.annotate(
                    _text(value, found.get((workload, system)), most[workload]),
                    (value or left, y),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7,
                )
        axis.set_xscale("log")
        axis.set_xlim(left, 6 * max(positive, default=1.0))  # room for the numbers
        axis.set_yticks(range(len(workloads)), workloads)
        axis.set_ylim(len(workloads) - 0.5, -0.5)  # the first one on top
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=system)
        for system, (colour, hatch) in STYLES.items()
        if system in systems
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _text(value: float | None, outcome: Outcome | None, most: int) -> str:
    if outcome is None:
        return ""
    if value is not None:
        digits = 0 if value >= 100 or value == 0 else 1 if value >= 10 else 2
        fewer = f" ({items(outcome)} of {most:,})" if items(outcome) < most else ""
        return f"{value:,.{digits}f}{fewer}"
    return "not available" if outcome.problem.startswith("not") else "failed"
