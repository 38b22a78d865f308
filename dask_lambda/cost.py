"""What AWS charges for what was counted.  Pure.  May import: nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

#: Of a function's processor, by Lambda's names.
Architecture = Literal["x86_64", "arm64"]
ARCHITECTURES: tuple[Architecture, ...] = ("x86_64", "arm64")

#: Bytes of the gigabyte that S3 bills (the worked examples of "Amazon S3 FAQs": 10 TB are
#: 10,995,116,277,760 bytes).
GB = 2**30
#: Seconds for which a snapshot is paid at least ("AWS Lambda Pricing", SnapStart).
SNAPSHOT_SECONDS = 3 * 3600


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of one region in US dollars, on demand, without the free tier.

    The defaults are those of us-east-1.  :func:`dask_lambda.prices.prices_for` has other regions,
    and says where the figures come from.

    Attributes
    ----------
    lambda_request : float
        An invocation.
    lambda_gb_second, lambda_gb_second_arm64 : float
        A GB-second of x86_64 and of arm64, billed in steps of 1 ms: below 6 (7.5) billion of them a
        month; beyond that they cost less, which is not reckoned with.
    s3_put : float
        A PUT, COPY, POST or LIST.
    s3_get : float
        A GET or HEAD.
    s3_gb_month : float
        A GB stored for a month, in the class "Standard", below 50 TB.
    snapshot_gb_second : float
        A second for which a published version of a Python function with SnapStart exists, for each
        GB of the function's memory.
    restore_gb : float
        An environment that begins as a copy of such a snapshot, for each GB of memory.
    source : str
        Whose prices these are, for people.
    """

    lambda_request: float = 0.20e-6
    lambda_gb_second: float = 0.0000166667
    lambda_gb_second_arm64: float = 0.0000133334
    s3_put: float = 5e-6
    s3_get: float = 0.4e-6
    s3_gb_month: float = 0.023
    snapshot_gb_second: float = 0.0000015046
    restore_gb: float = 0.0001397998
    source: str = "us-east-1"

    def cost(
        self,
        *,
        invocations: int,
        gb_seconds: float,
        arm64_gb_seconds: float = 0.0,
        puts: int = 0,
        lists: int = 0,
        gets: int = 0,
        restored_gb: float = 0.0,
    ) -> float:
        """Return the cost of what was counted, in US dollars (DELETEs are free).

        Parameters
        ----------
        invocations : int
        gb_seconds : float
            Of all functions.
        arm64_gb_seconds : float
            Those of them that were on arm64.
        puts, lists, gets : int
        restored_gb : float
            Memory of the functions whose snapshots were restored, once for each time.
        """
        return (
            invocations * self.lambda_request
            + (gb_seconds - arm64_gb_seconds) * self.lambda_gb_second
            + arm64_gb_seconds * self.lambda_gb_second_arm64
            + (puts + lists) * self.s3_put
            + gets * self.s3_get
            + restored_gb * self.restore_gb
        )

    def gb_second(self, architecture: Architecture) -> float:
        """Return the price of a GB-second on a processor."""
        return self.lambda_gb_second_arm64 if architecture == "arm64" else self.lambda_gb_second

    def on(self, architecture: Architecture) -> Prices:
        """Return the prices where every GB-second is one of this processor's."""
        return replace(self, lambda_gb_second=self.gb_second(architecture))

    def storage(self, nbytes: int) -> float:
        """Return what bytes in S3 cost a month, in US dollars."""
        return nbytes / GB * self.s3_gb_month

    def snapshots(self, memory_mb: Iterable[int], seconds: float) -> float:
        """Return what snapshots cost while they exist, in US dollars.

        Parameters
        ----------
        memory_mb : iterable of int
            Of each function that has one.
        seconds : float
            For which each of them exists; three hours are paid in any case.
        """
        gb = sum(memory_mb) / 1024
        return gb * max(seconds, SNAPSHOT_SECONDS) * self.snapshot_gb_second


#: What a user may say costs something else: the numbers of :class:`Prices`.
PRICED = tuple(each.name for each in fields(Prices) if each.name != "source")
