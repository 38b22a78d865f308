"""Join and group a table of patients, cut into partitions that no machine holds together.

A clinic has two tables: what was measured when a patient first came, and how far the diabetes had
progressed a year later. The second lists the patients in another order, so joining them moves
nearly every row to another partition (a shuffle); then the progression is summarised by sex and
decade of age. The data are real: the 442 patients of Efron, Hastie, Johnstone and Tibshirani
(2004), in the units of the measurement, from scikit-learn.

A shuffle is what serverless functions are said to be bad at, because they cannot talk to each
other. They need not: each partition is split into pieces in S3, and each new partition collects
its own. The code is ``dask.dataframe`` as anywhere else.

Run it with ``python dataframe.py``.
"""

import sys

import dask
import dask.dataframe as dd
import pandas as pd
from pandas.testing import assert_frame_equal
from sklearn.datasets import load_diabetes

from dask_lambda import lambda_get, last_report

PARTITIONS = 8


def two_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """First visits in order of patient number, and follow-ups in the order of the results."""
    patients = load_diabetes(as_frame=True, scaled=False).frame
    patients = patients.rename(columns={"target": "progression"}).rename_axis("patient")
    patients = patients.reset_index().astype({"sex": int, "age": int})
    visits = patients[["patient", "age", "sex", "bmi", "bp"]]
    followups = patients[["patient", "progression"]].sort_values(["progression", "patient"])
    return visits, followups.reset_index(drop=True)


def summarise(joined: pd.DataFrame | dd.DataFrame) -> pd.DataFrame | dd.DataFrame:
    """Patients, mean and standard deviation of progression, and mean body mass index by group.

    The same lines serve pandas and Dask, which is what makes the check below a fair one.
    """
    joined = joined.assign(decade=joined["age"] // 10 * 10)
    return joined.groupby(["sex", "decade"]).agg(
        patients=("patient", "count"),
        progression=("progression", "mean"),
        spread=("progression", "std"),
        bmi=("bmi", "mean"),
    )


def main() -> None:
    """Join and summarise the two tables and compare with pandas."""
    visits, followups = two_tables()

    joined = dd.merge(
        dd.from_pandas(visits, npartitions=PARTITIONS),
        dd.from_pandas(followups, npartitions=PARTITIONS),
        on="patient",
    )
    table, summary = dask.compute(joined, summarise(joined), scheduler=lambda_get)
    table = table.sort_values("patient", ignore_index=True)
    summary = summary.sort_index()

    print(f"{len(table)} patients joined; progression of the disease after a year:")
    print(summary.round(1).to_string())

    plain_table = visits.merge(followups, on="patient").sort_values("patient", ignore_index=True)
    plain_summary = summarise(plain_table).sort_index()
    try:
        assert_frame_equal(table, plain_table)
        assert_frame_equal(summary, plain_summary)
    except AssertionError as difference:
        sys.exit(f"check failed: pandas has another result\n{difference}")
    print("check passed: pandas joins the same rows and gives the same summary")
    print(last_report())


if __name__ == "__main__":
    main()
