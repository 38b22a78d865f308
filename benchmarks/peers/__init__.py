"""dask_lambda next to its peers, on the same S3, in the same rounds.

``workloads`` says what is done, ``system`` what a system's process does, ``on_dask``, ``on_cubed``
and ``on_lithops`` how each system does it; they run in environments of their own and import nothing
else from here.  ``emulator`` and ``counting_server`` are the S3 that all share, ``process`` drives
and measures one system, ``measure`` alternates them, ``table`` and ``plot`` show the outcome: ``python -m benchmarks.peers``.
"""
