"""Recognise handwritten digits by their nearest neighbour, with a blocked matrix product.

Every test image gets the label of the training image closest to it. All distances at once are one
matrix expression, since ‖x − y‖² = ‖x‖² + ‖y‖² − 2 x·y, and the product of the two image matrices
carries nearly all of the arithmetic. Cut into tiles, each product is a task of its own; the
nearest image of a row is found inside each tile first, and then among the tiles of that row.

It is the program of choice for functions that come and go: wide (every tile at once), with much
arithmetic for each byte of input, and short. numpywren showed it on Lambda; here it is plain
``dask.array``, on the 1,797 images of 8 x 8 pixels that come with scikit-learn.

Run it with ``python nearest_neighbor.py``.
"""

import sys

import dask.array as da
import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from dask_lambda import lambda_get, last_report

TRAIN = 1_350  # images to learn from; the remaining 447 are to be recognised
TILE = 150  # images along each side of a tile


def squared_distances(x: da.Array, y: da.Array) -> da.Array:
    """Squared Euclidean distances between the rows of x and of y, shape (len(x), len(y)).

    Pixels are whole numbers from 0 to 16, so every intermediate value is a whole number far below
    2**53: in float64 the result is exact, although the formula subtracts large numbers.
    """
    x_norms = (x**2).sum(axis=1)
    y_norms = (y**2).sum(axis=1)
    return x_norms[:, np.newaxis] + y_norms[np.newaxis, :] - 2 * (x @ y.T)


def main() -> None:
    """Recognise the test images and compare with scikit-learn's classifier."""
    images, labels = load_digits(return_X_y=True)
    x_train, x_test = images[:TRAIN], images[TRAIN:]
    y_train, y_test = labels[:TRAIN], labels[TRAIN:]

    test = da.from_array(x_test, chunks=(TILE, -1))
    train = da.from_array(x_train, chunks=(TILE, -1))
    distances = squared_distances(test, train)
    nearest = distances.argmin(axis=1).compute(scheduler=lambda_get)

    predicted = y_train[nearest]
    accuracy = np.mean(predicted == y_test)
    print(f"{len(x_test)} digits recognised from {len(x_train)} known ones,", end=" ")
    print(f"{distances.numblocks[0]} x {distances.numblocks[1]} tiles")
    print(f"accuracy: {accuracy:.4f}")

    classifier = KNeighborsClassifier(n_neighbors=1).fit(x_train, y_train)
    expected_distances, expected_nearest = classifier.kneighbors(x_test)
    expected_accuracy = classifier.score(x_test, y_test)

    # Two images can be equally near, and then either is right. So the distances must agree in
    # every row; where the neighbours differ, that makes it a tie.
    found_squared = ((x_test - x_train[nearest]) ** 2).sum(axis=1)
    expected_squared = np.rint(expected_distances[:, 0] ** 2)
    if not np.array_equal(found_squared, expected_squared):
        wrong = int(np.sum(found_squared != expected_squared))
        sys.exit(f"check failed: {wrong} of {len(x_test)} distances differ from scikit-learn's")
    ties = int(np.sum(nearest != expected_nearest[:, 0]))
    if accuracy != expected_accuracy:
        sys.exit(f"check failed: scikit-learn's accuracy is {expected_accuracy:.4f} ({ties} ties)")
    print(f"check passed: scikit-learn's 1-NN has the same distances and accuracy ({ties} ties)")
    print(last_report())


if __name__ == "__main__":
    main()
