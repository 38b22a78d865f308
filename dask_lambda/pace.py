"""How long groups of each kind take, as far as a run has seen it.  Pure.  May import: policy.

From this follows how many small groups share an invocation (:func:`batch_size`), which invocation
takes conspicuously long (:meth:`Pace.patience`), and what the next one is expected to cost.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

from dask_lambda.policy import Policy

#: How many groups of a kind the means remember.
SAMPLES = 16
#: How many invocations of a kind the quartiles remember.
WALL_SAMPLES = 64
#: Batches of a kind that was never seen before this run hold at most so many for each one done;
#: and so many invocations of such a kind may be in flight if a run must not spend too much.
TRUST = 4
#: What a group takes at least on a worker: fetching, unpickling, sealing.
MIN_SECONDS = 1e-4


class Pace:
    """What the groups of one kind took.

    Attributes
    ----------
    groups : int
        That are done.
    seconds, usd : float
        Means over the last ones: on the worker, and in US dollars.
    in_flight : int
        Groups in flight, each counted once for each invocation.
    """

    __slots__ = ("_order", "_walls", "groups", "in_flight", "seconds", "usd")

    def __init__(self) -> None:
        self.groups = 0
        self.seconds = 0.0
        self.usd = 0.0
        self.in_flight = 0
        self._walls: list[float] = []  # sorted
        self._order: deque[float] = deque()

    def done(self, seconds: float, usd: float, wall: float) -> None:
        """Take note of a group.

        Parameters
        ----------
        seconds : float
            That it took on the worker.
        usd : float
            Its share of what the invocation cost.
        wall : float
            Its share of the seconds from sending the invocation to its end.
        """
        weight = 1 / min(self.groups + 1, SAMPLES)
        self.groups += 1
        self.seconds += weight * (seconds - self.seconds)
        self.usd += weight * (usd - self.usd)
        if len(self._order) == WALL_SAMPLES:
            del self._walls[bisect_left(self._walls, self._order.popleft())]
        self._order.append(wall)
        insort(self._walls, wall)

    def patience(self, policy: Policy, groups: int = 1) -> float:
        """Return after how many seconds in flight some groups are conspicuous; infinity if never.

        Each takes longer than nearly all others: more than twice the median, and "far out" in
        Tukey's sense.  Few samples say little about the tail: then the bound is higher, by a
        factor that goes from 2 for five samples to 1.  And as long as fewer groups of the kind are
        done than are in flight, those that are done are the quick ones, which says nothing.
        """
        count = len(self._walls)
        if count < policy.straggler_samples or self.groups < self.in_flight:
            return math.inf
        lower, median, upper = (self._walls[(count - 1) * i // 4] for i in (1, 2, 3))
        far_out = upper + policy.straggler_fence * (upper - lower)
        bound = max(policy.straggler_factor * median, far_out)
        bound *= groups * (1 + policy.straggler_samples / count)
        return max(policy.straggler_seconds, bound)


def batch_size(pace: Pace, expected: float | None, ready: int, limit: int, policy: Policy) -> int:
    """Decide how many groups of one kind share an invocation.

    If each takes ``d`` seconds, ``n`` of them in ``m`` invocations take ``c m + n d / m``
    seconds with unlimited concurrency, where ``c`` is the client's time for an invocation:
    least for ``m = sqrt(n d / c)``.  If that is more than the window, the ready ones are
    divided by the window, which leaves smaller and smaller batches to the end, so that all
    end together (guided self-scheduling: Polychronopoulos and Kuck, IEEE Transactions on
    Computers C-36, 1987).

    Parameters
    ----------
    pace : Pace
    expected : float, optional
        Seconds that a group is expected to take, if anything is.
    ready : int
        Groups that could be sent now.
    limit : int
        Invocations that may be in flight.
    policy : Policy
    """
    seconds, bound = pace.seconds, policy.batch_groups
    if expected is not None:
        if not pace.groups:
            seconds = expected
    elif pace.groups:
        bound = min(bound, TRUST * pace.groups)
    else:  # nobody knows how long they take
        return 1
    seconds = max(seconds, MIN_SECONDS)
    size = max(math.sqrt(ready * policy.dispatch_seconds / seconds), ready / limit)
    return max(1, min(bound, int(size), int(policy.batch_seconds / seconds)))
