"""What update rules see of a tensor: moment accumulators, Adafactor factors, time.

A feature is a product of arrays [channels, *shape] whose `shape` has the rank of the parameter and
only broadcasts to it: row and column statistics stay rows and columns. `learned_opt.mlp` multiplies
them out element by element.

Sources: arXiv 2203.11860 (features of small_fc), arXiv 2211.09760 (VeLO's), arXiv 1804.04235
(factored second moments).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Feature = tuple[jax.Array, ...]
TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


def learned_decays(initial: Sequence[float], delta: jax.Array) -> jax.Array:
    """Decays [n] that are `initial` at delta = 0 and in (-inf, 1) always: 1 - exp(10 (log(1 - b) /
    10 + delta)).
    """
    return 1.0 - jnp.exp(jnp.log1p(-jnp.asarray(initial, jnp.float32)) + 10.0 * delta)


def moments_init(params: Any, channels: int) -> Any:
    """Zero accumulators [channels, *leaf.shape] in float32, one per leaf."""
    return jax.tree.map(lambda p: jnp.zeros((channels, *jnp.shape(p)), jnp.float32), params)


def ema(decays: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """Exponential moving averages [n, ...] of `new` [...], one per decay [n]. No bias
    correction.
    """
    b = lax.expand_dims(decays, range(1, old.ndim))
    return b * old + (1.0 - b) * new[None]


class Factored(NamedTuple):
    """Adafactor's factors: row [n, ..., 1 at the largest axis], col [n, ..., 1 at the second
    largest axis].

    For tensors of rank 0 and 1 both are the unfactored second moment [n, *shape] (held once: `col`
    is empty).
    """

    row: jax.Array
    col: jax.Array


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(second largest, largest) axis, ties broken as the published code does: the later axis counts
    as larger.
    """
    if len(shape) < 2:
        return None
    order = np.argsort(shape, kind="stable")
    return int(order[-2]), int(order[-1])


def factored_init(params: Any, channels: int) -> Any:
    """Zero factors per leaf, as a tree of `Factored`."""

    def leaf(p: jax.Array) -> Factored:
        shape = jnp.shape(p)
        axes = factored_axes(shape)
        if axes is None:
            return Factored(jnp.zeros((channels, *shape)), jnp.zeros((channels, 0)))
        d1, d0 = axes
        keep = lambda axis: tuple(1 if i == axis else n for i, n in enumerate(shape))  # noqa: E731
        return Factored(jnp.zeros((channels, *keep(d0))), jnp.zeros((channels, *keep(d1))))

    return jax.tree.map(leaf, params)


def factored_update(decays: jax.Array, old: Factored, grad: jax.Array) -> Factored:
    """Averages of the squared gradient over the two largest axes. The mean is taken once for all
    decays.
    """
    square = grad * grad + 1e-30
    axes = factored_axes(grad.shape)
    if axes is None:
        return Factored(ema(decays, old.row, square), old.col)
    d1, d0 = axes
    row = ema(decays, old.row, jnp.mean(square, axis=d0, keepdims=True))
    return Factored(row, ema(decays, old.col, jnp.mean(square, axis=d1, keepdims=True)))


def safe_rsqrt(x: jax.Array) -> jax.Array:
    return lax.rsqrt(jnp.maximum(x, 1e-9))


def factored_scales(factored: Factored, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Row and column factor of the preconditioner: x -> x * row * col. Column factor 1 for ranks 0
    and 1.
    """
    axes = factored_axes(shape)
    if axes is None:
        return safe_rsqrt(factored.row + 1e-9), jnp.ones((1,) * factored.row.ndim)
    # axis d1 of the parameter is axis d1 + 1 here, behind the channels
    mean = jnp.mean(factored.row, axis=axes[0] + 1, keepdims=True)
    return safe_rsqrt(factored.row / (mean + 1e-9)), safe_rsqrt(factored.col)


def time_embedding(count: jax.Array) -> jax.Array:
    """tanh(t / tau - 1) for eleven time scales tau, [11]."""
    return jnp.tanh(count / jnp.asarray(TIME_SCALES, jnp.float32) - 1.0)


class Accumulators(NamedTuple):
    """Per leaf, in float32: momenta [n, *shape], second moments [k, *shape], Adafactor factors."""

    momentum: Any
    rms: Any
    factored: Any


def accumulators_init(params: Any, momentum: int, rms: int, factored: int) -> Accumulators:
    """Zeros, with that many channels each."""
    return Accumulators(
        moments_init(params, momentum), moments_init(params, rms), factored_init(params, factored)
    )


def accumulators_update(
    momentum: jax.Array, rms: jax.Array, factored: jax.Array, old: Accumulators, grads: Any
) -> Accumulators:
    """The averages after one more gradient, with decays [n], [k] and [n]."""
    return Accumulators(
        jax.tree.map(lambda m, g: ema(momentum, m, g), old.momentum, grads),
        jax.tree.map(lambda v, g: ema(rms, v, g * g), old.rms, grads),
        jax.tree.map(lambda g, f: factored_update(factored, f, g), grads, old.factored),
    )


def tensor_features(
    g: jax.Array,
    p: jax.Array,
    m: jax.Array,
    v: jax.Array,
    factored: Factored,
    rms_epsilon: float = 1e-6,
    vector_epsilon: float = 0.0,
) -> dict[str, Feature]:
    """What the published MLP rules know of one tensor, by name, each as the tuple of its factors.

    Args:
      g, p: gradient and parameter [*shape], float32.
      m, v: momenta [n, *shape] and second moment [1, *shape], the gradient included.
      factored: factors of n channels, the gradient included.
      rms_epsilon: inside rsqrt(v + .).
      vector_epsilon: for ranks 0 and 1, inside the rsqrt that preconditions the momenta by the
        unfactored second moment.
    """
    rsqrt = lax.rsqrt(v + rms_epsilon)
    scales = factored_scales(factored, g.shape)
    if factored_axes(g.shape) is None:
        row, col, momentum_scales = (
            factored.row,
            factored.row,
            (lax.rsqrt(factored.row + vector_epsilon),),
        )
    else:
        row, col, momentum_scales = factored.row, factored.col, scales
    return {
        "g": (g[None],),
        "clipped_g": (jnp.clip(g[None], -0.1, 0.1),),
        "p": (p[None],),
        "m": (m,),
        "v": (v,),
        "m_rsqrt": (m, rsqrt),
        "rsqrt": (rsqrt,),
        "factored_g": (g[None], *scales),
        "g_rsqrt": (g[None], rsqrt),
        "row": (row,),
        "col": (col,),
        "row_rsqrt": (lax.rsqrt(row + 1e-8),),
        "col_rsqrt": (lax.rsqrt(col + 1e-8),),
        "factored_m": (m, *momentum_scales),
    }
