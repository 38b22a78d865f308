"""Measure dask_lambda next to its peers: ``python -m benchmarks.peers``.

Prints a table for each workload: medians over the rounds of wall seconds, S3 requests and bytes
(as the server counted them; *in* is to S3), the peak memory of all processes of a system together
(shared pages counted once; not S3's own), and Lambda invocations.  *ratio* is our seconds over the
system's, in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.measure import LONG_ROUND, OURS, SYSTEMS, Outcome, measure
from benchmarks.peers.system import CORES
from benchmarks.peers.table import markdown, table
from benchmarks.peers.workloads import WORKLOADS


def main() -> None:
    """Measure, and show the outcome as it comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"default: all of {', '.join(WORKLOADS)}")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one round")
    parser.add_argument("--markdown", action="store_true", help="print all as one table, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the medians")
    arguments = parser.parse_args()
    unknown = set(arguments.workloads) - WORKLOADS.keys()
    if unknown:
        parser.error(f"no such workload: {', '.join(sorted(unknown))}")

    started = time.monotonic()
    print(
        f"{CORES} cores, Python {platform.python_version()}, MiniStack {version('ministack')}; "
        f"up to {arguments.rounds} rounds, one for a peer that takes more than {LONG_ROUND:g} s"
    )
    outcomes: list[Outcome] = []
    for name in arguments.workloads or WORKLOADS:
        found = measure(
            name,
            arguments.systems,
            size=getattr(WORKLOADS[name], arguments.size),
            rounds=arguments.rounds,
            timeout=arguments.timeout,
        )
        print("\n" + table(found), flush=True)
        outcomes += found
    versions = {package: v for each in outcomes for package, v in each.versions.items()}
    print(f"\n{', '.join(f'{package} {v}' for package, v in versions.items())}")
    print(f"{time.monotonic() - started:.0f} s in all, load {os.getloadavg()[0]:.1f} at the end")
    if arguments.markdown:
        print("\n" + markdown(outcomes))
    if arguments.json:
        content = {
            "cores": CORES,
            "python": platform.python_version(),
            "versions": versions,
            "outcomes": [each.to_dict() for each in outcomes],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if arguments.plot:
        from benchmarks.peers.plot import plot

        plot(outcomes, arguments.plot)
    failed = [e for e in outcomes if e.system == OURS and e.problem]
    if failed:
        raise SystemExit(f"{OURS} failed: {failed[0].problem}")


if __name__ == "__main__":
    main()
