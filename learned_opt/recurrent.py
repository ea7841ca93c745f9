"""Dense layers and the LSTM of rules that watch a training run over time (LSTM: Hochreiter and
Schmidhuber 1997; gates and forget bias as in haiku, whose weights the published rules hold).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
