"""dask_lambda next to its peers, on the same S3, in the same rounds.

``workloads`` says what is done, ``system`` what a system's process does; ``on_dask``, ``on_cubed``
and ``on_lithops`` say how each system does it, and run in environments of their own, so they import
nothing else from here.  ``emulator`` and ``counting_server`` are the S3 that all share, ``process``
drives and measures one system, ``measure`` takes turns, ``table`` and ``plot`` show the outcome.
Run it with ``python -m benchmarks.peers``.
"""
