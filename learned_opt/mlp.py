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
import operator
from collections.abc import Callable, Sequence

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
    if not shape:
        features = [tuple(factor[:, None] for factor in feature) for feature in features]
        return [x[0] for x in mlp_per_parameter(theta, features, shared, (1,), epsilon, axes)]
    rank = len(shape)
    axes = tuple(range(-rank, 0)) if axes is None else tuple(a for a in axes if a >= -rank)
    counts = [max(len(factor) for factor in feature) for feature in features]
    *weights, weights_of_shared = jnp.split(theta["w0"], np.cumsum(counts))

    whole: list[tuple[Feature, jax.Array]] = []
    small: dict[Shape, list[tuple[jax.Array, jax.Array]]] = {}
    for feature, w in zip(features, weights, strict=True):
        part = np.broadcast_shapes(*(factor.shape[1:] for factor in feature))
        if part == shape:
            whole.append((feature, w))
        else:
            small.setdefault(part, []).append((product(feature), w))
    parts = [_column(theta["b0"] + shared @ weights_of_shared, rank)]
    for group in small.values():
        x, w = (jnp.concatenate(arrays) for arrays in zip(*group, strict=True))
        # repeated along the axes it lacks, it has the mean square of the small array
        x = x * lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + epsilon)
        parts.append(jnp.sum(_column(w, rank) * x[:, None], axis=0))
    features = [feature for feature, _ in whole]
    channels = [channel for feature in features for channel in _channels(feature)]
    scale = lax.rsqrt(_mean_squares(channels, axes) + epsilon)
    w = _column(jnp.concatenate([w for _, w in whole]), rank) * scale[:, None]

    wide = max(b.shape[-1] for name, b in theta.items() if name.startswith("b")) > NARROW
    layers = [(theta[f"w{i}"], theta[f"b{i}"]) for i in range(1, len(theta) // 2)]
    if wide:
        return _blocked(parts, w, features, layers, shape)
    return _unrolled(parts, w, channels, layers, shape)


def product(feature: Sequence[jax.Array]) -> jax.Array:
    """Its factors multiplied."""
    return functools.reduce(operator.mul, feature)


def _column(array: jax.Array, rank: int) -> jax.Array:
    """With axes of size one behind, to broadcast against a tensor."""
    return array.reshape(*array.shape, *(1,) * rank)


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


def _mean_squares(channels: Sequence[Feature], axes: Shape) -> jax.Array:
    """The mean square of each product over `axes`, which are kept with size 1.

    The squares are products of squares: squares of products would share the products with the MLP,
    and XLA would store what is shared, one array of the tensor's size per feature.
    """
    squares = tuple(product([factor * factor for factor in channel]) for channel in channels)
    sums = jnp.stack(_sum_last(squares))[..., None]
    return jnp.mean(sums, axes, keepdims=True) / squares[0].shape[-1]


def _numbers(array: jax.Array, shape: Shape) -> list[list[jax.Array]]:
    """The entries of a matrix [n, m, *broadcasts], row by row, each repeated to `shape`, which
    begins with an axis of size one.

    Cut out together with that axis they need no reshaping: of three operations per number XLA is
    spared one, and of loops of more than a thousand operations it makes several, storing whole
    tensors in between.
    """
    n, m, *rest = array.shape
    kept = [axis for axis, size in enumerate(rest) if size > 1]
    entries = lax.split(array.reshape(n * m, *(rest[axis] for axis in kept)), (1,) * (n * m))
    places = (0, *(axis + 1 for axis in kept))
    spread = [lax.broadcast_in_dim(entry, shape, places) for entry in entries]
    return [spread[i * m : (i + 1) * m] for i in range(n)]


def _unrolled(parts, weights, channels, layers, shape: Shape) -> list[jax.Array]:
    """Number by number: one loop for XLA, nothing stored.

    Args:
      parts: summands of the first layer [units, *broadcasts].
      weights: [channels, units, *broadcasts] of `channels`, products of the tensor's shape.
      layers: matrix and bias of the layers above.
    """
    numbers = functools.partial(_numbers, shape=(1, *shape))
    xs = [product([factor[None] for factor in channel]) for channel in channels]
    starts = zip(*(numbers(part[None])[0] for part in parts), strict=True)
    hidden = [
        sum(
            (x * w for x, w in zip(xs, column, strict=True)),
            start=functools.reduce(operator.add, start),
        )
        for column, start in zip(zip(*numbers(weights), strict=True), starts, strict=True)
    ]
    for matrix, bias in layers:
        hidden = [jax.nn.relu(h) for h in hidden]
        hidden = [
            sum((h * w for h, w in zip(hidden, column, strict=True)), start=b)
            for column, b in zip(
                zip(*numbers(matrix), strict=True), *numbers(bias[None]), strict=True
            )
        ]
    return [h[0] for h in hidden]


def _blocked(parts, weights, features, layers, shape: Shape) -> list[jax.Array]:
    """As matrix products, on a block of the tensor at a time along its longest axis."""
    axis = int(np.argmax(shape))
    rows = max(1, BLOCK * shape[axis] // math.prod(shape))

    def block(cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
        # not channel by channel: what is cut out of a loop's input before the loop is stored
        xs = jnp.concatenate([product([cut(factor) for factor in feature]) for feature in features])
        if weights.ndim == 2 or weights.size == math.prod(weights.shape[:2]):
            hidden = jnp.tensordot(weights.reshape(weights.shape[:2]).T, xs, 1)
        else:
            hidden = jnp.sum(cut(weights) * xs[:, None], axis=0)
        hidden = sum((cut(part) for part in parts), start=hidden)
        for matrix, bias in layers:
            hidden = jnp.tensordot(matrix.T, jax.nn.relu(hidden), 1) + _column(bias, len(shape))
        return hidden

    if rows >= shape[axis]:
        return list(block(lambda x: x))

    def fill(i: jax.Array, filled: jax.Array) -> jax.Array:
        # the last block is moved back inside: what it shares with its neighbour is computed twice
        start = jnp.minimum(i * rows, shape[axis] - rows)

        def cut(x: jax.Array) -> jax.Array:
            at = axis - len(shape)
            return x if x.shape[at] == 1 else lax.dynamic_slice_in_dim(x, start, rows, at)

        found = block(cut)
        return lax.dynamic_update_slice_in_dim(filled, found, start, axis + 1)

    outputs = len(layers[-1][1]) if layers else weights.shape[1]
    blocks = -(-shape[axis] // rows)
    return list(lax.fori_loop(0, blocks, fill, jnp.zeros((outputs, *shape))))
