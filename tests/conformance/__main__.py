"""The command line of the conformance suite: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import dask
import pytest

import tests.conformance
from tests.conformance.selection import SELECTIONS

HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description=tests.conformance.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s (--sample | --all) [options] [modules] [pytest options]",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    for name in SELECTIONS:
        which.add_argument(f"--{name}", dest="selection", action="store_const", const=name)
    options, rest = parser.parse_known_args(argv)

    modules = [arg for arg in rest if arg.startswith("dask.")]
    return pytest.main(
        [
            *("-c", str(HERE / "pytest.ini")),
            *("--rootdir", str(Path(dask.__file__).parents[1])),
            *("-p", "tests.conformance.plugin"),
            *("--selection", options.selection),
            *(arg for arg in rest if arg not in modules),
            "--pyargs",
            *(modules or SELECTIONS[options.selection]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
