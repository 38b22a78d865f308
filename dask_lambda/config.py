"""Settings: defaults, Dask's configuration, keywords.  May import: dask.config, cost, errors.

Later wins: ``dask_lambda.yaml``, the user's Dask configuration (files, ``DASK_DASK_LAMBDA__...``
variables, ``dask.config.set``) under ``dask-lambda:``, and keywords of the classes, in which a
dash is an underscore.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib import resources
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import dask.config
import yaml

from dask_lambda.cost import ARCHITECTURES, PRICED, Architecture
from dask_lambda.errors import ConfigurationError

#: Lambda quotas.
MAX_TIMEOUT = 900
MIN_MEMORY, MAX_MEMORY = 128, 10_240
#: Concurrent executions of an account by default (Lambda quotas).
DEFAULT_CONCURRENCY = 1000

#: Where tasks run that do not run on Lambda, unless it is an executor of the user's.
EXECUTORS = ("auto", "processes", "none")

#: Dask reads "none" in an environment variable as None.
NONE_IS_A_WORD = ("plan", "compression", "local_executor")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one scheduler; see ``dask_lambda.yaml`` for what each means."""

    backend: str
    function: str | None
    bucket: str | None
    prefix: str
    region: str | None
    endpoint_url: str | None
    concurrency: int | None
    inline_bytes: int
    compression: Literal["none", "zstd"]
    plan: Literal["auto", "none"]
    memory: int
    timeout: int
    retries: int
    speculate: bool
    patience: float
    max_cost_usd: float | None
    max_seconds: float | None
    prices: dict[str, float]
    architecture: Architecture | None
    larger_functions: dict[int, str]
    default_task_seconds: dict[str, float]
    modules: dict[str, list[str]]
    local_executor: Any
    resume: str | None
    keep: bool

    @classmethod
    def resolve(cls, **overrides: Any) -> Settings:
        """Read the configuration as it is now.

        Raises
        ------
        ConfigurationError
            For an unknown name, or a value of the wrong type or out of range.
        """
        names = cls.names()
        check_names(overrides)
        check_names(name.replace("-", "_") for name in dask.config.get("dask-lambda", {}))
        values = {n: dask.config.get(f"dask-lambda.{n.replace('_', '-')}", None) for n in names}
        values.update(overrides)
        for name in NONE_IS_A_WORD:
            values[name] = "none" if values[name] is None else values[name]
        values["larger_functions"] = _by_size(values["larger_functions"])
        values["prices"] = _underscored(values["prices"])
        values["modules"] = _lists(values["modules"])
        settings = cls(**values)
        settings._validate()
        return settings

    def _validate(self) -> None:
        _choice("backend", self.backend, ("auto", "local", "aws"))
        _choice("plan", self.plan, ("auto", "none"))
        _choice("compression", self.compression, ("none", "zstd"))
        _check(
            "local_executor",
            self.local_executor,
            f"one of {', '.join(map(repr, EXECUTORS))}, or an executor: an object with submit()",
            lambda v: v in EXECUTORS if isinstance(v, str) else callable(getattr(v, "submit", 0)),
        )
        if self.compression == "zstd" and find_spec("zstandard") is None:
            raise ConfigurationError(
                "dask-lambda.compression is 'zstd', but the package 'zstandard' is not installed: "
                "'pip install zstandard', and then 'dask-lambda deploy'"
            )
        for name in ("function", "bucket", "region", "endpoint_url"):
            _check(name, getattr(self, name), "text", lambda v: v is None or _is_name(v))
        _check(
            "prefix",
            self.prefix,
            "text without slashes at its ends",
            lambda v: _is_name(v) and v.strip("/") == v,
        )
        _check("concurrency", self.concurrency, "1 or more", lambda v: v is None or _int(v, 1))
        _check("inline_bytes", self.inline_bytes, "0 to 4,000,000", lambda v: _int(v, 0, 4_000_000))
        memory = f"{MIN_MEMORY} to {MAX_MEMORY} (MB)"
        _check("memory", self.memory, memory, lambda v: _int(v, MIN_MEMORY, MAX_MEMORY))
        timeout = f"1 to {MAX_TIMEOUT} (seconds)"
        _check("timeout", self.timeout, timeout, lambda v: _int(v, 1, MAX_TIMEOUT))
        _check("retries", self.retries, "0 or more", lambda v: _int(v, 0))
        _check("speculate", self.speculate, "true or false", lambda v: isinstance(v, bool))
        _check("patience", self.patience, "a number of seconds, 0 or more", _seconds)
        for name in ("max_cost_usd", "max_seconds"):
            value = getattr(self, name)
            _check(name, value, "a number above 0", lambda v: v is None or (_seconds(v) and v))
        _check(
            "prices",
            self.prices,
            f"a mapping of {', '.join(name.replace('_', '-') for name in PRICED)} to US dollars",
            lambda v: (
                isinstance(v, dict) and set(v) <= set(PRICED) and all(map(_price, v.values()))
            ),
        )
        _check(
            "architecture",
            self.architecture,
            f"one of {', '.join(map(repr, ARCHITECTURES))}, or null",
            lambda v: v is None or v in ARCHITECTURES,
        )
        _check(
            "larger_functions",
            self.larger_functions,
            "a mapping of memory sizes (MB) to names of functions",
            lambda v: (
                isinstance(v, dict)
                and all(_int(size, MIN_MEMORY, MAX_MEMORY) for size in v)
                and all(map(_is_name, v.values()))
            ),
        )
        if self.larger_functions and self.is_local:
            raise ConfigurationError(
                "dask-lambda.larger-functions is set, but the embedded AWS has one function: set "
                "dask-lambda.function and dask-lambda.bucket as well, or use dask-lambda.memory"
            )
        _check(
            "default_task_seconds",
            self.default_task_seconds,
            "a mapping of key prefixes to seconds",
            lambda v: isinstance(v, dict) and all(_seconds(each) for each in v.values()),
        )
        _check(
            "modules",
            self.modules,
            "a mapping of 'include' and 'exclude' to lists of names",
            lambda v: (
                isinstance(v, dict)
                and v.keys() == {"include", "exclude"}
                and all(isinstance(names, list) for names in v.values())
                and all(_is_name(name) for names in v.values() for name in names)
            ),
        )
        for name in self.modules["include"]:
            _check("modules.include", name, "the name of a module", _is_dotted)
        _check("resume", self.resume, "a name, or null", lambda v: v is None or _is_name(v))
        _check("keep", self.keep, "true or false", lambda v: isinstance(v, bool))
        if self.backend == "aws" and not (self.function and self.bucket):
            missing = [n for n in ("function", "bucket") if not getattr(self, n)]
            raise ConfigurationError(
                f"dask-lambda.backend is 'aws', but {' and '.join(missing)} not set; set "
                + " and ".join(f"dask-lambda.{n}" for n in missing)
                + ", or run 'dask-lambda deploy', which does"
            )
        if self.backend == "auto" and bool(self.function) != bool(self.bucket):
            there, not_there = ("function", "bucket") if self.function else ("bucket", "function")
            raise ConfigurationError(
                f"dask-lambda.{there} is set but dask-lambda.{not_there} is not: set both for "
                "AWS, none for the embedded one"
            )

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all settings."""
        return [field.name for field in fields(cls)]

    @property
    def is_local(self) -> bool:
        """Whether the embedded AWS is meant."""
        return self.backend == "local" or (self.backend == "auto" and not self.function)


def load_defaults() -> None:
    """Merge ``dask_lambda.yaml`` into Dask's configuration; what the user set stays."""
    text = resources.files("dask_lambda").joinpath("dask_lambda.yaml").read_text("utf-8")
    dask.config.update_defaults(yaml.safe_load(text))


