"""What the tests of deployment share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from xml.sax.saxutils import escape

from botocore.awsrequest import AWSResponse, HeadersDict

from dask_lambda.deploy.aws import Account
from tests.helpers import eventually


def inventory(account: Account) -> dict[str, Any]:
    """Everything in an account that a deployment may have a part in."""
    buckets = account.call("s3", "ListBuckets")["Buckets"]
    roles = account.pages("iam", "ListRoles", "Roles")
    return {
        "buckets": sorted(each["Name"] for each in buckets),
        "functions": sorted(
            each["FunctionName"] for each in account.pages("lambda", "ListFunctions", "Functions")
        ),
        "layers": sorted(
            each["LayerName"] for each in account.pages("lambda", "ListLayers", "Layers")
        ),
        "roles": sorted(each["RoleName"] for each in roles),
        "policies": sorted(
            each["PolicyName"]
            for each in account.pages("iam", "ListPolicies", "Policies", Scope="Local")
        ),
        "log groups": sorted(
            each["logGroupName"]
            for each in account.pages("logs", "DescribeLogGroups", "logGroups")
            if "dask-lambda-" in each["logGroupName"]
        ),
        "repositories": sorted(
            each["repositoryName"]
            for each in account.pages("ecr", "DescribeRepositories", "repositories")
        ),
    }


class _Raw:
    def __init__(self, body: bytes):
        self._body = body

    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self._body


def answer_with(
    account: Account,
    service: str,
    operation: str,
    code: str,
    message: str,
    *,
    status: int = 400,
    times: int = 1,
    only: Callable[[bytes], bool] = lambda body: True,
) -> list[str]:
    """Have AWS's answer be an error, in the form in which the service sends it.

    Returns a list that gets an entry for each time.
    """
    said: list[str] = []
    client = account.client(service)
    protocol = client.meta.service_model.resolved_protocol

    def handler(request: Any, **_: Any) -> AWSResponse | None:
        body = request.body if isinstance(request.body, bytes) else b""
        if len(said) >= times or not only(body):
            return None
        said.append(code)
        headers = {"x-amzn-requestid": "5d3f"}
        if protocol == "query":
            text = (
                "<ErrorResponse><Error><Type>Sender</Type>"
                f"<Code>{code}</Code><Message>{escape(message)}</Message></Error>"
                "<RequestId>5d3f</RequestId></ErrorResponse>"
            )
        elif protocol == "rest-xml":
            text = f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>"
            if request.method == "HEAD":
                text = ""
        else:
            headers["x-amzn-errortype"] = code
            text = json.dumps({"__type": code, "message": message})
        return AWSResponse(request.url, status, HeadersDict(headers), _Raw(text.encode()))

    _register(client, f"before-send.{service}.{operation}", handler)
    return said


def answer_instead(
    account: Account, service: str, operation: str, answer: dict[str, Any], *, times: int = 1
) -> list[str]:
    """Have the answer be another one, of a service that speaks JSON; a list as of the other."""
    said: list[str] = []

    def handler(request: Any, **_: Any) -> AWSResponse | None:
        if len(said) >= times:
            return None
        said.append(operation)
        body = json.dumps(answer).encode()
        return AWSResponse(request.url, 200, HeadersDict({}), _Raw(body))

    _register(account.client(service), f"before-send.{service}.{operation}", handler)
    return said


def answer_as(
    account: Account, service: str, operation: str, change: Callable[[dict[str, Any]], object]
) -> None:
    """Change the answers of an operation before anybody sees them."""

    def handler(parsed: dict[str, Any], **_: Any) -> None:
        change(parsed)

    _register(account.client(service), f"after-call.{service}.{operation}", handler)


_registered: list[tuple[Any, str, Any]] = []


def _register(client: Any, event: str, handler: Any) -> None:
    client.meta.events.register(event, handler)
    _registered.append((client, event, handler))


def answer_truly() -> None:
    """Have AWS's own answers again."""
    while _registered:
        client, event, handler = _registered.pop()
        client.meta.events.unregister(event, handler)


def denied(action: str, resource: str) -> str:
    """What AWS says about a missing permission."""
    who = "arn:aws:iam::123456789012:user/ada"
    return (
        f"User: {who} is not authorized to perform: {action} on resource: {resource} because no "
        f"identity-based policy allows the {action} action"
    )


def eventually_created(account: Account, stack: str) -> None:
    """Wait until CloudFormation has created a stack."""

    def status() -> str:
        (found,) = account.call("cloudformation", "DescribeStacks", StackName=stack)["Stacks"]
        return str(found["StackStatus"])

    assert eventually(lambda: not status().endswith("IN_PROGRESS"))
    assert status() == "CREATE_COMPLETE"


def refuse_large_functions(account: Account) -> None:
    """Refuse functions with more memory than an account may have that is new."""
    answer_with(
        account,
        "lambda",
        "CreateFunction",
        "InvalidParameterValueException",
        "'MemorySize' value failed to satisfy constraint: Member must have value less than or "
        "equal to 3008",
        only=lambda body: json.loads(body)["MemorySize"] > 3008,
        times=10,
    )
