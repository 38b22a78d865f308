"""What may be in the way, looked at one by one.

May import: aws, deployment's constants, environment (what is installed), failures, replies, config,
errors, the ground.

Each check asks AWS itself, with the credentials of whoever runs it: what may be done is tried, with
requests that change nothing, or an object of a few bytes that is deleted again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import metadata
from typing import Any, Literal

from dask_lambda import failures, replies
from dask_lambda.config import Settings
from dask_lambda.deploy.aws import Account, code_of
from dask_lambda.deploy.deployment import FEW
from dask_lambda.deploy.environment import all_installed
from dask_lambda.errors import AccessDeniedError, DaskLambdaError
from lambda_worker import protocol

Result = Literal["passed", "warning", "failed", "skipped"]

#: Seconds by which AWS's and this machine's clock may differ: signatures are refused at 300.
SKEW_WARNING, SKEW_ERROR = 60, 300
#: Part of the account's room for code that may be used before it is worth a word.
CODE_USED = 0.9


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report.

    Attributes
    ----------
    name : str
    result : {"passed", "warning", "failed", "skipped"}
    said : str
        What was found.
    advice : str
        What to do.
    """

    name: str
    result: Result
    said: str
    advice: str = ""


def examine(settings: Settings, region: str | None = None, *, wrong: str = "") -> Iterator[Check]:
    """Check one thing after the other; where one fails, what needs it is skipped.

    Parameters
    ----------
    settings : Settings
        Function and bucket are looked at if it names them.
    region : str, optional
        Default: that of the settings, or boto3's.
    wrong : str
        What is wrong with the settings, so that no computation could use them.
    """
    yield _here()
    try:
        account = Account.open(region or settings.region, settings.endpoint_url)
        yield Check("region", "passed", account.region)
    except DaskLambdaError as error:
        yield Check("region", "failed", str(error))
        yield Check("credentials", "skipped", "there is no region to ask in")
        return
    try:
        identity = account.identity
    except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
        yield Check("credentials", "failed", str(error))
        yield Check("everything else", "skipped", "AWS cannot be asked")
        return
    yield Check("credentials", "passed", f"{identity['Arn']}")
    yield _clock(identity)
    yield from _quotas(account)
    if wrong:
        yield Check("configuration", "failed", wrong, "mend it, or dask-lambda deploy")
        return
    if settings.is_local:
        yield Check(
            "deployment",
            "warning",
            "no function is configured: computations use the embedded AWS on this machine",
            "dask-lambda deploy",
        )
        return
    yield from _functions(account, settings)
    yield from _bucket(account, settings)


def _here() -> Check:
    names = ("dask_lambda", "dask", "cloudpickle", "numpy", "boto3")
    found = []
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return Check(
        "this machine", "passed", f"Python {protocol.versions()['python']}, " + ", ".join(found)
    )


def _clock(identity: Any) -> Check:
    date = identity["ResponseMetadata"]["HTTPHeaders"].get("date")
    if not date:
        return Check("clock", "skipped", "the answer has no date")
    skew = abs(time.time() - parsedate_to_datetime(date).timestamp())
    said = f"differs from AWS's by {skew:.0f} s"
    if skew < SKEW_WARNING:
        return Check("clock", "passed", said)
    result: Result = "failed" if skew >= SKEW_ERROR else "warning"
    return Check(
        "clock", result, said, "set this machine's clock (NTP): AWS refuses old signatures"
    )


def _quotas(account: Account) -> Iterator[Check]:
    from botocore.exceptions import ClientError

    try:
        answer = account.call("lambda", "GetAccountSettings")
    except (DaskLambdaError, ClientError) as error:
        yield Check("concurrency", "skipped", f"may not be asked ({error})")
        return
    limit, usage = answer.get("AccountLimit", {}), answer.get("AccountUsage", {})
    most = limit.get("ConcurrentExecutions", 0)
    free = limit.get("UnreservedConcurrentExecutions", most)
    said = (
        f"{most:,} executions at a time in this account and region, {free:,} of them not reserved"
    )
    if min(most, free) <= FEW:
        yield Check(
            "concurrency",
            "warning",
            said,
            "it works, slowly; ask for more: Service Quotas, AWS Lambda, Concurrent executions",
        )
    else:
        yield Check("concurrency", "passed", said)
    room, used = limit.get("TotalCodeSize", 0), usage.get("TotalCodeSize", 0)
    if room:
        full = used > CODE_USED * room
        yield Check(
            "room for code",
            "warning" if full else "passed",
            f"{used / 2**30:.1f} of {room / 2**30:.1f} GiB used",
            "delete old functions and layers" if full else "",
        )


