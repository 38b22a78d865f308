"""Credentials that an endpoint hands out: real HTTP on both sides, real S3 behind."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from dask_lambda import failures
from dask_lambda.events import FailureKind
from dask_lambda.local import LocalAWS
from lambda_worker import container_credentials, handler
from lambda_worker.container_credentials import (
    ADDRESS,
    HOSTS,
    TOKEN,
    TOKEN_FILE,
    WAITS,
    ContainerCredentials,
    CredentialsError,
)
from lambda_worker.errors import StoreError
from lambda_worker.store import Parts, Store, open_bucket
from tests.credentials_endpoint import CredentialsEndpoint
from tests.helpers import eventually

pytestmark = pytest.mark.local
uses_bucket = True

NAME = "0/prefix/run/x"


@pytest.fixture
def endpoint(aws: LocalAWS) -> Iterator[CredentialsEndpoint]:
    found = aws.client("sts").get_session_token()["Credentials"]
    keys = {name: found[name] for name in ("AccessKeyId", "SecretAccessKey")}
    with CredentialsEndpoint({**keys, "Token": found["SessionToken"]}) as running:
        yield running


@pytest.fixture
def store(
    aws: LocalAWS, endpoint: CredentialsEndpoint, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """The store that a worker opens whose environment has the endpoint, and no keys."""
    for name, value in endpoint.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REGION", aws.region)
    monkeypatch.setenv("AWS_ENDPOINT_URL", aws.endpoint_url)
    environment = handler.Environment()
    yield environment.store(aws.bucket)
    aws.client("s3").delete_object(Bucket=aws.bucket, Key=NAME)
    environment.close()


def refused(store: Store, endpoint: CredentialsEndpoint) -> StoreError:
    """What S3 could not do, which says nothing that is secret."""
    with pytest.raises(StoreError) as found:
        store.exists(NAME)
    told = "".join(traceback.format_exception(found.value))
    for secret in (endpoint.token, *endpoint.keys.values()):
        assert secret not in told
    assert "s3:GetObject 0/prefix/run/x" in str(found.value)
    return found.value


def on_the_client(error: StoreError) -> FailureKind:
    """What a client makes of it."""
    record = {"kind": f"store-{error.kind}", "message": str(error)}
    return failures.from_record(record).kind


# -- it works ------------------------------------------------------------------------------------


def test_a_worker_reads_and_writes_with_what_the_endpoint_gives(store, endpoint):
    assert store.put_new(NAME, b"once") is None
    assert store.get(NAME, 4) == b"once"
    assert store.put_new(NAME, b"twice") == 4
    assert asyncio.run(listed(store)) == [NAME]
    store.delete(NAME)
    assert not store.exists(NAME)
    assert endpoint.given == endpoint.asked == 1


async def listed(store: Store) -> list[str]:
    return [name async for name in store.list_async("0/prefix/")]


def test_many_threads_and_parts_share_what_was_given_once(aws, store, endpoint):
    store.parts = Parts(read_above=2**20, read=2**20, write_above=5 * 2**20, write=5 * 2**20)
    data = bytes(range(256)) * (11 * 2**12)
    store.put(NAME, data)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: store.get(NAME, len(data)), range(8)))
    assert all(bytes(each) == data for each in found)
    assert endpoint.asked == 1


def test_they_are_renewed_when_they_are_about_to_end(store, endpoint):
    endpoint.lifetime = timedelta(minutes=4)
    assert not store.exists(NAME)
    first = endpoint.given
    assert eventually(lambda: not store.exists(NAME) and endpoint.given > first + 2)
    endpoint.lifetime = timedelta(hours=1)
    at_last = endpoint.given
    assert eventually(lambda: not store.exists(NAME) and endpoint.given > at_last)
    for _ in range(10):
        store.exists(NAME)
    assert endpoint.given == at_last + 1


def test_what_s3_refuses_is_replaced_as_soon_as_there_is_something_else(store, endpoint):
    good = endpoint.keys
    endpoint.keys = {**good, "AccessKeyId": "AKIANOBODY"}
    endpoint.lifetime = timedelta(minutes=1)
    refused(store, endpoint)
    endpoint.keys = good
    assert eventually(lambda: exists(store) is False)


def exists(store: Store) -> bool | None:
    try:
        return store.exists(NAME)
    except StoreError:
        return None


def test_a_token_in_a_file_is_read_each_time(store, endpoint, tmp_path, monkeypatch):
    file = tmp_path / "token"
    monkeypatch.setenv(TOKEN_FILE, str(file))
    monkeypatch.setenv(TOKEN, "an older one")
    assert "cannot be read" in str(refused(store, endpoint))
    file.write_text(f"{endpoint.token}\n")
    assert not store.exists(NAME)


def test_the_token_is_read_each_time(store, endpoint, monkeypatch):
    monkeypatch.setenv(TOKEN, "an older one")
    assert refused(store, endpoint).kind == "denied"
    monkeypatch.setenv(TOKEN, endpoint.token)
    assert not store.exists(NAME)


def test_proxies_are_for_others(store, endpoint, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert not store.exists(NAME)
    assert endpoint.given == 1


# -- it does not ---------------------------------------------------------------------------------


def test_an_endpoint_that_refuses_is_told_as_denied(store, endpoint):
    endpoint.token = "another one"
    error = refused(store, endpoint)
    assert error.kind == "denied"
    assert f"the endpoint of {ADDRESS} refused to give credentials" in str(error)
    assert "status 401" in str(error)
    assert endpoint.asked == 1
    assert on_the_client(error) is FailureKind.FATAL


def test_credentials_that_have_ended_are_told_as_expired(store, endpoint):
    endpoint.lifetime = timedelta(seconds=-1)
    error = refused(store, endpoint)
    assert error.kind == "expired"
    assert "ExpiredToken" in str(error)
    assert on_the_client(error) is FailureKind.TRANSIENT


def test_what_fails_for_a_moment_is_asked_again(store, endpoint):
    endpoint.statuses = [500, 503, 429]
    assert not store.exists(NAME)
    assert (endpoint.asked, endpoint.given) == (4, 1)


def test_what_fails_on_and_on_may_pass(store, endpoint):
    endpoint.statuses = [503] * 100
    error = refused(store, endpoint)
    assert error.kind == "transient"
    assert "answered with status 503, 4 times" in str(error)
    assert endpoint.asked == len(WAITS) + 1
    assert on_the_client(error) is FailureKind.TRANSIENT


def test_nobody_there_may_pass(store, endpoint):
    endpoint.close()
    error = refused(store, endpoint)
    assert error.kind == "transient"
    assert "did not answer (ConnectionRefusedError)" in str(error)


def test_one_who_never_answers_is_not_waited_for(store, endpoint, monkeypatch):
    monkeypatch.setattr(container_credentials, "TIMEOUT_SECONDS", 0.05)
    with endpoint._lock:  # it takes the request, and says nothing
        error = refused(store, endpoint)
    assert error.kind == "transient"
    assert "did not answer (TimeoutError)" in str(error)


def test_a_redirection_is_no_answer(store, endpoint):
    endpoint.statuses = [302]
    endpoint.headers = {"Location": "http://127.0.0.1:9/"}
    error = refused(store, endpoint)
    assert error.kind == "denied"
    assert "status 302" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"<html>",
        b'{"AccessKeyId": "a", "SecretAccessKey": "s", "Token": "t"}',
        b'{"AccessKeyId": "a", "SecretAccessKey": "s", "Token": "", "Expiration": "2999-01-01"}',
        b'{"AccessKeyId": "a", "SecretAccessKey": "s", "Token": "t", "Expiration": "soon"}',
        b'{"AccessKeyId": "a", "SecretAccessKey": "s", "Token": "t", "Expiration": 4}',
    ],
)
def test_what_is_no_credentials_is_said_to_be_none(store, endpoint, body):
    endpoint.body = body
    assert "answered something that is no credentials" in str(refused(store, endpoint))


@pytest.mark.parametrize(
    "address",
    [
        "http://192.0.2.1/credentials",
        "http://example.com/",
        "http://127.0.0.1.example.com/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/",
        "http://127.0.0.1@192.0.2.1/",
        "file:///etc/hostname",
        "ftp://127.0.0.1/",
        "https:///nowhere",
        "http://[::1",
        "http://127.0.0.1:port/",
        "nothing",
    ],
)
def test_a_token_is_not_sent_anywhere_else(store, endpoint, monkeypatch, address):
    monkeypatch.setenv(ADDRESS, address)
    error = refused(store, endpoint)
    assert error.kind == "denied"
    assert ADDRESS in str(error)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "localhost", *sorted(HOSTS)])
def test_hosts_without_tls_are_those_of_aws_and_this_machine(host):
    host = f"[{host}]" if ":" in host and "[" not in host else host
    url = container_credentials._checked(f"http://{host}:80/v1")
    assert url.hostname == host.strip("[]")
    assert container_credentials._checked("https://example.com/").scheme == "https"


@pytest.mark.parametrize("token", ["two\nlines", "two\r\nlines: x", "h\u00e9", "\0"])
def test_a_token_that_would_be_more_than_a_header_is_not_sent(
    store, endpoint, tmp_path, monkeypatch, token
):
    (tmp_path / "token").write_text(token, "utf-8")
    monkeypatch.setenv(TOKEN_FILE, str(tmp_path / "token"))
    assert "token for credentials is not one line" in str(refused(store, endpoint))
    assert endpoint.asked == 0


# -- when it is asked ----------------------------------------------------------------------------


def test_keys_in_the_environment_count_more(aws, store, endpoint, credentials, monkeypatch):
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    assert not Store(open_bucket(aws.bucket)).exists(NAME)
    assert endpoint.asked == 0


def test_keys_that_are_given_count_more(aws, store, endpoint):
    keys = {"access_key_id": aws.access_key_id, "secret_access_key": aws.secret_access_key}
    assert not Store(open_bucket(aws.bucket, **keys)).exists(NAME)
    assert endpoint.asked == 0


def test_nothing_is_said_of_what_they_are(store, endpoint):
    provider = ContainerCredentials(endpoint.variables())
    given = provider()
    assert given["access_key_id"] == endpoint.keys["AccessKeyId"]
    assert given["expires_at"].tzinfo is not None
    for text in (repr(provider), str(provider), repr(store.bucket)):
        assert not any(secret in text for secret in (endpoint.token, *endpoint.keys.values()))
    with pytest.raises(CredentialsError) as found:
        ContainerCredentials({})()
    assert ADDRESS in str(found.value)
