"""What a reply of lambda_worker looks like, checked before it is used.  Pure.  May import: nothing.

The function that is called may be somebody else's, or an old one, and proxies on the way answer
too.  What the tags do not cover is therefore taken for what it is, or not at all.
"""

from __future__ import annotations

import math
from typing import Any


class NotAReply(ValueError):
    """Something that lambda_worker does not say; the text says what."""


_S3 = {"gets", "puts", "lists", "deletes", "bytes_read", "bytes_written"}


def check(content: Any) -> None:
    """Check the decoded JSON of a reply; its groups are counted by whoever knows how many.

    Raises
    ------
    NotAReply
    """
    reply = _mapping(content, "the reply")
    _number(reply, "memory_mb", 1)
    _number(reply, "milliseconds")
    for name in ("cache_hits", "peak_memory"):
        if name in reply:
            _number(reply, name)
    _text(reply.get("architecture", ""), "'architecture'")
    if not isinstance(reply.get("cold"), bool):
        raise NotAReply("'cold' is not true or false")
    if not isinstance(reply.get("restored", False), bool):
        raise NotAReply("'restored' is not true or false")
    counts = _mapping(reply.get("s3", {}), "'s3'")
    if not set(counts) <= _S3:
        raise NotAReply("'s3' counts something unknown")
    for name in counts:
        _number(counts, name)
    _text(reply.get("environment", ""), "'environment'")
    _versions(reply.get("differing", {}), "'differing'")
    if "refused" in reply:
        refused = _mapping(reply["refused"], "'refused'")
        _versions(refused.get("packages", {}), "the packages of 'refused'")
    elif "error" in reply:
        _error(reply["error"])
    else:
        for group in _sequence(reply.get("groups"), "'groups'"):
            _group(_mapping(group, "a group"))


def _group(group: dict[str, Any]) -> None:
    for name in _sequence(group.get("left", []), "'left'"):
        _text(name, "an object that is left")
    if "error" in group:
        _error(group["error"])
        return
    _number(group, "seconds")
    for output in _sequence(group.get("outputs"), "'outputs'"):
        _value(output)
    for kind in _sequence(group.get("types", []), "'types'"):
        _text(kind, "the type of an output")
    for measured in _mapping(group.get("tasks", {}), "'tasks'").values():
        numbers = _sequence(measured, "what was measured")
        if len(numbers) != 3:
            raise NotAReply("what was measured are not three numbers")
        for place in range(3):
            _number(dict(enumerate(numbers)), place)


def _error(error: Any) -> None:
    record = _mapping(error, "'error'")
    for name in ("kind", "message"):
        _text(record.get(name), f"{name!r} of an error")
    for name in ("key", "traceback", "type", "unpicklable", "module"):
        if name in record:
            _text(record[name], f"{name!r} of an error")
    if record.get("exception") is not None:
        _value(record["exception"])
        _text(record["exception"].get("data"), "the data of an exception")


def _value(value: Any) -> None:
    record = _mapping(value, "a value")
    _text(record.get("name"), "the name of a value")
    if type(record.get("size")) is not int:
        raise NotAReply("the size of a value is not a whole number")
    _number(record, "size")
    if "data" in record:
        _text(record["data"], "the data of a value")


def _versions(found: Any, what: str) -> None:
    for pair in _mapping(found, what).values():
        if len(_sequence(pair, what)) != 2:
            raise NotAReply(f"{what} are not pairs of versions")
        for version in pair:
            _text(version, what)


def _mapping(found: Any, what: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise NotAReply(f"{what} is not an object")
    return found


def _sequence(found: Any, what: str) -> list[Any]:
    if not isinstance(found, list):
        raise NotAReply(f"{what} is not a list")
    return found


def _text(found: Any, what: str) -> None:
    if not isinstance(found, str):
        raise NotAReply(f"{what} is not text")


def _number(record: dict[Any, Any], name: Any, least: float = 0) -> None:
    found = record.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise NotAReply(f"{name!r} is not a number")
    if not math.isfinite(found) or not least <= found < 2**63:
        raise NotAReply(f"{name!r} is out of range")
