"""Train a digit classifier by solving a dense linear system with a blocked Cholesky factorisation.

Kernel ridge regression needs the weights W in (K + λI) W = Y, where K[i, j] = exp(−γ‖xᵢ − xⱼ‖²)
compares two training images and Y holds one column for each digit, 1 where the image shows it.
K + λI is symmetric and positive definite, so K + λI = L Lᵀ, and two triangular solves follow:
L Z = Y, then Lᵀ W = Z. An unseen image is then the digit with the largest value in K' W, where K'
compares it with the training images.

A factorisation is hard on a fixed cluster: its parallelism starts at one task, swells to many and
dwindles to one again. Here a machine exists for as long as a tile needs it. The graph is the one
``dask.array.linalg`` writes; nothing in it knows about Lambda. The system itself never comes to
this computer: the tiles stay in S3, and the weights, the residual and the predictions return.

Run it with ``python linear_system.py``.
"""

import sys

import dask
import dask.array as da
import numpy as np
import scipy.linalg
from sklearn.datasets import load_digits
from sklearn.metrics.pairwise import rbf_kernel

from dask_lambda import lambda_get, last_report

TRAIN = 1_500  # images to learn from, which is the size of the system
TILE = 250  # rows and columns of a tile
GAMMA = 0.001  # inverse squared width of the kernel, for pixels from 0 to 16
RIDGE = 0.1  # λ; with it the system's condition number is about 1,700
TOLERANCE = 1e-11  # relative; rounding alone allows for some 1,700 times 1e-16


def kernel_matrix(x: da.Array, y: da.Array) -> da.Array:
    """The RBF kernel exp(−γ‖x − y‖²) between the rows of x and of y, shape (len(x), len(y))."""
    x_norms = (x**2).sum(axis=1)
    y_norms = (y**2).sum(axis=1)
    squared_distances = x_norms[:, np.newaxis] + y_norms[np.newaxis, :] - 2 * (x @ y.T)
    return da.exp(-GAMMA * squared_distances)


def main() -> None:
    """Solve the system, recognise the images and compare with SciPy."""
    images, labels = load_digits(return_X_y=True)
    one_hot = np.eye(10)[labels[:TRAIN]]

    train = da.from_array(images[:TRAIN], chunks=(TILE, -1))
    test = da.from_array(images[TRAIN:], chunks=(TILE, -1))
    targets = da.from_array(one_hot, chunks=(TILE, -1))

    kernel = kernel_matrix(train, train)
    system = kernel + RIDGE * da.eye(TRAIN, chunks=TILE)
    lower = da.linalg.cholesky(system, lower=True)
    halfway = da.linalg.solve_triangular(lower, targets, lower=True)
    weights = da.linalg.solve_triangular(lower.T, halfway, lower=False)

    residual = da.linalg.norm(system @ weights - targets) / da.linalg.norm(targets)
    fitted = (kernel @ weights).argmax(axis=1)
    predicted = (kernel_matrix(test, train) @ weights).argmax(axis=1)

    # One compute, so that the factorisation runs once for all four results.
    weights, residual, fitted, predicted = dask.compute(
        weights, residual, fitted, predicted, scheduler=lambda_get
    )
    print(f"{TRAIN} equations in {system.numblocks[0]} x {system.numblocks[1]} tiles,", end=" ")
    print(f"{weights.shape[1]} right-hand sides")
    print(f"relative residual: {residual:.1e}")
    print(f"accuracy on the {len(fitted)} training images: {np.mean(fitted == labels[:TRAIN]):.4f}")
    print(f"accuracy on {len(predicted)} unseen images: {np.mean(predicted == labels[TRAIN:]):.4f}")

    if not residual <= TOLERANCE:  # so written, NaN fails too
        sys.exit(f"check failed: the relative residual {residual:.1e} exceeds {TOLERANCE:.0e}")
    plain_system = rbf_kernel(images[:TRAIN], gamma=GAMMA) + RIDGE * np.eye(TRAIN)
    plain = scipy.linalg.cho_solve(scipy.linalg.cho_factor(plain_system, lower=True), one_hot)
    difference = np.linalg.norm(weights - plain) / np.linalg.norm(plain)
    if not difference <= TOLERANCE:
        sys.exit(f"check failed: the weights differ from SciPy's by {difference:.1e} (relative)")
    plain_scores = rbf_kernel(images[TRAIN:], images[:TRAIN], gamma=GAMMA) @ plain
    if not np.array_equal(predicted, plain_scores.argmax(axis=1)):
        sys.exit("check failed: some predictions differ from those of SciPy's weights")
    print(f"check passed: SciPy has the same weights (within {difference:.0e}) and predictions")
    print(last_report())


if __name__ == "__main__":
    main()
