"""What AWS charges.  Pure.  May import: nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in US dollars.

    The defaults are those of us-east-1 for x86, on demand, without the free tier, as published
    by AWS ("AWS Lambda pricing", "Amazon S3 pricing") and checked in 2026.

    Attributes
    ----------
    lambda_request : float
        An invocation.
    lambda_gb_second : float
        A GB-second, billed in steps of 1 ms; 0.0000133334 on arm64.
    s3_put : float
        A PUT or LIST.
    s3_get : float
        A GET or HEAD.
    s3_gb_month : float
        A GB stored for a month.
    """

    lambda_request: float = 0.20e-6
    lambda_gb_second: float = 0.0000166667
    s3_put: float = 5e-6
    s3_get: float = 0.4e-6
    s3_gb_month: float = 0.023

    def cost(
        self, *, invocations: int, gb_seconds: float, puts: int = 0, lists: int = 0, gets: int = 0
    ) -> float:
        """Return the cost of what was counted, in US dollars (DELETEs are free)."""
        return (
            invocations * self.lambda_request
            + gb_seconds * self.lambda_gb_second
            + (puts + lists) * self.s3_put
            + gets * self.s3_get
        )
