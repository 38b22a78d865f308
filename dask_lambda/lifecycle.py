"""Rules by which S3 itself deletes what clients have left behind: the safety net.  Pure.

May import: the ground.

A client deletes its objects when a run ends, however it ends; but one that is killed does not.
S3 deletes objects by age, in whole days, for a prefix of their names.  Our objects are in shards,
so there is a rule for each.  Runs that are kept have another prefix, and stay unless that is asked
for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lambda_worker import protocol

#: How the names of our rules begin; all others are somebody else's.
OWN = "dask-lambda:"
#: Days after which an upload in parts that was not completed is given up: none takes longer.
UPLOAD_DAYS = 1

Rule = dict[str, Any]


def rules(prefix: str, days: int) -> list[Rule]:
    """Return the rules for one prefix.

    Parameters
    ----------
    prefix : str
        Of the object names, behind the shard.
    days : int
        After which objects are deleted; S3 does so within another day or two.
    """
    if days < 1:
        raise ValueError("S3 counts whole days: it must be 1 or more")
    return [
        {
            "ID": _name(prefix, shard),
            "Status": "Enabled",
            "Filter": {"Prefix": f"{shard}/{prefix}/"},
            "Expiration": {"Days": days},
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": UPLOAD_DAYS},
        }
        for shard in protocol.shards()
    ]


def without(existing: Sequence[Rule], prefix: str) -> list[Rule]:
    """Return a bucket's rules without ours for a prefix."""
    ours = {_name(prefix, shard) for shard in protocol.shards()}
    return [rule for rule in existing if rule.get("ID") not in ours]


def merged(existing: Sequence[Rule], prefix: str, days: int) -> list[Rule]:
    """Return a bucket's rules with ours for a prefix in place of what ours were before."""
    return [*without(existing, prefix), *rules(prefix, days)]


def replacement(
    bucket: str, rules: Sequence[Rule], before: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the operation, and its parameters, that replaces all rules of a bucket.

    S3 knows no other way.

    Parameters
    ----------
    bucket : str
    rules : sequence of dict
        All of them, also those that stay.
    before : mapping
        The bucket's configuration as S3 tells it.
    """
    if not rules:
        return "DeleteBucketLifecycle", {"Bucket": bucket}
    name = "TransitionDefaultMinimumObjectSize"  # of the bucket; else S3 resets it
    more = {name: before[name]} if name in before else {}
    configuration = {"Rules": list(rules)}
    return (
        "PutBucketLifecycleConfiguration",
        {"Bucket": bucket, "LifecycleConfiguration": configuration, **more},
    )


def days_of(existing: Sequence[Rule], prefix: str) -> int | None:
    """Return after how many days objects of a prefix are deleted; None if not all of them are."""
    found = {rule.get("ID"): rule for rule in existing if rule.get("Status") == "Enabled"}
    days = [
        found.get(_name(prefix, shard), {}).get("Expiration", {}).get("Days")
        for shard in protocol.shards()
    ]
    known = [each for each in days if each is not None]
    return max(known) if len(known) == len(days) else None


def _name(prefix: str, shard: str) -> str:
    return f"{OWN}{prefix}:{shard}"
