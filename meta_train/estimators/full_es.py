"""Full evolution strategies: each estimate runs whole episodes, so any functional of the losses has
an unbiased gradient.
"""

import dataclasses
from typing import ClassVar, Literal

import jax

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem, episode_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullES:
    """Unbiased for the smoothed mean or final loss of an episode. Carries nothing; costs an episode
    per estimate.
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = False
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    sigma: float = base.static(0.01)
    objective: Literal["mean", "final"] = base.static("mean")
    first_particle: int | jax.Array = 0

    def __post_init__(self):
        antithetic.check(self)
        base.check_objective(self.objective)

    @property
    def unrolls(self) -> int:
        return 2 * self.problem.windows

    def init(self, theta: Theta, key: base.Key) -> None:
        return None

    def estimate(self, theta: Theta, state: None, key: base.Key) -> tuple[base.Estimate, None]:
        def particle(key):
            noise_key, episode_key = jax.random.split(key)
            noise = base.normal_like(noise_key, theta, self.sigma)
            losses = antithetic.on_both(
                theta,
                noise,
                lambda t: episode_loss(self.problem, t, episode_key, self.objective),
            )
            return antithetic.gradient(losses, noise, self.sigma)

        return base.mean_estimate(base.over_particles(self, particle, key)), state


EXAMPLES = (FullES(particles=4),)
