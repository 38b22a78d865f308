"""Carrying out a plan.

May import: aws, calls, image (for docker), errors.

AWS's control plane is eventually consistent: a role that was just made cannot be taken on for some
seconds, a function that was just changed cannot be changed again.  That is waited for here.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask_lambda.deploy import image
from dask_lambda.deploy.artifact import Archive
from dask_lambda.deploy.aws import Account, code_of
from dask_lambda.deploy.calls import Call, LayerArn, NewVersion, Push, Step
from dask_lambda.errors import DaskLambdaError, DeploymentError

#: Seconds until what AWS says about something that is being made is believed: a new role takes
#: about ten, a function a minute at the most.
PATIENCE = 180.0
#: The same of a snapshot: a function may take so long to initialise for it (AWS Lambda developer
#: guide, "Lambda SnapStart runtime hooks for Python"), and then it is copied.
SNAPSHOT_PATIENCE = 1200.0
#: Seconds between two looks, growing.
FIRST_WAIT, LONGEST_WAIT = 0.25, 5.0

#: Errors that end by themselves: code, and what the message says.
PASSING = (
    ("InvalidParameterValueException", "cannot be assumed by Lambda"),  # the role is too new
    ("ResourceConflictException", "update is in progress"),
    ("ResourceConflictException", "is currently in the following state: Pending"),
    ("InvalidParameterValueException", "execution role does not have permissions"),  # the same
    # Lambda encrypts a function's variables for its role, which KMS need not know yet.
    ("InvalidParameterValueException", "KMS key is invalid for CreateGrant"),
    # Made just now, and not known everywhere yet; a boundary that does not exist is no role.
    ("NoSuchEntity", "role with name"),
    ("NoSuchBucket", ""),
    ("OperationAborted", ""),  # a bucket of this name is just being deleted
    ("OperationAbortedException", ""),  # and a log group
    ("ConcurrentModification", ""),
    ("ConcurrentModificationException", ""),
    ("TooManyRequestsException", ""),
)
#: What error codes mean to a user.
MEANINGS = {
    "BucketAlreadyExists": "somebody else has a bucket of this name (they are unique in the "
    "world): choose another name (--name or --bucket)",
    "BucketAlreadyOwnedByYou": "this bucket was made by somebody in this account just now: run the "
    "same command again",
    "CodeStorageExceededException": "the account's room for functions and layers (75 GB) is used "
    "up: delete old ones, or ask AWS for more",
    "LimitExceededException": "a quota of the account is used up: ask AWS for more",
    "LimitExceeded": "a quota of the account is used up: ask AWS for more",
    "BucketNotEmpty": "something was written into the bucket meanwhile: run the same command again",
    "TooManyBuckets": "the account has as many buckets as it may: use one of them (--bucket)",
}


@dataclass(slots=True)
class Applied:
    """What was done.

    Attributes
    ----------
    done : list of Step
    left_out : list of (Step, str)
        What this account does not take, and what it says.
    layers : dict
        Name to ARN, of those that were published.
    versions : dict
        Function to the number of its version that was published.
    """

    done: list[Step] = field(default_factory=list)
    left_out: list[tuple[Step, str]] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Applier:
    """Carries out the steps of a plan, one after the other.

    Parameters
    ----------
    account : Account
    tell : callable, optional
        Hears of each step before it is taken.
    sleep, clock : callable
        As in :mod:`time`.
    """

    def __init__(
        self,
        account: Account,
        tell: Callable[[Step], object] = lambda step: None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._account, self._tell = account, tell
        self._sleep, self._clock = sleep, clock
        self.applied = Applied()

    def run(self, steps: Iterable[Step]) -> Applied:
        """Take all steps.

        Raises
        ------
        DeploymentError
            One could not be taken; the message says which, and what was done before.
        KeyboardInterrupt
            With what was done before.
        """
        for step in steps:
            missing = {each.name for each, _ in self.applied.left_out}
            if not step.calls or step.after in missing:
                continue
            made = 0
            try:
                self._tell(step)
                for call in step.calls:
                    if isinstance(call, Push):
                        self._push(call)
                    else:
                        self.make(call)
                    made += 1
            except Exception as error:
                if step.optional and step.optional in str(error):
                    self.applied.left_out.append((step, str(error)))
                    continue
                raise DeploymentError(
                    f"could not {step}: {_meaning(error)}\n{self._so_far(step, made)}"
                ) from error
            except KeyboardInterrupt:
                said = f"interrupted: {step}\n{self._so_far(step, made)}"
                raise KeyboardInterrupt(said) from None
            self.applied.done.append(step)
        return self.applied

    def make(self, call: Call) -> dict[str, Any]:
        """Make one call, and wait until it has taken effect."""
        from botocore.exceptions import ClientError

        parameters = self._filled(call.parameters)
        if call.before == "snapshot":
            name, version = parameters["FunctionName"], parameters["FunctionVersion"]
            what = f"the snapshot of the function {name}"
            self._until(lambda: self._is_ready(name, version), what, SNAPSHOT_PATIENCE)
        deadline = self._clock() + PATIENCE
        wait = FIRST_WAIT
        while True:
            try:
                answer = self._account.call(call.service, call.operation, **parameters)
            except ClientError as error:
                if code_of(error) in call.done:
                    return {}
                if not _passes(error) or self._clock() > deadline:
                    raise
                self._sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
            else:
                break
        if errors := answer.get("Errors"):  # of DeleteObjects, which succeeds all the same
            raise DeploymentError(
                f"{len(errors)} objects could not be deleted, among them {errors[0].get('Key')} "
                f"({errors[0].get('Code')}: {errors[0].get('Message')})"
            )
        if call.operation == "PublishLayerVersion":
            self.applied.layers[parameters["LayerName"]] = answer["LayerVersionArn"]
        if call.operation == "PublishVersion":
            self.applied.versions[parameters["FunctionName"]] = answer["Version"]
        self._settle(call)
        return answer

    def _push(self, push: Push) -> None:
        """Have docker build an image and push it, as whom ECR lets it."""
        image.build(push.recipe.context, push.uri, push.recipe.platform)
        (login,) = self._account.call("ecr", "GetAuthorizationToken")["authorizationData"]
        user, _, password = base64.b64decode(login["authorizationToken"]).decode().partition(":")
        image.push(push.uri, user, password)

    def _filled(self, value: Any) -> Any:
        """Put bytes, ARNs and numbers in their places."""
        if isinstance(value, Archive):
            return value.read()
        if isinstance(value, LayerArn):
            return self.applied.layers[value.name]
        if isinstance(value, NewVersion):
            return self.applied.versions[value.function]
        if isinstance(value, Mapping):
            return {name: self._filled(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._filled(each) for each in value]
        return value

    # -- waiting ---------------------------------------------------------------------------------

    def _settle(self, call: Call) -> None:
        match call.settled:
            case "bucket":
                name = call.parameters["Bucket"]
                self._until(
                    lambda: self._exists("s3", "HeadBucket", "404", "NoSuchBucket", Bucket=name),
                    f"the bucket {name}",
                )
            case "role":
                name = call.parameters["RoleName"]
                self._until(
                    lambda: self._exists("iam", "GetRole", "NoSuchEntity", RoleName=name),
                    f"the role {name}",
                )
            case "function":
                name = call.parameters["FunctionName"]
                self._until(lambda: self._is_ready(name), f"the function {name}")
            case "no function":
                name = call.parameters["FunctionName"]
                self._until(lambda: not self._is_there(name), f"the place of the function {name}")

    def _exists(self, service: str, operation: str, *absent: str, **parameters: Any) -> bool:
        return self._account.found(service, operation, *absent, **parameters) is not None

    def _configuration(self, name: str, version: str) -> dict[str, Any] | None:
        named = {"FunctionName": name, **({"Qualifier": version} if version else {})}
        return self._account.found(
            "lambda", "GetFunctionConfiguration", "ResourceNotFoundException", **named
        )

    def _is_there(self, name: str) -> bool:
        return self._configuration(name, "") is not None

    def _is_ready(self, name: str, version: str = "") -> bool:
        found = self._configuration(name, version)
        if found is None:
            return False
        for state in ("State", "LastUpdateStatus"):
            if found.get(state) == "Failed":
                why = found.get(f"{state}Reason") or "no reason is given"
                what = f"take a snapshot of the function {name}" if version else f"set up {name}"
                raise DeploymentError(f"Lambda could not {what}: {why}")
        pending = found.get("State") == "Pending" or found.get("LastUpdateStatus") == "InProgress"
        return not pending

    def _until(self, true: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
        deadline = self._clock() + patience
        wait = FIRST_WAIT
        while not true():
            if self._clock() > deadline:
                raise DeploymentError(f"{what} was not ready within {patience:g} s")
            self._sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    # -- what went wrong -------------------------------------------------------------------------

    def _so_far(self, step: Step, made: int) -> str:
        """Say what was done, of all steps and of the one that is not through."""
        done = [str(each) for each in self.applied.done]
        if made:
            done.append(f"{step}, {made} of {len(step.calls)} calls")
        said = f"done so far: {'; '.join(done)}" if done else "nothing was done before"
        return (
            f"{said}.\nThe same command goes on from there; `dask-lambda destroy` removes what was "
            "made."
        )


def _meaning(error: Exception) -> str:
    """Return what an error means to a user."""
    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):
        code = code_of(error)
        message = error.response.get("Error", {}).get("Message", "")
        return MEANINGS.get(code) or f"{code}: {message}"
    if isinstance(error, DaskLambdaError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _passes(error: Any) -> bool:
    code, message = code_of(error), str(error)
    return any(code == known and text in message for known, text in PASSING)
