"""An AWS account, as the control plane sees it: who we are there, and calls of its APIs.

May import: calls, naming, credentials' messages, errors; boto3 and botocore late.

All of it goes through botocore, with its standard retries: the control plane throttles, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dask_lambda.credentials import NO_CREDENTIALS, region_of_environment
from dask_lambda.deploy import policies
from dask_lambda.deploy.naming import Where
from dask_lambda.errors import AccessDeniedError, ConfigurationError, DeploymentError

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

    from dask_lambda.local import LocalAWS

#: Attempts of a request that AWS throttles or that the network loses; waits between them grow.
ATTEMPTS = 8
#: The first request of all finds out if the region is misspelt: nobody wants to wait for that.
ASKED_WHO = 2
#: Seconds; uploads of large archives take their time.
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 120

EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired")
INVALID = (
    *("InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId"),
    *("SignatureDoesNotMatch", "InvalidSignatureException", "AuthFailure", "InvalidToken"),
)
DENIED = (
    *("AccessDenied", "AccessDeniedException", "403", "Forbidden"),
    *("UnauthorizedOperation", "UnauthorizedAccess"),
)
SKEWED = ("RequestTimeTooSkewed", "SignatureNotYetCurrent")


class Account:
    """An account and a region of AWS.

    Parameters
    ----------
    session : boto3.Session
    endpoint_url : str, optional
        Of all services, where it is not AWS's own.

    Raises
    ------
    ConfigurationError
        If no region is configured.
    """

    def __init__(self, session: Any, endpoint_url: str | None = None):
        if session.region_name is None:
            raise ConfigurationError(
                "no AWS region is configured: give --region, or set AWS_REGION"
            )
        self._session = session
        self.region: str = session.region_name
        self.endpoint_url = endpoint_url
        self._clients: dict[str, Any] = {}
        self._identity: dict[str, Any] | None = None

    @classmethod
    def open(cls, region: str | None = None, endpoint_url: str | None = None) -> Account:
        """Find credentials and a region as boto3 does.

        Raises
        ------
        ConfigurationError
            A profile that does not exist, a broken file, no region.
        """
        import boto3
        from botocore.exceptions import BotoCoreError

        try:
            session = boto3.Session(region_name=region or region_of_environment())
            return cls(session, endpoint_url)
        except BotoCoreError as error:
            raise ConfigurationError(f"the AWS configuration cannot be used: {error}") from error

    @classmethod
    def of_local(cls, aws: LocalAWS) -> Account:
        """Return the account of an embedded AWS."""
        return cls(_LocalSession(aws), aws.endpoint_url)

    def client(self, service: str) -> Any:
        """Return a botocore client of a service, the same one each time."""
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        if service not in self._clients:
            config = Config(
                connect_timeout=CONNECT_TIMEOUT,
                read_timeout=READ_TIMEOUT,
                retries={
                    "mode": "standard",
                    "total_max_attempts": ASKED_WHO if service == "sts" else ATTEMPTS,
                },
                s3={"addressing_style": "path"} if self.endpoint_url else None,
            )
            try:
                self._clients[service] = self._session.client(
                    service, endpoint_url=self.endpoint_url, config=config
                )
            except (BotoCoreError, ValueError) as error:  # a malformed region or endpoint
                raise ConfigurationError(f"{error}: check the region and the endpoint") from error
        return self._clients[service]

    def configured_endpoint(self, service: str) -> str | None:
        """Return the address of a service if somebody has configured one; None if it is AWS's."""
        from botocore.config import Config

        own = Config(ignore_configured_endpoint_urls=True)
        usual = self._session.client(service, config=own).meta.endpoint_url
        used: str = self.client(service).meta.endpoint_url
        return None if used == usual else used

    @property
    def is_secure(self) -> bool:
        """Whether S3 is spoken to over TLS."""
        return str(self.client("s3").meta.endpoint_url).startswith("https:")

    @property
    def identity(self) -> Mapping[str, Any]:
        """Who we are: ``Account``, ``Arn``, and the answer's metadata.

        Raises
        ------
        AccessDeniedError
            No credentials, or ones that AWS does not take.
        """
        if self._identity is None:
            self._identity = self.call("sts", "GetCallerIdentity")
        return self._identity

    @property
    def where(self) -> Where:
        """The account and region."""
        arn = str(self.identity["Arn"])
        return Where(str(self.identity["Account"]), self.region, arn.split(":")[1])

    def call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        """Call an operation by its API name.

        Raises
        ------
        botocore.exceptions.ClientError
            An error of the service that is not about credentials or permissions.
        AccessDeniedError
            Those are; the message names the permission.
        ConfigurationError, DeploymentError
            AWS cannot be reached, or a parameter is not valid.
        """
        from botocore import xform_name

        with translated(service, operation, self.region):
            method = getattr(self.client(service), xform_name(operation))
            answer: dict[str, Any] = method(**parameters)
            return answer

    def pages(
        self, service: str, operation: str, result: str, **parameters: Any
    ) -> Iterator[dict[str, Any]]:
        """Return all items of a listing."""
        from botocore import xform_name

        with translated(service, operation, self.region):
            paginator = self.client(service).get_paginator(xform_name(operation))
            for page in paginator.paginate(**parameters):
                yield from page.get(result, [])

    def found(
        self, service: str, operation: str, *absent: str, **parameters: Any
    ) -> dict[str, Any] | None:
        """Call an operation; None if its error code says that there is nothing of the kind."""
        from botocore.exceptions import ClientError

        try:
            return self.call(service, operation, **parameters)
        except ClientError as error:
            if code_of(error) in absent:
                return None
            raise


