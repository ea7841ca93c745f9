"""One antithetic evolution-strategies step; the estimators of this family differ in how they carry
the noise.

A pair of trajectories under theta + noise and theta - noise shares all other randomness. With the
window's mean losses L+ and L- the gradient of a particle is credit * (L+ - L-) / (2 sigma^2),
`credit` being the noise that the window answers for.

All of them have the fields
  sigma: the standard deviation of the noise: a number, or one per leaf of theta, as pairs (or a
    dict) of path prefix and number, ("mlp", 0.01), ("", 0.003). The longest prefix of a leaf's
    dotted path counts; "" is one of every path.
  shaping: "none"; or "sign": only the sign of L+ - L- counts, as a difference of 1; or "rank": the
    sign times the rank of |L+ - L-| among all particles, divided by their number (equal ones share
    the mean of their ranks). Both bound what a particle can do and lose the scale of the gradient,
    and what is left is biased: towards what most particles say, whatever their differences are.
  clip_difference: the largest |L+ - L-| that counts, more is cut to it (before it is shaped); the
    gradient is biased towards zero by as much as is cut.
"""

import math
import numbers
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from learned_opt.base import Theta, flatten
from meta_train.estimators import base
from meta_train.unroll import InnerProblem

Sigma = float | tuple[tuple[str, float], ...] | dict[str, float]
Shaping = Literal["none", "sign", "rank"]


class Pair(NamedTuple):
    """A particle: its two inner states (leading axis 2), the noise that its estimator carries, the
    index of its next window in the episode (0: an episode starts next), and how many episodes it
    began.
    """

    inner: Any
    noise: Any
    window: jax.Array
    episodes: jax.Array


# (noise carried since the last window, new noise, index of the window in the episode)
# -> (noise to perturb by, noise to credit, noise to carry)
Carry = Callable[[Any, Theta, jax.Array], tuple[Theta, Theta, Any]]


def on_both(theta: Theta, noise: Theta, function: Callable, *args: Any) -> Any:
    """function(theta + noise, *args[0]) and function(theta - noise, *args[1]), stacked."""
    return jax.vmap(lambda sign, *a: function(base.add_scaled(theta, sign, noise), *a))(
        jnp.array([1.0, -1.0]), *args
    )


def empty_like(function: Callable, *args: Any) -> Any:
    """Zeros of the shapes that `function` returns, without running or compiling it."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *args))


def init(estimator: base.ParticleEstimator, theta: Theta, key: base.Key, carried: Any) -> Pair:
    """Particles that are about to begin their first episode; `carried` has the shapes of the noise
    that they carry.
    """

    def particle(key):
        zero = jax.tree.map(jnp.zeros_like, theta)
        inner = empty_like(
            lambda: on_both(theta, zero, lambda t: estimator.problem.reset(t, key, 0, True))
        )
        noise, none = jax.tree.map(jnp.zeros_like, carried), jnp.zeros((), jnp.int32)
        return Pair(inner, noise, none, none)

    return base.over_particles(estimator, particle, key)


def estimate(
    estimator: Any, theta: Theta, state: Pair, key: base.Key, carry: Carry
) -> tuple[base.Estimate, Pair]:
    """One window of every pair; pairs whose next window is the first are reset first, under this
    window's noise.
    """
    problem: InnerProblem = estimator.problem

    def particle(key, pair):
        noise_key, reset_key, unroll_key = jax.random.split(key, 3)
        new = noise_like(noise_key, theta, estimator.sigma)
        noise, credit, carried = carry(pair.noise, new, pair.window)
        fresh = pair.window == 0
        begun = on_both(theta, noise, lambda t: problem.reset(t, reset_key, pair.episodes, True))
        inner = base.select(fresh, begun, pair.inner)
        # Both halves draw their data, the same: shared, it would have another rank than
        # what it is multiplied with, and matrix products a slower form.
        unroll_keys = jnp.broadcast_to(unroll_key, (2,))
        rollout, inner = on_both(theta, noise, problem.unroll, inner, unroll_keys)
        losses = jnp.mean(rollout.losses, axis=1)
        info = base.by_window(problem, pair.window, jnp.mean(losses), rollout.diverged)
        window = jnp.where(rollout.done[0], 0, pair.window + 1)
        return (losses, credit, info), Pair(inner, carried, window, pair.episodes + fresh)

    shown, state = base.over_particles(estimator, particle, key, state)
    return mean_estimate(estimator, *shown), state


def mean_estimate(
    estimator: Any, losses: jax.Array, credit: Theta, info: dict[str, jax.Array]
) -> base.Estimate:
    """The estimate from the losses [particles, 2] of all pairs, the noise to credit and further
    diagnostics, whose leading axis are the particles, too.
    """
    difference = losses[:, 0] - losses[:, 1]
    weight = shaped(estimator, difference)

    def weighted(credit: jax.Array, sigma: float) -> jax.Array:
        return credit * (weight / (2.0 * sigma**2)).reshape(-1, *(1,) * (credit.ndim - 1))

    grad = jax.tree.map(weighted, credit, sigmas(credit, estimator.sigma))
    moments = {"squared_difference": difference**2, "fourth_difference": difference**4}
    return base.mean_estimate(base.Estimate(grad, jnp.mean(losses, axis=1), info | moments))


def shaped(estimator: Any, difference: jax.Array) -> jax.Array:
    """What counts of the loss differences [particles]."""
    limit = estimator.clip_difference
    difference = jnp.clip(difference, -limit, limit)
    if estimator.shaping == "sign":
        return jnp.sign(difference)
    if estimator.shaping == "rank":
        size = jnp.abs(difference)
        ordered = jnp.sort(size)
        smaller, not_larger = (jnp.searchsorted(ordered, size, side=s) for s in ("left", "right"))
        return jnp.sign(difference) * (smaller + not_larger + 1) / (2 * len(size))
    return difference


def noise_like(key: base.Key, theta: Theta, sigma: Sigma) -> Theta:
    """Independent normal noise, of each leaf's standard deviation."""
    normal = base.normal_like(key, theta, 1.0)
    return jax.tree.map(lambda s, x: s * x, sigmas(theta, sigma), normal)