def check_names(given: Iterable[str]) -> None:
    """Refuse names that are not settings."""
    names = Settings.names()
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ConfigurationError(
            f"unknown setting {', '.join(map(repr, unknown))}; settings are {', '.join(names)}"
        )


def _by_size(functions: Any) -> Any:
    """Make numbers of memory sizes: Dask's configuration files can have texts only as names."""
    if not isinstance(functions, dict):
        return functions
    return {
        int(size) if isinstance(size, str) and size.isdecimal() else size: function
        for size, function in functions.items()
    }


def _underscored(prices: Any) -> Any:
    """Have names with dashes mean those with underscores; none is none."""
    if not isinstance(prices, dict | None):
        return prices
    return {
        name.replace("-", "_") if isinstance(name, str) else name: price
        for name, price in (prices or {}).items()
    }


def _lists(modules: Any) -> Any:
    """Complete what travels: one name is as good as a list of it, and none is none."""
    if not isinstance(modules, dict | None):
        return modules
    given = {"include": None, "exclude": None, **(modules or {})}
    return {
        key: [names]
        if isinstance(names, str)
        else list(names or ())
        if isinstance(names, list | tuple | set | None)
        else names
        for key, names in given.items()
    }


def _is_dotted(value: Any) -> bool:
    return isinstance(value, str) and all(part.isidentifier() for part in value.split("."))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _int(value: Any, low: int, high: int | None = None) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and value >= low and (high is None or value <= high)


def _seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _price(value: Any) -> bool:
    return _seconds(value) and value < float("inf")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    _check(name, value, "one of " + ", ".join(map(repr, choices)), lambda v: v in choices)


def _check(name: str, value: Any, expected: str, good: Any) -> None:
    if not good(value):
        raise ConfigurationError(
            f"dask-lambda.{name.replace('_', '-')} is {value!r}; it must be {expected}"
        )


class Modules:
    """Which of the user's own modules travel with the tasks: ``dask_lambda.config.modules``.

    Modules and packages that are not installed travel by themselves, as far as tasks mention them
    before they run.  What is set here is ``dask-lambda.modules`` in Dask's configuration, for all
    later computations; of two words about one name the later counts.
    """

    def include(self, *modules: str | ModuleType) -> None:
        """Have modules travel in any case, such as those that tasks import by a computed name.

        Parameters
        ----------
        *modules : str or module
            ``"package"``; a package travels as a whole, also if a module in it is named.

        Raises
        ------
        ConfigurationError
            If it is no name.  That it is local is checked at the next computation.
        """
        self._move(modules, to="include", other="exclude")

    def exclude(self, *modules: str | ModuleType) -> None:
        """Keep modules from travelling: what is on the worker already, or needed by no task.

        Parameters
        ----------
        *modules : str or module
            ``"package"``, ``"package.module"``, or a pattern of files, ``"package/data/*"``.

        Raises
        ------
        ConfigurationError
            If it is no name.
        """
        self._move(modules, to="exclude", other="include")

    def _move(self, modules: Iterable[str | ModuleType], *, to: str, other: str) -> None:
        names = [each.__name__ if isinstance(each, ModuleType) else each for each in modules]
        settings = _lists(dask.config.get("dask-lambda.modules", None))
        for name in names:
            good = _is_dotted if to == "include" else _is_name
            _check(f"modules.{to}", name, "the name of a module", good)
        settings[other] = [name for name in settings[other] if name not in names]
        settings[to] = [*settings[to], *(name for name in names if name not in settings[to])]
        dask.config.set({"dask-lambda.modules": settings})

    def __repr__(self) -> str:
        settings = _lists(dask.config.get("dask-lambda.modules", None))
        return f"<modules that travel with tasks: {settings}>"


modules = Modules()
