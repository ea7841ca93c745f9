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
from jax.experimental.xla_metadata import set_xla_metadata
from jax.tree_util import Partial

# A feature is a product; a factor is an array or a function of single elements with its arrays.
Weights = dict[str, jax.Array]
Factor = jax.Array | Partial
Feature = tuple[Factor, ...]
Values = tuple[jax.Array, ...]
Shape = tuple[int, ...]

NARROW = 8  # units: wider layers are matrix products
VECTOR = 16  # elements that the widest registers hold
BLOCK = 8192  # elements of a tensor whose hidden units fit in the cache
CHAINS = 4  # of additions that go on side by side


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


def mlp_per_parameter(
    theta: Weights,
    features: Sequence[Feature],
    shared: jax.Array,
    shape: Shape,
    epsilon: float,
    axes: tuple[int, ...] | None = None,
    pooled: int = 0,
    stored: bool = False,
) -> list[jax.Array]:
    """A ReLU MLP applied to every element of a tensor.

    Args:
      theta: {w0, b0, w1, ...}; the rows of w0 are the channels of `features` in order, then
        `shared`.
      features: products, each the tuple of its factors [channels or 1, *broadcasts to shape]. Each
        channel is divided by its root mean square. A factor may be a `Partial`, a function of
        single elements with its arrays: it is computed where it is used and never stored.
      shared: [k] inputs that are equal for all elements; not normalised.
      shape: the tensor's shape.
      epsilon: added to the mean square.
      axes: where the mean square is taken, negative numbers; None: over the whole tensor. Axes that
        the tensor does not have are left out.
      pooled: of how many outputs, the last ones, only the mean over the tensor is wanted.
      stored: the outputs are read more than once, and are not to be computed by each reader.

    Returns:
      The outputs, each of `shape`, the pooled ones scalars.
    """
    if not shape:
        features = jax.tree.map(lambda x: x[:, None], features)
        found = mlp_per_parameter(theta, features, shared, (1,), epsilon, axes, pooled, stored)
        return [x.reshape(()) for x in found]
    arrays, structure = jax.tree.flatten(features)
    places = {id(array): array for array in arrays}
    order = tuple(list(places).index(id(array)) for array in arrays)
    axes = tuple(range(-len(shape), 0)) if axes is None else axes
    axes = tuple(axis for axis in axes if axis >= -len(shape))
    return _mlp(
        theta, list(places.values()), shared,
        order, structure, shape, epsilon, axes, pooled, stored,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=range(3, 10))
