"""The least F of composite tasks in float64, by solvers that share nothing with what is judged, and
by duality a bound of how far from it they are.
"""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from tasks.active_set import EPS, Fit, active_set, logistic, squared
from tasks.composite import (
    L1,
    Box,
    Composite,
    ElasticNet,
    LeastSquares,
    Logistic,
    NonNegative,
    QuadraticForm,
)


class Optimum(NamedTuple):
    point: np.ndarray  # float64 [N], in the penalty's domain
    value: float  # F there
    gap: float  # upper bound, but for rounding, of how far that is above the least F


def optimum(task: Composite, tolerance: float = 1e-9) -> Optimum:
    """The minimiser of one instance, of its very numbers in float64.

    With L1 scikit-learn's coordinate descent (for a logistic loss SciPy's L-BFGS-B), with bounds
    SciPy's NNLS or BVLS come first, then Newton steps in the coordinates that are free. An elastic
    net and a quadratic form are least squares with other rows.

    The gap is that to a point of the dual problem. It bounds F from below on all minimisers, which
    finite bounds, a norm or linearly independent columns keep within reach; without any of these
    on all points whose coordinates are at most ten times the largest of `point`.

    Raises:
      RuntimeError: the gap is above `tolerance`, relative to F, or to 1e-12 f(0) if F is below.
      TypeError, ValueError: there is no solver for such a task, or it is not one.
    """
    smooth, penalty = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), part)
        for part in (task.smooth_part, task.penalty)
    )
    if task.lipschitz.shape:
        raise ValueError("`task` must be one instance, got several: `optima` is for stacked ones")
    matrix, target = _rows(smooth)
    dimension, rho, low, high = matrix.shape[1], 0.0, -np.inf, np.inf
    fit, start = squared(target), _coordinate_descent
    match penalty:
        case L1():
            rho = float(penalty.rho)
        case ElasticNet():
            rho = float(penalty.rho)
            matrix = np.concatenate([matrix, np.sqrt(penalty.ridge) * np.eye(dimension)])
            fit = squared(np.concatenate([target, np.zeros(dimension)]))
        case NonNegative():
            low = 0.0
        case Box():
            low, high = penalty.low, penalty.high
        case _:
            raise TypeError(f"`task` has a penalty without a solver: {type(penalty).__name__}")
    if isinstance(smooth, Logistic):
        if not isinstance(penalty, L1) or rho == 0:
            raise TypeError(f"`task` of a logistic loss must have L1 and `rho` > 0, got {penalty}")
        fit, start = logistic(target), _quasi_newton
    # several threads gain nothing at these sizes, and lose 40 times when cores are shared
    with _blas().limit(limits=1, user_api="blas"):
        if rho > 0:
            point, gap = _sparse(fit, matrix, rho, start(fit, matrix, rho))
        else:
            point, gap = _bounded(fit, matrix, low, high)
    value = fit.value(matrix @ point) + rho * float(np.abs(point).sum())
    if not gap <= tolerance * max(value, 1e-12 * fit.value(np.zeros(len(matrix)))):
        raise RuntimeError(
            f"`task` was solved to {value} with a gap of {gap}, above `tolerance` {tolerance}: "
            "allow more, or condition it better"
        )
    return Optimum(point, value, gap)


def optima(tasks: Composite, tolerance: float = 1e-9) -> np.ndarray:
    """float64 [K], the least F of each of K tasks stacked along the leaves' first axis, see
    `optimum`.
    """
    tasks = jax.tree.map(np.asarray, tasks)
    each = (jax.tree.map(lambda leaf, i=i: leaf[i], tasks) for i in range(len(tasks.lipschitz)))
    return np.array([optimum(task, tolerance).value for task in each])


