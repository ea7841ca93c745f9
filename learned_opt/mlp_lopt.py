"""mlp_lopt: an MLP per parameter over the gradient, the parameter and six momenta (arXiv
2203.11860, "MLPLOpt"; the model of arXiv 1810.10180).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, features, fields
from learned_opt.mlp import mlp_init, mlp_per_parameter, pass_through


class MlpLoptState(NamedTuple):
    count: jax.typing.ArrayLike
    momentum: Any


@dataclasses.dataclass(frozen=True)
class MlpLopt:
    """update = -step_size * direction * exp(magnitude_scale * magnitude), both outputs of an MLP of
    19 inputs.

    The gradient, the parameter and its momenta are divided by their root mean square over the
    tensor; 11 inputs embed the time. Only theta's MLP is learned. Needs neither the loss nor a
    horizon.

    `initial` says where meta-training starts: "momentum" steps along the normalised momentum whose
    decay is nearest to 0.9; "random" is the published start.
    """

    hidden: int = 32
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3
    momentum_decays: tuple[float, ...] = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
    initial: Literal["momentum", "random"] = "momentum"

    def __post_init__(self):
        fields.at_least_one(self, "hidden")
        fields.decays("`momentum_decays`", self.momentum_decays)
        fields.momentum_or_random(self)

    @classmethod
    def published(cls) -> "MlpLopt":
        """The rule as it was published: meta-training starts at random."""
        return cls(initial="random")

    def init(self, key: base.Key) -> base.Theta:
        """Weights of the MLP, {"mlp": {w0 [19, hidden], b0, w1, b1, w2 [hidden, 2], b2}}."""
        inputs = 2 + len(self.momentum_decays) + len(features.TIME_SCALES)
        mlp = mlp_init(key, (inputs, self.hidden, self.hidden, 2))
        if self.initial == "momentum":
            nearest = min(self.momentum_decays, key=lambda b: abs(b - 0.9))
            # the momenta come behind the gradient and the parameter
            mlp = pass_through(mlp, channel=2 + self.momentum_decays.index(nearest))
        return {"mlp": mlp}

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)

        def init(params: base.Params) -> MlpLoptState:
            base.check_params(params)
            momentum = features.moments_init(params, len(self.momentum_decays))
            return MlpLoptState(jnp.zeros((), jnp.int32), momentum)

        def update(updates, state, params=None, **extra_args):
            del extra_args
            base.check_update(self, params)
            grads = base.float32(updates)
            decays = jnp.asarray(self.momentum_decays, jnp.float32)
            momentum = jax.tree.map(lambda m, g: features.ema(decays, m, g), state.momentum, grads)
            time = features.time_embedding(state.count)
            updates = jax.tree.map(
                lambda *leaf: self._leaf_update(theta["mlp"], time, *leaf), grads, params, momentum
            )
            return updates, MlpLoptState(optax.safe_increment(state.count), momentum)

        return optax.GradientTransformationExtraArgs(init, update)

    def _leaf_update(self, mlp, time, g, p, m) -> jax.Array:
        p = jnp.asarray(p)
        inputs = [(g[None],), (p.astype(jnp.float32)[None],), (m,)]
        direction, magnitude = mlp_per_parameter(
            mlp, inputs, shared=time, shape=g.shape, epsilon=1e-5
        )
        step = self.step_size * direction * jnp.exp(self.magnitude_scale * magnitude)
        return -step.astype(p.dtype)


EXAMPLES = (MlpLopt(hidden=4),)
