"""L2O-DM: an LSTM that turns each coordinate's gradient into its update (arXiv 1606.04474), as
arXiv 2305.18577 compares with it.
"""

import dataclasses
import functools

import jax
import optax

from learned_opt import base, coordinate_lstm, fields
from learned_opt.coordinate_lstm import LSTMState
from learned_opt.proximal import at_least_float32, over_leaves, subgradient


@dataclasses.dataclass(frozen=True)
class L2ODM:
    """x' = x + step_size * elu(LSTM(g, x)), g a gradient or subgradient of the loss.

    Where the loss is a composite one, pass its nonsmooth part as the keyword `penalty`, a function
    of the params; its derivative is added. The published networks were trained with the gradient of
    the mean over a batch of 64 problems, so theirs are smaller by that factor. Nothing is
    guaranteed. Needs neither loss nor horizon.

    Args:
      hidden, layers: sizes of the LSTM.
      state_scale: deviation of its normal initial state, drawn from `seed`; the published one is 1.
    """

    step_size: float = 0.1
    hidden: int = 20
    layers: int = 2
    state_scale: float = 0.0
    seed: int = 0

    def __post_init__(self):
        fields.positive(self, "step_size")
        fields.at_least_one(self, "hidden", "layers")
        fields.not_negative(self, "state_scale")

    def init(self, key: base.Key) -> base.Theta:
        """torch's initialisation."""
        keys = jax.random.split(key)
        return {
            "lstm": coordinate_lstm.init(keys[0], 2, self.hidden, self.layers),
            "out": coordinate_lstm.dense_init(keys[1], self.hidden, 1),
        }

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        theta = base.float32(theta)  # also where init has drawn float64

        def init(params: base.Params):
            base.check_params(params)
            return coordinate_lstm.start(theta["lstm"], params, self.state_scale, self.seed)

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            grads = subgradient(updates, params, extra_args)
            moved, state = over_leaves(
                2, functools.partial(self._moved, theta), grads, at_least_float32(params), state
            )
            return base.like_params(moved, params), state

        return optax.GradientTransformationExtraArgs(init, update)

    def _moved(
        self, theta: base.Theta, grad: jax.Array, x: jax.Array, state: LSTMState
    ) -> tuple[jax.Array, LSTMState]:
        seen = coordinate_lstm.inputs(grad, x)
        out, state = coordinate_lstm.step(theta["lstm"], seen, state)
        moved = self.step_size * jax.nn.elu(coordinate_lstm.dense(theta["out"], out))
        return moved[0], state


EXAMPLES = (L2ODM(hidden=4),)
CONFIGURATIONS = {"l2o_dm": L2ODM()}
