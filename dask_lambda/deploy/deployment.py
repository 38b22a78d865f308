"""A deployment from end to end: look, plan, write down, apply, configure.

May import: all of deploy but status, destroy, packaging and cloudformation; errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dask_lambda.deploy import record as records
from dask_lambda.deploy.apply import Applied, Applier
from dask_lambda.deploy.artifact import Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.calls import Step
from dask_lambda.deploy.look import look, look_at_functions
from dask_lambda.deploy.plan import changes, plan
from dask_lambda.deploy.record import Record
from dask_lambda.deploy.resources import Blueprint, Options, blueprint
from dask_lambda.deploy.seen import Seen, SeenFunction
from dask_lambda.errors import ConfigurationError, DaskLambdaError, DeploymentError

#: Concurrent executions of a new account, at the most; usual are 1,000 (Lambda quotas).
FEW = 100


@dataclass(frozen=True, slots=True)
class Prepared:
    """What would be done.

    Attributes
    ----------
    account : Account
    wanted : Blueprint
    seen : Seen
    steps : list of Step
    concurrency : int, optional
        Executions at a time that the account may have; None if that may not be asked.
    """

    account: Account
    wanted: Blueprint
    seen: Seen
    steps: list[Step]
    concurrency: int | None

    @property
    def changes(self) -> list[Step]:
        """The steps that do something."""
        return changes(self.steps)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before."""
        if self.concurrency is None or self.concurrency > FEW:
            return []
        return [
            f"this account may run {self.concurrency} functions at a time (new accounts begin like "
            "this): it works, slowly; ask for 1,000 or more in the Service Quotas console "
            "(AWS Lambda, Concurrent executions), which is free"
        ]


@dataclass(frozen=True, slots=True)
class Deployed:
    """What was done.

    Attributes
    ----------
    record : Record
    applied : Applied
    configuration : Path
        Dask's, that was written.
    """

    record: Record
    applied: Applied
    configuration: Path


def prepare(account: Account, options: Options, package: Package, version: str) -> Prepared:
    """Look at what there is, and plan; nothing is changed.

    Raises
    ------
    ConfigurationError, AccessDeniedError, BucketNotFoundError, DeploymentError
    """
    options.check()
    where = account.where
    wanted = blueprint(options, where, package, version=version, secure=account.is_secure)
    before = records.read(options.name, where)
    if before is not None and before.bucket != wanted.bucket.name:
        raise DeploymentError(
            f"the deployment {options.name!r} in {where} uses the bucket {before.bucket!r}, not "
            f"{wanted.bucket.name!r}: give --bucket {before.bucket} again, destroy it before, or "
            "choose another name (--name)"
        )
    if before is not None and before.prefix != wanted.bucket.prefix:
        raise DeploymentError(
            f"the deployment {options.name!r} in {where} has its objects below the prefix "
            f"{before.prefix!r}: under another one, what is kept there would be out of its reach; "
            f"give --prefix {before.prefix} again, destroy it before, or choose another name "
            "(--name)"
        )
    _check_not_shared(wanted)
    seen = look(account, options.name, wanted.bucket.name)
    begun = [before.bucket] if before is not None and before.own_bucket else []
    steps = plan(wanted, seen, begun=begun)
    if (stack := seen.stack_of(options.name)) and changes(steps):
        raise DeploymentError(
            f"{options.name!r} was made by the CloudFormation stack {stack!r}: "
            "`dask-lambda deploy --cloudformation FILE` writes the template to update it with"
        )
    return Prepared(account, wanted, seen, steps, concurrency_of(account))


def _check_not_shared(wanted: Blueprint) -> None:
    """Refuse a place that another deployment has: to destroy one would empty the other."""
    names = wanted.names
    for other in records.find(None, names.where.region):
        same = (other.bucket, other.prefix) == (names.bucket, names.prefix)
        if same and other.name != names.deployment and other.account == names.where.account:
            raise ConfigurationError(
                f"the deployment {other.name!r} has its objects below the prefix "
                f"{names.prefix!r} of the bucket {names.bucket!r}: give another --prefix"
            )


def deploy(
    prepared: Prepared,
    tell: Callable[[Step], object] = lambda step: None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Deployed:
    """Do what was planned, write it down, and have Dask use it.

    Raises
    ------
    DeploymentError
        Something went wrong half-way.  The record says what was begun; the same command goes on.
    """
    wanted, account = prepared.wanted, prepared.account
    record = record_of(wanted, account.endpoint_url)
    record.write()  # before anything is made: what is made is then found again
    applied = Applier(account, tell, sleep, clock).run(prepared.steps)
    missing = {step.name for step, _ in applied.left_out}
    record.sizes = [s for s in wanted.names.sizes if wanted.names.function(s) not in missing]
    functions = look_at_functions(account, record.name)
    record.settings = {
        spec.name: known_settings(spec.settings, functions[spec.name])
        for spec in wanted.functions
        if spec.name in functions
    }
    record.complete = True
    record.write()
    return Deployed(record, applied, records.configure(record))


def known_settings(settings: Mapping[str, Any], found: SeenFunction) -> dict[str, Any]:
    """Return what a function is set to, for a record."""
    configuration = found.configuration
    return {
        **settings,
        "CodeSha256": configuration.get("CodeSha256"),
        "Layers": [each["Arn"] for each in configuration.get("Layers", [])],
    }


def concurrency_of(account: Account) -> int | None:
    """Return how many executions the account may have at a time; None if that may not be asked."""
    from botocore.exceptions import ClientError

    try:
        answer = account.call("lambda", "GetAccountSettings")
    except (DaskLambdaError, ClientError):  # not needed for anything else
        return None
    limit = answer.get("AccountLimit", {})
    return limit.get("ConcurrentExecutions")


def record_of(wanted: Blueprint, endpoint_url: str | None) -> Record:
    """Return the record of what is to be, before anything is known of how it went.

    Parameters
    ----------
    wanted : Blueprint
    endpoint_url : str, optional
        Of an emulator.
    """
    where = wanted.names.where
    return Record(
        wanted.options.name,
        where.account,
        where.region,
        where.partition,
        endpoint_url,
        wanted.bucket.name,
        wanted.bucket.is_ours,
        wanted.options.prefix,
        list(wanted.names.sizes),
        environment=wanted.package.environment,
        architecture=wanted.package.architecture,
        version=wanted.functions[0].tags["dask-lambda:version"],
        options=wanted.options.to_json(),
    )
