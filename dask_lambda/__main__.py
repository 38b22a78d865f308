"""``python -m dask_lambda``: the command line."""

from __future__ import annotations

from dask_lambda.cli import main

if __name__ == "__main__":
    main(prog_name="dask-lambda")
