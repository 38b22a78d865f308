"""Which tests are left out for what they ask of ``gen_cluster``, and why.

A test that names its workers' class or settings is about workers that run here, and there are none:
the tasks run on Lambda. What a rule cannot see is listed in ``deselected.toml``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from distributed import utils_test

#: Markers of tests that distributed's own CI does not run, or not always.
OPTIONAL = {"slow", "avoid_ci"}


def note_arguments() -> None:
    """Let tests keep what they gave to ``gen_cluster``."""
    original = utils_test.gen_cluster

    @functools.wraps(original)
    def gen_cluster(*arguments: Any, **named: Any) -> Callable[..., Any]:
        if named.get("timeout", 0) is None:  # which older files say
            del named["timeout"]
        decorate = original(*arguments, **named)
        asked = dict(named)
        if arguments:
            asked["nthreads"] = arguments[0]

        def keep(function: Callable[..., Any]) -> Callable[..., Any]:
            test = decorate(function)
            test.asked = asked
            return test

        return keep

    utils_test.gen_cluster = gen_cluster


def rule(item: pytest.Item) -> str | None:
    """Why a test is left out, or None."""
    if OPTIONAL & set(item.keywords):
        return "Slow or unreliable by distributed's own marks."
    asked = getattr(getattr(item, "function", None), "asked", {})
    if asked.get("nthreads") == []:
        return "It starts ordinary workers itself, and tasks would run on those."
    if "Worker" in asked:
        return "It is about a class of workers: a Nanny, or one that stops at a chosen point."
    if "worker_kwargs" in asked:
        return "It is about settings of workers: their memory limit, their plugins."
    if "security" in asked:
        return "It is about TLS between client, scheduler and workers."
    return None
