"""Lists of tests that are left out, each with its reason: ``deselected.toml``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import pytest

Item = TypeVar("Item", bound=pytest.Item)


def reasons(names: Mapping[Item, str], path: Path) -> tuple[dict[Item, str], list[str]]:
    """Why tests are left out, and the patterns in the list that are about none of them.

    A pattern is ``module::test``, with ``*`` for anything; without parameters it means the test
    with all of its parameters. Patterns for modules that were not collected are passed over.
    """
    modules = {name.partition("::")[0] for name in names.values()}
    found: dict[Item, str] = {}
    stale = []
    for group in tomllib.loads(path.read_text("utf-8"))["deselected"]:
        for pattern in group["tests"]:
            if pattern.partition("::")[0] not in modules:
                continue
            matches = re.compile(re.escape(pattern).replace(r"\*", ".*") + r"(\[.*)?").fullmatch
            hits = [item for item, name in names.items() if matches(name)]
            found.update(dict.fromkeys(hits, group["reason"]))
            if not hits:
                stale.append(pattern)
    return found, stale
