"""Composite convex tasks F = f + r: f is smooth, r has a cheap proximal operator (as in
arXiv:2305.18577). Instances are made in `tasks.convex`.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from tasks.base import Batch, Key, Split, relative_loss

# GPUs and TPUs would round the factors of float32 products, and F - F* would show it
product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class SmoothPart(Protocol):
    """f of x [N], convex; `lipschitz` is an upper bound (scalar) of its gradient's constant."""

    @property
    def dimension(self) -> int: ...

    def value(self, x: jax.Array) -> jax.Array: ...

    def lipschitz(self) -> jax.Array: ...


class Penalty(Protocol):
    """r of x [N], convex and separable, perhaps infinite outside of a domain.

    `prox(v, step)` is argmin_x r(x) + sum_i (x_i - v_i)^2 / (2 step_i) for a positive `step`, [N]
    or scalar; `nearest` projects onto the domain.
    """

    def value(self, x: jax.Array) -> jax.Array: ...

    def prox(self, v: jax.Array, step: jax.Array) -> jax.Array: ...

    def nearest(self, x: jax.Array) -> jax.Array: ...


def spectral_bound(gram: jax.Array, squarings: int = 9) -> jax.Array:
    """Upper bound, up to rounding, of the largest eigenvalue of a positive semidefinite matrix
    [K, K]: |gram^q|_F^(1/q) with q = 2^squarings, at most K^(1/(2q)) times the eigenvalue.

    Step sizes need a bound from above; power iteration gives one from below, which depends on where
    it starts. Squaring has no start, no loop of unknown length, and is made of batched products.
    """
    largest = jnp.max(jnp.abs(gram))
    scale = jnp.where(largest == 0, 1, largest)

    def square(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        power, bound = state
        norm = jnp.linalg.norm(power)
        norm = jnp.where(norm == 0, 1, norm)
        # multiplied up: the rounding of a sum of logs would grow with the log of the scale
        return product(power / norm, power / norm), bound * norm ** jnp.exp2(-i).astype(norm.dtype)

    bound = jax.lax.fori_loop(0, squarings + 1, square, (gram / scale, scale))[1]
    return jnp.where(largest == 0, jnp.finfo(gram.dtype).tiny, bound)  # 1 / L is finite


def _largest_square(matrix: jax.Array) -> jax.Array:
    """Bound of the square of the largest singular value."""
    wide = matrix.shape[0] < matrix.shape[1]
    return spectral_bound(product(matrix, matrix.T) if wide else product(matrix.T, matrix))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """|matrix x - target|^2 / 2."""

    matrix: jax.Array  # [M, N]
    target: jax.Array  # [M]

    @property
    def dimension(self) -> int:
        return self.matrix.shape[-1]

    def value(self, x: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(jnp.square(product(self.matrix, x) - self.target))

    def lipschitz(self) -> jax.Array:
        return _largest_square(self.matrix)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logistic:
    """Mean over samples of the logistic loss of labels 0 and 1 at the logits matrix x."""

    matrix: jax.Array  # [S, N]
    labels: jax.Array  # [S], of the matrix's dtype

    @property
    def dimension(self) -> int:
        return self.matrix.shape[-1]

    def value(self, x: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softplus((1 - 2 * self.labels) * product(self.matrix, x)))

    def lipschitz(self) -> jax.Array:
        """sigma_max^2 / (4 S); the published code's sigma_max is about 100 times as large."""
        return _largest_square(self.matrix) / (4 * self.matrix.shape[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuadraticForm:
    """(x - center)^T hessian (x - center) / 2."""

    hessian: jax.Array  # [N, N], symmetric and positive semidefinite
    center: jax.Array  # [N]

    @property
    def dimension(self) -> int:
        return self.center.shape[-1]

    def value(self, x: jax.Array) -> jax.Array:
        error = x - self.center
        return 0.5 * jnp.sum(error * product(self.hessian, error))

    def lipschitz(self) -> jax.Array:
        return spectral_bound(self.hessian)


def _like(value: Any, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(value, x.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class L1:
    """rho |x|_1."""

    rho: jax.Array  # scalar

    def value(self, x: jax.Array) -> jax.Array:
        # for a subgradient of 0 at 0, where the derivative of jnp.abs is 1
        return self.rho * jnp.sum(x * jnp.sign(x))

    def prox(self, v: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.sign(v) * jnp.maximum(jnp.abs(v) - _like(self.rho * step, v), 0)

    def nearest(self, x: jax.Array) -> jax.Array:
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ElasticNet:
    """rho |x|_1 + ridge |x|^2 / 2."""

    rho: jax.Array  # scalar
    ridge: jax.Array  # scalar

    def value(self, x: jax.Array) -> jax.Array:
        return L1(self.rho).value(x) + 0.5 * self.ridge * jnp.sum(jnp.square(x))

    def prox(self, v: jax.Array, step: jax.Array) -> jax.Array:
        return L1(self.rho).prox(v, step) / _like(1 + self.ridge * step, v)

    def nearest(self, x: jax.Array) -> jax.Array:
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NonNegative:
    """0 where no coordinate is negative, else infinity."""

    def value(self, x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(x >= 0), 0.0, jnp.inf)

    def prox(self, v: jax.Array, step: jax.Array) -> jax.Array:
        return self.nearest(v)

    def nearest(self, x: jax.Array) -> jax.Array:
        return jnp.maximum(x, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Box:
    """0 where low <= x <= high in all coordinates, else infinity."""

    low: jax.Array  # [N] or scalar
    high: jax.Array  # [N] or scalar

    def value(self, x: jax.Array) -> jax.Array:
        return jnp.where(jnp.all(x == self.nearest(x)), 0.0, jnp.inf)

    def prox(self, v: jax.Array, step: jax.Array) -> jax.Array:
        return self.nearest(v)

    def nearest(self, x: jax.Array) -> jax.Array:
        return jnp.clip(x, _like(self.low, x), _like(self.high, x))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Composite:
    """The task of minimising F = smooth_part + penalty, from 0; there is no noise in it.

    `loss` is F at the point of the penalty's domain that is nearest to the params, so that it is
    finite for extrapolated points that leave the domain.
    """

    smooth_part: SmoothPart
    penalty: Penalty
    lipschitz: jax.Array  # scalar, see `SmoothPart`

    def init(self, key: Key) -> jax.Array:
        """[N] zeros."""
        return jnp.zeros(self.smooth_part.dimension, self.lipschitz.dtype)

    def batch(self, key: Key, split: Split) -> tuple[()]:
        return ()

    def smooth(self, params: jax.Array, batch: Batch) -> jax.Array:
        return self.smooth_part.value(params)

    def loss(self, params: jax.Array, batch: Batch) -> jax.Array:
        feasible = self.penalty.nearest(params)
        return self.smooth_part.value(feasible) + self.penalty.value(feasible)

    def extra_args(self, batch: Batch) -> dict[str, Any]:
        """What proximal optimizers need; one that wants a subgradient differentiates `penalty`, one
        that takes gradients of f at other points, too, calls `gradient`.
        """
        return {
            "prox": self.penalty.prox,
            "penalty": self.penalty.value,
            "lipschitz": self.lipschitz,
            "gradient": jax.grad(self.smooth_part.value),
        }

    def normalize(self, loss: jax.Array) -> jax.Array:
        """Relative to F(0)."""
        zeros = jnp.zeros(self.smooth_part.dimension, self.lipschitz.dtype)
        return relative_loss(loss, self.loss(zeros, ()))
