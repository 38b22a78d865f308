"""Credentials that expire in the middle of a run are looked for anew, and the run goes on."""

from __future__ import annotations

import asyncio
import configparser
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from botocore.credentials import Credentials as Botocore
from botocore.credentials import RefreshableCredentials
from botocore.exceptions import UnauthorizedSSOTokenError
from dask import delayed
from obstore.store import S3Store

from dask_lambda import LambdaScheduler, credentials
from dask_lambda.credentials import Credentials
from dask_lambda.errors import AccessDeniedError
from dask_lambda.local import LocalAWS
from lambda_worker.errors import StoreError
from lambda_worker.store import Store, open_bucket
from tests.faults.proxy import EXPIRED, EXPIRED_TOKEN, Action, Proxy, Request, s3_error
from tests.helpers import report

uses_bucket = True

Connect = Callable[..., LambdaScheduler]


class Expiring(Proxy):
    """An AWS for which some credentials have expired.

    Attributes
    ----------
    expired : set of str
        Access keys.
    refused : list of str
        Kinds of the requests that came with one of them.
    """

    def __init__(self, upstream: str):
        super().__init__(upstream)
        self.expired: set[str] = set()
        self.refused: list[str] = []
        self.when_refused: Callable[[], None] = lambda: None

    async def _act(self, received: Any, request: Request, action: Action) -> Any:
        if any(key in received.headers.get("Authorization", "") for key in self.expired):
            self.refused.append(request.kind)
            self.when_refused()
            action = EXPIRED if request.kind in ("invoke", "check") else EXPIRED_TOKEN
        return await super()._act(received, request, action)


@pytest.fixture
def proxy(aws: LocalAWS) -> Iterator[Expiring]:
    with Expiring(aws.endpoint_url) as running:
        yield running


