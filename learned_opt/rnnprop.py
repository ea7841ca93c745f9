"""RNNprop: an LSTM that sees each coordinate's gradient and Adam's momentum, both relative to the
size of its gradients (arXiv 1703.03633), as it is compared with in arXiv 2305.18577.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, coordinate_lstm, fields
from learned_opt.coordinate_lstm import LSTMState
from learned_opt.proximal import at_least_float32, over_leaves, subgradient

EPSILON = 1e-8


class RNNpropState(NamedTuple):
    """Adam's moments, like the params in float32 or better, and the LSTM's states by leaf."""

    adam: Any
    lstm: Any


@dataclasses.dataclass(frozen=True)
class RNNprop:
    """x' = x - step_size * tanh(LSTM(g / s, m / s)), m and s^2 Adam's means of g and g^2, corrected
    for their start.

    g is a gradient or subgradient of the loss; where that is a composite one, pass its nonsmooth
    part as the keyword `penalty`, a function of the params. Scaling the loss changes nothing, up to
    an epsilon of 1e-8. Nothing is guaranteed. Needs neither loss nor horizon.

    Args:
      decay: of both means.
      hidden, layers: sizes of the LSTM and of the layer before it.
      state_scale: deviation of its normal initial state, drawn from `seed`; the published one is
        0.01, or 1 for logistic regression.
    """

    step_size: float = 0.1
    decay: float = 0.95
    hidden: int = 20
    layers: int = 2
    state_scale: float = 0.0
    seed: int = 0

    def __post_init__(self):
        fields.positive(self, "step_size")
        fields.decays("`decay`", (self.decay,))
        fields.at_least_one(self, "hidden", "layers")
        fields.not_negative(self, "state_scale")

    def init(self, key: base.Key) -> base.Theta:
        """torch's initialisation."""
        keys = jax.random.split(key, 3)
        return {
            "in": coordinate_lstm.dense_init(keys[0], 2, self.hidden),
            "lstm": coordinate_lstm.init(keys[1], self.hidden, self.hidden, self.layers),
            "out": coordinate_lstm.dense_init(keys[2], self.hidden, 1),
        }

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        theta = base.float32(theta)  # also where init has drawn float64
        moments = optax.scale_by_adam(self.decay, self.decay, EPSILON)

        def init(params: base.Params) -> RNNpropState:
            base.check_params(params)
            start = coordinate_lstm.start(theta["lstm"], params, self.state_scale, self.seed)
            return RNNpropState(moments.init(at_least_float32(params)), start)

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            grads = subgradient(updates, params, extra_args)
            momentum, adam = moments.update(grads, state.adam)
            assert isinstance(adam, optax.ScaleByAdamState)
            squares: Any = optax.tree.bias_correction(adam.nu, self.decay, adam.count)
            relative = jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + EPSILON), grads, squares)
            moved, lstm = over_leaves(
                2, functools.partial(self._moved, theta), relative, momentum, state.lstm
            )
            return base.like_params(moved, params), RNNpropState(adam, lstm)

        return optax.GradientTransformationExtraArgs(init, update)

    def _moved(
        self, theta: base.Theta, relative: jax.Array, momentum: jax.Array, state: LSTMState
    ) -> tuple[jax.Array, LSTMState]:
        seen = coordinate_lstm.inputs(relative, momentum)
        seen = jax.nn.elu(coordinate_lstm.dense(theta["in"], seen))
        out, state = coordinate_lstm.step(theta["lstm"], seen, state)
        out = jnp.tanh(coordinate_lstm.dense(theta["out"], out))
        return -self.step_size * out[0], state


EXAMPLES = (RNNprop(hidden=4),)
CONFIGURATIONS = {"l2o_rnnprop": RNNprop()}
