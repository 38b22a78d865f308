"""Dask on AWS Lambda and S3, without a cluster.

>>> from dask_lambda import lambda_get
>>> x.compute(scheduler=lambda_get)                                       # doctest: +SKIP

Importing the package registers the scheduler's name (``dask.config.set(scheduler="lambda")``)
and its defaults in Dask's configuration; nothing is started before the first computation.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from dask.base import named_schedulers

from dask_lambda.config import load_defaults
from dask_lambda.distant import DistantFuture
from dask_lambda.executor import LambdaExecutor
from dask_lambda.forecast import Estimate
from dask_lambda.futures import LambdaFuture
from dask_lambda.report import RunReport
from dask_lambda.saved import load, save
from dask_lambda.scheduler import LambdaScheduler, estimate, last_report

if TYPE_CHECKING:
    from dask_lambda.cluster import LambdaClient, LambdaCluster

__all__ = [
    "DistantFuture",
    "Estimate",
    "LambdaClient",
    "LambdaCluster",
    "LambdaExecutor",
    "LambdaFuture",
    "LambdaScheduler",
    "RunReport",
    "estimate",
    "lambda_get",
    "last_report",
    "load",
    "save",
]

#: Where those names are that are imported when they are asked for: distributed takes its time.
_LATE = {"LambdaClient": "cluster", "LambdaCluster": "cluster"}

try:
    __version__ = version("dask_lambda")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

load_defaults()

#: ``get`` of a scheduler with the settings of Dask's configuration.
lambda_get = LambdaScheduler().get

named_schedulers["lambda"] = lambda_get


def __getattr__(name: str) -> Any:
    if name in _LATE:
        value = getattr(import_module(f"dask_lambda.{_LATE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
