"""Convex functions K whose gradients Lion-K (arXiv 2310.05898) steps along, with their conjugates,
which say what problem it then solves.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax


class Shape(Protocol):
    """What the kappas read of a rule."""

    @property
    def epsilon(self) -> float: ...
    @property
    def p(self) -> float: ...
    @property
    def k(self) -> int: ...


def _scaled(c: jax.Array) -> jax.Array:
    """`c` over its largest magnitude, so that no power of it overflows or all of them vanish."""
    # the directions that use this do not depend on the scale, so neither do their derivatives
    scale = lax.stop_gradient(jnp.max(jnp.abs(c)))
    return c / jnp.where(scale >= jnp.finfo(c.dtype).tiny, scale, 1.0)


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1.0)


def _l2_direction(c: jax.Array, rule: Shape) -> jax.Array:
    del rule
    u = _scaled(c)
    return u / jnp.sqrt(_nonzero(jnp.sum(u * u)))


def _lp_direction(c: jax.Array, rule: Shape) -> jax.Array:
    u = _scaled(c)
    norm = _nonzero(jnp.sum(jnp.abs(u) ** rule.p)) ** (1 / rule.p)
    # a power below 1 has no derivative at zero
    return jnp.sign(u) * (_nonzero(jnp.abs(u)) / norm) ** (rule.p - 1)


def _linf_direction(c: jax.Array, rule: Shape) -> jax.Array:
    del rule
    places = jnp.arange(c.size).reshape(c.shape)
    return jnp.where(places == jnp.argmax(jnp.abs(c)), jnp.sign(c), 0.0)


def _largest(c: jax.Array, rule: Shape) -> tuple[jax.Array, jax.Array]:
    """The k largest magnitudes (all of fewer) and where they are."""
    return lax.top_k(jnp.abs(c).ravel(), min(rule.k, c.size))


def _top_k_direction(c: jax.Array, rule: Shape) -> jax.Array:
    # by place: more than k magnitudes may equal the k-th
    chosen = jnp.zeros(c.size, bool).at[_largest(c, rule)[1]].set(True)
    return jnp.where(chosen.reshape(c.shape), jnp.sign(c), 0.0)


def _softmax(c: jax.Array, rule: Shape) -> jax.Array:
    return jax.nn.softmax((c - lax.stop_gradient(jnp.max(c))) / rule.epsilon, axis=None)


def _matrix(c: jax.Array) -> jax.Array:
    """Rows are all axes but the last; a vector is one row."""
    return c.reshape(-1, c.shape[-1]) if c.ndim > 1 else c.reshape(1, -1)


def _polar(c: jax.Array, rule: Shape) -> jax.Array:
    del rule
    matrix = _matrix(_scaled(c))
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    rank = s > max(matrix.shape) * jnp.finfo(s.dtype).eps * s[0]
    return jnp.matmul(u * rank[None], vt, precision="highest").reshape(c.shape)


def _log_cosh(c: jax.Array, rule: Shape) -> jax.Array:
    u = c / rule.epsilon
    return rule.epsilon * jnp.sum(jnp.logaddexp(u, -u) - jnp.log(2.0))


def _within(norm: jax.Array, penalty: jax.typing.ArrayLike = 0.0) -> jax.Array:
    """`penalty` where `norm` is at most 1, up to the rounding that steps along the boundary add up;
    infinity elsewhere.
    """
    slack = float(jnp.finfo(norm.dtype).eps) ** (2 / 3)
    return jnp.where(norm <= 1.0 + slack, penalty, jnp.inf)


def _norm(y: jax.Array, order: float) -> jax.Array:
    return jnp.linalg.norm(y.ravel(), ord=order)


def _box(y: jax.Array, penalty: jax.typing.ArrayLike = 0.0) -> jax.Array:
    return _within(jnp.max(jnp.abs(y)), penalty)


def _singular_values(c: jax.Array) -> jax.Array:
    return jnp.linalg.svd(_matrix(c), compute_uv=False)


def _entropy(y: jax.Array) -> jax.Array:
    """The sum of y log y, finite up to where rounding makes a zero negative."""
    return jnp.sum(jax.scipy.special.xlogy(jnp.maximum(y, 0.0), jnp.maximum(y, 0.0)))


def _simplex(y: jax.Array, rule: Shape) -> jax.Array:
    off = jnp.maximum(jnp.abs(jnp.sum(y) - 1.0), -jnp.min(y))
    return _within(1.0 + off, rule.epsilon * _entropy(y))


class Kappa(NamedTuple):
    """A convex K of one leaf. Its functions take the leaf (of any float type) and the rule, whose
    `epsilon`, `p` and `k` they read.

    gradient: a subgradient of K at c; zero at zero, but for logsumexp.
    value: K(c), a scalar.
    conjugate: K*(y) = sup_c <c, y> - K(c), a scalar; infinity outside of its domain.
    constraint: what (1/lam) K*(lam x) asks of the leaf x.
    """

    gradient: Callable[[jax.Array, Shape], jax.Array]
    value: Callable[[jax.Array, Shape], jax.Array]
    conjugate: Callable[[jax.Array, Shape], jax.Array]
    constraint: str


KAPPAS: dict[str, Kappa] = {
    "l1": Kappa(
        lambda c, _: jnp.sign(c),
        lambda c, _: _norm(c, 1),
        lambda y, _: _box(y),
        "|x|_inf <= 1/lam",
    ),
    "half_l2_squared": Kappa(
        lambda c, _: c,
        lambda c, _: jnp.sum(c * c) / 2,
        lambda y, _: jnp.sum(y * y) / 2,
        "lam/2 |x|_2^2",
    ),
    "l2": Kappa(
        _l2_direction,
        lambda c, _: _norm(c, 2),
        lambda y, _: _within(_norm(y, 2)),
        "|x|_2 <= 1/lam",
    ),
    "lp": Kappa(
        _lp_direction,
        lambda c, rule: _norm(c, rule.p),
        lambda y, rule: _within(_norm(y, rule.p / (rule.p - 1))),
        "|x|_q <= 1/lam",
    ),
    "linf": Kappa(
        _linf_direction,
        lambda c, _: _norm(c, np.inf),
        lambda y, _: _within(_norm(y, 1)),
        "|x|_1 <= 1/lam",
    ),
    "thresholded_l1": Kappa(
        lambda c, rule: jnp.where(jnp.abs(c) > rule.epsilon, jnp.sign(c), 0.0),
        lambda c, rule: jnp.sum(jnp.maximum(jnp.abs(c) - rule.epsilon, 0.0)),
        lambda y, rule: _box(y, rule.epsilon * _norm(y, 1)),
        "e |x|_1, |x|_inf <= 1/lam",
    ),
    "huber": Kappa(
        lambda c, rule: jnp.clip(c / rule.epsilon, -1.0, 1.0),
        lambda c, rule: jnp.sum(optax.losses.huber_loss(c, delta=rule.epsilon)) / rule.epsilon,
        lambda y, rule: _box(y, rule.epsilon / 2 * jnp.sum(y * y)),
        "e lam/2 |x|_2^2, |x|_inf <= 1/lam",
    ),
    "pseudo_huber": Kappa(
        lambda c, rule: c / jnp.hypot(c, rule.epsilon),
        lambda c, rule: jnp.sum(jnp.hypot(c, rule.epsilon)),
        lambda y, rule: _box(y, -rule.epsilon * jnp.sum(jnp.sqrt(jnp.maximum(1 - y * y, 0.0)))),
        "-e/lam sum sqrt(1 - (lam x)^2), |x|_inf < 1/lam",
    ),
    "log_cosh": Kappa(
        lambda c, rule: jnp.tanh(c / rule.epsilon),
        _log_cosh,
        lambda y, rule: _box(y, rule.epsilon / 2 * (_entropy(1 + y) + _entropy(1 - y))),
        "e/(2 lam) sum h(1 + lam x) + h(1 - lam x), |x|_inf < 1/lam",
    ),
    "top_k": Kappa(
        _top_k_direction,
        lambda c, rule: jnp.sum(_largest(c, rule)[0]),
        lambda y, rule: _within(jnp.maximum(_norm(y, np.inf), _norm(y, 1) / rule.k)),
        "|x|_inf <= 1/lam, |x|_1 <= k/lam",
    ),
    "logsumexp": Kappa(
        _softmax,
        lambda c, rule: rule.epsilon * jax.nn.logsumexp(c / rule.epsilon),
        _simplex,
        "e/lam sum h(lam x), x > 0, sum x = 1/lam",
    ),
    "nuclear": Kappa(
        _polar,
        lambda c, _: jnp.sum(_singular_values(c)),
        lambda y, _: _within(_singular_values(y)[0]),
        "sigma_max(x) <= 1/lam",
    ),
}
