"""A wrong function, wrong settings and wrong graphs are refused with a clear error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import pytest
from dask import delayed
from dask._task_spec import Alias, Task, TaskRef

from dask_lambda import LambdaScheduler, lambda_get
from dask_lambda.errors import (
    AccessDeniedError,
    BucketNotFoundError,
    ConfigurationError,
    CyclicGraphError,
    DaskLambdaError,
    FunctionNotFoundError,
    InvocationError,
    MissingKeyError,
    VersionMismatchError,
)
from tests.helpers import notes, report, shown

pytestmark = pytest.mark.local
uses_bucket = True

Connect = Callable[..., LambdaScheduler]
Deploy = Callable[..., str]


def inc(x: Any) -> Any:
    return x + 1


# -- the wrong function --------------------------------------------------------------------------

OTHER_VERSION = """
from lambda_worker import protocol
protocol._versions = {"python": "2.7", "dask": "0.1"}
from lambda_worker.handler import handler
"""

FOREIGN = """
import sys

def handler(event, context):
    print("invoked", file=sys.stderr, flush=True)
    return {"hello": 1}
"""

CANNOT_START = """
import a_package_that_is_not_there
"""

WRONG_TYPE = FOREIGN.replace('{"hello": 1}', '"hello"')
FAILS = FOREIGN.replace('return {"hello": 1}', "raise ValueError('not ours')")


def test_a_worker_of_another_version_is_refused_with_both_versions(
    deploy: Deploy, connect: Connect
) -> None:
    function = deploy({"other_version.py": OTHER_VERSION}, "other_version.handler")
    with pytest.raises(VersionMismatchError) as caught:
        delayed(inc)(1).compute(scheduler=connect(function=function))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"worker 2.7, client {python}" in str(caught.value)
    assert f"worker 0.1, client {dask.__version__}" in str(caught.value)
    assert "eploy" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (FOREIGN, "hello"),
        (WRONG_TYPE, "hello"),
        (FAILS, "not ours"),
        (CANNOT_START, "a_package_that_is_not_there"),
    ],
    ids=["another reply", "a text", "an exception", "cannot start"],
)
def test_a_function_that_is_not_ours_is_named(
    deploy: Deploy, connect: Connect, source: str, text: str
) -> None:
    function = deploy({"foreign.py": source}, "foreign.handler")
    with pytest.raises(InvocationError, match=text):
        delayed(inc)(1).compute(scheduler=connect(function=function))


# -- the wrong settings --------------------------------------------------------------------------


def test_a_function_that_does_not_exist_is_named(connect: Connect) -> None:
    with pytest.raises(FunctionNotFoundError, match=r"'not-there'.*us-east-1"):
        delayed(inc)(1).compute(scheduler=connect(function="not-there"))


def test_a_bucket_that_does_not_exist_is_named(connect: Connect) -> None:
    with pytest.raises(BucketNotFoundError, match="not-there"):
        delayed(inc)(1).compute(scheduler=connect(bucket="not-there"))


def test_without_credentials_the_error_says_so(connect: Connect, monkeypatch: Any) -> None:
    scheduler = connect()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match="credentials"):
        delayed(inc)(1).compute(scheduler=scheduler)


def test_wrong_credentials_are_denied(connect: Connect, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "999999999999")
    with pytest.raises(AccessDeniedError, match="lambda:InvokeFunction"):
        delayed(inc)(1).compute(scheduler=connect())


def test_a_profile_that_does_not_exist_is_named(connect: Connect, monkeypatch: Any) -> None:
    monkeypatch.setenv("AWS_PROFILE", "not-there")
    with pytest.raises(DaskLambdaError, match="not-there"):
        delayed(inc)(1).compute(scheduler=connect())


@pytest.mark.parametrize("region", [None, "not a region"])
def test_a_missing_or_malformed_region_is_an_error(connect: Connect, region: Any) -> None:
    with pytest.raises(ConfigurationError, match="region"):
        delayed(inc)(1).compute(scheduler=connect(region=region))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://"])
def test_an_endpoint_where_nobody_listens_is_an_error(connect: Connect, url: str) -> None:
    started = time.monotonic()
    with pytest.raises(DaskLambdaError):
        delayed(inc)(1).compute(scheduler=connect(endpoint_url=url))
    assert time.monotonic() - started < 20


def test_settings_are_checked(connect: Connect) -> None:
    for wrong in ({"concurrency": 0}, {"inline_bytes": -1}, {"timeout": 901}, {"backend": "x"}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong)).replace("_", "-")):
            delayed(inc)(1).compute(scheduler=connect(**wrong))
    with pytest.raises(ConfigurationError, match="'sizes'"):
        LambdaScheduler(sizes=1)
    with pytest.raises(ConfigurationError, match="'timeout' cannot be set for one computation"):
        delayed(inc)(1).compute(scheduler=lambda_get, timeout=1)
    with (
        dask.config.set({"dask-lambda.function": "f"}),
        pytest.raises(ConfigurationError, match=r"dask-lambda\.bucket"),
    ):
        delayed(inc)(1).compute(scheduler=lambda_get)


# -- bad input -----------------------------------------------------------------------------------


def test_an_empty_graph_and_no_keys_are_fine() -> None:
    assert lambda_get({}, []) == ()
    assert lambda_get({"a": (inc, 1)}, []) == ()
    assert lambda_get({"a": (inc, 1)}, [[], [[]]]) == dask.get({"a": (inc, 1)}, [[], [[]]])
    assert report().invocations == 0


def test_a_key_that_is_missing_is_named() -> None:
    with pytest.raises(MissingKeyError, match="'b' was requested"):
        lambda_get({"a": (inc, 1)}, "b")
    with pytest.raises(KeyError, match="'b'"):
        lambda_get({"a": (inc, 1)}, ["a", ["b"]])
    with pytest.raises(KeyError):
        lambda_get({}, "a")


def test_a_dependency_that_is_missing_is_named() -> None:
    with pytest.raises(MissingKeyError, match=r"'b' is read by task \('a', 0\)"):
        lambda_get({("a", 0): Task(("a", 0), inc, TaskRef("b"))}, ("a", 0))
    with pytest.raises(MissingKeyError, match="'b' is read by task 'a'"):
        lambda_get({"a": Alias("a", "b")}, "a")


@pytest.mark.parametrize(
    "dsk",
    [
        {"a": (inc, "b"), "b": (inc, "a")},
        {"a": (inc, "a")},
        {"a": "b", "b": "a"},
        {"a": "b", "b": (inc, "c"), "c": "a"},
        {"a": (inc, "b"), "b": [(inc, "c")], "c": "b"},
    ],
    ids=shown,
)
def test_a_cycle_is_an_error(dsk: Any) -> None:
    with pytest.raises(CyclicGraphError, match="Cycle"):
        lambda_get(dsk, "a")


@pytest.mark.parametrize(
    "key",
    [
        "x" * 10_000,
        ("x" * 5_000, 1, "y" * 5_000),
        7,
        -1.5,
        b"bytes",
        ("tuple", 1, 2.0, b"x"),
        "ключ/?#%00 \n\t\x00😀\ud800",
        "../../escape",
        "",
    ],
    ids=["long", "long tuple", "int", "float", "bytes", "tuple", "odd text", "path", "empty"],
)
def test_keys_may_be_anything_that_dask_takes(key: Any) -> None:
    dsk = {key: (np.full, 10, 2.0), "last": Task("last", np.sum, TaskRef(key))}
    scheduler = LambdaScheduler(inline_bytes=0)
    assert lambda_get(dsk, "last") == 20
    assert scheduler.get(dsk, ["last", key])[1].sum() == 20
    scheduler.close()
    with pytest.raises(ZeroDivisionError) as caught:
        lambda_get({key: (lambda: 1 / 0,)}, key)
    assert len(notes(caught.value)) < 5000


def test_keys_that_print_alike_are_not_mixed_up() -> None:
    dsk = {1: (inc, 11), "1": (inc, 12), ("1",): (inc, 13), (1,): (inc, 14), b"1": (inc, 15)}
    for inline_bytes in (0, 1000):
        with LambdaScheduler(inline_bytes=inline_bytes) as scheduler:
            assert scheduler.get(dsk, list(dsk)) == dask.get(dsk, list(dsk))