def sigmas(theta: Theta, sigma: Sigma) -> Any:
    """Each leaf's standard deviation, in a tree like theta.

    Raises:
      ValueError: a leaf has none, or a prefix is that of no leaf.
    """
    if not isinstance(sigma, tuple):
        return jax.tree.map(lambda _: sigma, theta)
    names, of_prefix = list(flatten(theta)), dict(sigma)
    idle = [prefix for prefix in of_prefix if not any(_is_under(prefix, name) for name in names)]
    if idle:
        raise ValueError(
            f"`sigma` names {', '.join(map(repr, idle))}, where theta has no leaf; its leaves are "
            f"{', '.join(map(repr, names))}"
        )
    found = []
    for name in names:
        fitting = [prefix for prefix in of_prefix if _is_under(prefix, name)]
        if not fitting:
            raise ValueError(
                f"`sigma` has none for the leaf {name!r}, got {sigma}; the pair ('', number) is "
                "for all leaves that no other prefix fits"
            )
        found.append(of_prefix[max(fitting, key=len)])
    return jax.tree.unflatten(jax.tree.structure(theta), found)


def _is_under(prefix: str, name: str) -> bool:
    return prefix == "" or f"{name}.".startswith(f"{prefix}.")


def check(estimator: Any) -> None:
    """Raises ValueError unless there are particles and the fields of the family make sense. A
    `sigma` of pairs is made a tuple, for the estimator to be hashable.
    """
    base.check_particles(estimator)
    sigma = estimator.sigma
    if isinstance(sigma, dict | list | tuple):
        try:
            sigma = tuple(dict(sigma).items())
        except (TypeError, ValueError):
            raise ValueError(f"`sigma` must be pairs of prefix and number, got {sigma}") from None
        object.__setattr__(estimator, "sigma", sigma)
    values = [s for _, s in sigma] if isinstance(sigma, tuple) else [sigma]
    if not values or not all(_is_positive(s) and s < math.inf for s in values):
        raise ValueError(f"`sigma` must be positive, got {sigma}")
    if estimator.shaping not in typing.get_args(Shaping):
        known = ", ".join(map(repr, typing.get_args(Shaping)))
        raise ValueError(f"`shaping` must be one of {known}, got {estimator.shaping!r}")
    if not _is_positive(estimator.clip_difference):
        raise ValueError(f"`clip_difference` must be positive, got {estimator.clip_difference!r}")


def _is_positive(number: Any) -> bool:
    return isinstance(number, numbers.Real) and float(number) > 0
