"""Adam whose learning-rate schedule is theta: the smallest complete rule, and the one to copy when
writing a new one.

Adam: arXiv 1412.6980. Learned schedules of a hand-designed optimizer are the usual first rung of
the ladder to learned rules.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from learned_opt import base


@dataclasses.dataclass(frozen=True)
class Hyperparams:
    """theta is the logarithm of Adam's learning rate at `knots` equally spaced times of the run,
    linear in between.

    Needs the horizon. After it the last learning rate stays.
    """

    knots: int = 8
    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self):
        if self.knots < 2:
            raise ValueError(f"`knots` must be at least 2, got {self.knots}")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}")

    def init(self, key: base.Key) -> base.Theta:
        """A constant schedule at `learning_rate`."""
        del key
        return {"log_learning_rate": jnp.full((self.knots,), jnp.log(self.learning_rate))}

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        base.check_theta(self, theta)
        horizon = base.require_horizon(self, horizon)
        knots = jnp.linspace(0.0, 1.0, self.knots)

        def learning_rate(count: jax.typing.ArrayLike) -> jax.Array:
            return jnp.exp(jnp.interp(count / horizon, knots, theta["log_learning_rate"]))

        adam = optax.adam(learning_rate, b1=self.b1, b2=self.b2)

        def init(params: base.Params) -> optax.OptState:
            base.check_params(params)
            return adam.init(base.float32(params))

        def update(updates, state, params=None, **extra_args):
            del extra_args
            base.check_update(self, params)
            # in bfloat16 the decay 0.999 would round to 1
            updates, state = adam.update(base.float32(updates), state)
            return base.like_params(updates, params), state

        return optax.GradientTransformationExtraArgs(init, update)


EXAMPLES = (Hyperparams(knots=3),)
