"""Settings: who wins, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dask
import pytest
import yaml

import dask_lambda
from dask_lambda import config
from dask_lambda.config import Settings, load_defaults
from dask_lambda.errors import ConfigurationError

ROOT = Path(config.__file__).parents[1]
DEFAULTS = yaml.safe_load((ROOT / "dask_lambda" / "dask_lambda.yaml").read_text("utf-8"))


@pytest.fixture(autouse=True)
def _defaults():
    with dask.config.set({"dask-lambda": DEFAULTS["dask-lambda"]}):
        yield


def test_the_defaults_are_valid_and_mean_the_embedded_aws():
    settings = Settings.resolve()
    assert settings.is_local
    assert settings.prefix == "dask-lambda"


def test_every_setting_has_a_default_in_the_file_and_the_other_way_round():
    names = {name.replace("-", "_") for name in DEFAULTS["dask-lambda"]}
    assert names == set(Settings.__slots__)


def test_dasks_configuration_wins_over_the_defaults_and_keywords_over_both():
    with dask.config.set({"dask-lambda.retries": 3, "dask-lambda.memory": 512}):
        assert Settings.resolve().retries == 3
        settings = Settings.resolve(retries=5)
        assert (settings.retries, settings.memory) == (5, 512)
    assert Settings.resolve().retries == 0


def test_dashes_and_underscores_mean_the_same():
    with dask.config.set({"dask_lambda.inline_bytes": 7}):
        assert Settings.resolve().inline_bytes == 7


def test_a_keyword_none_clears_a_setting():
    with dask.config.set({"dask-lambda.region": "eu-north-1"}):
        assert Settings.resolve(region=None).region is None


def test_what_the_user_has_set_survives_loading_the_defaults():
    with dask.config.set({"dask-lambda.retries": 3}):
        load_defaults()
        assert Settings.resolve().retries == 3


def test_environment_variables_and_files_are_read(tmp_path):
    (tmp_path / "mine.yaml").write_text("dask-lambda:\n  retries: 2\n  prefix: from-file\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DASK_CONFIG": str(tmp_path),
        "DASK_DASK_LAMBDA__PREFIX": "from-environment",
        "DASK_DASK_LAMBDA__CONCURRENCY": "17",
        "DASK_DASK_LAMBDA__PLAN": "none",  # which Dask reads as None
    }
    code = (
        "import dask_lambda; from dask_lambda.config import Settings; s = Settings.resolve(); "
        "print(s.retries, s.prefix, s.concurrency, s.plan)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["2", "from-environment", "17", "none"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("backend", "azure"),
        ("backend", None),
        ("plan", "clever"),
        ("function", ""),
        ("function", 5),
        ("bucket", ["b"]),
        ("region", 1),
        ("endpoint_url", b"http://x"),
        ("prefix", ""),
        ("prefix", None),
        ("prefix", "/a"),
        ("prefix", "a/"),
        ("concurrency", 0),
        ("concurrency", -1),
        ("concurrency", 2.5),
        ("concurrency", "8"),
        ("concurrency", True),
        ("inline_bytes", -1),
        ("inline_bytes", 4_000_001),
        ("inline_bytes", None),
        ("compression", "lzma"),
        ("memory", 127),
        ("memory", 10_241),
        ("memory", "1 GB"),
        ("timeout", 0),
        ("timeout", 901),
        ("timeout", 0.5),
        ("retries", -1),
        ("retries", None),
        ("retries", "many"),
        ("speculate", "x"),
        ("patience", -1),
        ("patience", "3m"),
        ("max_cost_usd", 0),
        ("max_seconds", True),
        ("larger_functions", "big"),
        ("larger_functions", {"3 GB": "big"}),
        ("modules", "mine"),
        ("modules", ["mine"]),
        ("modules", {"include": [3], "exclude": []}),
        ("modules", {"include": [], "exclude": [""]}),
        ("modules", {"include": [], "exclude": {"mine": 1}}),
        ("modules", {"include": [], "exclude": [], "only": []}),
        ("resume", 3),
        ("keep", "yes"),
    ],
)
def test_a_bad_value_is_refused_by_name_from_wherever_it_comes(name, value):
    dashed = f"dask-lambda.{name.replace('_', '-')}"
    with pytest.raises(ConfigurationError) as from_keyword:
        Settings.resolve(**{name: value})
    with dask.config.set({dashed: value}), pytest.raises(ConfigurationError) as from_dask:
        Settings.resolve()
    for info in (from_keyword, from_dask):
        assert dashed in str(info.value)
        assert repr(value) in str(info.value)
        assert "it must be" in str(info.value)
        assert isinstance(info.value, ValueError)


@pytest.mark.parametrize("size", [3008, "3008"])
def test_memory_sizes_may_be_texts_as_in_files_and_variables(size):
    settings = Settings.resolve(function="f", bucket="b", larger_functions={size: "big"})
    assert settings.larger_functions == {3008: "big"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inline_bytes", 0),
        ("inline_bytes", 4_000_000),
        ("memory", 128),
        ("memory", 10_240),
        ("timeout", 1),
        ("timeout", 900),
        ("concurrency", 1),
        ("concurrency", None),
        ("prefix", "a/b"),
    ],
)
def test_the_ends_of_each_range_are_allowed(name, value):
    assert getattr(Settings.resolve(**{name: value}), name) == value


def test_an_unknown_keyword_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ConfigurationError, match=r"unknown setting 'memroy'.*memory"):
        Settings.resolve(memroy=512)
    with pytest.raises(ConfigurationError, match="'memroy'"):
        dask_lambda.LambdaScheduler(memroy=512)


def test_a_function_and_a_bucket_mean_aws():
    assert not Settings.resolve(function="f", bucket="b").is_local
    assert Settings.resolve(function="f", bucket="b", backend="local").is_local
    assert not Settings.resolve(function="f", bucket="b", backend="aws").is_local


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({"backend": "aws"}, ["function", "bucket"]),
        ({"backend": "aws", "function": "f"}, ["bucket"]),
        ({"backend": "aws", "bucket": "b"}, ["function"]),
        ({"function": "f"}, ["bucket"]),
        ({"bucket": "b"}, ["function"]),
    ],
)
def test_half_of_an_aws_configuration_is_refused_and_the_other_half_is_named(given, missing):
    with pytest.raises(ConfigurationError) as info:
        Settings.resolve(**given)
    for name in missing:
        assert f"dask-lambda.{name}" in str(info.value)


def test_an_unknown_keyword_of_compute_is_refused_before_anything_starts():
    x = dask.delayed(int)("5")
    with pytest.raises(ConfigurationError, match="'memory'"):
        x.compute(scheduler=dask_lambda.LambdaScheduler(), memory=512)


def test_a_keyword_of_compute_that_resembles_a_setting_is_pointed_out(caplog):
    dsk = {"x": 1}
    scheduler = dask_lambda.LambdaScheduler()
    assert scheduler.get(dsk, "x", max_cost=1, num_workers=4) == 1
    assert "'max_cost'" in caplog.text
    assert "max_cost_usd" in caplog.text
    assert "num_workers" not in caplog.text


def test_a_misspelt_name_in_dasks_configuration_is_refused():
    with (
        dask.config.set({"dask-lambda.inline-byte": 0}),
        pytest.raises(ConfigurationError, match="'inline_byte'.*inline_bytes"),
    ):
        Settings.resolve()


def test_compression_needs_its_package(monkeypatch):
    assert Settings.resolve(compression="zstd").compression == "zstd"
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="pip install zstandard"):
        Settings.resolve(compression="zstd")
    assert Settings.resolve().compression == "none"


def test_what_travels_may_be_one_name_some_or_none():
    modules = {"include": "a.b", "exclude": ("c", "d/*")}
    assert Settings.resolve(modules=modules).modules == {
        "include": ["a.b"],
        "exclude": ["c", "d/*"],
    }
    for nothing in (None, {}, {"exclude": None}):
        assert Settings.resolve(modules=nothing).modules == {"include": [], "exclude": []}


@pytest.mark.parametrize("name", ["no module", "a/b", "../a", "a.", ""])
def test_only_a_name_can_be_included(name):
    with pytest.raises(ConfigurationError, match=r"dask-lambda.modules"):
        Settings.resolve(modules={"include": [name]})
    with pytest.raises(ConfigurationError, match=r"dask-lambda.modules.include"):
        config.modules.include(name)


def test_of_two_words_about_a_module_the_later_counts():
    config.modules.include("one", "two")
    config.modules.exclude("two", "three/*", config)
    config.modules.include("three", "one")
    found = Settings.resolve().modules
    assert found == {"include": ["one", "three"], "exclude": ["two", "three/*", config.__name__]}
    assert str(found) in repr(config.modules)
