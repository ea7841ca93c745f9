"""What watches a whole training run: how much of it is left, how the loss has fallen at ten time
scales, and an LSTM over that, for rules that plan their step sizes (VeLO, arXiv 2211.09760; Celo,
arXiv 2501.12670).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from learned_opt.recurrent import (
    Dense,
    LSTMState,
    dense,
    dense_init,
    lstm,
    lstm_init,
    placed_as,
    whole,
)

FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
AVERAGES = 10
RUN_FEATURES = len(FRACTIONS) + AVERAGES - 1


class LossBuffer(NamedTuple):
    """[10] averages of the loss, which start at zero; the least that each was, corrected for that
    start; their decays.
    """

    means: jax.Array
    minima: jax.Array
    decays: jax.Array


class SchedulerState(NamedTuple):
    losses: LossBuffer
    lstm: LSTMState


def fraction_features(count: ArrayLike, horizon: int | jax.Array) -> jax.Array:
    """[9]: where the run stands, before or behind nine fractions of the horizon."""
    return jnp.tanh(10.0 * (jnp.asarray(count) / horizon - jnp.asarray(FRACTIONS, jnp.float32)))


def loss_buffer(horizon: int | jax.Array) -> LossBuffer:
    """Before the first loss. The time scales of the averages go from 10 steps to the horizon."""
    scales = 10.0 ** jnp.linspace(1.0, jnp.log10(horizon), AVERAGES, dtype=jnp.float32)
    # Decays computed anew in every step would be optimised together with their powers, which
    # rounds otherwise than published, and the features are small differences. An average of decay 1
    # would never move.
    decays = jnp.minimum(jnp.exp(-1.0 / scales), 1.0 - 2.0**-24)
    minima = jnp.full((AVERAGES,), 1e12, jnp.float32)
    return LossBuffer(jnp.zeros((AVERAGES,)), minima, decays)


def loss_features(
    old: LossBuffer, loss: jax.Array, count: ArrayLike
) -> tuple[jax.Array, LossBuffer]:
    """How far each average of the loss is above its minimum, relative to the next slower one.

    Args:
      old: averages of the losses before this one, `count` of them.
      loss: cut off at twice the largest average; NaN counts as that much, unless it is the first.

    Returns:
      [9] numbers in [-1, 1], zeros in the first two steps, and the buffer with the loss in it.
    """
    decays, count = old.decays, jnp.asarray(count, jnp.float32)
    seen = old.means / jnp.where(count == 0, 1.0, 1.0 - decays**count)
    # fmin, not minimum: of a NaN and a number it is the number
    loss = jnp.where(count == 0, loss, jnp.fmin(loss, 2.0 * jnp.abs(jnp.max(seen))))
    means = decays * old.means + (1.0 - decays) * loss
    corrected = means / (1.0 - decays ** (count + 1.0))
    minima = jnp.minimum(old.minima, corrected)
    # not corrected - minima: compiled twice, the two may be rounded apart, and zero matters
    above = jnp.maximum(0.0, (corrected - old.minima)[:-1])
    slower = jnp.maximum(1e-8, corrected[1:] - minima[:-1])
    found = jnp.where(count < 2, 0.0, jnp.clip(above / slower - 1.0, -1.0, 1.0))
    return found, LossBuffer(means, minima, decays)


def run_features(
    old: LossBuffer, loss: jax.Array, count: ArrayLike, horizon: int | jax.Array
) -> tuple[jax.Array, LossBuffer]:
    """[18]: of the fraction and of the loss."""
    from_loss, losses = loss_features(old, loss, count)
    return jnp.concatenate([fraction_features(count, horizon), from_loss]), losses


def scheduler_init(key: jax.Array, inputs: int, size: int, heads: dict[str, int]) -> dict[str, Any]:
    """theta of the mixing layers, of the LSTM and its first state, and of linear heads on it, by
    name with their number of outputs.
    """
    keys = jax.random.split(key, 3 + len(heads))
    return {
        "mix_all": dense_init(keys[0], inputs, size),
        "mix_own": dense_init(keys[1], inputs, size),
        "lstm": lstm_init(keys[2], size, size),
        "initial": {"hidden": jnp.zeros((size,)), "cell": jnp.zeros((size,))},
        **{
            name: dense_init(k, size, n)
            for k, (name, n) in zip(keys[3:], heads.items(), strict=True)
        },
    }


def head_at(head: Dense, value: ArrayLike) -> Dense:
    """The head made to give `value`, plus a tenth of what it gave."""
    return {"w": 0.1 * head["w"], "b": jnp.full_like(head["b"], value)}


def scheduler_state(theta: dict[str, Any], rows: int, horizon: int | jax.Array) -> SchedulerState:
    """Before the first step, with an LSTM state for each of `rows`."""
    lstm = jax.tree.map(lambda x: jnp.tile(x, (rows, 1)), LSTMState(**theta["initial"]))
    return SchedulerState(loss_buffer(horizon), lstm)


def dense_rows(theta: Dense, x: jax.Array) -> jax.Array:
    """[rows, inputs] -> [rows, outputs]."""
    return jax.vmap(dense, in_axes=(None, 0))(theta, x)


def mixed_lstm(theta: dict[str, Any], x: jax.Array, state: LSTMState) -> LSTMState:
    """One step of the LSTM on inputs [rows, inputs], every row told of the others by a maximum
    over them.
    """
    # the maximum of no rows and of zero is a ReLU that may have no rows
    every = jnp.max(dense_rows(theta["mix_all"], x), axis=0, initial=0.0)
    mixed = dense_rows(theta["mix_own"], x) + every[None]
    return jax.vmap(lstm, in_axes=(None, 0, 0))(theta["lstm"], mixed, state)


def run_schedule(
    theta: dict[str, Any],
    state: SchedulerState,
    loss: jax.Array,
    count: ArrayLike,
    horizon: int | jax.Array,
) -> tuple[jax.Array, SchedulerState]:
    """A positive multiplier of all step sizes, from the run alone: Celo's. The LSTM has one row."""
    old = whole(state)
    x, losses = run_features(old.losses, loss, count, horizon)
    lstm_state = mixed_lstm(theta, x[None], old.lstm)
    logarithm = dense(theta["step_size"], lstm_state.hidden[0])[0]
    return 0.1 * jnp.exp(logarithm), placed_as(SchedulerState(losses, lstm_state), state)
