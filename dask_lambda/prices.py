"""The price table: what AWS publishes, by region.  Pure.  May import: cost.

A region is here only if all of its figures have a source; for any other those of us-east-1 are
taken, and the result says so.  AWS's own page ("AWS Lambda Pricing", "Amazon S3 pricing") counts,
not this table: what you pay there may be given as the setting ``dask-lambda.prices``.

Sources, as read on :data:`AS_OF`:

* A GB-second, x86_64 and arm64: AWS Price List, service AWSLambda, as the table of
  janritter/aws-lambda-live-tuner on GitHub has it; us-east-1 and eu-west-2 also as quoted from the
  price list of 2026 and from "AWS Lambda Pricing".
* A million invocations: $0.20 for us-east-1 and eu-west-2 (the same); taken to be the same where a
  GB-second costs the same.
* A GB-month in S3: AWS Price List, service AmazonS3, version of 2026-07-01; us-east-1 that of
  2026-09-28, eu-central-1 of 2026-08-31, ap-southeast-3 of 2026-09-18: all quoted in public
  repositories.
* Requests to S3: us-east-1, eu-central-1 and ap-southeast-3 from the same price lists; eu-west-2
  and ca-central-1 as quoted from it in 2026; ap-southeast-2 from "Amazon S3 pricing" of 2026-09-10;
  eu-west-3 from the lines of a bill; eu-west-1 and ap-southeast-1 as published in October 2025;
  the others from the table of hmphu/aws-cost-calculator on GitHub, which is older (ap-northeast-1
  and -2 agree with lines of bills).
* SnapStart with Python, a GB-second of a snapshot and a GB restored: "AWS Lambda Pricing" for
  us-east-1, where x86_64 and arm64 cost the same; for other regions no source was found, and it is
  taken to cost the same there.

Not here, since no source was found for requests to S3: us-east-2, eu-north-1 and others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dask_lambda.cost import PRICED, Prices

#: When the table was checked last.
AS_OF = "2026-10"
#: Whose prices stand in for those that are not here.
USUAL = "us-east-1"

_TABLE: dict[str, Prices] = {}


def _region(name: str, *, put: float, get: float, gb_month: float) -> None:
    """Add a region whose functions and snapshots cost what they cost in us-east-1.

    Parameters
    ----------
    name : str
    put, get : float
        A thousand PUTs or LISTs, and ten thousand GETs, as AWS prints them.
    gb_month : float
    """
    _TABLE[name] = Prices(
        s3_put=put / 1_000, s3_get=get / 10_000, s3_gb_month=gb_month, source=f"{name}, {AS_OF}"
    )


_region("us-east-1", put=0.005, get=0.004, gb_month=0.023)
_region("us-west-1", put=0.0055, get=0.0044, gb_month=0.026)
_region("us-west-2", put=0.005, get=0.004, gb_month=0.023)
_region("ca-central-1", put=0.0055, get=0.0044, gb_month=0.025)
_region("sa-east-1", put=0.007, get=0.0056, gb_month=0.0405)
_region("eu-west-1", put=0.005, get=0.004, gb_month=0.023)
_region("eu-west-2", put=0.0053, get=0.0042, gb_month=0.024)
_region("eu-west-3", put=0.0053, get=0.0042, gb_month=0.024)
_region("eu-central-1", put=0.0054, get=0.0043, gb_month=0.0245)
_region("ap-south-1", put=0.005, get=0.004, gb_month=0.025)
_region("ap-southeast-1", put=0.005, get=0.004, gb_month=0.025)
_region("ap-southeast-2", put=0.0055, get=0.0044, gb_month=0.025)
_region("ap-southeast-3", put=0.005, get=0.004, gb_month=0.025)
_region("ap-northeast-1", put=0.0047, get=0.0037, gb_month=0.025)
_region("ap-northeast-2", put=0.0045, get=0.0035, gb_month=0.025)


def regions() -> list[str]:
    """Return the regions in the table."""
    return sorted(_TABLE)


def prices_for(region: str | None, given: Mapping[str, float] | None = None) -> Prices:
    """Return the prices of a region.

    Parameters
    ----------
    region : str, optional
        If it is not in the table, us-east-1's prices are returned; ``source`` says so.
    given : mapping, optional
        Prices that the user knows better: names of :data:`dask_lambda.cost.PRICED` to US dollars
        (``dask-lambda.prices``).
    """
    prices = _TABLE.get(region or USUAL)
    if prices is None:
        usual = _TABLE[USUAL]
        prices = replace(usual, source=f"{usual.source}, in place of {region}, which is not known")
    if given:
        what = "all of them" if set(given) >= set(PRICED) else ", ".join(sorted(given))
        prices = replace(prices, **given, source=f"{prices.source}; given by you: {what}")
    return prices
