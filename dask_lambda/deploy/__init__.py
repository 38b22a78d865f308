"""From an account to a function that runs: what is put there, and how it is packaged.

:mod:`dask_lambda.deploy.package` builds the worker's environment.
"""

from __future__ import annotations
