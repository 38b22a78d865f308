"""What an invocation writes into its log: one line of JSON.  May import: nothing of the package.

On AWS it goes to CloudWatch, whose Logs Insights finds the fields by themselves, and makes metrics
of them if the function has the environment variable :data:`METRICS`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: Groups of an invocation that its line names, and characters of a key, as JSON.  With them the
#: line is far below the 4 kB of log that Lambda sends back with the reply.
MAX_GROUPS = 8
MAX_KEY = 80
#: Environment variable of the function: the line holds metrics for CloudWatch, too.
METRICS = "DASK_LAMBDA_METRICS"
NAMESPACE = "dask_lambda"


@dataclass(frozen=True, slots=True)
class Work:
    """One group.

    Attributes
    ----------
    group : str
        Label of its first output, the last part of the object's name.
    key : str
        Of its first output; empty if it never got so far.
    error : str, optional
        What kind of error it ended with.
    """

    group: str
    key: str
    error: str | None = None

    def to_json(self) -> dict[str, str]:
        """Describe it, not at too great a length."""
        error = {"error": self.error} if self.error else {}
        return {"group": _cut(self.group), "key": _cut(self.key), **error}


def _cut(text: str) -> str:
    """Return a beginning that is not too long as JSON, where a character may take up to twelve."""
    text = text[:MAX_KEY]
    if text.isascii() and text.isprintable() and not set(text) & set('"\\'):
        return text
    room = MAX_KEY
    for place, character in enumerate(text):
        room -= len(json.dumps(character)) - 2
        if room < 0:
            return text[:place]
    return text


def line(
    event: dict[str, Any], context: Any, reply: dict[str, Any], work: Sequence[Work] = ()
) -> str:
    """Return the line, with its end.

    Parameters
    ----------
    event : dict
        The request.
    context : object
        Lambda's.
    reply : dict
    work : sequence of Work
        The groups that were run.
    """
    groups = reply.get("groups", [])
    record: dict[str, Any] = {
        "run": event.get("run"),
        "request": context.aws_request_id,
        "cold": reply["cold"],
        **({"restored": True} if reply.get("restored") else {}),
        "groups": len(groups),
        "errors": sum("error" in g for g in groups),
        "cancelled": any(g.get("error", {}).get("kind") == "cancelled" for g in groups),
        "milliseconds": round(reply["milliseconds"], 3),
        "peak_memory": reply.get("peak_memory"),
        "work": [each.to_json() for each in work[:MAX_GROUPS]],
    }
    if os.environ.get(METRICS):
        record |= _metrics(context, record, reply.get("s3", {}))
    return json.dumps(record) + "\n"


def _metrics(context: Any, record: dict[str, Any], s3: dict[str, int]) -> dict[str, Any]:
    """Return what makes metrics of a line ("CloudWatch embedded metric format specification")."""
    values = {
        "Duration": (record["milliseconds"], "Milliseconds"),
        "Groups": (record["groups"], "Count"),
        "Errors": (record["errors"], "Count"),
        "ColdStarts": (int(record["cold"]), "Count"),
        "PeakMemory": (record["peak_memory"] or 0, "Bytes"),
        "BytesRead": (s3.get("bytes_read", 0), "Bytes"),
        "BytesWritten": (s3.get("bytes_written", 0), "Bytes"),
    }
    directive = {
        "Namespace": NAMESPACE,
        "Dimensions": [["FunctionName"]],
        "Metrics": [{"Name": name, "Unit": unit} for name, (_, unit) in values.items()],
    }
    return {
        "_aws": {"Timestamp": int(time.time() * 1e3), "CloudWatchMetrics": [directive]},
        "FunctionName": str(getattr(context, "function_name", "")),
        **{name: value for name, (value, _) in values.items()},
    }
