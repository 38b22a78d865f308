"""The constants of the engine's decisions.  Pure.  May import: nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The constants of the decisions; times in seconds."""

    deaths: int = 2  #: further tries after the environment died, before the task is blamed
    transient_tries: int = 8
    backoff: float = 0.1  #: before the first retry; doubles each time
    max_backoff: float = 20.0
    throttle_patience: float = 1000.0  #: throttled and nothing done: above the longest invocation
    decrease: float = 0.7
    decrease_interval: float = 1.0  #: one burst of throttles shrinks the limit once
    batch_seconds: float = 1.0  #: of one invocation, when several groups share it
    batch_groups: int = 512  #: in one invocation at the most
    dispatch_seconds: float = 0.001  #: of the client, for each invocation (docs/benchmarks.md)
