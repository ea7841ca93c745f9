"""Dense layers and the LSTM of rules that watch a training run over time (LSTM: Hochreiter and
Schmidhuber 1997; gates and forget bias as in haiku, whose weights the published rules hold).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Dense = dict[str, jax.Array]


def dense_init(key: jax.Array, inputs: int, outputs: int) -> Dense:
    """{w [inputs, outputs], b [outputs]}: truncated normal of standard deviation 1/sqrt(inputs),
    zero bias.
    """
    w = jax.random.truncated_normal(key, -2, 2, (inputs, outputs)) / np.sqrt(inputs)
    return {"w": w, "b": jnp.zeros((outputs,))}


def dense(theta: Dense, x: jax.Array) -> jax.Array:
    return x @ theta["w"] + theta["b"]


class LSTMState(NamedTuple):
    """[..., size] each."""

    hidden: jax.Array
    cell: jax.Array


def lstm_init(key: jax.Array, inputs: int, size: int) -> Dense:
    """One dense layer from [input, hidden] to the gates i, g, f, o."""
    return dense_init(key, inputs + size, 4 * size)


def lstm(theta: Dense, x: jax.Array, state: LSTMState) -> LSTMState:
    """One step on inputs [..., inputs]; the new hidden state is the output."""
    gates = dense(theta, jnp.concatenate([x, state.hidden], axis=-1))
    i, g, f, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f + 1.0) * state.cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    return LSTMState(jax.nn.sigmoid(o) * jnp.tanh(cell), cell)


def whole(tree: Any) -> Any:
    """The arrays on every device, where shardings are part of types: too small to be split."""

    def leaf(x: jax.Array) -> jax.Array:
        mesh = jax.typeof(x).sharding.mesh
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.sharding.reshard(x, everywhere) if AxisType.Explicit in mesh.axis_types else x

    return jax.tree.map(leaf, tree)


def placed_as(tree: Any, old: Any) -> Any:
    """The arrays split over devices as those of `old` are, where shardings are part of types."""

    def leaf(x: jax.Array, old: jax.Array) -> jax.Array:
        sharding = jax.typeof(old).sharding
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        return jax.sharding.reshard(x, sharding) if explicit else x

    return jax.tree.map(leaf, tree, old)
