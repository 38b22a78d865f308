"""Deploying other functions than the usual one to an embedded AWS."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

from dask_lambda import local_start
from dask_lambda.local import LocalAWS

#: Arguments of :func:`deploy` for the function that does to itself what the proxy tells it.
FAULTY: dict[str, Any] = {
    "files": {"faulty.py": Path(__file__).with_name("worker.py").read_text("utf-8")},
    "handler": "faulty.handler",
}


def deploy(
    aws: LocalAWS,
    name: str,
    files: dict[str, str] | None = None,
    handler: str = local_start.HANDLER,
    timeout: int = 60,
    environment: dict[str, str] | None = None,
    memory: int | None = None,
) -> str:
    """Deploy a function; its name.

    The files (name to source) are added to ``lambda_worker``; without any it is the function
    that ``lambda_get`` uses, under another name.
    """
    functions = aws.client("lambda")
    original = functions.get_function_configuration(FunctionName=aws.function)
    buffer = io.BytesIO(local_start.worker_code())
    with zipfile.ZipFile(buffer, "a") as archive:
        for path, source in (files or {}).items():
            archive.writestr(path, source)
    functions.create_function(
        FunctionName=name,
        Runtime=original["Runtime"],
        Handler=handler,
        Role=original["Role"],
        Code={"ZipFile": buffer.getvalue()},
        MemorySize=memory or aws.memory,
        Timeout=timeout,
        Environment={"Variables": {**local_start.FUNCTION_ENVIRONMENT, **(environment or {})}},
    )
    return name


def use_credentials(aws: LocalAWS) -> None:
    """Let this process find an embedded AWS's credentials where it would find those of AWS."""
    os.environ.update(
        AWS_CONFIG_FILE=os.devnull,
        AWS_SHARED_CREDENTIALS_FILE=os.devnull,
        AWS_EC2_METADATA_DISABLED="true",
        AWS_ACCESS_KEY_ID=aws.access_key_id,
        AWS_SECRET_ACCESS_KEY=aws.secret_access_key,
    )
    os.environ.pop("AWS_SESSION_TOKEN", None)
