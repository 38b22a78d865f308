"""The log lines of the functions, from CloudWatch.  May import: aws, naming, errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.naming import LOGS, function_of

#: Seconds between two looks.
FOLLOW_SECONDS = 2.0
#: Milliseconds: lines may arrive later than others that are younger.
OVERLAP = 10_000
#: What Lambda itself writes around each invocation.
PLATFORM = ("START RequestId:", "END RequestId:", "REPORT RequestId:", "INIT_START ")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a log.

    Attributes
    ----------
    function : str
    stream : str
        Of the execution environment.
    time : int
        Milliseconds since 1970.
    text : str
    """

    function: str
    stream: str
    time: int
    text: str

    @property
    def is_platform(self) -> bool:
        """Whether Lambda wrote it."""
        return self.text.startswith(PLATFORM)

    @property
    def record(self) -> dict[str, Any] | None:
        """What the worker says about an invocation; None for all other lines."""
        if not self.text.startswith("{"):
            return None
        try:
            found = json.loads(self.text)
        except ValueError:
            return None
        return found if isinstance(found, dict) and "run" in found and "request" in found else None


def read(
    account: Account, functions: Sequence[str], since: int, *, run: str | None = None
) -> Iterator[Line]:
    """Return the lines of some functions, the oldest first.

    Parameters
    ----------
    account : Account
    functions : sequence of str
        A function that has not written anything has no lines.
    since : int
        Milliseconds since 1970.
    run : str, optional
        Only lines that name this run.

    Raises
    ------
    AccessDeniedError
    """
    yield from sorted(
        (line for _, line in _events(account, functions, since, run)), key=lambda line: line.time
    )


def follow(
    account: Account,
    functions: Sequence[str],
    since: int,
    *,
    run: str | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Line]:
    """Return lines for ever, as they come."""
    seen: dict[str, int] = {}
    while True:
        fresh = [(i, line) for i, line in _events(account, functions, since, run) if i not in seen]
        for _, line in sorted(fresh, key=lambda each: each[1].time):
            yield line
        seen.update({i: line.time for i, line in fresh})
        if seen:
            since = max(since, max(seen.values()) - OVERLAP)
            seen = {i: when for i, when in seen.items() if when >= since}
        sleep(FOLLOW_SECONDS)


def _events(
    account: Account, functions: Sequence[str], since: int, run: str | None
) -> Iterator[tuple[str, Line]]:
    from botocore.exceptions import ClientError

    from dask_lambda.deploy.aws import code_of

    # A term in quotes is looked for in the whole line, so that lines of other forms are found, too.
    pattern = {"filterPattern": json.dumps(run)} if run else {}
    for function in functions:
        try:
            for event in account.pages(
                "logs",
                "FilterLogEvents",
                "events",
                logGroupName=LOGS + function_of(function),
                startTime=since,
                **pattern,
            ):
                line = Line(
                    function,
                    event.get("logStreamName", ""),
                    int(event["timestamp"]),
                    event["message"].rstrip("\n"),
                )
                yield event.get("eventId") or repr(line), line
        except ClientError as error:
            if code_of(error) != "ResourceNotFoundException":  # no log yet
                raise
