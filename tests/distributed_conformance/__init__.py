"""distributed's own tests of its client, run against ``LambdaCluster``.

``python -m tests.distributed_conformance [FILE]`` runs a copy of distributed's ``test_client.py``
in which the clusters that the tests ask for are replaced by :class:`dask_lambda.LambdaCluster`
over the embedded AWS. distributed's releases no longer ship their tests: without FILE it is the
last release that did (``requirements.txt`` has its number and checksum), which is fetched with pip
and unpacked into the virtual environment.

``--cluster lambda|worker|distributed``
    what stands in: ``LambdaCluster`` (the default), or a yardstick: a cluster with one ordinary
    worker (what fails there needs two), or distributed's own (what fails there is the file's age)
``--only-deselected``
    the tests that are left out, to see which of them could come back

Whatever else is given goes to pytest. Tests that are left out are listed with their reasons in
``deselected.toml``, or have a rule with its reason in :mod:`tests.distributed_conformance.rules`.
"""