@pytest.fixture
def log_in(aws: LocalAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """``log_in()``: get temporary credentials and write them to the shared file; their key."""
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def log_in() -> str:
        found = aws.client("sts").get_session_token()["Credentials"]
        config = configparser.ConfigParser()
        config["default"] = {
            "aws_access_key_id": found["AccessKeyId"],
            "aws_secret_access_key": found["SecretAccessKey"],
            "aws_session_token": found["SessionToken"],
        }
        with file.open("w") as stream:
            config.write(stream)
        return str(found["AccessKeyId"])

    return log_in


@pytest.fixture
def logged_in(
    proxy: Expiring, connect: Connect, log_in: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> LambdaScheduler:
    """A scheduler whose credentials are in the shared file alone."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return connect(endpoint_url=proxy.url, plan="none")


def inc(x: Any) -> Any:
    return x + 1


@pytest.mark.local
def test_a_process_of_this_machine_looks_for_new_credentials_too(
    proxy: Expiring,
    logged_in: LambdaScheduler,
    log_in: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(credentials, "REFRESH_SECONDS", 0.0)
    old = log_in()
    new: list[str] = []

    def when_refused() -> None:
        if not new:
            new.append(log_in())

    with dask.annotate(where="local"):
        first, second = delayed(inc)(1), delayed(inc)(2)
    assert first.compute(scheduler=logged_in, inline_bytes=0) == 2  # by the process that goes on
    proxy.when_refused, proxy.expired = when_refused, {old}
    assert second.compute(scheduler=logged_in, inline_bytes=0) == 3
    assert proxy.refused[0] == "put"
    assert report().retries == 1


@pytest.mark.local
@pytest.mark.parametrize("inline_bytes", [0, 65536], ids=["through s3", "inline"])
def test_a_run_goes_on_with_credentials_that_were_written_meanwhile(
    proxy: Expiring,
    logged_in: LambdaScheduler,
    log_in: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    inline_bytes: int,
) -> None:
    monkeypatch.setattr(credentials, "REFRESH_SECONDS", 0.05)
    old = log_in()
    assert delayed(inc)(1).compute(scheduler=logged_in) == 2
    total = delayed(np.sum)([delayed(inc)(np.arange(10_000) + i) for i in range(4)])
    expected = total.compute(scheduler="sync")
    proxy.expired = {old}
    new: list[str] = []

    def when_refused() -> None:
        if len(proxy.refused) == 3 and not new:  # only after some tries in vain
            new.append(log_in())

    proxy.when_refused = when_refused
    found = total.compute(scheduler=logged_in, inline_bytes=inline_bytes, optimize_graph=False)
    assert found == expected
    assert new
    assert new[0] != old
    assert "invoke" in proxy.refused
    assert not report().failed


@pytest.mark.local
def test_a_result_waits_for_new_credentials(
    proxy: Expiring,
    logged_in: LambdaScheduler,
    log_in: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(credentials, "REFRESH_SECONDS", 0.05)
    old = log_in()
    kept = delayed(np.arange)(10_000).persist(scheduler=logged_in)
    proxy.expired = {old}
    proxy.when_refused = lambda: len(proxy.refused) == 2 and log_in()
    x = delayed(inc)(kept)
    assert x.compute(scheduler=logged_in, inline_bytes=0)[-1] == 10_000
    assert proxy.refused


@pytest.mark.local
def test_credentials_that_stay_expired_are_an_error_that_says_how_to_log_in(
    proxy: Expiring,
    logged_in: LambdaScheduler,
    log_in: Callable[[], str],
) -> None:
    old = log_in()
    assert delayed(inc)(1).compute(scheduler=logged_in) == 2
    proxy.expired = {old}
    with pytest.raises(
        AccessDeniedError, match=r"have expired.*lambda:InvokeFunction.*Log in again"
    ):
        delayed(inc)(1).compute(scheduler=logged_in, patience=1)
    assert proxy.refused


# -- the source ----------------------------------------------------------------------------------


def test_credentials_are_looked_for_anew_when_they_are_refreshed() -> None:
    found = iter([Botocore("AK1", "one"), Botocore("AK2", "two", "token")])
    source = Credentials(lambda: next(found))
    assert source.get_frozen_credentials().access_key == source()["access_key_id"] == "AK1"
    source.refresh()
    assert source.get_frozen_credentials().access_key == "AK2"
    given = source()
    assert (given["access_key_id"], given["secret_access_key"], given["token"]) == (
        "AK2",
        "two",
        "token",
    )


def test_many_that_refresh_at_once_look_once() -> None:
    looked = []

    def find() -> Botocore:
        looked.append(1)
        return Botocore("AK", "secret")

    source = Credentials(find)
    for _ in range(20):
        source.refresh()
    assert len(looked) == 2


def test_credentials_that_are_not_found_again_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "REFRESH_SECONDS", 0.0)
    found = iter([Botocore("AK", "secret"), None])
    source = Credentials(lambda: next(found))
    source.refresh()  # None
    source.refresh()  # StopIteration, as any error of a file that is being written
    assert source.get_frozen_credentials().access_key == "AK"


def test_no_credentials_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(AccessDeniedError, match=r"log in.*AWS_PROFILE.*'local'"):
        Credentials(lambda: None)


def test_credentials_are_not_shown() -> None:
    assert "AK" not in repr(Credentials(lambda: Botocore("AK", "secret")))


def test_what_botocore_cannot_renew_is_expired_for_s3() -> None:
    class Session:
        def get_frozen_credentials(self) -> Any:
            raise UnauthorizedSSOTokenError

    bucket: S3Store = open_bucket(
        "bucket",
        endpoint_url="http://127.0.0.1:9",
        region="us-east-1",
        credential_provider=Credentials(Session),
    )
    with pytest.raises(StoreError, match="SSO") as info:
        Store(bucket).get("0/prefix/run/x", 10)
    assert info.value.kind == "expired"


@pytest.mark.local
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "ExpiredToken"),
        (400, "InvalidToken"),
        (403, "InvalidAccessKeyId"),
        (403, "RequestTimeTooSkewed"),
    ],
)
@pytest.mark.parametrize("kind", ["get", "put", "list", "delete"])
def test_s3s_words_for_expired_credentials_are_understood(
    aws: LocalAWS, proxy: Expiring, kind: str, status: int, code: str
) -> None:
    bucket = open_bucket(
        aws.bucket,
        endpoint_url=proxy.url,
        region=aws.region,
        access_key_id=aws.access_key_id,
        secret_access_key=aws.secret_access_key,
    )
    store = Store(bucket)

    async def list_all() -> list[str]:
        return [name async for name in store.list_async("0/prefix/")]

    requests: dict[str, Callable[[], Any]] = {
        "get": lambda: store.get("0/prefix/run/x", 10),
        "put": lambda: store.put_new("0/prefix/run/x", b"x"),
        "list": lambda: asyncio.run(list_all()),
        "delete": lambda: asyncio.run(store.delete_async(["0/prefix/run/x"])),
    }
    proxy.plan(**{kind: [s3_error(status, code, "in S3's words")]})
    with pytest.raises(StoreError, match="in S3's words") as info:
        requests[kind]()
    assert info.value.kind == "expired"


def test_credentials_that_have_to_be_renewed_are_not_at_hand() -> None:
    def fetch() -> dict[str, str]:
        later = datetime.now(UTC) + timedelta(hours=1)
        return {
            "access_key": "a",
            "secret_key": "b",
            "token": "c",
            "expiry_time": later.isoformat(),
        }

    soon = {**fetch(), "expiry_time": (datetime.now(UTC) + timedelta(seconds=30)).isoformat()}
    source = RefreshableCredentials.create_from_metadata(soon, fetch, "test")
    credentials = Credentials(lambda: source)
    assert not credentials.at_hand
    assert credentials.get_frozen_credentials().access_key == "a"
    assert credentials.at_hand
    assert Credentials(lambda: Botocore("a", "b")).at_hand


def test_aws_region_is_read_as_awss_other_tools_read_it(
    connect: Connect, aws: LocalAWS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REGION", aws.region)
    assert delayed(abs)(-1).compute(scheduler=connect(region=None)) == 1
