"""The command line: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

import tests.distributed_conformance
from tests.distributed_conformance.source import fetch

HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.distributed_conformance",
        description=tests.distributed_conformance.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [FILE] [options] [pytest options]",
    )
    _, rest = parser.parse_known_args(argv)
    files = [arg for arg in rest if arg.endswith(".py")]
    file = (Path(files[0]) if files else fetch("test_client.py")).absolute()
    if not file.is_file():
        parser.error(f"there is no file {file}")
    return pytest.main(
        [
            *("-c", str(HERE / "pytest.ini")),
            *("--rootdir", str(file.parent)),
            *("-p", "tests.distributed_conformance.plugin"),
            *(arg for arg in rest if arg not in files),
            str(file),
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
