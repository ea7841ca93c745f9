"""The LSTM that runs along with every coordinate: all coordinates share its weights, each has a
state of its own (arXiv 1606.04474). As in torch, whose weights the published rules hold.

Arrays are [units, *shape of the leaf]: products of small weights with long rows, and gates that are
contiguous. Sigmoids are written as tanh, one function for all gates.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from learned_opt import base

Layer = dict[str, jax.Array]  # {w [outputs, inputs], b [outputs]}


class LayerState(NamedTuple):
    """[units, *shape] each."""

    hidden: jax.Array
    cell: jax.Array


LSTMState = tuple[LayerState, ...]


def dense_init(key: jax.Array, inputs: int, outputs: int) -> Layer:
    """torch's: uniform on +-1/sqrt(inputs)."""
    bound, keys = 1 / math.sqrt(inputs), jax.random.split(key)
    w = jax.random.uniform(keys[0], (outputs, inputs), minval=-bound, maxval=bound)
    return {"w": w, "b": jax.random.uniform(keys[1], (outputs,), minval=-bound, maxval=bound)}


def dense(theta: Layer, x: jax.Array) -> jax.Array:
    """[inputs, *shape] -> [outputs, *shape]."""
    bias = theta["b"].reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.tensordot(theta["w"], x, 1) + bias


def init(key: jax.Array, inputs: int, hidden: int, layers: int) -> dict[str, Layer]:
    """A layer's weights [4 hidden, inputs + hidden] are those of torch side by side, gates in the
    order i, f, g, o; its bias is the sum of torch's two, uniform on +-1/sqrt(hidden) each.
    """
    bound, theta = 1 / math.sqrt(hidden), {}
    for layer in range(layers):
        sizes = 4 * hidden, (hidden if layer else inputs) + hidden
        keys = jax.random.split(jax.random.fold_in(key, layer))
        w = jax.random.uniform(keys[0], sizes, minval=-bound, maxval=bound)
        both = jax.random.uniform(keys[1], (2, sizes[0]), minval=-bound, maxval=bound)
        theta[f"layer{layer}"] = {"w": w, "b": jnp.sum(both, axis=0)}
    return theta


def _start(theta: dict[str, Layer], shape: tuple[int, ...], scale: float, seed: int) -> LSTMState:
    """Zero, or normal numbers of deviation `scale`, which are drawn from `seed`."""

    def layer(key: jax.Array, weights: Layer) -> LayerState:
        full = (len(weights["b"]) // 4, *shape)
        if scale == 0:
            return LayerState(jnp.zeros(full, jnp.float32), jnp.zeros(full, jnp.float32))
        hidden, cell = scale * jax.random.normal(key, (2, *full), jnp.float32)
        return LayerState(hidden, cell)

    keys = jax.random.split(jax.random.key(seed), len(theta))
    return tuple(layer(*both) for both in zip(keys, theta.values(), strict=True))


def start(theta: dict[str, Layer], params: base.Params, scale: float = 0.0, seed: int = 0) -> Any:
    """The state of every leaf: zero, or normal numbers of deviation `scale`, drawn from `seed`, the
    same for leaves of one shape.
    """
    return jax.tree.map(lambda p: _start(theta, jnp.shape(p), scale, seed), params)


def step(theta: dict[str, Layer], x: jax.Array, state: LSTMState) -> tuple[jax.Array, LSTMState]:
    """Inputs [inputs, *shape] -> outputs of the last layer [hidden, *shape], state."""
    states = []
    for weights, (hidden, cell) in zip(theta.values(), state, strict=True):
        # sigmoid(z) = tanh(z / 2) / 2 + 1/2
        half = np.repeat([0.5, 0.5, 1.0, 0.5], hidden.shape[0]).astype(np.float32)
        halved = {"w": weights["w"] * half[:, None], "b": weights["b"] * half}
        gates = jnp.tanh(dense(halved, jnp.concatenate([x, hidden])))
        i, f, g, o = jnp.split(gates, 4)
        kept = (0.5 * f + 0.5) * cell + (0.5 * i + 0.5) * g
        x = (0.5 * o + 0.5) * jnp.tanh(kept)
        states.append(LayerState(x, kept))
    return x, tuple(states)


def inputs(*arrays: Any) -> jax.Array:
    """Arrays of one shape -> [arrays, *shape] float32, cut out of backpropagation: what a
    network sees of a trajectory is, by the published recipes, not differentiated.
    """
    return jax.lax.stop_gradient(jnp.stack([jnp.asarray(x, jnp.float32) for x in arrays]))
