"""How large the worker's package is and how fast it starts: ``python -m benchmarks.packaging``.

The environment of this interpreter is built as ``dask-lambda`` deploys it (or found in the cache),
and unpacked into an empty directory.  Each round is a new interpreter with nothing but that on its
path, which imports what a worker imports before it can run a task of an array: the handler, and
``DASK_LAMBDA_PREIMPORT``.  Printed are the sizes, what was cut, medians, and the modules whose own
code takes longest (``-X importtime``).
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

from dask_lambda.deploy import layers, package
from dask_lambda.deploy.platforms import IMAGE_GLIBC, Platform

PROGRAM = f"""
import sys, time
sys.path[:0] = sys.argv[1:]
started, cpu = time.perf_counter(), time.process_time()
import lambda_worker.handler
handler = time.perf_counter() - started
for name in {package.PREIMPORT!r}.split(","):
    __import__(name)
print(handler, time.perf_counter() - started, time.process_time() - cpu)
"""


def main() -> None:
    """Build, unpack, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", help="besides what every worker has")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    # Any C library that this machine has will do here, whatever Lambda's is.
    lambdas = Platform.of_lambda()
    here = Platform(lambdas.python, lambdas.architecture, IMAGE_GLIBC)
    built = package.build(arguments.packages, form="layers", platform=here)
    print(f"package for workers, {built.platform}")
    for size in built.sizes[:8]:
        print(f"  {size.name + ' ' + size.version:32} {size.nbytes / 1e6:9.1f} MB")
    others = sum(size.nbytes for size in built.sizes[8:])
    print(f"  {len(built.sizes[8:])} others {'':22} {others / 1e6:10.1f} MB")
    print(f"  unzipped                         {built.unzipped / 1e6:9.1f} MB")
    for layer in built.layers:
        print(f"  {layer.file:32} {layer.nbytes / 1e6:9.1f} MB zipped")
    for why, nbytes in built.cuts.items():
        print(f"  cut: {why:27} {nbytes / 1e6:9.1f} MB")
    with tempfile.TemporaryDirectory() as directory:
        opt, task = Path(directory, "opt"), Path(directory, "task")
        for layer in built.layers:
            zipfile.ZipFile(built.directory / layer.file).extractall(opt)
        zipfile.ZipFile(BytesIO(package.function_code())).extractall(task)
        paths = [str(task), str(opt / layers.FOLDER)]
        start(paths)  # the files are in memory afterwards
        rounds = [tuple(map(float, start(paths)[0].split())) for _ in range(arguments.rounds)]
        ranking = own_times(start(paths, "-X", "importtime")[1])
    print(f"  import of the handler            {median(rounds, 0):9.0f} ms")
    print(f"  ... and of {package.PREIMPORT:22}{median(rounds, 1):9.0f} ms")
    print(f"  ... in processor time, all threads{median(rounds, 2):9.0f} ms")
    for name, milliseconds in ranking[:12]:
        print(f"    {name:30} {milliseconds:9.1f} ms")


def start(paths: list[str], *options: str) -> tuple[str, str]:
    """Return what one interpreter writes to its output and to its error output."""
    command = [sys.executable, "-I", "-S", "-B", *options, "-c", PROGRAM, *paths]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout, done.stderr


def median(rounds: list[tuple[float, ...]], place: int) -> float:
    """Return the median of one measurement, in milliseconds."""
    return statistics.median(each[place] for each in rounds) * 1e3


def own_times(said: str) -> list[tuple[str, float]]:
    """Return modules and the milliseconds of their own, the slowest first."""
    lines = re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", said)
    return sorted(((name, int(own) / 1e3) for own, name in lines), key=lambda each: -each[1])


if __name__ == "__main__":
    main()
