"""From an account to a function that runs: what is put there, and how it is packaged.

:mod:`dask_lambda.deploy.package` builds the worker's environment.
:mod:`dask_lambda.deploy.resources` says what is to exist, :mod:`dask_lambda.deploy.policies` who
may do what, :mod:`dask_lambda.deploy.plan` which API calls lead there from what there is.
"""

from __future__ import annotations
