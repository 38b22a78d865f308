"""A deployment from end to end: look, plan, write down, apply, configure; and its state.

May import: all of deploy but packaging and cloudformation, errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dask_lambda.deploy import record as records
from dask_lambda.deploy import snapshots
from dask_lambda.deploy.apply import Applied, Applier
from dask_lambda.deploy.artifact import Package
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.calls import Step
from dask_lambda.deploy.differences import setting_differences
from dask_lambda.deploy.look import look, look_at_functions
from dask_lambda.deploy.naming import ALIAS, LOGS
from dask_lambda.deploy.plan import changes, plan
from dask_lambda.deploy.record import Record
from dask_lambda.deploy.resources import Blueprint, Options, blueprint, names_of
from dask_lambda.deploy.seen import Seen, SeenFunction, is_ours
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
    record = _record(prepared)
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


def _record(prepared: Prepared) -> Record:
    wanted = prepared.wanted
    where = wanted.names.where
    return Record(
        wanted.options.name,
        where.account,
        where.region,
        where.partition,
        prepared.account.endpoint_url,
        wanted.bucket.name,
        wanted.bucket.is_ours,
        wanted.options.prefix,
        list(wanted.names.sizes),
        environment=wanted.package.environment,
        architecture=wanted.package.architecture,
        version=wanted.functions[0].tags["dask-lambda:version"],
        options=wanted.options.to_json(),
    )


# -- finding it again --------------------------------------------------------------------------


def known(account: Account, name: str, bucket: str | None = None) -> Record:
    """Return what this machine, or else the account, knows of a deployment.

    Parameters
    ----------
    account : Account
    name : str
    bucket : str, optional
        The user's own bucket, where no record knows of it.
    """
    where = account.where
    found = records.read(name, where)
    if found is not None:
        return found
    options = Options(name, bucket)
    names = names_of(options, where)
    return Record(
        name,
        where.account,
        where.region,
        where.partition,
        account.endpoint_url,
        names.bucket,
        bucket is None,
        options.prefix,
    )


@dataclass(frozen=True, slots=True)
class FunctionState:
    """How a function is."""

    name: str
    state: str  #: Lambda's: "Active", ...; or "missing"
    memory: int | None
    differences: list[str] = field(default_factory=list)
    snapshot: str | None = None  #: the state of the version by which it is called, if it has any


@dataclass(frozen=True, slots=True)
class State:
    """How a deployment is.

    Attributes
    ----------
    record : Record
    seen : Seen
    functions : list of FunctionState
    remarks : list of str
        What is not as it was deployed.
    concurrency : int, optional
        Of the account.
    """

    record: Record
    seen: Seen
    functions: list[FunctionState]
    remarks: list[str]
    concurrency: int | None

    @property
    def exists(self) -> bool:
        """Whether anything of it is there."""
        return _exists(self.record, self.seen)


def state_of(account: Account, name: str, bucket: str | None = None) -> State:
    """Look at a deployment, and compare it with what was deployed from this machine.

    Raises
    ------
    AccessDeniedError, ConfigurationError, DeploymentError
    """
    record = known(account, name, bucket)
    seen = look(account, name, record.bucket, foreign=True)
    functions = list(_function_states(record, seen))
    remarks = [f"{f.name}: {each}" for f in functions for each in f.differences]
    remarks += _remarks(record, seen)
    return State(record, seen, functions, remarks, concurrency_of(account))


def _function_states(record: Record, seen: Seen) -> Iterator[FunctionState]:
    ours = {n for n, f in seen.functions.items() if is_ours(f, record.name)}
    wanted = set(record.names.functions)
    for name in sorted(ours | wanted, key=lambda n: int(n.rsplit("-", 1)[1])):
        found = seen.functions.get(name)
        if found is None or name not in ours:
            yield FunctionState(name, "missing", None, ["it is missing"])
            continue
        configuration = found.configuration
        differences: list[str] = []
        deployed = record.settings.get(name)
        if deployed is not None:
            settings, code, layers = _parts(deployed)
            differences = list(setting_differences(settings, configuration))
            now = known_settings({}, found)
            if now["CodeSha256"] != code:
                differences.append("its code is not the one that was deployed")
            if now["Layers"] != layers:
                differences.append("its layers are not those that were deployed")
        state = str(configuration.get("State", "Active"))
        if configuration.get("LastUpdateStatus") == "Failed":
            differences.append(
                f"its last update failed: {configuration.get('LastUpdateStatusReason')}"
            )
        if record.names.alias:
            differences += _snapshot_differences(deployed, found)
        snapshot = None if found.live is None else str(found.live.get("State", "Active"))
        yield FunctionState(name, state, configuration.get("MemorySize"), differences, snapshot)


def _snapshot_differences(deployed: dict[str, Any] | None, found: SeenFunction) -> Iterator[str]:
    """Say in which way what is called is not what was deployed."""
    live = found.live
    if live is None:
        yield f"nothing has its alias {ALIAS!r}, by which it is called"
        return
    if live.get("State") == "Failed":
        yield f"Lambda has no snapshot of it: {live.get('StateReason')}"
    if deployed is not None:
        settings, code, layers = _parts(deployed)
        same = (live.get("CodeSha256"), [each["Arn"] for each in live.get("Layers", [])])
        if snapshots.differences(settings, live) or same != (code, layers):
            yield f"its alias {ALIAS!r} means another version of it than the one deployed"


def _parts(deployed: Mapping[str, Any]) -> tuple[dict[str, Any], str | None, list[str]]:
    """Return settings, code and layers of what :func:`known_settings` has noted."""
    settings = {k: v for k, v in deployed.items() if k not in ("CodeSha256", "Layers")}
    return settings, deployed["CodeSha256"], deployed["Layers"]


def _exists(record: Record, seen: Seen) -> bool:
    begun = record.own_bucket and seen.bucket is not None and record.path.exists()
    return begun or seen.has_any(record.name)


def _remarks(record: Record, seen: Seen) -> Iterator[str]:
    if not _exists(record, seen):
        return
    if record.sizes and not record.complete:
        yield "the last `dask-lambda deploy` did not come to its end: run it again"
    if seen.bucket is None:
        yield f"the bucket {record.bucket} is missing, or somebody else's"
    elif seen.bucket.region != record.region:
        yield f"the bucket {record.bucket} is in another region, {seen.bucket.region}"
    elif not seen.bucket.lifecycle.get("Rules"):
        yield f"the bucket {record.bucket} has no rules that delete what is left behind"
    if seen.role is None:
        yield f"the role {record.names.role} is missing"
    for name in seen.functions:
        if is_ours(seen.functions[name], record.name) and LOGS + name not in seen.log_groups:
            yield f"the log group {LOGS + name} is missing: nothing is logged"


def only_one(name: str | None, region: str | None) -> Record:
    """Return the deployment of this machine that is meant.

    Raises
    ------
    ConfigurationError
        There is none, or there are several.
    """
    found = records.find(name, region)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigurationError("nothing was deployed from this machine: dask-lambda deploy")
    listed = ", ".join(f"{each.name} ({each.where})" for each in found)
    raise ConfigurationError(f"which deployment? Give --name and --region; there are: {listed}")
