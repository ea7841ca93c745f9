"""nn_adam: Adam whose learning rate, decays and epsilon an LSTM moves per tensor, step by step (the
"NNAdam" of arXiv 2203.11860's library).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt import base, fields
from learned_opt.recurrent import LSTMState, dense, lstm, lstm_init, placed_as, whole

# the LSTM moves log(x) / 10 of learning rate, 1 - beta1, 1 - beta2 and epsilon; bounds of log(x)
LOWEST = np.array([np.log(1e-8), -10.0, -10.0, np.log(1e-11)], np.float32)
HIGHEST = np.array([np.log(1e3), 0.0, 0.0, np.log(1e4)], np.float32)
IS_DECAY = np.array([False, True, True, False])
INPUTS = 19
GRADIENT_CLIP = 1000.0


def to_log(hyperparameters: jax.Array) -> jax.Array:
    """Learning rate, beta1, beta2, epsilon [4] -> what the LSTM moves."""
    return 0.1 * jnp.log(jnp.where(IS_DECAY, 1.0 - hyperparameters, hyperparameters))


def from_log(moved: jax.Array) -> jax.Array:
    """The inverse of `to_log`, within the bounds."""
    x = jnp.exp(jnp.clip(10.0 * moved, LOWEST, HIGHEST))
    return jnp.where(IS_DECAY, 1.0 - x, x)


def log_magnitude(x: jax.Array) -> jax.Array:
    return 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5.0, 5.0)


class NNAdamState(NamedTuple):
    """Momentum and second moment like the params; per tensor, in the order of the leaves, the logs
    of the hyperparameters [tensors, 4] and the LSTM's state [tensors, lstm].
    """

    momentum: Any
    rms: Any
    hyperparameters: jax.Array
    lstm: LSTMState


@dataclasses.dataclass(frozen=True)
class NNAdam:
    """update = -learning_rate * (1 + epsilon) * momentum / (epsilon + sqrt(second moment)).

    The factor 1 + epsilon lets the LSTM turn Adam into momentum without a growing learning rate.
    The averages are not corrected for their start at zero. Only theta knows the hyperparameters a
    tensor starts with; the LSTM's outputs start at zero, so that meta-training starts at Adam.
    Needs neither the loss nor a horizon.

    Args:
      lstm: size of the LSTM.
      learning_rate, beta1, beta2, epsilon: what `init` writes into theta.
      output_scale: multiplies what the LSTM adds to the logs.
      decay_strength: share of the way back to theta's hyperparameters, taken at every step.
    """

    lstm: int = 32
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    output_scale: float = 0.01
    decay_strength: float = 0.0

    def __post_init__(self):
        fields.at_least_one(self, "lstm")
        for name, low, high in (("learning_rate", 1e-8, 1e3), ("epsilon", 1e-11, 1e4)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"`{name}` must be between {low:g} and {high:g}, got {getattr(self, name)}"
                )
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 <= self.decay_strength <= 1.0:
            raise ValueError(f"`decay_strength` must be in [0, 1], got {self.decay_strength}")

    @classmethod
    def published(cls) -> "NNAdam":
        """The rule as it was published: meta-training starts at a smaller learning rate."""
        return cls(learning_rate=1e-4)

    def init(self, key: base.Key) -> base.Theta:
        """{"lstm": {w [19 + lstm, 4 lstm], b}, "controls": {w [lstm, 4], b}, "initial": {hidden
        [lstm], cell [lstm], learning_rate, beta1, beta2, epsilon}}, the last four as `to_log` of
        the fields.
        """
        start = to_log(jnp.asarray((self.learning_rate, self.beta1, self.beta2, self.epsilon)))
        return {
            "lstm": lstm_init(key, INPUTS, self.lstm),
            "controls": {"w": jnp.zeros((self.lstm, 4)), "b": jnp.zeros((4,))},
            "initial": {
                "hidden": jnp.zeros((self.lstm,)),
                "cell": jnp.zeros((self.lstm,)),
                "learning_rate": start[0],
                "beta1": start[1],
                "beta2": start[2],
                "epsilon": start[3],
            },
        }

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        names = ("learning_rate", "beta1", "beta2", "epsilon")
        initial = jnp.stack([theta["initial"][name] for name in names])

        def init(params: base.Params) -> NNAdamState:
            base.check_params(params)
            tensors = len(jax.tree.leaves(params))
            repeat = lambda x: jnp.tile(x[None], (tensors, 1))  # noqa: E731
            # not one tree of zeros twice: donated buffers must differ
            zeros = lambda: jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)  # noqa: E731
            state = LSTMState(repeat(theta["initial"]["hidden"]), repeat(theta["initial"]["cell"]))
            return NNAdamState(zeros(), zeros(), repeat(initial), state)

        def control(inputs: jax.Array, state: LSTMState, moved: jax.Array):
            """The LSTM's next state and the next hyperparameters of one tensor."""
            state = lstm(theta["lstm"], inputs, state)
            moved = moved + self.output_scale * dense(theta["controls"], state.hidden)
            moved = moved - self.decay_strength * (moved - initial)
            return state, to_log(from_log(moved))

        def update(updates, state, params=None, **extra_args):
            del extra_args
            base.check_update(self, params)
            treedef = jax.tree.structure(updates)
            if not treedef.num_leaves:
                return updates, state
            clip = functools.partial(jnp.clip, min=-GRADIENT_CLIP, max=GRADIENT_CLIP)
            grads = jax.tree.map(clip, base.float32(updates))
            controlled = (state.lstm, state.hyperparameters)
            lstm_state, moved = jax.tree.map(whole, controlled)
            rows = jax.tree.unflatten(treedef, list(moved))
            now = jax.tree.map(from_log, rows)
            momentum = jax.tree.map(_average(1), now, state.momentum, grads)
            rms = jax.tree.map(_average(2), now, state.rms, jax.tree.map(jnp.square, grads))
            steps = jax.tree.map(_step, now, params, momentum, rms)
            inputs = jax.tree.map(_inputs, rows, params, grads, momentum, rms)
            stacked = jnp.stack(jax.tree.leaves(inputs))
            controlled = jax.tree.map(
                placed_as, jax.vmap(control)(stacked, lstm_state, moved), controlled
            )
            return steps, NNAdamState(momentum, rms, controlled[1], controlled[0])

        return optax.GradientTransformationExtraArgs(init, update)


