"""The minimiser within bounds of a convex function of matrix x plus a linear one, in float64, and a
certificate by duality. With signs for bounds it is Lee et al., Efficient sparse coding algorithms
(2006).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

EPS = np.finfo(np.float64).eps
STEPS = 2000  # more than it ever takes


class Fit(NamedTuple):
    """A convex function of z, the matrix times x. Its conjugate is finite where u = nearest(u), and
    `excess(z, u)` is value(z) + conjugate(u) - z u, 0 if u is the slope at z and else positive.
    """

    value: Callable[[np.ndarray], float]
    slope: Callable[[np.ndarray], np.ndarray]
    curvature: Callable[[np.ndarray], np.ndarray]
    nearest: Callable[[np.ndarray], np.ndarray]
    excess: Callable[[np.ndarray, np.ndarray], float]


def squared(target: np.ndarray) -> Fit:
    return Fit(
        value=lambda z: 0.5 * float(np.sum((z - target) ** 2)),
        slope=lambda z: z - target,
        curvature=np.ones_like,
        nearest=lambda u: u,
        excess=lambda z, u: 0.5 * float(np.sum((z - target - u) ** 2)),
    )


def logistic(labels: np.ndarray) -> Fit:
    from scipy import special

    sign, count = 1 - 2 * labels, len(labels)

    def value(z: np.ndarray) -> float:
        return float(np.mean(np.logaddexp(0, sign * z)))

    def excess(z: np.ndarray, u: np.ndarray) -> float:
        wrong = count * sign * u  # chances of the wrong label
        conjugate = -np.mean(special.entr(wrong) + special.entr(1 - wrong))
        return max(value(z) + float(conjugate - z @ u), 0.0)

    return Fit(
        value=value,
        slope=lambda z: sign * special.expit(sign * z) / count,
        curvature=lambda z: special.expit(z) * special.expit(-z) / count,
        nearest=lambda u: sign * np.clip(count * sign * u, 0, 1) / count,
        excess=excess,
    )


def active_set(
    fit: Fit,
    matrix: np.ndarray,
    cost: float,
    bounds: tuple[np.ndarray, np.ndarray],
    point: np.ndarray,
    reach: float,
) -> tuple[np.ndarray, float]:
    """The minimiser of fit(matrix x) + cost sum(x) within bounds and its gap, if no coordinate of
    it is larger than `reach`. Newton steps in the free coordinates go up to the first bound; one
    coordinate is freed whenever they are at their minimum.
    """
    (low, high), seen = bounds, set()
    free = (low < point) & (point < high)

    def total(x: np.ndarray) -> float:
        return fit.value(matrix @ x) + cost * float(x.sum())

    def slopes(x: np.ndarray) -> np.ndarray:
        return matrix.T @ fit.slope(matrix @ x) + cost

    for _ in range(STEPS):
        slope, step, trial = slopes(point), np.zeros_like(point), point.copy()
        step[free] = _newton(matrix[:, free], fit.curvature(matrix @ point), slope[free])
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(step > 0, high - point, low - point) / step
        room[step == 0] = np.inf
        length = min(1.0, room.min())
        trial += length * step
        # not for rounding, which would cost the last step that gains digits
        while total(trial) > total(point) * (1 + 10 * EPS) and length > 1e-4:
            length /= 2
            trial = point + length * step
        hit = room <= length
        if hit.any():
            point, free = np.where(hit, np.where(step > 0, high, low), trial), free & ~hit
            continue
        left, wrong = (np.abs(s[free]).max(initial=0) for s in (slopes(trial), slope))
        # near the minimum the slopes still lose digits when the value has no more to lose
        if total(trial) < total(point) or left < wrong / 2:
            point = trial
            continue
        gain = np.where(free, 0, np.where(point > low, slope, -slope))
        freed = int(gain.argmax())
        if gain[freed] <= 0 or free.tobytes() in seen:
            break
        seen.add(free.tobytes())
        free[freed] = True

    active, dual = matrix[:, free], fit.slope(matrix @ point)
    # the slope may be far smaller than what it is a difference of; it is made to fit its equations
    dual = fit.nearest(dual - np.linalg.lstsq(active.T, active.T @ dual + cost)[0])
    if cost > 0:
        dual *= min(1.0, cost / max(-(matrix.T @ dual).min(), cost))  # no slope below 0
    slope = matrix.T @ dual + cost
    nearest, farthest = np.maximum(low, -reach), np.minimum(high, reach)
    slack = np.maximum(slope * (point - nearest), slope * (point - farthest))
    return point, fit.excess(matrix @ point, dual) + float(np.maximum(slack, 0).sum())


def _newton(active: np.ndarray, curvature: np.ndarray, slope: np.ndarray) -> np.ndarray:
    from scipy import linalg

    hessian = active.T @ (curvature[:, None] * active)
    try:
        factor = linalg.cho_factor(hessian)
    except linalg.LinAlgError:
        # dependent columns: far in the directions in which nothing curves
        damping = 1e-12 * np.trace(hessian) + np.finfo(np.float64).tiny
        factor = linalg.cho_factor(hessian + damping * np.eye(len(slope)))
    return -linalg.cho_solve(factor, slope)
