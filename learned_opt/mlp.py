"""The small MLP that an update rule applies to every element of a tensor.

Nothing of size features x parameters is ever built. The mean squares that normalise the inputs are
one reduction of many operands, a single pass over the tensor; the MLP is a second pass: for narrow
layers written out number by number, which XLA fuses into one loop, for wide ones matrix products
over blocks of the tensor that fit in the cache. Inputs that are rows or columns stay rows and
columns.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Weights = dict[str, jax.Array]
Feature = tuple[jax.Array, ...]
Shape = tuple[int, ...]

NARROW = 8
BLOCK = 8192


def mlp_init(key: jax.Array, sizes: Sequence[int]) -> Weights:
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


def pass_through(theta: Weights, channel: int) -> Weights:
    """The three-layer MLP with its first output made input `channel`, plus a tenth of what it was.

    Two hidden units carry the positive and the negative part of the input.
    """
    w0, w1, w2 = theta["w0"], theta["w1"], theta["w2"]
    w0 = w0.at[:, :2].set(0.0).at[channel, :2].set(jnp.array([1.0, -1.0]))
    w1 = w1.at[:, :2].set(0.0).at[[0, 1], [0, 1]].set(1.0)
    w2 = (0.1 * w2).at[:2, 0].set(jnp.array([1.0, -1.0]))
    return theta | {"w0": w0, "w1": w1, "w2": w2}


@functools.partial(jax.jit, static_argnames=("shape", "epsilon", "axes"))
def mlp_per_parameter(
    theta: Weights,
    features: Sequence[Feature],
    shared: jax.Array,
    shape: Shape,
    epsilon: float,
    axes: tuple[int, ...] | None = None,
) -> list[jax.Array]:
    """A ReLU MLP applied to every element of a tensor.

    Args:
      theta: {w0, b0, w1, ...}; the rows of w0 are the channels of `features` in order, then
        `shared`.
      features: products, each the tuple of its factors [channels or 1, *broadcasts to shape]. Each
        channel is divided by its root mean square.
      shared: [k] inputs that are equal for all elements; not normalised.
      shape: the tensor's shape.
      epsilon: added to the mean square.
      axes: where the mean square is taken, negative numbers; None: over the whole tensor. Axes that
        the tensor does not have are left out.

    Returns:
      The outputs, each of `shape`.
    """
    rank = len(shape)
    axes = tuple(range(-rank, 0)) if axes is None else tuple(a for a in axes if a >= -rank)
    channels = [channel for feature in features for channel in _channels(feature)]
    scales = [lax.rsqrt(s + epsilon) for s in _mean_squares(channels, shape, axes)]
    wide = max(b.shape[-1] for name, b in theta.items() if name.startswith("b")) > NARROW
    first = theta["b0"] + shared @ theta["w0"][len(channels) :]
    inputs = [(*channel, scale) for channel, scale in zip(channels, scales, strict=True)]
    return (_blocked if wide else _unrolled)(theta, first, inputs, shape)


def _channels(feature: Feature) -> list[Feature]:
    """A product of arrays [*broadcasts] for every channel."""
    pick = lambda f, i: lax.index_in_dim(f, min(i, len(f) - 1), keepdims=False)  # noqa: E731
    count = max(len(factor) for factor in feature)
    return [tuple(pick(factor, i) for factor in feature) for i in range(count)]


@jax.custom_jvp
def _sum_last(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The sum of each array over the last axis, in one loop over what they are made of."""
    zeros = (jnp.zeros(()),) * len(arrays)
    add = lambda old, new: tuple(x + y for x, y in zip(old, new, strict=True))  # noqa: E731
    return tuple(lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,)))


@_sum_last.defjvp
def _(primals, tangents):
    return _sum_last(*primals), tuple(jnp.sum(t, axis=-1) for t in tangents[0])


