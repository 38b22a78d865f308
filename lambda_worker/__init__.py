"""What runs inside AWS Lambda: the ground floor of dask_lambda.

This package is deployed to Lambda on its own, and the client imports the wire format, the
codec, the store and the object names from it, so each of these has exactly one definition.
It imports nothing of :mod:`dask_lambda`, and at module level neither boto3 nor ``distributed``
nor ``dask.array``: every import here is paid for at each cold start.
"""

from __future__ import annotations