def _average(index: int):
    """The moving average whose decay is hyperparameter `index`."""
    return lambda h, old, new: h[index] * old + (1.0 - h[index]) * new


def _step(hyperparameters, p, m, v) -> jax.Array:
    rate, epsilon = hyperparameters[0], hyperparameters[3]
    step = rate * (1.0 + epsilon) / (epsilon + jnp.sqrt(v + 1e-10)) * m
    return -step.astype(jnp.result_type(p))


def _inputs(moved, p, g, m, v) -> jax.Array:
    """What the LSTM sees of a tensor, [19], in the published order."""
    p = jnp.asarray(p, jnp.float32)
    rate, beta1, beta2, epsilon = 0.2 * jnp.clip(moved, -5.0, 5.0)
    means = {name: jnp.mean(x) for name, x in {"g": g, "m": m, "p": p, "v": v}.items()}
    spread = lambda x, mean: log_magnitude(jnp.mean(jnp.square(x - mean)))  # noqa: E731
    is_rank = lambda rank: jnp.asarray(1.0 if p.ndim == rank else -1.0)  # noqa: E731
    return jnp.stack(
        [
            beta1, beta2, epsilon, is_rank(1), is_rank(0), rate,
            log_magnitude(means["g"]), jnp.sign(means["g"]), log_magnitude(jnp.mean(jnp.abs(g))),
            log_magnitude(means["m"]), jnp.sign(means["m"]),
            log_magnitude(means["p"]), jnp.sign(means["p"]),
            log_magnitude(means["v"]), jnp.sign(means["v"]),
            spread(g, means["g"]), spread(m, means["m"]), spread(p, means["p"]),
            spread(v, means["v"]),
        ]
    )  # fmt: skip


EXAMPLES = (NNAdam(lstm=8),)
