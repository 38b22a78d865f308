"""The constants of the engine's decisions.  Pure.  May import: nothing.

``docs/reliability.md`` says in words what they amount to.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """The constants of the decisions; times in seconds, shares as fractions.

    What has no source is our own choice.
    """

    # -- trying again
    deaths: int = 2  #: further tries after the environment died, before the group is divided
    transient_tries: int = 3  #: at least so many, however long each takes
    backoff: float = 0.1  #: before the first retry; doubles each time
    max_backoff: float = 20.0
    throttle_patience: float = 3600.0  #: throttled, and nothing done in all that time
    notice_after: float = 20.0  #: of trying in vain, the user is told
    notice_every: float = 60.0

    # -- the window
    decrease: float = 0.9  #: of the limit, when Lambda refuses (it says so at once and for free)
    decrease_interval: float = 1.0  #: one burst of throttles shrinks the limit once
    growth: float = 0.1  #: of limit and rate, in each second
    rate_burst: float = 0.1  #: seconds' worth of requests that may be sent at once

    # -- batches
    batch_seconds: float = 1.0  #: of one invocation, when several groups share it
    batch_groups: int = 512  #: in one invocation at the most
    dispatch_seconds: float = 0.001  #: of the client, for each invocation (docs/benchmarks.md)

    # -- stragglers
    straggler_samples: int = 5  #: invocations of a kind that must be known
    straggler_factor: float = 2.0  #: times the median is the least that is conspicuous
    straggler_fence: float = 3.0  #: interquartile ranges above the upper quartile ("far out":
    #: Tukey, Exploratory Data Analysis, 1977)
    straggler_seconds: float = 2.0  #: nothing shorter is conspicuous: a cold start takes as long
    speculative_share: float = 0.1  #: of the window (at least one at a time), and of the money
    check_interval: float = 1.0  #: between two looks at what is in flight
