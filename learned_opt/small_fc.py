"""small_fc: a tiny MLP per parameter over momenta and factored second moments (arXiv 2203.11860,
"small_fc_lopt").
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from learned_opt import base, features


class SmallFCState(NamedTuple):
    """Per leaf, in float32: momenta [3, *shape], second moment [1, *shape], Adafactor factors."""

    count: jax.typing.ArrayLike
    momentum: Any
    rms: Any
    factored: Any


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
        if self.hidden < 1:
            raise ValueError(f"`hidden` must be at least 1, got {self.hidden}")
        if self.initial not in ("momentum", "random"):
            raise ValueError(f"`initial` must be 'momentum' or 'random', got {self.initial!r}")
        if self.initial == "momentum" and self.hidden < 2:
            raise ValueError(
                f"`hidden` must be at least 2 for initial='momentum', got {self.hidden}; "
                "set initial='random'"
            )
        if len(self.momentum_decays) != len(self.factored_decays):
            raise ValueError(
                "`momentum_decays` and `factored_decays` must be of equal length, got "
                f"{len(self.momentum_decays)} and {len(self.factored_decays)}"
            )

    def init(self, key: base.Key) -> base.Theta:
        """Weights of the MLP and offsets of the decays (zero: the fields' decays)."""
        n = len(self.momentum_decays)
        inputs = 4 + 8 * n + len(features.TIME_SCALES)
        mlp = features.mlp_init(key, (inputs, self.hidden, self.hidden, 2))
        if self.initial == "momentum":
            # the first momentum over its root mean square: behind g, p, n momenta and the rms
            mlp = features.pass_through(mlp, channel=3 + n)
        return {
            "mlp": mlp,
            "momentum_decays": jnp.zeros((n,)),
            "rms_decays": jnp.zeros((1,)),
            "factored_decays": jnp.zeros((n,)),
        }

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        channels = len(self.momentum_decays)
        momentum_decays = features.learned_decays(self.momentum_decays, theta["momentum_decays"])
        rms_decay = features.learned_decays((self.rms_decay,), theta["rms_decays"])
        factored_decays = features.learned_decays(self.factored_decays, theta["factored_decays"])

        def init(params: base.Params) -> SmallFCState:
            base.check_params(params)
            return SmallFCState(
                count=jnp.zeros((), jnp.int32),
                momentum=features.moments_init(params, channels),
                rms=features.moments_init(params, 1),
                factored=features.factored_init(params, channels),
            )

        def update(updates, state, params=None, **extra_args):
            del extra_args
            base.check_update(self, params)
            grads = base.float32(updates)
            momentum = jax.tree.map(
                lambda m, g: features.ema(momentum_decays, m, g), state.momentum, grads
            )
            rms = jax.tree.map(lambda v, g: features.ema(rms_decay, v, g * g), state.rms, grads)
            factored = jax.tree.map(
                lambda g, f: features.factored_update(factored_decays, f, g), grads, state.factored
            )
            time = features.time_embedding(state.count)
            updates = jax.tree.map(
                lambda *leaf: self._leaf_update(theta["mlp"], time, *leaf),
                grads, params, momentum, rms, factored,
            )  # fmt: skip
            count = optax.safe_increment(state.count)
            return updates, SmallFCState(count, momentum, rms, factored)

        return optax.GradientTransformationExtraArgs(init, update)

    def _leaf_update(self, mlp, time, g, p, m, v, factored: features.Factored) -> jax.Array:
        p = jnp.asarray(p)
        rsqrt = lax.rsqrt(v + 1e-6)
        row_scale, col_scale = features.factored_scales(factored, g.shape)
        if features.factored_axes(g.shape) is None:
            col = factored.row
            preconditioned_m = m * lax.rsqrt(factored.row + 1e-6)
        else:
            col = factored.col
            preconditioned_m = m * row_scale * col_scale
        direction, magnitude = features.mlp_per_parameter(
            mlp,
            [
                g[None], p.astype(jnp.float32)[None], m, v, m * rsqrt, rsqrt,
                g[None] * row_scale * col_scale, factored.row, col,
                lax.rsqrt(factored.row + 1e-8), lax.rsqrt(col + 1e-8), preconditioned_m,
            ],
            shared=time, shape=g.shape, epsilon=1e-5,
        )  # fmt: skip
        step = self.step_size * direction * jnp.exp(self.magnitude_scale * magnitude)
        return -step.astype(p.dtype)


EXAMPLES = (SmallFC(hidden=4),)