def _mean_squares(channels: Sequence[Feature], shape: Shape, axes: Shape) -> list[jax.Array]:
    """The mean square of each product over `axes`, which are kept with size 1.

    The squares are products of squares: squares of products would share the products with the MLP,
    and XLA would store what is shared, one array of the tensor's size per feature.
    """
    squares = [math.prod(factor * factor for factor in channel) for channel in channels]
    whole = [i for i, s in enumerate(squares) if shape and s.shape == shape]
    rows = _sum_last(tuple(squares[i] for i in whole)) if whole else ()
    # what is repeated along the axes it lacks has the mean square of the small array
    means = [s if i in whole else jnp.mean(s, axes, keepdims=True) for i, s in enumerate(squares)]
    for i, row in zip(whole, rows, strict=True):
        means[i] = jnp.mean(row[..., None], axes, keepdims=True) / shape[-1]
    return means


def _numbers(array: jax.Array) -> list:
    """The elements of a vector or of the rows of a matrix."""
    if array.ndim == 2:
        return [_numbers(row) for row in array]
    return [x.reshape(()) for x in lax.split(array, (1,) * len(array))]


def _unrolled(theta: Weights, first: jax.Array, inputs: list[Feature], shape: Shape):
    """Layers number by number: one loop for XLA, nothing stored."""
    xs = [math.prod(factors) for factors in inputs]
    w, hidden = _numbers(theta["w0"][: len(xs)]), []
    for unit, bias in enumerate(_numbers(first)):
        parts: dict[Shape, jax.Array] = {}
        for x, weights in zip(xs, w, strict=True):
            term = x * weights[unit]
            parts[x.shape] = parts[x.shape] + term if x.shape in parts else term
        hidden.append(jnp.broadcast_to(sum(parts.values(), start=bias), shape))
    for layer in range(1, len(theta) // 2):
        w, hidden = _numbers(theta[f"w{layer}"]), [jax.nn.relu(h) for h in hidden]
        hidden = [
            sum((h * weights[unit] for h, weights in zip(hidden, w, strict=True)), start=bias)
            for unit, bias in enumerate(_numbers(theta[f"b{layer}"]))
        ]
    return hidden


def _blocked(theta: Weights, first: jax.Array, inputs: list[Feature], shape: Shape):
    """Layers as matrix products, a block of the tensor at a time along its longest axis."""
    last = len(theta) // 2 - 1
    outputs = theta[f"b{last}"].shape[0]
    size = math.prod(shape)
    axis = int(np.argmax(shape)) if shape else 0
    rows = max(1, BLOCK * shape[axis] // size) if shape else 1

    def layers(xs: list[jax.Array]) -> jax.Array:
        hidden = first.reshape(-1, *(1,) * len(shape))
        for part in {x.shape: None for x in xs}:
            rows_of_w0 = np.array([i for i, x in enumerate(xs) if x.shape == part])
            stacked = jnp.stack([x for x in xs if x.shape == part])
            hidden = hidden + jnp.tensordot(theta["w0"][rows_of_w0].T, stacked, 1)
        hidden = jnp.broadcast_to(
            hidden, (len(first), *np.broadcast_shapes(*(x.shape for x in xs)))
        )
        for layer in range(1, last + 1):
            bias = theta[f"b{layer}"].reshape(-1, *(1,) * len(shape))
            hidden = jnp.tensordot(theta[f"w{layer}"].T, jax.nn.relu(hidden), 1) + bias
        return hidden

    if not shape or rows >= shape[axis]:
        return list(layers([math.prod(factors) for factors in inputs]))

    def cut(x: jax.Array, start: jax.Array) -> jax.Array:
        return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, rows, axis)

    def fill(i: jax.Array, filled: jax.Array) -> jax.Array:
        # the last block is moved back inside: what it shares with its neighbour is computed twice
        start = jnp.minimum(i * rows, shape[axis] - rows)
        block = layers([math.prod(cut(factor, start) for factor in factors) for factors in inputs])
        return lax.dynamic_update_slice_in_dim(filled, block, start, axis + 1)

    blocks = -(-shape[axis] // rows)
    return list(lax.fori_loop(0, blocks, fill, jnp.zeros((outputs, *shape))))
