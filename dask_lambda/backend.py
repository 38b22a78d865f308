"""Where invocations and objects go: real AWS, or the embedded one.

May import: credentials, config, errors, the ground; late, since they are slow to import: invoke,
standalone, local_shared, boto3.  The engine does not know which of the two it talks to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from dask_lambda.config import DEFAULT_CONCURRENCY, Settings
from dask_lambda.credentials import (
    Credentials,
    find_credentials,
    open_with_own_credentials,
    region_of_environment,
)
from dask_lambda.errors import ConfigurationError
from lambda_worker.store import open_bucket

if TYPE_CHECKING:
    from dask_lambda.invoke import LambdaInvoker
    from dask_lambda.standalone import ExecutorInvoker, ProcessInvoker

logger = logging.getLogger("dask_lambda")

#: Open files besides one connection for each invocation: S3, the program's own.
OTHER_FILES = 256
#: A connection to the embedded AWS breaks a little earlier than it is known to have ended.
CHECK_SECONDS = 0.2


@dataclass(slots=True)
class AWSBackend:
    """Functions, a bucket, and the way to both."""

    invokers: Sequence[LambdaInvoker]  #: from the usual function to the one with most memory
    bucket_name: str
    bucket: Any
    prefix: str
    window: int
    is_alive: Callable[[], bool]
    check: Callable[[], None]
    refresh: Callable[[], None]  #: look for credentials anew, since these have expired
    function: str
    region: str
    endpoint_url: str | None
    s3: Callable[[], Any]  #: makes a botocore client, for what is no matter of a run
    affordable: Callable[[int], int]  #: of so many invocations in flight, how many are possible
    keys: tuple[str, str] | None = field(
        default=None, repr=False
    )  #: of the embedded AWS, drawn when it was started
    lasting: bool = True  #: whether what is in the bucket outlives this process
    local: ProcessInvoker | ExecutorInvoker | None = None  #: for what does not run on Lambda


def open_backend(settings: Settings) -> AWSBackend:
    """Find credentials and open clients; the embedded AWS is started if it is meant.

    Raises
    ------
    ConfigurationError
        If no region is configured.
    AccessDeniedError
        If there are no credentials.
    LocalAWSError
        If the embedded AWS cannot be started.
    """
    return _local(settings) if settings.is_local else _aws(settings)


def _local(settings: Settings) -> AWSBackend:
    from botocore.credentials import Credentials as BotocoreCredentials

    from dask_lambda.invoke import LambdaInvoker
    from dask_lambda.local_shared import local_aws

    aws = local_aws(
        concurrency=settings.concurrency,
        memory=settings.memory,
        timeout=settings.timeout,
        # Nobody asked for it: say so where it is seen even if logging is not configured.
        log_level=logging.WARNING if settings.backend == "auto" else logging.INFO,
    )
    invoker = LambdaInvoker(
        aws.function,
        aws.region,
        BotocoreCredentials(aws.access_key_id, aws.secret_access_key),
        aws.endpoint_url,
        settings.timeout,
        aws.memory,
    )
    open_ = partial(
        open_bucket,
        aws.bucket,
        endpoint_url=aws.endpoint_url,
        region=aws.region,
        access_key_id=aws.access_key_id,
        secret_access_key=aws.secret_access_key,
        session_token="",  # not the user's, from AWS_SESSION_TOKEN
        retry_seconds=10.0,
    )
    bucket = open_()
    window = min(settings.concurrency or aws.concurrency, aws.concurrency)
    return AWSBackend(
        [invoker],
        aws.bucket,
        bucket,
        settings.prefix,
        window,
        is_alive=aws.is_alive,
        check=partial(aws.check, wait=CHECK_SECONDS),
        refresh=lambda: None,
        function=aws.function,
        region=aws.region,
        endpoint_url=aws.endpoint_url,
        s3=partial(aws.client, "s3"),
        # Processes elsewhere on this machine cannot find these credentials, nor do they expire.
        local=_elsewhere(settings, aws.bucket, bucket, open_),
        keys=(aws.access_key_id, aws.secret_access_key),
        affordable=partial(_served, aws.concurrency),
        lasting=aws.is_shared,
    )


def _elsewhere(
    settings: Settings, bucket: str, opened: Any, open_: Callable[[], Any]
) -> ProcessInvoker | ExecutorInvoker | None:
    from dask_lambda.local_start import available_cores
    from dask_lambda.standalone import open_local

    return open_local(settings.local_executor, bucket, opened, open_, available_cores())


def open_elsewhere(
    bucket: str, region: str | None, endpoint_url: str | None, keys: tuple[str, str] | None
) -> Any:
    """Open the bucket of another process.

    Parameters
    ----------
    bucket, region, endpoint_url
    keys : tuple of str, optional
        Access key and its secret, if it is an embedded AWS; else the user's own credentials are
        looked for.

    Raises
    ------
    AccessDeniedError
        If there are no credentials.
    """
    if keys is not None:
        return open_bucket(
            bucket,
            endpoint_url=endpoint_url,
            region=region,
            access_key_id=keys[0],
            secret_access_key=keys[1],
            session_token="",
            retry_seconds=10.0,
        )
    import boto3

    credentials = Credentials(lambda: boto3.Session().get_credentials())
    return open_bucket(
        bucket, endpoint_url=endpoint_url, region=region, credential_provider=credentials
    )


def usual_window(settings: Settings) -> int:
    """Return how many invocations may be in flight, as far as the settings tell."""
    if settings.concurrency is not None:
        return settings.concurrency
    if not settings.is_local:
        return DEFAULT_CONCURRENCY
    from dask_lambda.local_start import INVOCATIONS_PER_CORE, available_cores

    return INVOCATIONS_PER_CORE * available_cores()


def _served(concurrency: int, window: int) -> int:
    """Lower the window to what the embedded AWS was started for."""
    if window > concurrency:
        logger.warning(
            "the embedded AWS serves %d invocations at the same time, not %d: it was started with "
            "dask-lambda.concurrency, by default three for each core",
            concurrency,
            window,
        )
    return min(window, concurrency)


def region_of(settings: Settings) -> str | None:
    """Return where the function is, without connecting; None if no region is configured."""
    if settings.region is not None:
        return settings.region
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        found: str | None = botocore.session.get_session().get_config_variable("region")
    except BotoCoreError:  # a profile that does not exist: a run will say so
        return None
    return region_of_environment() or found


def _affordable(window: int) -> int:
    """Make room for a connection for each invocation in flight, or lower the window."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return window
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = window + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < needed:
            affordable = max(1, soft - OTHER_FILES)
            logger.warning(
                "this process may open %d files only: at most %d of %d invocations run at the "
                "same time; raise the limit (ulimit -n), or lower dask-lambda.concurrency",
                soft,
                affordable,
                window,
            )
            return affordable
    return window


