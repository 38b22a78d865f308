"""Call a function on every element of a list, each call as one AWS Lambda invocation.

This is the first program one writes for serverless functions (the ``map`` of PyWren), said with
``dask.delayed``: a list of calls, and a sum that waits for all of them. No cluster is started and
none is left behind: Dask's graph decides what may run, and every call that is ready runs at once.
A second, shorter list of calls reports where each of them ran.

Run it with ``python hello.py``. Without any configuration it uses an AWS that is embedded in this
machine; with a deployed function it uses your account. The program is the same.
"""

import os
import socket
import sys
from collections import Counter

import dask

from dask_lambda import lambda_get, last_report


def add_one(x: int) -> int:
    """Stand in for the work that is worth a call of its own."""
    return x + 1


def here() -> tuple[str, str, int]:
    """Where this call runs: the name of the Lambda function (empty if none), host, process."""
    function = os.environ.get("AWS_LAMBDA_FUNCTION_NAME", "")
    return function, socket.gethostname(), os.getpid()


def main() -> None:
    """Run the calls, say where they ran, and compare with a plain loop."""
    numbers = range(100)
    incremented = [dask.delayed(add_one)(n) for n in numbers]
    total = dask.delayed(sum)(incremented)
    places = [dask.delayed(here)() for _ in range(20)]

    # Nothing has run so far. One compute runs all of it as one graph.
    incremented, total, places = dask.compute(incremented, total, places, scheduler=lambda_get)

    print(f"add_one over 0 ... {numbers[-1]}: {incremented[:5]} ... {incremented[-1]}")
    print(f"their sum: {total}")
    print(f"this program runs on host {socket.gethostname()} in process {os.getpid()};")
    for (function, host, process), calls in sorted(Counter(places).items()):
        print(f"{calls:3} calls ran in function {function!r} on host {host} in process {process}")

    plain = [add_one(n) for n in numbers]
    if incremented != plain or total != sum(plain):
        sys.exit("check failed: the list or its sum differ from a plain loop")
    if here() in places or not all(function for function, _, _ in places):
        sys.exit("check failed: some calls did not run in a Lambda function")
    print("check passed: a plain loop gives the same list and sum, and nothing ran in this process")
    print(last_report())


if __name__ == "__main__":
    main()
