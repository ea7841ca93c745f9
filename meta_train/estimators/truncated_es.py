"""Truncated evolution strategies: each window alone, from a start state that both halves of a pair
share.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem


class Trajectory(NamedTuple):
    """A particle: its unperturbed inner state, whether an episode starts next, and how many did."""

    inner: Any
    fresh: jax.Array
    episodes: jax.Array


def init_trajectory(estimator: base.ParticleEstimator, theta: Theta, key: base.Key) -> Trajectory:
    """Particles that are about to begin their first episode."""

    def particle(key):
        inner = antithetic.empty_like(lambda: estimator.problem.reset(theta, key, 0, True))
        return Trajectory(inner, jnp.ones((), bool), jnp.zeros((), jnp.int32))

    return base.over_particles(estimator, particle, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TruncatedES:
    """Biased: a window does not answer for what theta did to its start state. For smoke tests and
    comparison.

    The trajectory goes on under theta itself (a third unroll), so that no noise leaks into it.
    """

    truncated: ClassVar[bool] = True
    backpropagates: ClassVar[bool] = False
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    sigma: float = base.static(0.01)
    first_particle: int | jax.Array = 0

    __post_init__ = antithetic.check

    @property
    def unrolls(self) -> int:
        return 3

    def init(self, theta: Theta, key: base.Key) -> Trajectory:
        return init_trajectory(self, theta, key)

    def estimate(
        self, theta: Theta, state: Trajectory, key: base.Key
    ) -> tuple[base.Estimate, Trajectory]:
        def particle(key, run):
            noise_key, reset_key, unroll_key = jax.random.split(key, 3)
            noise = base.normal_like(noise_key, theta, self.sigma)
            begun = self.problem.reset(theta, reset_key, run.episodes, True)
            start = base.select(run.fresh, begun, run.inner)

            def perturbed(sign):
                theta_sign = base.add_scaled(theta, sign, noise)
                return self.problem.unroll(theta_sign, start, unroll_key)

            rollouts, inner = jax.vmap(perturbed)(jnp.array([1.0, -1.0, 0.0]))
            losses = jnp.mean(rollouts.losses, axis=1)
            estimate = antithetic.gradient(losses[:2], noise, self.sigma)
            kept = jax.tree.map(lambda x: x[2], inner)
            return estimate, Trajectory(kept, rollouts.done[2], run.episodes + run.fresh)

        estimates, state = base.over_particles(self, particle, key, state)
        return base.mean_estimate(estimates), state


EXAMPLES = (TruncatedES(particles=4),)