def _aws(settings: Settings) -> AWSBackend:
    import boto3
    from botocore.exceptions import BotoCoreError

    from dask_lambda.invoke import LambdaInvoker

    assert settings.function is not None
    assert settings.bucket is not None
    try:
        session = boto3.Session(region_name=settings.region or region_of_environment())
        credentials = Credentials(find_credentials)
    except BotoCoreError as error:  # a profile that does not exist, a broken file
        raise ConfigurationError(f"the AWS configuration cannot be used: {error}") from error
    if session.region_name is None:
        raise ConfigurationError(
            "no AWS region is configured: set dask-lambda.region or AWS_REGION"
        )
    try:
        config = session.client("lambda", endpoint_url=settings.endpoint_url).meta
    except (BotoCoreError, ValueError) as error:  # a malformed region or endpoint
        raise ConfigurationError(
            f"{error}: check dask-lambda.region and dask-lambda.endpoint-url"
        ) from error
    larger = sorted(settings.larger_functions.items())
    invokers = [
        LambdaInvoker(
            function,
            session.region_name,
            credentials,
            config.endpoint_url,
            settings.timeout,
            memory,
        )
        for memory, function in [(settings.memory if larger else None, settings.function), *larger]
    ]
    bucket = open_bucket(
        settings.bucket,
        endpoint_url=settings.endpoint_url,
        region=session.region_name,
        credential_provider=credentials,
    )
    window = _affordable(settings.concurrency or DEFAULT_CONCURRENCY)
    return AWSBackend(
        invokers,
        settings.bucket,
        bucket,
        settings.prefix,
        window,
        is_alive=lambda: True,
        check=lambda: None,
        refresh=credentials.refresh,
        function=settings.function,
        region=session.region_name,
        endpoint_url=settings.endpoint_url,
        s3=partial(session.client, "s3", endpoint_url=settings.endpoint_url),
        affordable=_affordable,
        local=_elsewhere(
            settings,
            settings.bucket,
            bucket,
            partial(
                open_with_own_credentials,
                settings.bucket,
                settings.endpoint_url,
                session.region_name,
            ),
        ),
    )