class _LocalSession:
    """In the place of a boto3 session: no setting of the user's has a part in it."""

    def __init__(self, aws: LocalAWS):
        self.region_name, self._aws = aws.region, aws

    def client(self, service: str, **settings: Any) -> Any:
        return self._aws.client(service)


def code_of(error: ClientError) -> str:
    """Return the code of a service's error."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def translated(service: str, operation: str, region: str) -> Iterator[None]:
    """Make errors about credentials, permissions and the network our own."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectTimeoutError,
        EndpointConnectionError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from botocore.parsers import ResponseParserError  # a proxy's page, for example

    action = policies.action_of(service, operation)
    try:
        yield
    except ClientError as error:
        if (why := refusal(error, action, region)) is not None:
            raise AccessDeniedError(why) from error
        raise
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise AccessDeniedError(f"{NO_CREDENTIALS} ({error})") from error
    except (EndpointConnectionError, ConnectTimeoutError) as error:
        raise ConfigurationError(
            f"{error}: check the network, and that {region!r} is a region of AWS{_near(region)} "
            "(--region)"
        ) from error
    except (BotoCoreError, ResponseParserError) as error:
        raise DeploymentError(f"{action} failed: {error}") from error


def _near(region: str) -> str:
    """Suggest regions of AWS for one that is none."""
    import difflib

    import botocore.session

    session = botocore.session.Session()
    known = [
        each
        for partition in session.get_available_partitions()
        for each in session.get_available_regions("lambda", partition)
    ]
    if region in known:
        return ""
    found = difflib.get_close_matches(region, known, 2)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def refusal(error: ClientError, action: str, region: str) -> str | None:
    """Say why AWS refuses a request: credentials or permissions; None if it is neither."""
    code = code_of(error)
    message = str(error.response.get("Error", {}).get("Message", ""))
    if code in EXPIRED:
        return (
            f"the AWS credentials have expired ({code}): log in again (for example: aws sso login)"
        )
    if code in SKEWED or "Signature expired" in message or "not yet current" in message:
        return f"this machine's clock is wrong, and AWS refuses its signatures ({message}): set it"
    if code in INVALID:
        return (
            f"AWS does not take these credentials in {region} ({code}: {message}): check them, "
            f"and that the account has the region {region} enabled"
        )
    if code in DENIED:
        named, on = policies.refused(message) or (action, "")
        resource = f" on {on}" if on else ""
        return (
            f"access denied: {named}{resource}; whoever looks after the account can allow it "
            f"(`dask-lambda deploy --dry-run` prints the policy for deploying). AWS says: {message}"
        )
    return None
