"""Full evolution strategies: each estimate runs whole episodes."""

import dataclasses
from typing import ClassVar

import jax

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem, episode_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullES:
    """Unbiased for the smoothed loss of an episode. Carries nothing; costs an episode per
    estimate.
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = False
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    sigma: float = base.static(0.01)
    first_particle: int | jax.Array = 0

    __post_init__ = antithetic.check

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
                theta, noise, lambda t: episode_loss(self.problem, t, episode_key)
            )
            return antithetic.gradient(losses, noise, self.sigma)

        return base.mean_estimate(base.over_particles(self, particle, key)), state


EXAMPLES = (FullES(particles=4),)
