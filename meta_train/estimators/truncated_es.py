"""Truncated evolution strategies: each window alone, from a start state that both halves of a pair
share.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem


class Trajectory(NamedTuple):
    """A particle: its unperturbed inner state, the index of its next window in the episode (0: an
    episode starts next), and how many episodes it began.
    """

    inner: Any
    window: jax.Array
    episodes: jax.Array


def init_trajectory(estimator: base.ParticleEstimator, theta: Theta, key: base.Key) -> Trajectory:
    """Particles that are about to begin their first episode."""

    def particle(key):
        inner = antithetic.empty_like(lambda: estimator.problem.reset(theta, key, 0, True))
        return Trajectory(inner, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    return base.over_particles(estimator, particle, key)


def begin(problem: InnerProblem, theta: Theta, run: Trajectory, key: base.Key) -> Any:
    """The inner state from which the particle's next window starts."""
    begun = problem.reset(theta, key, run.episodes, True)
    return base.select(run.window == 0, begun, run.inner)


def after(run: Trajectory, inner: Any, done: jax.Array) -> Trajectory:
    """The particle after its window, which led to `inner` and may have ended the episode."""
    window = jnp.where(done, 0, run.window + 1)
    return Trajectory(inner, window, run.episodes + (run.window == 0))


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
    sigma: float | tuple[tuple[str, float], ...] = base.static(0.01)
    shaping: str = base.static("none")
    clip_difference: float = base.static(math.inf)
    first_particle: int | jax.Array = 0

    __post_init__ = antithetic.check

    @property
    def unrolls(self) -> int:
        return 3

    init = init_trajectory

    def estimate(
        self, theta: Theta, state: Trajectory, key: base.Key
    ) -> tuple[base.Estimate, Trajectory]:
        def particle(key, run):
            noise_key, reset_key, unroll_key = jax.random.split(key, 3)
            noise = antithetic.noise_like(noise_key, theta, self.sigma)
            start = begin(self.problem, theta, run, reset_key)
            unroll = lambda t: self.problem.unroll(t, start, unroll_key)  # noqa: E731
            pair, _ = antithetic.on_both(theta, noise, unroll)
            rollout, inner = unroll(theta)
            losses = jnp.mean(pair.losses, axis=1)
            lost = jnp.any(pair.diverged) | rollout.diverged
            info = base.by_window(self.problem, run.window, jnp.mean(losses), lost)
            return (losses, noise, info), after(run, inner, rollout.done)

        shown, state = base.over_particles(self, particle, key, state)
        return antithetic.mean_estimate(self, *shown), state


EXAMPLES = (TruncatedES(particles=4),)
