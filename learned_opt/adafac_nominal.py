"""adafac_nominal: the MLP of small_fc beside a nominal, hand-designed step whose size it may
control, and weight decay (arXiv 2209.11208, "STAR").
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from learned_opt import base, features, fields
from learned_opt.mlp import mlp_init, mlp_per_parameter
from learned_opt.small_fc import INPUTS, SmallFCState, decay_offsets, decays_of

Nominal = Literal["sgd", "momentum", "aggregated_momentum", "adam", "aggregated_adam"]
BlackBox = Literal["raw", "preconditioned", "mean_gradient"]
Initial = Literal["nominal", "random"]
RMS_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class AdafacNominal:
    """update = -(black box + nominal step + decay * param), with three magnitudes from the MLP:

        black box    = step_size * direction * exp(magnitude_scale * magnitude)
        nominal step = nominal_step_size * exp(nominal_magnitude_scale * magnitude) * nominal
        decay        = weight_decay * exp(decay_magnitude_scale * magnitude)

    Inputs, time and learned decays are small_fc's. Needs neither the loss nor a horizon.

    Args:
      hidden: width of the MLP.
      nominal: the gradient, the last momentum, the mean of the momenta, or the last two over the
        root of the second moment; averages are not corrected for their start at zero.
      nominal_control, decay_control: whether the MLP moves that magnitude; otherwise they are 1 and
        0, as published.
      pool_magnitude, pool_nominal_magnitude: one magnitude per tensor, the mean.
      black_box: "preconditioned" divides it by the root of the second moment, "mean_gradient"
        multiplies it by the mean gradient of the tensor.
      initial: where meta-training starts: "nominal" is the nominal step alone; "random" is the
        published start.
    """

    hidden: int = 4
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3
    nominal: Nominal = "aggregated_adam"
    nominal_step_size: float = 1e-3
    nominal_magnitude_scale: float = 0.1
    nominal_control: bool = True
    weight_decay: float = 0.0
    decay_magnitude_scale: float = 0.1
    decay_control: bool = True
    pool_magnitude: bool = False
    pool_nominal_magnitude: bool = False
    black_box: BlackBox = "raw"
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decay: float = 0.999
    factored_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    initial: Initial = "nominal"

    def __post_init__(self):
        fields.at_least_one(self, "hidden")
        choices = {"nominal": Nominal, "black_box": BlackBox, "initial": Initial}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"`{name}` must be one of {', '.join(get_args(known))}, "
                    f"got {getattr(self, name)!r}"
                )
        if not 0.0 <= self.weight_decay < 1.0:
            raise ValueError(f"`weight_decay` must be in [0, 1), got {self.weight_decay}")
        if self.initial == "nominal" and not self.nominal_step_size > 0.0:
            raise ValueError(
                "`nominal_step_size` must be positive for initial='nominal', got "
                f"{self.nominal_step_size}; set initial='random'"
            )
        fields.accumulator_decays(self)

    @classmethod
    def published(cls) -> "AdafacNominal":
        """What the published code does unasked: no nominal step, no decay, a random start."""
        return cls(
            nominal_step_size=0.0,
            nominal_magnitude_scale=1e-3,
            nominal_control=False,
            decay_magnitude_scale=1e-3,
            decay_control=False,
            initial="random",
        )

    def init(self, key: base.Key) -> base.Theta:
        """{"mlp": {w0 [39, hidden], b0, w1, b1, w2 [hidden, 4], b2}} and offsets of the decays; the
        four outputs are the direction and the three magnitudes.
        """
        n = len(self.momentum_decays)
        inputs = 4 + 8 * n + len(features.TIME_SCALES)
        mlp = mlp_init(key, (inputs, self.hidden, self.hidden, 4))
        if self.initial == "nominal":
            mlp["w2"] = jnp.zeros_like(mlp["w2"])
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
            grads = base.float32(updates)
            accumulators = features.accumulators_update(*decays, state.accumulators, grads)
            time = features.time_embedding(state.count)
            updates = jax.tree.map(
                lambda *leaf: self._leaf_update(theta["mlp"], time, *leaf),
                grads, params, *accumulators,
            )  # fmt: skip
            return updates, SmallFCState(optax.safe_increment(state.count), accumulators)

        return optax.GradientTransformationExtraArgs(init, update)

    def _leaf_update(self, mlp, time, g, p, m, v, row, col) -> jax.Array:
        p = jnp.asarray(p)
        dtype, p = p.dtype, p.astype(jnp.float32)
        known = features.tensor_features(g, p, m, v, row, col, RMS_EPSILON, vector_epsilon=1e-6)
        direction, magnitude, nominal_magnitude, decay_magnitude = mlp_per_parameter(
            mlp, [known[name] for name in INPUTS], shared=time, shape=g.shape, epsilon=1e-5
        )
        if self.pool_magnitude:
            magnitude = jnp.mean(magnitude)
        if not self.nominal_control:
            nominal_magnitude = 1.0
        elif self.pool_nominal_magnitude:
            nominal_magnitude = jnp.mean(nominal_magnitude)
        if not self.decay_control:
            decay_magnitude = 0.0
        rsqrt = lax.rsqrt(v[0] + RMS_EPSILON)
        step = self.step_size * direction * jnp.exp(self.magnitude_scale * magnitude)
        if self.black_box == "preconditioned":
            step = step * rsqrt
        elif self.black_box == "mean_gradient":
            step = step * jnp.mean(g)
        nominal = self.nominal_step_size * jnp.exp(self.nominal_magnitude_scale * nominal_magnitude)
        decay = self.weight_decay * jnp.exp(self.decay_magnitude_scale * decay_magnitude)
        return -(step + nominal * self._nominal(g, m, rsqrt) + decay * p).astype(dtype)

    def _nominal(self, g: jax.Array, m: jax.Array, rsqrt: jax.Array) -> jax.Array:
        if self.nominal == "sgd":
            return g
        # a sum of terms fuses with the step, a reduction would not
        momentum = sum(m[1:], m[0]) / len(m) if self.nominal.startswith("aggregated") else m[-1]
        return momentum * rsqrt if self.nominal.endswith("adam") else momentum


EXAMPLES = (AdafacNominal(weight_decay=0.01, black_box="preconditioned"),)
