"""Use Dask's futures and its dashboard without a cluster to keep: each task runs on AWS Lambda.

This is code as it is written for ``dask.distributed``: a ``Client`` whose futures start to run when
they are submitted, are arguments of one another, and are looked at as they complete. The only line
that says Lambda is the one that makes the cluster. The computation is a bootstrap: how well is the
slope of a regression line known? Each future draws patients with replacement and fits a line.
Then two tables are joined with ``dask.dataframe``, whose partitions stay in S3 between the steps
(``persist``). The data are the 442 diabetes patients of Efron, Hastie, Johnstone and Tibshirani
(2004), from scikit-learn.

Run it with ``python distributed_client.py``, and open the address that it prints: the dashboard
shows what runs. It needs the package bokeh.
"""

import sys

import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import as_completed
from pandas.testing import assert_frame_equal
from sklearn.datasets import load_diabetes

from dask_lambda import LambdaCluster

DRAWS = 40
PARTITIONS = 4


def patients() -> pd.DataFrame:
    """Body mass index, blood pressure and progression of the disease, by patient."""
    table = load_diabetes(as_frame=True, scaled=False).frame
    return table.rename(columns={"target": "progression"}).rename_axis("patient").reset_index()


def slope(table: pd.DataFrame, seed: int) -> float:
    """Slope of progression over body mass index for patients drawn with replacement."""
    drawn = table.sample(len(table), replace=True, random_state=seed)
    return float(np.polyfit(drawn["bmi"], drawn["progression"], 1)[0])


def spread(slopes: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return float(np.mean(slopes)), float(np.std(slopes, ddof=1))


def main() -> None:
    """Bootstrap, join two tables, and compare both with plain loops and pandas."""
    table = patients()
    with LambdaCluster() as cluster, cluster.get_client() as client:
        print(f"the dashboard is at {cluster.dashboard_link}")

        # The table goes to S3 once; 40 calls read it there.
        shared = client.scatter(table[["bmi", "progression"]])
        futures = client.map(slope, [shared] * DRAWS, range(DRAWS))
        summary = client.submit(spread, futures)  # runs as soon as the 40 are done
        for number, future in enumerate(as_completed(futures), 1):
            if number % 10 == 0:
                print(f"{number} lines are fitted, the last one with slope {future.result():.2f}")
        mean, error = summary.result()
        print(f"progression rises by {mean:.2f} +- {error:.2f} per unit of body mass index")

        # Another table in another order: to join them, nearly every row has to move.
        pressure = table[["patient", "bp"]].sort_values(["bp", "patient"], ignore_index=True)
        joined = dd.merge(
            dd.from_pandas(table[["patient", "age", "bmi"]], npartitions=PARTITIONS),
            dd.from_pandas(pressure, npartitions=PARTITIONS),
            on="patient",
        ).persist()  # stays in S3, for the next two lines
        rows = joined.compute().sort_values("patient", ignore_index=True)
        means = joined[["bmi", "bp"]].mean().compute()
        print(f"{len(rows)} patients joined; means:\n{means.round(1).to_string()}")
        report = cluster.report

    loop = spread([slope(table, seed) for seed in range(DRAWS)])
    if not np.allclose((mean, error), loop, rtol=1e-9):  # the last digits are up to the memory
        sys.exit(f"check failed: a plain loop has slope and error {loop}, not {(mean, error)}")
    plain = table[["patient", "age", "bmi"]].merge(pressure, on="patient")
    try:
        assert_frame_equal(rows, plain)
        np.testing.assert_allclose(means, plain[["bmi", "bp"]].mean())
    except AssertionError as difference:
        sys.exit(f"check failed: pandas has another result\n{difference}")
    print("check passed: a plain loop and pandas give the same")
    print(report)


if __name__ == "__main__":
    main()
