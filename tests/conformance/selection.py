"""Which of Dask's tests make the sample, and which make the whole.

A selection maps a module, or a package with everything in it, to a number: 1 takes every test,
7 every seventh in the order of collection. The numbers are primes, so that they do not fall into
step with the tests' parameters, and the sample sees all of their values.
"""

from __future__ import annotations

SELECTIONS: dict[str, dict[str, int]] = {
    "sample": {
        "dask.array.tests.test_linalg": 1,
        "dask.tests.test_delayed": 1,
        "dask.bag.tests.test_bag": 1,
        "dask.array.tests.test_reductions": 7,
        "dask.array.tests.test_routines": 7,
        "dask.dataframe.dask_expr.tests.test_collection": 23,
    },
    "all": {
        "dask.array.tests": 1,
        "dask.tests.test_delayed": 1,
        "dask.bag.tests": 1,
        "dask.dataframe.dask_expr.tests": 1,
        "dask.dataframe.dask_expr.io.tests": 1,
    },
}
