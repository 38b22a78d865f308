"""What a cold start of the worker imports: ``python -m benchmarks.cold_start``.

Each round is a new interpreter that imports the handler, as Lambda does before the first call, and
then what the first task of an array needs.  Printed are medians, in milliseconds, and which large
packages the handler's import has loaded (it should be Dask's top level only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

LARGE = ("boto3", "botocore", "distributed", "numpy", "pandas", "dask", "dask.array")

PROGRAM = f"""
import json, sys, time
started = time.perf_counter()
import lambda_worker.handler
handler = time.perf_counter() - started
loaded = [name for name in {LARGE!r} if name in sys.modules]
import dask.array
print(json.dumps([handler, time.perf_counter() - started, loaded]))
"""


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = [measure() for _ in range(parser.parse_args().rounds)]
    handler = statistics.median(each[0] for each in rounds)
    array = statistics.median(each[1] for each in rounds)
    print("cold start of the worker")
    print(f"  import of the handler            {handler * 1e3:9.0f} ms ({', '.join(rounds[0][2])})")
    print(f"  ... and of dask.array            {array * 1e3:9.0f} ms")


def measure() -> tuple[float, float, list[str]]:
    """Return the seconds of one interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    handler, array, loaded = json.loads(done.stdout)
    return handler, array, loaded


if __name__ == "__main__":
    main()
