"""Celo: VeLO's MLP, but one for all tensors, and an LSTM that sees only the run and plans one
schedule of step sizes (arXiv 2501.12670).
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, features, fields, scheduler, velo
from learned_opt.mlp import mlp_init, pass_through


class CeloState(NamedTuple):
    count: jax.typing.ArrayLike
    scheduler: scheduler.SchedulerState
    accumulators: features.Accumulators


@dataclasses.dataclass(frozen=True)
class Celo:
    """update = -step_size * multiplier * rms(params) * direction * exp(magnitude_scale * magnitude)

    Direction and magnitude are outputs of an MLP of 30 normalised inputs, the multiplier is the
    schedule: 0.1 * exp(output of the LSTM). Needs the loss and the horizon. NaN losses after the
    first are harmless.

    Args:
      lstm: size of the LSTM.
      hidden: width of the MLP.
      schedule: False makes the multiplier 1. Published meta-training has two phases: first the MLP
        without the schedule, then the schedule with theta["mlp"] frozen.
      gradient_clip: gradients are clipped to plus or minus this, element by element.
      relative_steps: False leaves rms(params) out.
      initial: where meta-training starts: "momentum" steps step_size * rms(params) along the
        momentum over its root mean square; "random" is the published start.
    """

    lstm: int = 64
    hidden: int = 4
    schedule: bool = True
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3
    gradient_clip: float = 1000.0
    relative_steps: bool = True
    initial: Literal["momentum", "random"] = "momentum"

    def __post_init__(self):
        fields.at_least_one(self, "lstm", "hidden")
        fields.positive(self, "gradient_clip")
        fields.momentum_or_random(self)

    @classmethod
    def published(cls) -> "Celo":
        """The rule of the released weights, with its random start of meta-training."""
        return cls(initial="random")

    def init(self, key: base.Key) -> base.Theta:
        """{"mlp": {w0 [30, hidden], b0, w1, b1, w2 [hidden, 3], b2}, "scheduler": {"mix_all",
        "mix_own", "lstm", "step_size", each {w, b}, "initial": {hidden, cell}}}.
        """
        of_mlp, of_plan = jax.random.split(key)
        mlp = mlp_init(of_mlp, (30, self.hidden, self.hidden, 3))
        plan = scheduler.scheduler_init(
            of_plan, scheduler.RUN_FEATURES, self.lstm, {"step_size": 1}
        )
        if self.initial == "momentum":
            mlp = pass_through(mlp, velo.MOMENTUM)
            plan["step_size"] = scheduler.head_at(plan["step_size"], math.log(10.0))
        return {"mlp": mlp, "scheduler": plan}

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        base.check_theta(self, theta)
        horizon = base.require_horizon(self, horizon)

        def init(params: base.Params) -> CeloState:
            base.check_params(params)
            state = scheduler.scheduler_state(theta["scheduler"], 1, horizon)
            return CeloState(jnp.zeros((), jnp.int32), state, velo.accumulators_init(params))

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            updates = jax.tree.map(jnp.asarray, updates)
            loss = base.require_value(self, extra_args)
            multiplier, plan = scheduler.run_schedule(
                theta["scheduler"], state.scheduler, loss, state.count, horizon
            )
            step_size = self.step_size * (multiplier if self.schedule else 1.0)
            accumulators = velo.accumulators_update(state.accumulators, updates, self.gradient_clip)

            def leaf_update(g, p, m, v, row, col):
                p = jnp.asarray(p)
                single = p.astype(jnp.float32)
                scale = 1.0
                if self.relative_steps:
                    scale = velo.parameter_scale(velo.mean_square(single))
                step = velo.mlp_step(
                    theta["mlp"], self.magnitude_scale, self.gradient_clip, g, p, m, v, row, col
                )
                return (-step_size * scale * step).astype(p.dtype)

            updates = jax.tree.map(leaf_update, updates, params, *accumulators)
            count = optax.safe_increment(state.count)
            return updates, CeloState(count, plan, accumulators)

        return optax.GradientTransformationExtraArgs(init, update)


EXAMPLES = (Celo(lstm=8),)
