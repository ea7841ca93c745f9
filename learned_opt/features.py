"""What update rules see of a tensor: moment accumulators, Adafactor factors, time.

A feature is a product of arrays [channels, *shape] whose `shape` has the rank of the parameter and
only broadcasts to it: row and column statistics stay rows and columns. `learned_opt.mlp` multiplies
them out element by element.

Sources: arXiv 2203.11860 (features of small_fc), arXiv 2211.09760 (VeLO's), arXiv 1804.04235
(factored second moments).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from learned_opt.mlp import Feature

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


@dataclasses.dataclass(frozen=True)
class Clip:
    """x in float32, every element within plus or minus `bound`."""

    bound: float = math.inf

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        return x if math.isinf(self.bound) else jnp.clip(x, -self.bound, self.bound)


def _read(g: jax.Array, beside: jax.Array, clip: float) -> jax.Array:
    """The clipped gradient for one average, `beside`: XLA would store what several of them share,
    the clipped gradient or its square, and storing costs more than computing it again.
    """
    return Clip(clip)(lax.optimization_barrier((jnp.asarray(g), beside))[0])


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


def factored_init(p: jax.Array, channels: int) -> Factored:
    """Zero factors of one tensor."""
    shape = jnp.shape(p)
    axes = factored_axes(shape)
    if axes is None:
        return Factored(jnp.zeros((channels, *shape)), jnp.zeros((channels, 0)))
    d1, d0 = axes
    keep = lambda axis: tuple(1 if i == axis else n for i, n in enumerate(shape))  # noqa: E731
    return Factored(jnp.zeros((channels, *keep(d0))), jnp.zeros((channels, *keep(d1))))


def factored_update(
    decays: jax.Array,
    old: Factored,
    grad: jax.Array,
    clip: float = math.inf,
) -> Factored:
    """Averages of the squared gradient over the two largest axes. The mean is taken once for all
    decays. The gradient's elements are clipped to plus or minus `clip`.
    """
    axes = factored_axes(grad.shape)
    if axes is None:
        square = jnp.square(_read(grad, old.row, clip))
        return Factored(ema(decays, old.row, square + 1e-30), old.col)
    d1, d0 = axes
    over_d0 = jnp.mean(jnp.square(_read(grad, old.row, clip)), axis=d0, keepdims=True)
    over_d1 = jnp.mean(jnp.square(_read(grad, old.col, clip)), axis=d1, keepdims=True)
    row, col = ema(decays, old.row, over_d0 + 1e-30), ema(decays, old.col, over_d1 + 1e-30)
    return Factored(row, col)


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
    """Per leaf, in float32: momenta [n, *shape], second moments [k, *shape], and Adafactor's
    factors, see `Factored`. One tree for each, as wrappers such as flax's nnx expect of a state.
    """

    momentum: Any
    rms: Any
    row: Any
    col: Any


def accumulators_init(params: Any, momentum: int, rms: int, factored: int) -> Accumulators:
    """Zeros, with that many channels each."""
    factors = jax.tree.map(lambda p: factored_init(p, factored), params)
    row, col = _trees(params, factors)
    return Accumulators(moments_init(params, momentum), moments_init(params, rms), row, col)


def _trees(params: Any, factors: Any) -> tuple[Any, Any]:
    """A tree of `Factored` as two trees."""
    row = jax.tree.map(lambda _, f: f.row, params, factors)
    return row, jax.tree.map(lambda _, f: f.col, params, factors)


def accumulators_update(
    momentum: jax.Array,
    rms: jax.Array,
    factored: jax.Array,
    old: Accumulators,
    grads: Any,
    clip: float = math.inf,
) -> Accumulators:
    """The averages after one more gradient, of which every element is clipped to plus or minus
    `clip`, with decays [n], [k] and [n].
    """

    factors = jax.tree.map(
        lambda g, row, col: factored_update(factored, Factored(row, col), g, clip),
        grads, old.row, old.col,
    )  # fmt: skip
    return Accumulators(
        jax.tree.map(lambda g, m: ema(momentum, m, _read(g, m, clip)), grads, old.momentum),
        jax.tree.map(lambda g, v: ema(rms, v, jnp.square(_read(g, v, clip))), grads, old.rms),
        *_trees(grads, factors),
    )


# of `tensor_features`, in the order in which VeLO's and Celo2's weights read them
NAMES = (
    "g", "clipped_g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "g_rsqrt",
    "row", "col", "row_rsqrt", "col_rsqrt", "factored_m",
)  # fmt: skip


def tensor_features(
    g: jax.Array,
    p: jax.Array,
    m: jax.Array,
    v: jax.Array,
    row: jax.Array,
    col: jax.Array,
    rms_epsilon: float = 1e-6,
    vector_epsilon: float = 0.0,
    clip: float = math.inf,
) -> dict[str, Feature]:
    """What the published MLP rules know of one tensor, by name, each as the tuple of its factors.

    Args:
      g, p: gradient and parameter [*shape].
      m, v: momenta [n, *shape] and second moment [1, *shape], the gradient included.
      row, col: factors of n channels, see `Factored`, the gradient included.
      rms_epsilon: inside rsqrt(v + .).
      vector_epsilon: for ranks 0 and 1, inside the rsqrt that preconditions the momenta by the
        unfactored second moment.
      clip: the gradient's elements are clipped to plus or minus this.
    """
    raw, scales = jnp.asarray(g)[None], factored_scales(Factored(row, col), g.shape)
    momentum_scales = scales
    if factored_axes(g.shape) is None:
        col, momentum_scales = row, (lax.rsqrt(row + vector_epsilon),)
    gradient, rsqrt = Partial(Clip(clip), raw), Partial(Rsqrt(rms_epsilon), v)
    return {
        "g": (gradient,),
        "clipped_g": (Partial(Clip(min(clip, 0.1)), raw),),
        "p": (Partial(Clip(), jnp.asarray(p)[None]),),
        "m": (m,),
        "v": (v,),
        "m_rsqrt": (m, rsqrt),
        "rsqrt": (rsqrt,),
        "factored_g": (gradient, *scales),
        "g_rsqrt": (gradient, rsqrt),
        "row": (row,),
        "col": (col,),
        "row_rsqrt": (lax.rsqrt(row + 1e-8),),
        "col_rsqrt": (lax.rsqrt(col + 1e-8),),
        "factored_m": (m, *momentum_scales),
    }


@dataclasses.dataclass(frozen=True)
class Rsqrt:
    """1 / sqrt(x + epsilon)."""

    epsilon: float

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.rsqrt(x + self.epsilon)

    def squared(self, x: jax.Array) -> jax.Array:
        return 1.0 / (x + self.epsilon)
