"""Minimise by gradient iterations whose states never leave AWS.

Ridge regression fits how a disease progresses in 442 diabetes patients from ten measurements: the
weights w minimise f(w) = ‖Xw − y‖²/2n + λ‖w‖²/2. How much λ should be is not known beforehand, so
several are tried at the same time, each by a chain of gradient steps with momentum
(Polyak's heavy ball: B. T. Polyak, "Some methods of speeding up the convergence of iteration
methods", USSR Computational Mathematics and Mathematical Physics 4, 1964):

    v ← βv − η∇f(w),  w ← w + v

``iterate`` calls ``step(k, state, argument)`` for k = 0, 1, ... as PyWren's iteration interface
does. Each step is one call, and gets the state of the one before; the chains do not wait for each
other, and no state passes through this program. The data are given to the executor once
(``scatter``), and the future of them is part of each chain's argument.

Run it with ``python gradient_descent.py``.
"""

import sys

import numpy as np
import scipy.linalg
from sklearn.datasets import load_diabetes

from dask_lambda import LambdaExecutor, last_report

RIDGES = (0.1, 0.3, 1.0, 3.0)  # λ
STEPS = 80
TOLERANCE = 1e-8  # relative; the slowest of the chains is at 1e-9 then


def gradient(weights: np.ndarray, x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """The gradient of f at some weights."""
    return x.T @ (x @ weights - y) / len(y) + ridge * weights


def step(k: int, state: tuple | None, argument: tuple) -> tuple:
    """One step: the next weights and their velocity."""
    ridge, (x, y) = argument
    if state is None:
        state = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    weights, velocity = state
    # The best step and momentum for a function between these two curvatures.
    low, high = ridge, ridge + np.linalg.norm(x, 2) ** 2 / len(y)
    root = np.sqrt(high / low)
    momentum = ((root - 1) / (root + 1)) ** 2
    rate = 4 / (np.sqrt(high) + np.sqrt(low)) ** 2
    velocity = momentum * velocity - rate * gradient(weights, x, y, ridge)
    return weights + velocity, velocity


def main() -> None:
    """Run all chains, and compare with the solutions of the normal equations."""
    x, y = load_diabetes(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    y = (y - y.mean()) / y.std()

    with LambdaExecutor() as executor:
        data = executor.scatter((x, y))
        chains = executor.iterate(step, STEPS, [(ridge, data) for ridge in RIDGES])
        states = [chain.result() for chain in chains]

    worst = 0.0
    for ridge, chain, (weights, _) in zip(RIDGES, chains, states, strict=True):
        system = x.T @ x / len(y) + ridge * np.eye(x.shape[1])
        exact = scipy.linalg.solve(system, x.T @ y / len(y), assume_a="pos")
        error = np.linalg.norm(weights - exact) / np.linalg.norm(exact)
        worst = max(worst, error) if error == error else np.inf  # NaN fails too
        explained = 1 - np.mean((x @ weights - y) ** 2)
        print(f"λ = {ridge:<4g} {chain.k} steps, explains {explained:.1%}, error {error:.0e}")

    if not worst <= TOLERANCE:
        sys.exit(f"check failed: weights differ from SciPy's solution by {worst:.1e} (relative)")
    print(f"check passed: SciPy solves the normal equations for the same weights ({worst:.0e})")
    print(last_report())


if __name__ == "__main__":
    main()