def _mlp(theta, arrays, shared, order, structure, shape, epsilon, axes, pooled: int, stored: bool):
    rank = len(shape)
    features: Sequence[Feature] = structure.unflatten([arrays[i] for i in order])
    # What the statistics and the MLP both compute XLA would compute once, and store. They share
    # the arrays alone.
    apart = lax.optimization_barrier(arrays)
    watched: Sequence[Feature] = structure.unflatten([apart[i] for i in order])
    values = [tuple(map(_value, feature)) for feature in features]
    counts = [max(len(factor) for factor in value) for value in values]
    *weights, weights_of_shared = jnp.split(theta["w0"], np.cumsum(counts))

    whole: list[int] = []
    small: dict[Shape, list[int]] = {}
    for i, value in enumerate(values):
        part = np.broadcast_shapes(*(factor.shape[1:] for factor in value))
        (whole if part == shape else small.setdefault(part, [])).append(i)
    parts = [_column(theta["b0"] + shared @ weights_of_shared, rank)]
    layers = [(theta[f"w{i}"], theta[f"b{i}"]) for i in range(1, len(theta) // 2)]
    wide = _widest(theta["b0"], layers) > NARROW
    spread: list[tuple[jax.Array, jax.Array]] = []
    for group in small.values():
        x = jnp.concatenate([product(values[i]) for i in group])
        # repeated along the axes it lacks, it has the mean square of the small array
        x = x * lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + epsilon)
        spread.append((x, jnp.concatenate([weights[i] for i in group])))
    if not wide:
        parts += [jnp.tensordot(w.T, x, 1) for x, w in spread]
        spread = []
    features, watched = [features[i] for i in whole], [watched[i] for i in whole]
    w = jnp.concatenate([weights[i] for i in whole])
    # what is split over devices explicitly has no axes to merge
    split = any(any(jax.typeof(x).sharding.spec) for x in arrays)
    merged = shape if wide or split else merged_shape(shape, axes)
    if merged != shape:
        features, watched = (_merge_features(f, shape, merged) for f in (features, watched))
        parts = [jnp.broadcast_to(_total(parts), (len(parts[0]), *shape)).reshape(-1, *merged)]
        axes = axes[rank - len(merged) :]
    run = functools.partial(_on_whole, shape=merged, axes=axes, epsilon=epsilon, pooled=pooled)
    # as part of another loop the merged one would take that one's shape
    run = _apart(run) if stored or merged != shape else run
    found = run(parts, features, watched, w, spread, layers)
    return [x.reshape(shape) if i < len(found) - pooled else x for i, x in enumerate(found)]


def _widest(units: jax.Array, layers: list[tuple[jax.Array, jax.Array]]) -> int:
    return max(map(len, (units, *(bias for _, bias in layers))))


def _apart(function: Callable) -> Callable:
    """The function as a computation of its own, that XLA neither inlines nor fuses with others."""

    @jax.jit
    def body(*args):
        with set_xla_metadata(inlineable="true"):  # what it calls in turn
            return function(*args)

    def call(*args):
        with set_xla_metadata(inlineable="false"):
            return body(*args)

    return call


def _on_whole(parts, features, watched, w, spread, layers, shape: Shape, axes, epsilon, pooled):
    """The MLP on features as large as the tensor and on `spread`, pairs of smaller ones that are
    normalised already and their weights; `parts` is what others add to the first layer.
    """
    scale = lax.rsqrt(_mean_squares(watched, axes) + epsilon)
    w = _column(w, len(shape)) * scale[:, None]
    if _widest(w[0], layers) > NARROW:
        rows = [w, *(_column(v, len(shape)) for _, v in spread)]
        rows = [jnp.broadcast_to(row, (*row.shape[:2], *w.shape[2:])) for row in rows]
        features = [*features, *((x,) for x, _ in spread)]
        return _blocked(parts, jnp.concatenate(rows), features, layers, shape, pooled)
    channels = [tuple(map(_value, c)) for feature in features for c in _channels(feature)]
    outputs = _unrolled(parts, w, channels, layers, shape)
    kept = len(outputs) - pooled
    return [*outputs[:kept], *map(jnp.mean, outputs[kept:])]


def merged_shape(shape: Shape, axes: Shape) -> Shape:
    """`shape` with its last axes merged as long as the last one is too short to fill a vector and
    both are among `axes`. XLA vectorises the innermost loop alone.
    """
    axes = tuple(sorted(axes))
    while len(shape) > 1 and shape[-1] < VECTOR and axes[-2:] == (-2, -1):
        shape, axes = (*shape[:-2], shape[-2] * shape[-1]), tuple(a + 1 for a in axes[:-1])
    return shape


def _merge_features(features: Sequence[Feature], shape: Shape, merged: Shape) -> list[Feature]:
    """Features whose factors are all [channels, *merged]: those that only broadcast to `shape` are
    multiplied out.
    """

    def of(feature: Feature) -> Feature:
        full = lambda f: all(x.shape[1:] == shape for x in jax.tree.leaves(f))  # noqa: E731
        spread = [_value(factor) for factor in feature if not full(factor)]
        factors = jax.tree.map(
            lambda x: x.reshape(len(x), *merged), tuple(f for f in feature if full(f))
        )
        if not spread:
            return factors
        x = product(spread)
        return *factors, jnp.broadcast_to(x, (len(x), *shape)).reshape(-1, *merged)

    return [of(feature) for feature in features]


def _value(factor: Factor) -> jax.Array:
    return factor() if isinstance(factor, Partial) else factor


def _squared(factor: Factor) -> jax.Array:
    """The square, by the factor's own `squared` if its function has a cheaper one."""
    if isinstance(factor, Partial) and hasattr(factor.func, "squared"):
        return factor.func.squared(*factor.args)
    value = _value(factor)
    return value * value


def product(feature: Sequence[jax.Array]) -> jax.Array:
    """Its factors multiplied."""
    return functools.reduce(operator.mul, feature)


def _column(array: jax.Array, rank: int) -> jax.Array:
    """With axes of size one behind, to broadcast against a tensor."""
    return array.reshape(*array.shape, *(1,) * rank)


def _channels(feature: Feature) -> list[Feature]:
    """A product of factors [*broadcasts] for every channel."""
    count = max(len(array) for array in jax.tree.leaves(feature))
    pick = lambda f, i: lax.index_in_dim(f, min(i, len(f) - 1), keepdims=False)  # noqa: E731
    return [jax.tree.map(functools.partial(pick, i=i), feature) for i in range(count)]


@jax.custom_jvp
def sum_last(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The sum of each array over the last axis, in one loop over what they are made of."""
    zeros = (jnp.zeros(()),) * len(arrays)
    add = lambda old, new: tuple(x + y for x, y in zip(old, new, strict=True))  # noqa: E731
    return tuple(lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,)))


@sum_last.defjvp
def _(primals, tangents):
    return sum_last(*primals), tuple(jnp.sum(t, axis=-1) for t in tangents[0])


def _mean_squares(features: Sequence[Feature], axes: Shape) -> jax.Array:
    """The mean square of every channel over `axes`, which are kept with size 1. What is constant
    along the last axis is multiplied after the sum over it.
    """
    channels = [tuple(map(_squared, c)) for feature in features for c in _channels(feature)]
    along, across = [], []
    for channel in channels:
        varies = [square.shape[-1] > 1 for square in channel]
        varies = varies if any(varies) else [True] * len(channel)
        along.append([x for x, inner in zip(channel, varies, strict=True) if inner])
        across.append([x for x, inner in zip(channel, varies, strict=True) if not inner])
    shape = np.broadcast_shapes(*(square.shape for channel in channels for square in channel))
    squares = tuple(jnp.broadcast_to(product(factors), shape) for factors in along)
    rows = [row[..., None] for row in sum_last(squares)]
    rows = [product([row, *factors]) for row, factors in zip(rows, across, strict=True)]
    return jnp.mean(jnp.stack(rows), axes, keepdims=True) / shape[-1]


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


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
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
        _total([x * w for x, w in zip(xs, column, strict=True)] + list(start))
        for column, start in zip(zip(*numbers(weights), strict=True), starts, strict=True)
    ]
    for matrix, bias in layers:
        hidden = [_relu(h) for h in hidden]
        columns = zip(zip(*numbers(matrix), strict=True), *numbers(bias[None]), strict=True)
        hidden = [
            _total([h * w for h, w in zip(hidden, column, strict=True)] + [b])
            for column, b in columns
        ]
    return [h[0] for h in hidden]


@_unrolled.defjvp
def _(shape: Shape, primals, tangents):
    """Through matrix products: number by number, every weight's gradient would be a sum of its own
    over the tensor.
    """

    def multiplied(parts, weights, channels, layers):
        features = [tuple(factor[None] for factor in channel) for channel in channels]
        return _blocked(parts, weights, features, layers, shape, pooled=0)

    return _unrolled(*primals, shape), jax.jvp(multiplied, primals, tangents)[1]


def _relu(x: jax.Array) -> jax.Array:
    """Not jax.nn's, which is a call, and apart from its neighbours under `inlineable`."""
    return lax.max(x, jnp.zeros((), x.dtype))


def _total(terms: list[jax.Array]) -> jax.Array:
    """The sum, in CHAINS interleaved sums: in one, every addition waits for the one before."""
    chains = [
        functools.reduce(operator.add, terms[i::CHAINS]) for i in range(min(CHAINS, len(terms)))
    ]
    return functools.reduce(operator.add, chains)


def _blocked(parts, weights, features, layers, shape: Shape, pooled: int) -> list[jax.Array]:
    """As matrix products, on a block of the tensor at a time along its longest axis."""
    axis = int(np.argmax(shape))
    rows = max(1, BLOCK * shape[axis] // math.prod(shape))
    kept = (len(layers[-1][1]) if layers else weights.shape[1]) - pooled
    inner = tuple(range(1, len(shape) + 1))

    def block(cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
        # neither channel by channel nor computed before it is cut: the loop's inputs are stored
        blocks = [product(list(map(_value, jax.tree.map(cut, feature)))) for feature in features]
        size = np.broadcast_shapes(*(x.shape[1:] for x in blocks))
        xs = jnp.concatenate([jnp.broadcast_to(x, (len(x), *size)) for x in blocks])
        if weights.ndim == 2 or weights.size == math.prod(weights.shape[:2]):
            hidden = jnp.tensordot(weights.reshape(weights.shape[:2]).T, xs, 1)
        else:
            hidden = jnp.sum(cut(weights) * xs[:, None], axis=0)
        hidden = sum((cut(part) for part in parts), start=hidden)
        for matrix, bias in layers:
            hidden = jnp.tensordot(matrix.T, _relu(hidden), 1) + _column(bias, len(shape))
        return hidden

    if rows >= shape[axis]:
        found = block(lambda x: x)
        return [*found[:kept], *jnp.mean(found[kept:], axis=inner)]

    def fill(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        filled, total = carry
        # the last block is moved back inside: what it shares with its neighbour is computed twice
        start = jnp.minimum(i * rows, shape[axis] - rows)

        def cut(x: jax.Array) -> jax.Array:
            at = axis - len(shape)
            return x if x.shape[at] == 1 else lax.dynamic_slice_in_dim(x, start, rows, at)

        found = block(cut)
        new = _column(start + jnp.arange(rows) >= i * rows, len(shape) - axis - 1)
        pool = jnp.where(jnp.broadcast_to(new, found.shape[1:])[None], found[kept:], 0.0)
        filled = lax.dynamic_update_slice_in_dim(filled, found[:kept], start, axis + 1)
        return filled, total + jnp.sum(pool, axis=inner)

    blocks = -(-shape[axis] // rows)
    filled, total = lax.fori_loop(
        0, blocks, fill, (jnp.zeros((kept, *shape)), jnp.zeros((pooled,)))
    )
    return [*filled, *(total / math.prod(shape))]
