"""The embedded AWS that all systems share, and the count of what passed through it."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from benchmarks.peers import counting_server
from dask_lambda import local_start
from dask_lambda.local import LocalAWS


@contextmanager
def started(peers: Iterable[str]) -> Iterator[LocalAWS]:
    """Start an embedded AWS that counts, with its default settings, and end it.

    Only the file that is run as the server is another one: it loads the usual one.

    Parameters
    ----------
    peers : iterable of str
        Names of systems that get a bucket.
    """
    server = SimpleNamespace(__file__=counting_server.__file__)
    with mock.patch.object(local_start, "local_server", server):
        aws = LocalAWS.start()
    with aws:
        s3 = aws.client("s3")
        for name in peers:
            s3.create_bucket(Bucket=bucket(name))
        yield aws


def bucket(name: str) -> str:
    """Return the bucket of a peer."""
    return f"peer-{name}"


def environment(aws: LocalAWS, name: str) -> dict[str, str]:
    """Return the variables with which a system finds it: AWS's own, and the names."""
    return {
        "AWS_ENDPOINT_URL": aws.endpoint_url,
        "AWS_ACCESS_KEY_ID": aws.access_key_id,
        "AWS_SECRET_ACCESS_KEY": aws.secret_access_key,
        "AWS_REGION": aws.region,
        "AWS_DEFAULT_REGION": aws.region,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ALLOW_HTTP": "true",  # obstore asks for it
        "BENCHMARK_BUCKET": bucket(name),
        "BENCHMARK_FUNCTION": aws.function,
        "BENCHMARK_FUNCTION_BUCKET": aws.bucket,
        "BENCHMARK_CONCURRENCY": str(aws.concurrency),
    }


def take_counts(aws: LocalAWS) -> dict[str, dict[str, int]]:
    """Return the requests and bytes since the last call, for each bucket."""
    address = urlsplit(aws.endpoint_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        # The guard looks for the owner's access key.
        authorization = f"AWS4-HMAC-SHA256 Credential={aws.access_key_id}/benchmark"
        connection.request("GET", counting_server.COUNTS, headers={"Authorization": authorization})
        answer: Any = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    return dict(answer)
