"""Backpropagation through the inner training, truncated or whole."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import base
from meta_train.estimators.truncated_es import Trajectory, after, begin, init_trajectory
from meta_train.unroll import InnerProblem, Walk, episode_loss, in_a_row


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TruncatedBPTT:
    """Exact gradient of a window's mean loss for a fixed start state: biased as truncated ES is,
    without its variance.

    Memory grows with the truncation; `Training(remat=True)` keeps one inner state per step.
    """

    truncated: ClassVar[bool] = True
    backpropagates: ClassVar[bool] = True
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    first_particle: int | jax.Array = 0

    __post_init__ = base.check_particles

    @property
    def unrolls(self) -> int:
        return 1

    init = init_trajectory

    def estimate(
        self, theta: Theta, state: Trajectory, key: base.Key
    ) -> tuple[base.Estimate, Trajectory]:
        def particle(key, run):
            reset_key, unroll_key = jax.random.split(key)

            def loss(theta):
                # the reset is inside: an initial state that depends on theta has its gradient
                start = begin(self.problem, theta, run, reset_key)
                rollout, inner = self.problem.unroll(theta, start, unroll_key)
                return jnp.mean(rollout.losses), (rollout.done, jnp.any(rollout.diverged), inner)

            (value, (done, lost, inner)), grad = jax.value_and_grad(loss, has_aux=True)(theta)
            info = base.by_window(self.problem, run.window, value, lost)
            return base.Estimate(grad, value, info), after(run, inner, done)

        estimates, state = base.over_particles(self, particle, key, state)
        return base.mean_estimate(estimates), state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullBPTT:
    """Exact gradient of a whole episode's loss. For short horizons: long ones are chaotic.

    Its state is the number of episodes, int32 [particles].
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = True
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    first_particle: int | jax.Array = 0

    __post_init__ = base.check_particles

    @property
    def unrolls(self) -> int:
        return self.problem.windows

    init = base.no_episodes

    def estimate(
        self, theta: Theta, state: jax.Array, key: base.Key
    ) -> tuple[base.Estimate, jax.Array]:
        return whole_episodes(self, theta, state, key)


def whole_episodes(
    estimator: base.ParticleEstimator,
    theta: Theta,
    state: jax.Array,
    key: base.Key,
    walk: Walk = in_a_row,
) -> tuple[base.Estimate, jax.Array]:
    """The exact gradient of every particle's next episode; `walk` decides what is stored."""

    def particle(key, episode):
        loss = lambda t: episode_loss(estimator.problem, t, key, episode, walk)  # noqa: E731
        (value, lost), grad = jax.value_and_grad(loss, has_aux=True)(theta)
        return base.Estimate(grad, value, {"diverged": lost.astype(jnp.float32)})

    return base.mean_estimate(base.over_particles(estimator, particle, key, state)), state + 1


EXAMPLES = (TruncatedBPTT(particles=4), FullBPTT(particles=4))
