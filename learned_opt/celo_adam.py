"""Celo-Adam: Adam with the schedule of step sizes that Celo's LSTM plans from the run (arXiv
2501.12670). Hardly dearer than Adam.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, fields, scheduler


class CeloAdamState(NamedTuple):
    adam: optax.ScaleByAdamState
    scheduler: scheduler.SchedulerState


@dataclasses.dataclass(frozen=True)
class CeloAdam:
    """update = -step_size * multiplier * Adam's direction; the multiplier is the schedule: 0.1 *
    exp(output of the LSTM).

    Needs the loss and the horizon. NaN losses after the first are harmless.

    Args:
      lstm: size of the LSTM.
      initial: where meta-training starts: "constant" is Adam of learning rate `step_size`, with a
        tenth of a random schedule on top; "random" is the published start.
    """

    lstm: int = 64
    step_size: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    gradient_clip: float = 1000.0
    initial: Literal["constant", "random"] = "constant"

    def __post_init__(self):
        fields.at_least_one(self, "lstm")
        for name in ("b1", "b2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        fields.positive(self, "gradient_clip")
        fields.one_of(self, "initial", "constant", "random")

    @classmethod
    def published(cls) -> "CeloAdam":
        """The rule of the released weights, with its random start of meta-training."""
        return cls(initial="random")

    def init(self, key: base.Key) -> base.Theta:
        """{"scheduler": {"mix_all", "mix_own", "lstm", "step_size", each {w, b}, "initial":
        {hidden, cell}}}.
        """
        plan = scheduler.scheduler_init(key, scheduler.RUN_FEATURES, self.lstm, {"step_size": 1})
        if self.initial == "constant":
            plan["step_size"] = scheduler.head_at(plan["step_size"], math.log(10.0))
        return {"scheduler": plan}

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        base.check_theta(self, theta)
        horizon = base.require_horizon(self, horizon)
        adam = optax.scale_by_adam(self.b1, self.b2, eps=1e-8, eps_root=1e-10)

        def init(params: base.Params) -> CeloAdamState:
            base.check_params(params)
            state = scheduler.scheduler_state(theta["scheduler"], 1, horizon)
            return CeloAdamState(adam.init(base.float32(params)), state)  # pyright: ignore[reportArgumentType]

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            loss = base.require_value(self, extra_args)
            clip = self.gradient_clip
            grads = jax.tree.map(lambda g: jnp.clip(g, -clip, clip), base.float32(updates))
            multiplier, plan = scheduler.run_schedule(
                theta["scheduler"], state.scheduler, loss, state.adam.count, horizon
            )
            directions, moments = adam.update(grads, state.adam)
            factor = -self.step_size * multiplier
            updates = jax.tree.map(
                lambda d, p: (factor * d).astype(jnp.result_type(p)), directions, params
            )
            return updates, CeloAdamState(moments, plan)  # pyright: ignore[reportArgumentType]

        return optax.GradientTransformationExtraArgs(init, update)


EXAMPLES = (CeloAdam(lstm=8),)