def _rows(smooth: Any) -> tuple[Any, Any]:
    """The matrix and target of which it is half the squared error, or the samples and labels."""
    if isinstance(smooth, LeastSquares):
        return smooth.matrix, smooth.target
    if isinstance(smooth, Logistic):
        return smooth.matrix, smooth.labels
    if not isinstance(smooth, QuadraticForm):
        raise TypeError(f"`task` has a smooth part without a solver: {type(smooth).__name__}")
    spectrum, basis = np.linalg.eigh(smooth.hessian)
    if spectrum[0] < -1e-5 * spectrum[-1]:
        raise ValueError(f"`task` is not convex: its hessian has the eigenvalue {spectrum[0]}")
    matrix = np.sqrt(np.maximum(spectrum, 0))[:, None] * basis.T
    return matrix, matrix @ smooth.center


@functools.cache
def _blas() -> Any:
    """What limits the threads of the libraries that are loaded here."""
    from scipy import linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _coordinate_descent(fit: Fit, matrix: np.ndarray, rho: float) -> np.ndarray:
    """By way of larger penalties, from the least one whose solution is 0."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lasso_path

    target = -fit.slope(np.zeros(len(matrix)))
    most = np.abs(matrix.T @ target).max()
    if most <= rho:
        return np.zeros(matrix.shape[1])
    penalties = np.geomspace(most, rho, 2 + int(np.log10(most / rho)))[1:] / len(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        path = lasso_path(matrix, target, alphas=penalties, tol=1e-10, max_iter=1000)
    return path[1][:, -1]


def _quasi_newton(fit: Fit, matrix: np.ndarray, rho: float) -> np.ndarray:
    from scipy import optimize

    signs = np.concatenate([matrix, -matrix], axis=1)

    def objective(halves: np.ndarray) -> tuple[float, np.ndarray]:
        z = signs @ halves
        return fit.value(z) + rho * halves.sum(), signs.T @ fit.slope(z) + rho

    halves = optimize.minimize(
        objective,
        np.zeros(signs.shape[1]),
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(0, np.inf),
        options={"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9 * rho},
    ).x
    return np.subtract(*np.split(halves, 2))


def _sparse(
    fit: Fit, matrix: np.ndarray, rho: float, start: np.ndarray
) -> tuple[np.ndarray, float]:
    """The minimiser of fit(matrix x) + rho |x|_1 and its gap: positive and negative parts of x are
    nonnegative, and at most F / rho.
    """
    reach = (fit.value(matrix @ start) + rho * np.abs(start).sum()) / rho
    halves, gap = active_set(
        fit,
        np.concatenate([matrix, -matrix], axis=1),
        rho,
        (np.zeros(2 * len(start)), np.full(2 * len(start), np.inf)),
        np.maximum(np.concatenate([start, -start]), 0),
        float(reach),
    )
    return np.subtract(*np.split(halves, 2)), gap


def _bounded(fit: Fit, matrix: np.ndarray, low: Any, high: Any) -> tuple[np.ndarray, float]:
    """The minimiser of `squared` of matrix x for low <= x <= high, and its gap."""
    from scipy import optimize

    target = -fit.slope(np.zeros(len(matrix)))
    low, high = (np.broadcast_to(bound, matrix.shape[1:]) for bound in (low, high))
    if (low == 0).all() and (high == np.inf).all():
        start = optimize.nnls(matrix, target)[0]
    else:
        found = optimize.lsq_linear(matrix, target, (low, high), method="bvls", tol=1e-15)
        start = np.clip(found.x, low, high)
    # |matrix x - target| <= |matrix start - target| keeps x near, if columns are independent
    spectrum = np.linalg.svd(matrix, compute_uv=False)
    reach = 10 * np.abs(start).max()
    if len(spectrum) == matrix.shape[1] and spectrum[-1] > len(matrix) * EPS * spectrum[0]:
        norms = np.linalg.norm(target) + np.linalg.norm(matrix @ start - target)
        reach = norms / spectrum[-1]
    return active_set(fit, matrix, 0.0, (low, high), start, float(reach))
