"""small_fc: a tiny MLP per parameter over momenta and factored second moments (arXiv 2203.11860,
"small_fc_lopt").
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, features, fields
from learned_opt.mlp import mlp_init, mlp_per_parameter, pass_through

INPUTS = (
    "g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g",
    "row", "col", "row_rsqrt", "col_rsqrt", "factored_m",
)  # fmt: skip


class SmallFCState(NamedTuple):
    count: jax.typing.ArrayLike
    accumulators: features.Accumulators


def decay_offsets(channels: int) -> base.Theta:
    """What theta learns of the decays: offsets, at 0 the fields of the rule."""
    zeros = jnp.zeros((channels,))
    return {"momentum_decays": zeros, "rms_decays": jnp.zeros((1,)), "factored_decays": zeros}


def decays_of(rule: Any, theta: base.Theta) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Decays of momenta [n], second moment [1] and factored second moments [n]. Those of squares,
    whose averages must not become negative, are kept in [0, 1], as published.
    """
    momentum, rms, factored = (
        features.learned_decays(initial, theta[name])
        for name, initial in (
            ("momentum_decays", rule.momentum_decays),
            ("rms_decays", (rule.rms_decay,)),
            ("factored_decays", rule.factored_decays),
        )
    )
    return momentum, jnp.clip(rms, 0.0, 1.0), jnp.clip(factored, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class SmallFC:
    """update = -step_size * direction * exp(magnitude_scale * magnitude), both outputs of an MLP of
    39 inputs.

    28 inputs are normalised features of the parameter, 11 embed the time. The accumulators' decays
    are learned. Needs neither the loss nor a horizon.

    `initial` says where meta-training starts: "momentum" steps along the momentum over its root
    mean square, as Adam does; "random" is the published start, from which evolution strategies
    first learn to stand still and leave that plateau late.
    """

    hidden: int = 4
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decay: float = 0.999
    factored_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    initial: Literal["momentum", "random"] = "momentum"

    def __post_init__(self):
        fields.at_least_one(self, "hidden")
        fields.momentum_or_random(self)
        fields.equal_channels(self)

    @classmethod
    def published(cls) -> "SmallFC":
        """As published, with its random start of meta-training; trajectories are the same."""
        return cls(initial="random")

    def init(self, key: base.Key) -> base.Theta:
        """Weights of the MLP and offsets of the decays (zero: the fields' decays)."""
        n = len(self.momentum_decays)
        inputs = 4 + 8 * n + len(features.TIME_SCALES)
        mlp = mlp_init(key, (inputs, self.hidden, self.hidden, 2))
        if self.initial == "momentum":
            # the first momentum over its root mean square: behind g, p, n momenta and the rms
            mlp = pass_through(mlp, channel=3 + n)
        return {"mlp": mlp, **decay_offsets(n)}

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        channels = len(self.momentum_decays)
        decays = decays_of(self, theta)

        def init(params: base.Params) -> SmallFCState:
            base.check_params(params)
            accumulators = features.accumulators_init(params, channels, 1, channels)
            return SmallFCState(jnp.zeros((), jnp.int32), accumulators)

        def update(updates, state, params=None, **extra_args):
            del extra_args
            base.check_update(self, params)
            updates = jax.tree.map(jnp.asarray, updates)
            accumulators = features.accumulators_update(*decays, state.accumulators, updates)
            time = features.time_embedding(state.count)
            updates = jax.tree.map(
                lambda *leaf: self._leaf_update(theta["mlp"], time, *leaf),
                updates, params, *accumulators,
            )  # fmt: skip
            count = optax.safe_increment(state.count)
            return updates, SmallFCState(count, accumulators)

        return optax.GradientTransformationExtraArgs(init, update)

    def _leaf_update(self, mlp, time, g, p, m, v, row, col) -> jax.Array:
        known = features.tensor_features(g, p, m, v, row, col, vector_epsilon=1e-6)
        direction, magnitude = mlp_per_parameter(
            mlp, [known[name] for name in INPUTS], shared=time, shape=g.shape, epsilon=1e-5
        )
        step = self.step_size * direction * jnp.exp(self.magnitude_scale * magnitude)
        return -step.astype(jnp.result_type(p))


EXAMPLES = (SmallFC(hidden=4),)
# ELO's weights (arXiv 2506.10315, PyLO) are of this rule, with fixed decays; weight decay and
# schedule are the user's
CONFIGURATIONS = {"elo": SmallFC(hidden=32, initial="random")}
