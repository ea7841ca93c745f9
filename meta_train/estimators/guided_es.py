"""Guided evolution strategies (arXiv 1806.10230): whole episodes, with noise that is stretched
along a gradient which is cheap and wrong: that of truncated backpropagation.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem, Key, Rollout, State, episode_loss


@dataclasses.dataclass(frozen=True)
class Detached:
    """The problem with no derivative through the states between its windows."""

    problem: InnerProblem

    @property
    def windows(self) -> int:
        return self.problem.windows

    def reset(
        self, theta: Theta, key: Key, episode: int | jax.Array = 0, stagger: bool = False
    ) -> State:
        return self.problem.reset(theta, key, episode, stagger)

    def unroll(self, theta: Theta, state: State, key: Key) -> tuple[Rollout, State]:
        rollout, state = self.problem.unroll(theta, state, key)
        return rollout, lax.stop_gradient(state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuidedES:
    """Biased, by a known matrix: the expected estimate is beta * C * gradient of the smoothed loss.

    The noise is N(0, sigma^2 C), C = alpha/d I + (1 - alpha) u u^T, for d meta-parameters and u the
    direction of the surrogate: the gradient of the same episode's loss without what passes between
    its windows. C has trace 1, so sigma is the length of the noise, not that of one entry. Where
    the surrogate is zero or not finite, u is zero and the noise isotropic. alpha 1/2, beta 2 and
    sigma 0.1 are the published values: a gradient along u keeps about its length. alpha 1 and beta
    d is `full_es`. With a sigma per leaf all this holds for theta measured in units of sigma.

    Its state is the number of episodes, int32 [particles].
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = True
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    sigma: float | tuple[tuple[str, float], ...] = base.static(0.1)
    shaping: str = base.static("none")
    clip_difference: float = base.static(math.inf)
    alpha: float = base.static(0.5)
    beta: float = base.static(2.0)
    first_particle: int | jax.Array = 0

    def __post_init__(self):
        antithetic.check(self)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must be between 0 and 1, got {self.alpha}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"`beta` must be positive, got {self.beta}")

    @property
    def unrolls(self) -> int:
        return 3 * self.problem.windows

    init = base.no_episodes

    def estimate(
        self, theta: Theta, state: jax.Array, key: base.Key
    ) -> tuple[base.Estimate, jax.Array]:
        def particle(key, episode):
            noise_key, episode_key = jax.random.split(key)

            def loss(problem, theta):
                return episode_loss(problem, theta, episode_key, episode)

            surrogate = jax.grad(lambda t: loss(Detached(self.problem), t)[0])(theta)
            noise = self.noise(noise_key, theta, surrogate)
            losses, lost = antithetic.on_both(theta, noise, lambda t: loss(self.problem, t))
            credit = jax.tree.map(lambda n: self.beta * n, noise)
            return losses, credit, {"diverged": jnp.any(lost).astype(jnp.float32)}

        shown = base.over_particles(self, particle, key, state)
        return antithetic.mean_estimate(self, *shown), state + 1

    def noise(self, key: base.Key, theta: Theta, surrogate: Theta) -> Theta:
        """Noise of covariance sigma^2 C."""
        sigmas = antithetic.sigmas(theta, self.sigma)
        isotropic_key, along_key = jax.random.split(key)
        isotropic = base.normal_like(isotropic_key, theta, math.sqrt(self.alpha))
        along = math.sqrt(1.0 - self.alpha) * jax.random.normal(along_key)
        guide = direction(jax.tree.map(lambda s, g: s * g, sigmas, surrogate))
        size = sum(leaf.size for leaf in jax.tree.leaves(theta))
        return jax.tree.map(
            lambda s, e, u: s * (e / math.sqrt(size) + along * u), sigmas, isotropic, guide
        )


def direction(gradient: Theta) -> Any:
    """The gradient scaled to length 1, or zero if it has no direction: is zero or not finite."""
    flat, unravel = jax.flatten_util.ravel_pytree(gradient)
    largest = jnp.max(jnp.abs(flat))
    # entry by entry: a maximum that XLA takes on a CPU may hide a NaN
    known = jnp.isfinite(flat).all() & (largest > 0)
    # by its largest entry first: the square of a huge or tiny one is not a number of float32
    flat = jnp.where(known, flat / jnp.where(known, largest, 1.0), 0.0)
    return unravel(flat / jnp.where(known, jnp.linalg.norm(flat), 1.0))


EXAMPLES = (GuidedES(particles=4),)
