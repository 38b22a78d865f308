"""Dask's own tests, run on Lambda.

Dask ships its tests in its wheel. ``python -m tests.conformance`` runs them with every one of
Dask's schedulers replaced by ``dask_lambda.lambda_get`` over the embedded AWS, so that what they
say about Dask holds for us: the same values, types and exceptions for the same graphs.

``--sample``
    what ``make test`` runs, in minutes (:mod:`tests.conformance.selection`)
``--all``
    the whole of array, bag, delayed and dataframe, in hours
``--scheduler sync|pickle``
    the same tests under Dask's own scheduler (what fails there is not ours to mend), or under the
    smallest scheduler that serialises everything (what fails there cannot pass on Lambda either)
``--only-deselected``
    the tests that are left out, to see which of them could come back

Whatever else is given goes to pytest, and names such as ``dask.array.tests.test_linalg`` replace
the selection. Tests that are left out are listed with their reasons in ``deselected.toml``.
"""
