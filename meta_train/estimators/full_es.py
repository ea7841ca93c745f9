"""Full evolution strategies: each estimate runs whole episodes."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem, episode_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullES:
    """Unbiased for the smoothed loss of an episode; costs an episode per estimate.

    Its state is the number of episodes, int32 [particles].
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = False
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    sigma: float | tuple[tuple[str, float], ...] = base.static(0.01)
    shaping: str = base.static("none")
    clip_difference: float = base.static(math.inf)
    first_particle: int | jax.Array = 0

    __post_init__ = antithetic.check

    @property
    def unrolls(self) -> int:
        return 2 * self.problem.windows

    init = base.no_episodes

    def estimate(
        self, theta: Theta, state: jax.Array, key: base.Key
    ) -> tuple[base.Estimate, jax.Array]:
        def particle(key, episode):
            noise_key, episode_key = jax.random.split(key)
            noise = antithetic.noise_like(noise_key, theta, self.sigma)
            losses, lost = antithetic.on_both(
                theta, noise, lambda t: episode_loss(self.problem, t, episode_key, episode)
            )
            return losses, noise, {"diverged": jnp.any(lost).astype(jnp.float32)}

        shown = base.over_particles(self, particle, key, state)
        return antithetic.mean_estimate(self, *shown), state + 1


EXAMPLES = (FullES(particles=4),)