def _functions(account: Account, settings: Settings) -> Iterator[Check]:
    assert settings.function is not None
    for name in dict.fromkeys([settings.function, *settings.larger_functions.values()]):
        line = f"function {name}"
        dry = {"FunctionName": name, "InvocationType": "DryRun"}
        said = _attempt(partial(account.call, "lambda", "Invoke", **dry))
        if said is not None:
            gone = "ResourceNotFoundException" in said
            yield Check(line, "failed", said, "dask-lambda deploy" if gone else "")
            continue
        yield Check(line, "passed", "you may invoke it")
        yield _versions(account, name)


def _versions(account: Account, name: str) -> Check:
    """Ask the worker for its versions: it refuses a request without ours, and says its own.

    It compares the packages that are installed here, of which a run names those that are imported.
    """
    from botocore.exceptions import ClientError

    line = f"versions in {name}"
    installed = {each.name: each.version for each in all_installed()}
    try:
        payload = json.dumps({"packages": installed}).encode()
        answer = account.call("lambda", "Invoke", FunctionName=name, Payload=payload)
    except (DaskLambdaError, ClientError) as error:
        return Check(line, "failed", str(error))
    said = answer["Payload"].read().decode("utf-8", "replace")
    try:
        reply = json.loads(said)
        replies.check(reply)
        refused = reply["refused"]
    except (ValueError, KeyError):
        return Check(line, "failed", f"it is no worker of ours: {said[:300]}", "dask-lambda deploy")
    advice = "dask-lambda deploy puts this machine's versions there"
    if different := failures.differing_versions(refused):
        return Check(line, "failed", failures.describe_versions(different), advice)
    if seldom := reply.get("differing"):
        said = f"{failures.describe_versions(seldom)}; it works, since this seldom matters"
        return Check(line, "warning", said, advice)
    ours = {"protocol": protocol.PROTOCOL, **protocol.versions()}
    same = ", ".join(f"{each} {value}" for each, value in ours.items())
    return Check(line, "passed", f"the same as here: {same}")


def _bucket(account: Account, settings: Settings) -> Iterator[Check]:
    bucket = settings.bucket
    assert bucket is not None
    line = f"bucket {bucket}"
    try:
        head = account.found("s3", "HeadBucket", "404", "NoSuchBucket", Bucket=bucket)
    except AccessDeniedError:
        yield Check(line, "failed", "access denied: s3:ListBucket", "ask for the invoker's policy")
        return
    except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
        yield Check(line, "failed", f"{error}")
        return
    if head is None:
        yield Check(line, "failed", "it does not exist", "dask-lambda deploy")
        return
    headers = head["ResponseMetadata"]["HTTPHeaders"]
    region = head.get("BucketRegion") or headers.get("x-amz-bucket-region") or account.region
    if region != account.region:
        advice = "data would cross regions: slow, and it costs"
        yield Check(line, "failed", f"it is in {region}, functions in {account.region}", advice)
        return
    yield Check(line, "passed", f"in {region}")
    name = protocol.object_name(settings.prefix, secrets.token_hex(16), "doctor")
    where = {"Bucket": bucket, "Key": name}
    tries: list[tuple[str, Callable[[], object]]] = [
        ("s3:PutObject", lambda: account.call("s3", "PutObject", **where, Body=b"hello")),
        ("s3:GetObject", lambda: account.call("s3", "GetObject", **where)),
        ("s3:DeleteObject", lambda: account.call("s3", "DeleteObject", **where)),
    ]
    refused = [said for _, attempt in tries if (said := _attempt(attempt)) is not None]
    if refused:
        yield Check("objects", "failed", "; ".join(refused), "ask for the invoker's policy")
    else:
        yield Check("objects", "passed", f"you may write, read and delete */{settings.prefix}/*")


def _attempt(call: Callable[[], object]) -> str | None:
    """Return what is in the way of a call; None if it succeeds."""
    from botocore.exceptions import ClientError

    try:
        call()
    except DaskLambdaError as error:
        return str(error)
    except ClientError as error:
        return f"{code_of(error)}: {error}"
    return None
