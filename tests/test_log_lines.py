"""The line that a worker writes for each invocation, and what the client makes of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from dask_lambda.cli.look import _as_text
from dask_lambda.deploy import logs
from dask_lambda.deploy.logs import Line
from lambda_worker import log_lines
from lambda_worker.log_lines import MAX_GROUPS, MAX_KEY, METRICS, Work

CONTEXT = SimpleNamespace(aws_request_id="41d0", function_name="dask-lambda-1769")
REPLY = {
    "cold": True,
    "milliseconds": 12.3456,
    "peak_memory": 10**8,
    "groups": [{"outputs": []}, {"error": {"kind": "exception"}}],
    "s3": {"bytes_read": 5, "bytes_written": 7},
}


def written(*work: Work) -> dict[str, Any]:
    (line,) = log_lines.line({"run": "ab" * 16}, CONTEXT, REPLY, work).splitlines()
    assert len(line) < 3000  # Lambda sends 4 kB back, and what tasks print is to be there as well
    return dict(json.loads(line))


def test_the_line_names_groups_keys_and_errors() -> None:
    line = written(Work("4f2a", "('sum', 0)"), Work("77b0", "('sum', 1)", "exception"))
    assert line["work"] == [
        {"group": "4f2a", "key": "('sum', 0)"},
        {"group": "77b0", "key": "('sum', 1)", "error": "exception"},
    ]
    assert (line["groups"], line["errors"], line["cold"]) == (2, 1, True)
    assert "_aws" not in line


def test_the_line_stays_short_whatever_the_keys_are() -> None:
    line = written(*[Work("f" * 500, "k" * 500, "exception")] * 100)
    assert len(line["work"]) == MAX_GROUPS
    assert {len(each["key"]) for each in line["work"]} == {MAX_KEY}


@pytest.mark.parametrize("character", ["é", "\N{SLIGHTLY SMILING FACE}", '"', "\\", "\0", "\udc80"])
def test_the_line_stays_short_in_any_language(character: str) -> None:
    line = written(*[Work("f" * 500, "key " + character * 500)] * 100)
    for each in line["work"]:
        assert each["key"].startswith("key " + character)
        assert len(json.dumps(each["key"])) <= MAX_KEY + 2


def test_what_is_printed_of_a_log_cannot_control_the_terminal() -> None:
    said = "\x1b]0;title\x07\x1b[2Jmine\tand\nthat é\u202e"
    line = Line("f", "s", 0, said)
    assert _as_text(line).endswith(r"\x1b]0;title\x07\x1b[2Jmine" + "\tand\nthat é" + r"\u202e")
    work = [{"group": "4f2a", "key": "\x1b[2J"}]
    record = {"run": "\x1b[3J", "request": "1", "groups": 1, "work": work}
    assert "\x1b" not in _as_text(Line("f", "s", 0, json.dumps(record)))


def test_with_metrics_the_line_is_in_embedded_metric_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(METRICS, "1")
    line = written()
    (directive,) = line["_aws"]["CloudWatchMetrics"]
    assert line["_aws"]["Timestamp"] > 1.7e12  # milliseconds
    for names in directive["Dimensions"]:
        assert all(isinstance(line[name], str) for name in names)
    for metric in directive["Metrics"]:
        assert isinstance(line[metric["Name"]], int | float)
        assert metric["Unit"] in ("Milliseconds", "Count", "Bytes")
    assert (line["Duration"], line["Errors"], line["BytesRead"]) == (12.346, 1, 5)


class Pages:
    """CloudWatch, with one more line each time that it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def pages(self, *_: str, **parameters: Any) -> list[dict[str, Any]]:
        self.asked.append(parameters)
        return [
            {"eventId": str(n), "timestamp": 1_000_000 + n, "message": f"line {n}\n"}
            for n in range(len(self.asked))
        ]


def test_following_says_each_line_once() -> None:
    pages = Pages()
    lines = logs.follow(pages, ["f"], 0, run="ab", sleep=lambda s: None)  # type: ignore[arg-type]
    assert [next(lines).text for _ in range(4)] == ["line 0", "line 1", "line 2", "line 3"]
    assert pages.asked[0]["filterPattern"] == '"ab"'
    assert pages.asked[0]["startTime"] == 0
    assert pages.asked[-1]["startTime"] > 900_000


@pytest.mark.parametrize(
    ("text", "platform", "record"),
    [
        ('{"run": "ab", "request": "41d0"}', False, True),
        ('{"what": "a task has printed"}', False, False),
        ("{not json", False, False),
        ("REPORT RequestId: 41d0\tDuration: 1 ms", True, False),
        ("INIT_START Runtime Version: python:3.12", True, False),
    ],
)
def test_lines_are_told_apart(text: str, platform: bool, record: bool) -> None:
    line = Line("f", "s", 0, text)
    assert (line.is_platform, line.record is not None) == (platform, record)


def test_a_line_of_no_run_says_so():
    record = {"run": None, "request": "r", "milliseconds": 0.25}
    shown = _as_text(Line("f", "s", 0, json.dumps(record)))
    assert "no run" in shown
    assert "None" not in shown
