"""Simulated AWS: ``python -m benchmarks.aws_model``.

The workloads of two papers (:mod:`benchmarks.workloads`), planned and driven by the real planner
and state machine, in virtual time against a model of AWS (:mod:`dask_lambda.simulate`).  Printed
for each workload are the simulated seconds, next to lower bounds and the published seconds,
dollars and requests; and what one invocation for each task would have taken.

``--validate`` compares the simulator with real runs on the embedded AWS instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.truth import Machine, true_estimates
from benchmarks.workloads import WORKLOADS, Inputs, Workload, graph_of, sleeping
from dask_lambda.aws_model import AWS, AwsModel
from dask_lambda.cost_model import CostModel
from dask_lambda.estimates import Estimates
from dask_lambda.graph import Graph
from dask_lambda.plan import make_plan
from dask_lambda.simulate import Simulation, simulate
from dask_lambda.splitting import split

#: How a workload is run: its name here, the planner's mode, what the planner is told, environments.
RUNS = (
    ("auto", "auto", "exact", "cold"),
    ("auto, warm", "auto", "exact", "warm"),
    ("auto, first run", "auto", "guess", "cold"),
    ("none", "none", "guess", "cold"),
)


@dataclass(frozen=True)
class Row:
    """One simulated run."""

    workload: str
    run: str
    published: float | None
    source: str
    memory_mb: int
    chunks: str
    window: int
    tasks: int
    groups: int
    planning_seconds: float  # measured here
    seconds: float
    chain_seconds: float
    critical_path_seconds: float
    bandwidth_seconds: float
    work_seconds: float
    ratio: float
    report: dict[str, Any]


def plan_and_simulate(
    graph: Graph,
    truth: Callable[[Graph], Estimates],
    aws: AwsModel,
    window: int,
    mode: Any,
    told: str,
) -> tuple[Any, Simulation, float]:
    """Return the plan, the simulated run, and the seconds that planning took here."""
    model = CostModel.of(aws.memory_mb, window=window)
    estimates = truth(graph) if told == "exact" else None
    started = time.perf_counter()
    plan = make_plan(graph, mode=mode, finalise=False, estimates=estimates, model=model)
    planning = time.perf_counter() - started
    smaller = partial(split, plan.graph, plan.repeated) if mode == "auto" else None
    simulation = simulate(plan, truth, aws, window=window, keep_results=True, split=smaller)
    return plan, simulation, planning


def rows(workload: Workload, window: int, runs: Iterable[str]) -> Iterable[Row]:
    """Simulate one workload in several ways."""
    inputs = Inputs()
    graph = graph_of(*workload.make(inputs))
    aws = AWS.replace(memory_mb=workload.memory_mb, concurrency=window)
    if workload.sleep is None:
        truth = partial(true_estimates, machine=Machine(aws.vcpus), stored=inputs.shapes)
    else:
        truth = partial(sleeping, seconds=workload.sleep)
    for name, mode, told, state in RUNS:
        if name not in runs:
            continue
        model = aws.replace(warm_environments=window) if state == "warm" else aws
        plan, simulation, planning = plan_and_simulate(graph, truth, model, window, mode, told)
        report, bounds = simulation.report, simulation.bounds
        yield Row(
            workload=workload.name,
            run=name,
            published=workload.published,
            source=workload.source,
            memory_mb=workload.memory_mb,
            chunks=workload.chunks,
            window=window,
            tasks=len(graph.tasks),
            groups=len(plan.groups),
            planning_seconds=planning,
            seconds=report.wall_seconds,
            chain_seconds=bounds.chain_seconds,
            critical_path_seconds=bounds.critical_path_seconds,
            bandwidth_seconds=bounds.bandwidth_seconds,
            work_seconds=bounds.work_seconds,
            ratio=simulation.ratio,
            report=report.to_dict(),
        )


HEADER = (
    "| workload | run | simulated s | path s | network s | work s | ratio | published s | USD "
    "| invocations | PUTs | GETs |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """Return a row of the table."""
    report = row.report
    failed = " (failed)" if report["failed"] else ""
    published = "" if row.published is None else f"{row.published:,g}"
    return (
        f"| {row.workload} | {row.run} | {number(row.seconds)}{failed} "
        f"| {number(row.critical_path_seconds)} | {number(row.bandwidth_seconds)} "
        f"| {number(row.work_seconds)} | {row.ratio:.2f} | {published} "
        f"| {report['cost_usd']:.3f} | {report['invocations']:,} | {report['s3_puts']:,} "
        f"| {report['s3_gets']:,} |"
    )


def number(seconds: float) -> str:
    """Return seconds with three digits or so."""
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def plot(found: list[Row], path: str) -> None:
    """Draw simulated, bound and published seconds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.workload for row in found))
    # Okabe and Ito's colours, which all can tell apart, and shapes for print.
    styles = {
        "auto": ("#0072B2", "o", "dask_lambda, simulated, cold"),
        "auto, warm": ("#56B4E9", "s", "dask_lambda, simulated, warm"),
        "none": ("#E69F00", "^", "one invocation a task, simulated"),
    }
    figure, axes = plt.subplots(figsize=(8.5, 0.5 * len(names) + 1.8), layout="constrained")
    heights = {name: len(names) - 1 - i for i, name in enumerate(names)}
    for run, (colour, marker, label) in styles.items():
        chosen = [row for row in found if row.run == run]
        x, y = [row.seconds for row in chosen], [heights[row.workload] for row in chosen]
        axes.scatter(x, y, s=46, color=colour, marker=marker, label=label, zorder=3)
    base = {row.workload: row for row in found}
    bounds = [
        min(row.seconds / row.ratio for row in found if row.workload == name) for name in base
    ]
    y = [heights[name] for name in base]
    axes.scatter(bounds, y, marker="|", s=260, color="black", label="lower bound", zorder=2)
    published = [row for row in base.values() if row.published is not None]
    axes.scatter(
        [row.published for row in published],
        [heights[row.workload] for row in published],
        marker="D", s=46, facecolor="none", edgecolor="#D55E00", linewidth=1.8,
        label="published, measured on AWS", zorder=4,
    )  # fmt: skip
    axes.set_yticks(list(heights.values()), list(heights))
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.grid(axis="x", which="major", color="0.85", zorder=0)
    axes.grid(axis="y", color="0.93", zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=1000, help="concurrent invocations")
    parser.add_argument("--only", default="", help="workloads with this in their names")
    parser.add_argument("--small", action="store_true", help="without those of 256k x 256k")
    parser.add_argument("--runs", default=";".join(run[0] for run in RUNS))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--validate", action="store_true", help="against the embedded AWS")
    arguments = parser.parse_args()
    if arguments.validate:
        from benchmarks.validation import validate

        validate()
        return
    print(HEADER)
    found = []
    for workload in WORKLOADS:
        if arguments.only not in workload.name or (arguments.small and "256k" in workload.name):
            continue
        for row in rows(workload, arguments.window, arguments.runs.split(";")):
            found.append(row)
            print(line(row), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in found], file, indent=1)
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
