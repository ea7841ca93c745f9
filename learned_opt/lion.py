"""Lion (arXiv 2302.06675) steps along the sign of an average of gradients; Lion-K (arXiv
2310.05898) puts the gradient of any convex K in the place of the sign, and with weight decay it
then solves a constrained or regularised problem, which K chooses.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt import base, fields
from learned_opt.kappas import KAPPAS

# a learned weight decay of no more than this is none
NO_DECAY = 1e-8
LOWEST = np.float32(np.log(NO_DECAY))


class Rates(NamedTuple):
    """What theta holds, as scalars. The decays as 1 - b, which is exact where b is near 1."""

    learning_rate: jax.Array
    one_minus_b1: jax.Array
    one_minus_b2: jax.Array
    weight_decay: jax.Array


class LionState(NamedTuple):
    """The average of the gradients, like the params."""

    momentum: Any


@dataclasses.dataclass(frozen=True)
class Lion:
    """update = learning_rate * (dK(-c) - weight_decay * params), c = b1 momentum + (1 - b1) grads;
    then momentum = b2 momentum + (1 - b2) grads.

    With lam = weight_decay > 0 and learning_rate * lam <= 1, every step multiplies the distance of
    lam x, x the params, to the domain of the conjugate K* by 1 - learning_rate * lam or less,
    whatever the gradients; inside, it stays. With b2 > b1, too, and learning rates that fall to
    zero, a convex loss is brought to the minimum of loss + (1/lam) K*(lam x). Without weight decay
    nothing is bounded. K and its constraint are of each leaf by itself; e is `epsilon`,
    h(y) = y log y, 1/p + 1/q = 1:

        kappa            direction dK(c)            minimised with the loss
        l1 (Lion)        sign c                     |x|_inf <= 1/lam
        half_l2_squared  c                          lam/2 |x|_2^2
        l2               c / |c|_2                  |x|_2 <= 1/lam
        lp               sign c (|c|/|c|_p)^(p-1)   |x|_q <= 1/lam
        linf             sign c at the largest      |x|_1 <= 1/lam
        thresholded_l1   sign c where |c| > e       e |x|_1, |x|_inf <= 1/lam
        huber            clip(c/e, -1, 1)           e lam/2 |x|_2^2, |x|_inf <= 1/lam
        pseudo_huber     c / sqrt(c^2 + e^2)        -e/lam sum sqrt(1 - (lam x)^2), |x|_inf < 1/lam
        log_cosh         tanh(c/e)                  e/(2 lam) sum h(1 + lam x) + h(1 - lam x),
                                                    |x|_inf < 1/lam
        top_k            sign c at the k largest    |x|_inf <= 1/lam, |x|_1 <= k/lam
        logsumexp        softmax(c/e)               e/lam sum h(lam x), x > 0, sum x = 1/lam
        nuclear          U V^T of the SVD           sigma_max(x) <= 1/lam

    Of a leaf of more than two axes, `nuclear` takes all axes but the last for rows; of a vector it
    is l2, of a scalar l1. Its derivative, an SVD's, needs singular values that differ. Directions
    that are piecewise constant (l1, linf, thresholded_l1, top_k) tell a meta-gradient nothing of
    the decays; evolution strategies learn them. Needs neither the loss nor a horizon.

    Args:
      learning_rate, b1, b2, weight_decay: what `init` writes into theta. 0 is none for each of the
        last three, exactly.
      kappa: one of `KAPPAS`.
      epsilon: where the smoothed and the thresholded kappas bend, in units of the gradients.
      p: of lp, above 1.
      k: of top_k; leaves of fewer elements take all.
    """

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1
    kappa: str = "l1"
    epsilon: float = 1e-3
    p: float = 4.0
    k: int = 16

    def __post_init__(self):
        fields.positive(self, "learning_rate", "epsilon")
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 <= self.weight_decay < np.inf:
            raise ValueError(f"`weight_decay` must be at least 0, got {self.weight_decay}")
        fields.one_of(self, "kappa", *KAPPAS)
        if not 1.0 < self.p < np.inf:
            raise ValueError(
                f"`p` must be above 1 and finite, got {self.p}; set kappa='l1' or kappa='linf'"
            )
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"`k` must be an integer of at least 1, got {self.k!r}")

    def init(self, key: base.Key) -> base.Theta:
        """The logarithms of learning rate, 1 - b1, 1 - b2 and weight decay, four scalars. A weight
        decay of 0 is written as log(1e-8), and all that is not above it is 0.
        """
        del key
        return {
            "log_learning_rate": _log(self.learning_rate),
            "log_one_minus_b1": _log(1.0 - self.b1),
            "log_one_minus_b2": _log(1.0 - self.b2),
            "log_weight_decay": _log(max(self.weight_decay, NO_DECAY)),
        }

    def rates(self, theta: base.Theta) -> Rates:
        """Decays that theta would take below 0 are 0."""
        decay = theta["log_weight_decay"]
        return Rates(
            jnp.exp(theta["log_learning_rate"]),
            jnp.exp(jnp.minimum(theta["log_one_minus_b1"], 0.0)),
            jnp.exp(jnp.minimum(theta["log_one_minus_b2"], 0.0)),
            jnp.where(decay > LOWEST, jnp.exp(decay), 0.0),
        )

    def step(self, rates: Rates, grads: Any, momentum: Any, params: Any) -> tuple[Any, Any]:
        """Updates and the next momentum, in the precision of what is passed."""
        gradient = KAPPAS[self.kappa].gradient

        def average(new: jax.Array) -> Any:
            return jax.tree.map(lambda m, g: (1.0 - new) * m + new * g, momentum, grads)

        def update(c: jax.Array, p: jax.Array) -> jax.Array:
            return rates.learning_rate * (gradient(-c, self) - rates.weight_decay * p)

        updates = jax.tree.map(update, average(rates.one_minus_b1), params)
        return updates, average(rates.one_minus_b2)

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        rates = self.rates(theta)

        def init(params: base.Params) -> LionState:
            base.check_params(params)
            return LionState(jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params))

        def update(updates, state, params=None, **extra_args):
            del extra_args
            base.check_update(self, params)
            grads = base.float32(updates)
            updates, momentum = self.step(rates, grads, state.momentum, base.float32(params))
            return base.like_params(updates, params), LionState(momentum)

        return optax.GradientTransformationExtraArgs(init, update)


def _log(x: float) -> jax.Array:
    return jnp.asarray(np.log(x), jnp.float32)


EXAMPLES = (Lion(), Lion(kappa="l2"))
