"""Search the parameters of a support vector machine, each fit as one call on Lambda.

569 tumours, described by 30 numbers each, are benign or malignant (the breast-cancer data of
scikit-learn). A support vector classifier with an RBF kernel has two parameters that have to be
found by trying: the penalty C of training errors and the inverse width gamma of the kernel. Each
pair is judged by ten-fold cross-validation, so that a grid of 4 x 4 needs 160 fits, which do not
depend on each other: a function and a list.

It is done twice. First with ``LambdaExecutor``: the data are stored once (``scatter``), every call
reads them from S3, and ``starmap`` iterates over the scores in the order of the calls, however they
finish. Then with scikit-learn's own ``GridSearchCV``, which hands its fits to joblib, joblib to
``dask.distributed``, and that, in a ``LambdaCluster``, to Lambda: nothing but the two lines around
it is different from a search on this computer.

Run it with ``python hyperparameter_search.py``.
"""

import sys
from itertools import product

import joblib
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from dask_lambda import LambdaCluster, LambdaExecutor, last_report

PENALTIES = [1.0, 10.0, 100.0, 1000.0]
GAMMAS = [0.0001, 0.001, 0.01, 0.1]
FOLDS = StratifiedKFold(n_splits=10, shuffle=True, random_state=0)

Grid = dict[tuple[float, float], float]


def classifier(penalty: float = 1.0, gamma: float = 1.0):
    """The classifier, with features scaled to unit variance as in the training data."""
    return make_pipeline(StandardScaler(), SVC(C=penalty, gamma=gamma))


def score(data: tuple, penalty: float, gamma: float, fold: int) -> float:
    """The accuracy on one tenth of the data of what was trained with the others."""
    features, labels = data
    train, test = list(FOLDS.split(features, labels))[fold]
    fitted = classifier(penalty, gamma).fit(features[train], labels[train])
    return fitted.score(features[test], labels[test])


def search_with_executor(features: np.ndarray, labels: np.ndarray) -> Grid:
    """The mean accuracy for each pair of parameters: one call for each fit."""
    pairs = list(product(PENALTIES, GAMMAS))
    with LambdaExecutor() as executor:
        data = executor.scatter((features, labels))
        calls = ((data, *pair, fold) for pair in pairs for fold in range(FOLDS.n_splits))
        scores = np.array(list(executor.starmap(score, calls)))
    means = scores.reshape(len(pairs), FOLDS.n_splits).mean(axis=1)
    return dict(zip(pairs, means.tolist(), strict=True))


def grid_search(jobs: int) -> GridSearchCV:
    """scikit-learn's own search of the same grid."""
    parameters = {"svc__C": PENALTIES, "svc__gamma": GAMMAS}
    return GridSearchCV(classifier(), parameters, cv=FOLDS, n_jobs=jobs, refit=False)


def search_with_joblib(features: np.ndarray, labels: np.ndarray) -> Grid:
    """The same grid, searched by scikit-learn on a cluster that is not there."""
    with LambdaCluster(dashboard_address=None) as cluster, cluster.get_client():
        with joblib.parallel_config(backend="dask"):
            found = grid_search(-1).fit(features, labels)
        print(cluster.report)
    return grid_of(found)


def grid_of(search: GridSearchCV) -> Grid:
    """What a search has found: the mean accuracy for each pair of parameters."""
    found = zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True)
    return {(chosen["svc__C"], chosen["svc__gamma"]): float(mean) for chosen, mean in found}


def check(grid: Grid, expected: Grid, who: str) -> None:
    """End the program if a grid is not what it should be."""
    difference = max(abs(grid[pair] - expected[pair]) for pair in expected)
    if not difference <= 1e-12:  # so written, NaN fails too
        sys.exit(f"check failed: {who}: accuracies differ from these here by {difference:.1e}")


def show(grid: Grid) -> None:
    """Print a grid of accuracies, and the best of them."""
    print("accuracy" + "".join(f"{f'gamma {gamma:g}':>14}" for gamma in GAMMAS))
    for penalty in PENALTIES:
        row = "".join(f"{grid[penalty, gamma]:14.4f}" for gamma in GAMMAS)
        print(f"C {penalty:<6g}{row}")
    penalty, gamma = max(grid, key=grid.__getitem__)
    print(f"the best: C={penalty:g}, gamma={gamma:g}, {grid[penalty, gamma]:.4f}")


def main() -> None:
    """Search twice on Lambda, and compare with scikit-learn's search on this computer."""
    features, labels = load_breast_cancer(return_X_y=True)
    expected = grid_of(grid_search(1).fit(features, labels))

    grid = search_with_executor(features, labels)
    show(grid)
    check(grid, expected, "LambdaExecutor")
    check(search_with_joblib(features, labels), expected, "joblib on LambdaCluster")

    print(f"check passed: GridSearchCV on this computer has the same {len(expected)} accuracies")
    print(last_report())


if __name__ == "__main__":
    main()
