"""What update rules see of a tensor: moment accumulators, Adafactor factors, time, and the small
MLP over these features.

A feature is an array [channels, *shape] whose `shape` has the rank of the parameter and only
broadcasts to it: row and column statistics stay rows and columns. Nothing of size features x
parameters is ever built: the first layer is a sum over channels of scalar weight times feature, per
broadcast shape, which XLA fuses with what follows into one pass over the parameter.

Sources: arXiv 2203.11860 (features of small_fc), arXiv 1804.04235 (factored second moments).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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


def mlp_init(key: jax.Array, sizes: Sequence[int]) -> dict[str, jax.Array]:
    """Weights {w0, b0, w1, ...}: truncated normal of standard deviation 1/sqrt(fan-in), zero
    biases.
    """
    theta = {}
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        std = 1.0 / np.sqrt(n)
        theta[f"w{i}"] = std * jax.random.truncated_normal(
            jax.random.fold_in(key, i), -2, 2, (n, m)
        )
        theta[f"b{i}"] = jnp.zeros((m,))
    return theta


def pass_through(theta: dict[str, jax.Array], channel: int) -> dict[str, jax.Array]:
    """The three-layer MLP with its first output made input `channel`, plus a tenth of what it was.

    Two hidden units carry the positive and the negative part of the input.
    """
    w0, w1, w2 = theta["w0"], theta["w1"], theta["w2"]
    w0 = w0.at[:, :2].set(0.0).at[channel, :2].set(jnp.array([1.0, -1.0]))
    w1 = w1.at[:, :2].set(0.0).at[[0, 1], [0, 1]].set(1.0)
    w2 = (0.1 * w2).at[:2, 0].set(jnp.array([1.0, -1.0]))
    return theta | {"w0": w0, "w1": w1, "w2": w2}


def mlp_per_parameter(
    theta: dict[str, jax.Array],
    features: Sequence[jax.Array],
    shared: jax.Array,
    shape: tuple[int, ...],
    epsilon: float,
) -> list[jax.Array]:
    """A ReLU MLP applied to every element of a tensor.

    Args:
      theta: {w0, b0, w1, ...}; the rows of w0 are the channels of `features` in order, then
        `shared`.
      features: arrays [channels, *broadcasts to shape]; each channel is divided by its root mean
        square over the tensor.
      shared: [k] inputs that are equal for all elements; not normalised.
      shape: the tensor's shape.
      epsilon: added to the mean square.

    Returns:
      The outputs, each of `shape`.
    """
    w0, b0 = theta["w0"], theta["b0"]
    width, rank = w0.shape[1], len(shape)
    channels = sum(len(f) for f in features)

    def column(vector: jax.Array) -> jax.Array:
        return vector.reshape(-1, *(1,) * rank)

    # hidden units are a leading axis: the program's size does not depend on their number
    parts = {(1,) * rank: column(b0 + shared @ w0[channels:])}
    start = 0
    for feature in features:
        # a broadcast axis repeats every element equally often, so its mean square is that of the
        # small array
        mean_square = jnp.mean(feature * feature, axis=tuple(range(1, rank + 1)))
        weight = w0[start : start + len(feature)] * lax.rsqrt(mean_square + epsilon)[:, None]
        start += len(feature)
        for w, f in zip(weight, feature, strict=True):
            term = column(w) * f[None]
            parts[f.shape] = parts[f.shape] + term if f.shape in parts else term
    hidden = jnp.broadcast_to(sum(parts.values()), (width, *shape))
    for layer in range(1, len(theta) // 2):
        hidden = jax.nn.relu(hidden)
        w, b = theta[f"w{layer}"], theta[f"b{layer}"]
        hidden = sum(
            (column(wi) * h[None] for wi, h in zip(w, hidden, strict=True)), start=column(b)
        )
    return list(hidden)
