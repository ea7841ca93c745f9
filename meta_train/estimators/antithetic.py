"""One antithetic evolution-strategies step; the estimators of this family differ in how they carry
the noise.

A pair of trajectories under theta + noise and theta - noise shares all other randomness. With the
window's mean losses L+ and L- the gradient of a particle is credit * (L+ - L-) / (2 sigma^2),
`credit` being the noise that the window answers for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import base
from meta_train.unroll import InnerProblem


class Pair(NamedTuple):
    """A particle: its two inner states (leading axis 2), its noise, whether an episode starts next,
    and how many did.
    """

    inner: Any
    noise: Theta
    fresh: jax.Array
    episodes: jax.Array


# (noise since the last reset or zero, new noise, fresh) -> (noise to perturb by, noise to credit
# and carry)
Carry = Callable[[Theta, Theta, jax.Array], tuple[Theta, Theta]]


def on_both(theta: Theta, noise: Theta, function: Callable, *args: Any) -> Any:
    """function(theta + noise, *args[0]) and function(theta - noise, *args[1]), stacked."""
    return jax.vmap(lambda sign, *a: function(base.add_scaled(theta, sign, noise), *a))(
        jnp.array([1.0, -1.0]), *args
    )


def empty_like(function: Callable, *args: Any) -> Any:
    """Zeros of the shapes that `function` returns, without running or compiling it."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))


def init(estimator: base.ParticleEstimator, theta: Theta, key: base.Key) -> Pair:
    """Particles that are about to begin their first episode."""

    def particle(key):
        zero = jax.tree.map(jnp.zeros_like, theta)
        inner = empty_like(
            lambda: on_both(theta, zero, lambda t: estimator.problem.reset(t, key, 0, True))
        )
        return Pair(inner, zero, jnp.ones((), bool), jnp.zeros((), jnp.int32))

    return base.over_particles(estimator, particle, key)


def estimate(
    estimator: Any, theta: Theta, state: Pair, key: base.Key, carry: Carry
) -> tuple[base.Estimate, Pair]:
    """One window of every pair; pairs that are `fresh` are reset first, under this window's
    noise.
    """
    problem: InnerProblem = estimator.problem

    def particle(key, pair):
        noise_key, reset_key, unroll_key = jax.random.split(key, 3)
        new = base.normal_like(noise_key, theta, estimator.sigma)
        noise, credit = carry(pair.noise, new, pair.fresh)
        begun = on_both(theta, noise, lambda t: problem.reset(t, reset_key, pair.episodes, True))
        inner = base.select(pair.fresh, begun, pair.inner)
        rollout, inner = on_both(theta, noise, lambda t, s: problem.unroll(t, s, unroll_key), inner)
        losses = jnp.mean(rollout.losses, axis=1)
        estimate = gradient(losses, credit, estimator.sigma)
        return estimate, Pair(inner, credit, rollout.done[0], pair.episodes + pair.fresh)

    estimates, state = base.over_particles(estimator, particle, key, state)
    return base.mean_estimate(estimates), state


def gradient(losses: jax.Array, credit: Theta, sigma: float) -> base.Estimate:
    """A particle's estimate from the losses [2] of its two halves."""
    difference = losses[0] - losses[1]
    grad = jax.tree.map(lambda c: c * (difference / (2.0 * sigma**2)), credit)
    return base.Estimate(grad, jnp.mean(losses), {"squared_difference": difference**2})


def check(estimator: Any) -> None:
    """Raises ValueError unless there are particles and sigma is positive."""
    base.check_particles(estimator)
    if not estimator.sigma > 0:
        raise ValueError(f"`sigma` must be positive, got {estimator.sigma}")
