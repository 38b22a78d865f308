"""The worker's packages: which differences from the client's are refused, and who says so."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dask import delayed
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_lambda import failures
from dask_lambda.errors import VersionMismatchError
from dask_lambda.replies import NotAReply, check
from lambda_worker import environment, handler, protocol
from lambda_worker.environment import Deployed, Packages, compare, find_deployed, preimport

uses_bucket = True

DEPLOYED = Deployed(
    "0123",
    {"numpy": "2.4.6", "pandas": "3.1.1", "tornado": "6.6.1", "mylab": "0.3.1", "odd": "main"},
    frozenset({"numpy", "pandas", "mylab", "odd"}),
)
CONTEXT = SimpleNamespace(memory_limit_in_mb="1769", aws_request_id="41d0")

# -- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "refused", "warned"),
    [
        ({"numpy": "2.4.6"}, [], []),
        ({"numpy": "2.4.5"}, [], ["numpy"]),
        ({"numpy": "2.3.6"}, ["numpy"], []),
        ({"numpy": "1.4.6"}, ["numpy"], []),
        ({"pandas": "3.1"}, [], ["pandas"]),
        ({"pandas": "3.1.1rc1"}, [], ["pandas"]),
        ({"pandas": "3.2.0.dev0"}, ["pandas"], []),
        ({"mylab": "0.4.0"}, ["mylab"], []),
        ({"tornado": "6.6.9"}, [], []),
        ({"tornado": "6.5.0"}, [], ["tornado"]),
        ({"absent": "1.0"}, [], []),
        ({"odd": "main"}, [], []),
        ({"odd": "other"}, ["odd"], []),
        ({"numpy": None, "pandas": ["3"]}, [], []),
        ({}, [], []),
    ],
)
def test_what_was_listed_must_be_of_the_same_series(client, refused, warned):
    found = compare(DEPLOYED, client)
    assert list(found.refused) == refused
    assert list(found.warned) == warned


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*DEPLOYED.packages, "absent"]), st.text(max_size=12)))
def test_any_text_may_be_a_version(client):
    found = compare(DEPLOYED, client)
    assert not set(found.refused) & set(found.warned)
    for name, (ours, theirs) in {**found.refused, **found.warned}.items():
        assert ours == DEPLOYED.packages[name] != theirs == client[name]


def test_a_worker_that_was_built_from_nobodys_environment_compares_nothing():
    assert not Packages(None).differences({"numpy": "1.0"}).refused


def test_a_second_client_is_compared_after_the_first():
    packages = Packages(DEPLOYED)
    assert packages.differences({"numpy": "2.3"}).refused
    assert not packages.differences({"numpy": "2.4.6"}).refused
    assert packages.differences({"numpy": "2.3"}).refused
    assert not packages.differences("numpy").refused


def test_the_file_is_found_beside_the_packages(tmp_path):
    (tmp_path / environment.FILE).write_text(DEPLOYED.to_json())
    assert find_deployed(["/not/there", __file__, str(tmp_path)]) == DEPLOYED
    assert find_deployed(["/not/there"]) is None


def test_what_is_imported_is_named_as_its_package_with_its_version():
    import yaml

    found = environment.imported()
    assert found["numpy"] == np.__version__
    assert found["pyyaml"] == yaml.__version__
    assert "json" not in found
    assert set(map(environment.normal_name, found)) == set(found)


def test_a_later_import_is_noticed(tmp_path, monkeypatch):
    assert "some-package" not in environment.imported()
    (tmp_path / "some_package.py").write_text("")
    (tmp_path / "Some_Package-1.5.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: Some_Package\nVersion: 1.5\n"
    (tmp_path / "Some_Package-1.5.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    import some_package  # noqa: F401

    assert environment.imported()["some-package"] == "1.5"
    del sys.modules["some_package"]


def test_modules_are_imported_early_and_a_missing_one_is_no_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    monkeypatch.setattr(sys, "stdout", sys.__stderr__)
    failed = preimport(" this,not_there_at_all ,, json")
    assert "this" in sys.modules
    assert list(failed) == ["not_there_at_all"]
    assert "No module named" in failed["not_there_at_all"]


# -- in the function -----------------------------------------------------------------------------


@pytest.fixture
def deployed(monkeypatch):
    fresh = handler.Environment()
    fresh.packages = Packages(DEPLOYED)
    monkeypatch.setattr(handler, "environment", fresh)


def call(packages: Any) -> dict[str, Any]:
    event = protocol.Request("r", {"r": b"s" * 32}, "bucket", 0, []).to_json()
    return json.loads(json.dumps(handler.handler({**event, "packages": packages}, CONTEXT)))


@pytest.mark.usefixtures("deployed")
def test_the_function_refuses_another_series_before_it_reads_the_request():
    reply = call({"numpy": "2.3.1", "pandas": "3.1.1"})
    assert reply["refused"]["packages"] == {"numpy": ["2.4.6", "2.3.1"]}
    assert reply["environment"] == "0123"
    assert "groups" not in reply
    check(reply)
    text = str(failures.to_exception(failures.from_refusal(reply["refused"]), "x", {}))
    assert "numpy: worker 2.4.6, client 2.3.1" in text
    assert "pandas" not in text
    assert "'dask-lambda deploy'" in text
    assert "'python -m pip install numpy==2.4.6'" in text


@pytest.mark.usefixtures("deployed")
def test_the_function_tells_of_smaller_differences_and_goes_on():
    reply = call({"numpy": "2.4.1"})
    assert reply["differing"] == {"numpy": ["2.4.6", "2.4.1"]}
    assert "refused" not in reply
    text = failures.describe_differing("f", reply["differing"])
    assert "'f'" in text
    assert "numpy: worker 2.4.6, client 2.4.1" in text


@pytest.mark.usefixtures("deployed")
@pytest.mark.parametrize("packages", [None, [], "numpy", 3, {"numpy": {}}])
def test_packages_that_make_no_sense_are_answered(packages):
    check(call(packages))


@pytest.mark.parametrize(
    "changes",
    [
        {"differing": []},
        {"differing": {"numpy": "2"}},
        {"differing": {"numpy": ["2"]}},
        {"differing": {"numpy": ["2", 3]}},
        {"refused": {"packages": {"numpy": [1, 2]}}},
        {"environment": 3},
    ],
)
def test_a_reply_with_other_things_in_place_of_versions_is_no_reply(changes):
    reply = {"memory_mb": 1769, "milliseconds": 1.0, "cold": True, "groups": []}
    check(reply)
    with pytest.raises(NotAReply):
        check({**reply, **changes})


# -- over the embedded AWS -----------------------------------------------------------------------


def with_numpy(version: str) -> dict[str, str]:
    deployed = Deployed("4567", {"numpy": version}, frozenset({"numpy"}))
    return {environment.FILE: deployed.to_json()}


@pytest.mark.local
def test_a_run_is_refused_by_a_function_with_another_numpy(
    deploy: Callable[..., str], connect: Callable[..., Any]
) -> None:
    function = deploy(with_numpy("1.0.0"))
    with pytest.raises(VersionMismatchError, match=f"numpy: worker 1.0.0, client {np.__version__}"):
        delayed(sum)([1, 2]).compute(scheduler=connect(function=function))


@pytest.mark.local
def test_a_run_is_done_and_warned_once_by_a_function_with_another_patch_of_numpy(
    deploy: Callable[..., str],
    connect: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    series = ".".join(np.__version__.split(".")[:2])
    function = deploy(with_numpy(f"{series}.999"))
    scheduler = connect(function=function)
    with caplog.at_level(logging.WARNING, "dask_lambda"):
        for _ in range(2):
            assert delayed(sum)([1, 2]).compute(scheduler=scheduler) == 3
    (said,) = [r.getMessage() for r in caplog.records if "other versions" in r.getMessage()]
    assert f"worker {series}.999, client {np.__version__}" in said
