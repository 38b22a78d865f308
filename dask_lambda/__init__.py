"""Dask on AWS Lambda and S3, without a cluster.

>>> from dask_lambda import lambda_get
>>> x.compute(scheduler=lambda_get)                                       # doctest: +SKIP

Importing the package registers the scheduler's name (``dask.config.set(scheduler="lambda")``)
and its defaults in Dask's configuration; nothing is started before the first computation.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from dask.base import named_schedulers

from dask_lambda.config import load_defaults
from dask_lambda.distant import DistantFuture
from dask_lambda.executor import LambdaExecutor
from dask_lambda.futures import LambdaFuture
from dask_lambda.report import RunReport
from dask_lambda.saved import load, save
from dask_lambda.scheduler import LambdaScheduler, last_report

__all__ = [
    "DistantFuture",
    "LambdaExecutor",
    "LambdaFuture",
    "LambdaScheduler",
    "RunReport",
    "lambda_get",
    "last_report",
    "load",
    "save",
]

try:
    __version__ = version("dask_lambda")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

load_defaults()

#: ``get`` of a scheduler with the settings of Dask's configuration.
lambda_get = LambdaScheduler().get

named_schedulers["lambda"] = lambda_get
