"""How many invocations may be in flight, and how many may be sent a second.  Pure.

May import: policy.  Lambda says 429 for two reasons.  Too many invocations at the same time (of the
account, or of the function's reserved concurrency): then the *limit* shrinks.  Too many a second
(ten for each environment that an account may have): then the *rate* does.  Both shrink by a
factor and grow by a constant, as TCP's window does (AIMD: Chiu and Jain, Computer Networks and ISDN
Systems 17, 1989).  One thing is better here than for TCP: a refusal comes at once and costs
nothing, and what is still in flight then was not refused; so the limit need not go below that.

Lambda may also say that the function is not ready: nothing of it runs, for minutes.  Then the
window *pauses*: now and then one invocation is sent to ask again, until one is not refused.  This
says nothing of how many there may be, so limit and rate stay what they are.
"""

from __future__ import annotations

import math

from dask_lambda.policy import Policy

#: A run never stops asking.
MIN_LIMIT = 1.0
#: Requests a second for each environment that an account may have (Lambda quotas).
MIN_RATE = 10.0
#: In a second: the limit grows at least by so much.
MIN_STEP = 1.0
#: Seconds before it is asked again whether a function is ready; they double each time.  An answer
#: takes less.
MIN_PAUSE = 1.0
#: A rate that was learnt so many seconds before anything else was sent says nothing any more.
FORGET_SECONDS = 600.0
ROUNDING = 1e-6


class Window:
    """The window of one engine.

    Parameters
    ----------
    size : int
        Invocations in flight at the most.
    policy : Policy

    Attributes
    ----------
    limit : float
        Invocations in flight that Lambda is believed to accept, up to ``size``.
    rate : float
        Invocations a second that Lambda is believed to accept.
    refusals : int
        Bursts of refusals since anything succeeded.
    """

    def __init__(self, size: int, policy: Policy):
        self.size = size
        self.limit = float(size)
        self.rate = math.inf
        self.refusals = 0
        self._policy = policy
        self._now = 0.0  # up to when limit, rate and tokens have grown
        self._last_decrease = -math.inf
        self._tokens = 0.0
        self._second = -math.inf  # begin of the present second of counting
        self._sent = self._refused = 0  # in it
        self._pause = 0.0  # seconds between two that ask whether the function is ready
        self._paused_until: float | None = None  # when the next one may
        self._asked = False  # whether one was sent, of which nothing was heard yet

    def resize(self, size: int) -> None:
        """Change the size; what was learnt about Lambda stays."""
        self.limit = float(size) if self.limit >= self.size else min(self.limit, float(size))
        self.size = size

    @property
    def allowed(self) -> int:
        """How many invocations may be in flight."""
        return int(self.limit + 0.5)

    def room(self, in_flight: int, now: float) -> bool:
        """Whether one more invocation may be sent now."""
        if self._is_paused(now):
            return False
        if self.limit == self.size and self.rate == math.inf:  # nothing was refused
            return in_flight < self.size
        self._grow(now)
        return in_flight < self.allowed and (self.rate == math.inf or self._tokens > 1 - ROUNDING)

    def opens(self, in_flight: int, now: float) -> float | None:
        """Return when there will be room if nothing ends before; None if there will be none."""
        self._grow(now)
        at = now
        if self._paused_until is not None:
            at = max(now, self._paused_until)
        if in_flight >= self.allowed:
            if in_flight >= self.size:
                return None
            at += (in_flight + 0.5 + ROUNDING - self.limit) / self._step
        if self.rate != math.inf:
            at = max(at, now + (1 - self._tokens) / self.rate)
        return at

    def sent(self, now: float) -> None:
        """Take note of an invocation."""
        if now - self._second >= 1:
            self._judge()
            self._sent = self._refused = 0
            self._second = now
        self._sent += 1
        if self._paused_until is not None:
            self._asked, self._paused_until = True, now + self._pause
        self._tokens -= 1

    def succeeded(self) -> None:
        """Take note of an invocation that ended well: the limit grows by one a limit's worth."""
        self.refusals = 0
        self._asked, self._paused_until = False, None
        self.limit = min(float(self.size), self.limit + 1.0 / self.limit)

    def throttled(self, in_flight: int, now: float) -> None:
        """Take note that there were too many at the same time; ``in_flight`` are left."""
        self._grow(now)
        self.limit = max(MIN_LIMIT, min(self.limit, float(in_flight)))
        if now - self._last_decrease >= self._policy.decrease_interval:
            self._last_decrease = now
            self.refusals += 1
            self.limit = max(MIN_LIMIT, self.limit * self._policy.decrease)

    def rate_limited(self, now: float) -> None:
        """Take note that there were too many a second."""
        self._grow(now)
        if self.rate == math.inf:  # until the second is over, and one knows better
            self.rate, self._tokens = max(MIN_RATE, self._sent * self._policy.decrease), 0.0
        self.refusals += not self._refused
        self._refused += 1

    def not_ready(self, now: float) -> None:
        """Take note that the function can run nothing yet."""
        if self._paused_until is not None and now < self._paused_until and not self._asked:
            return  # it was sent before the pause
        self.refusals += 1
        self._pause = min(self._policy.max_backoff, MIN_PAUSE * 2.0 ** min(self.refusals - 1, 60))
        self._asked, self._paused_until = False, now + self._pause

    def _is_paused(self, now: float) -> bool:
        """Whether nothing may be sent, since the function is not ready."""
        if self._paused_until is None:
            return False
        if now < self._paused_until:
            return True
        if self._asked:  # a refusal comes at once, and none has come
            self._asked, self._paused_until = False, None
        return False

    def _judge(self) -> None:
        """Learn from a second in which some were refused: what was accepted is the rate.

        If not many were sent, that says little, and the rate falls by a factor.
        """
        if self._refused:
            many = self._sent >= self.rate / 2
            taken = float(self._sent - self._refused)
            self.rate = max(MIN_RATE, taken if many else self.rate * self._policy.decrease)

    @property
    def _step(self) -> float:
        """How much the limit grows in a second."""
        return max(MIN_STEP, self.limit * self._policy.growth)

    def _grow(self, now: float) -> None:
        """Let limit and rate grow with time: what is long in flight must not be waited for."""
        passed, self._now = now - self._now, now
        if self.limit < self.size:
            self.limit = min(float(self.size), self.limit + self._step * passed)
        if self.rate != math.inf:
            burst = max(1.0, self.rate * self._policy.rate_burst)
            self._tokens = min(burst, self._tokens + self.rate * passed)
            if passed > FORGET_SECONDS:  # after a break; growth would exceed what a float holds
                self.rate = math.inf
            else:
                self.rate *= (1 + self._policy.growth) ** passed
