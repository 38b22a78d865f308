"""How a deployment is, and what of it is not as it was deployed.

May import: aws, deployment, differences, look, naming, record, resources, seen, snapshots.

What is compared with is what this machine's record says; without one, only what is missing shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask_lambda.deploy import record as records
from dask_lambda.deploy import snapshots
from dask_lambda.deploy.aws import Account
from dask_lambda.deploy.deployment import concurrency_of, known_settings
from dask_lambda.deploy.differences import (
    bucket_differences,
    log_group_differences,
    other_policies,
    role_differences,
    setting_differences,
)
from dask_lambda.deploy.look import look
from dask_lambda.deploy.naming import ALIAS, LOGS
from dask_lambda.deploy.plan import logs_are_ours
from dask_lambda.deploy.record import Record
from dask_lambda.deploy.resources import Options, names_of, surroundings
from dask_lambda.deploy.seen import Seen, SeenFunction, is_ours


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
        What is not as it was deployed, and `deploy` puts right.
    foreign : list of str
        What somebody has added, and `deploy` leaves alone.
    concurrency : int, optional
        Of the account.
    """

    record: Record
    seen: Seen
    functions: list[FunctionState]
    remarks: list[str]
    foreign: list[str]
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
    foreign: list[str] = []
    if _exists(record, seen):
        remarks += _missing(record, seen)
        remarks += _differences(record, seen, secure=account.is_secure)
        foreign += _foreign(record, seen)
    return State(record, seen, functions, remarks, foreign, concurrency_of(account))


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


def _missing(record: Record, seen: Seen) -> Iterator[str]:
    """Say what is not there, or cannot be used."""
    if record.removing:
        yield "the last `dask-lambda destroy` did not come to its end: run it again"
    elif record.sizes and not record.complete:
        yield "the last `dask-lambda deploy` did not come to its end: run it again"
    if seen.bucket is None:
        yield f"the bucket {record.bucket} is missing, or somebody else's"
    elif seen.bucket.region != record.region:
        yield f"the bucket {record.bucket} is in another region, {seen.bucket.region}"
    if not is_ours(seen.role, record.name):
        yield f"the role {record.names.role} is missing, or not this deployment's"
    for name in seen.functions:
        if is_ours(seen.functions[name], record.name) and LOGS + name not in seen.log_groups:
            yield f"the log group {LOGS + name} is missing: nothing is logged"


def _differences(record: Record, seen: Seen, *, secure: bool) -> Iterator[str]:
    """Compare what functions have around them with what the record says was wanted."""
    if not record.options:  # it was deployed from another machine, or by a stack
        return
    wanted = surroundings(
        Options.from_json(record.options), record.where, version=record.version, secure=secure
    )
    bucket, role, log_groups = wanted
    if seen.bucket is not None and seen.bucket.region == record.region:
        for why, _ in bucket_differences(bucket, seen.bucket):
            yield f"the bucket {bucket.name}: {why}"
    if seen.role is not None and is_ours(seen.role, record.name):
        for why, _ in role_differences(role, seen.role):
            yield f"the role {role.name}: {why}"
    for group in log_groups:
        found = seen.log_groups.get(group.name)
        if found is not None and logs_are_ours(found, seen, record.name):
            arn = record.names.log_group_arn(group.name)
            for why, _ in log_group_differences(group, found, arn):
                yield f"the log group {group.name}: {why}"


def _foreign(record: Record, seen: Seen) -> Iterator[str]:
    """Say what functions may do that this deployment has not let them."""
    if seen.role is not None and is_ours(seen.role, record.name):
        for policy in other_policies(seen.role):
            yield (
                f"the role {seen.role.name} has a policy that is not this deployment's, {policy}: "
                "tasks may do what it says; `deploy` leaves it"
            )
