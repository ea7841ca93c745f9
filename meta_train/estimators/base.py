"""What a meta-gradient estimator is, and what all of them share: particles by global index, and
means over them.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.flatten_util
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.unroll import InnerProblem

Key = jax.Array
EstState = Any


class Estimate(NamedTuple):
    """Mean over particles of the gradient (like theta), the loss (scalar) and named diagnostics
    (scalars).
    """

    grad: Theta
    loss: jax.Array
    info: dict[str, jax.Array]


class GradientEstimator(Protocol):
    """Estimates d loss / d theta: all that the outer loop sees."""

    def init(self, theta: Theta, key: Key) -> EstState: ...

    def estimate(self, theta: Theta, state: EstState, key: Key) -> tuple[Estimate, EstState]: ...


class ParticleEstimator(GradientEstimator, Protocol):
    """An estimator over particles. A pytree; `problem` and `first_particle` are leaves.

    The particles have the global indices first_particle, ..., first_particle + particles - 1, and
    all randomness of a particle comes from its index, so the estimate does not depend on which
    process hosts which particle. Every array of the state has the particles as its leading axis.
    `truncated` declares the bias: the gradient is that of each window for a given start state, not
    that of the episode. `backpropagates` tells the problem to rematerialise. `unrolls` counts the
    unrolls that an estimate takes per particle.
    """

    truncated: ClassVar[bool]
    backpropagates: ClassVar[bool]

    @property
    def problem(self) -> InnerProblem: ...

    @property
    def particles(self) -> int: ...

    @property
    def first_particle(self) -> int | jax.Array: ...

    @property
    def unrolls(self) -> int: ...


UNBOUND: Any = None
"""The problem of an estimator that is still only named; `dataclasses.replace` binds one."""


def static(default: Any = dataclasses.MISSING) -> Any:
    """A static field: part of the compiled program."""
    return dataclasses.field(default=default, metadata={"static": True})


def check_particles(estimator: ParticleEstimator) -> None:
    """Raises ValueError unless the number of particles is a positive integer."""
    if not isinstance(estimator.particles, int):
        raise ValueError(f"`particles` must be an integer, got {estimator.particles!r}")
    if estimator.particles < 1:
        raise ValueError(f"`particles` must be at least 1, got {estimator.particles}")


def over_particles(estimator: ParticleEstimator, function: Callable, key: Key, *states: Any) -> Any:
    """`function(key of the particle, *its states)` for all particles, stacked on a leading axis."""
    indices = estimator.first_particle + jnp.arange(estimator.particles)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    return jax.vmap(function)(keys, *states)


def mean_estimate(particles: Estimate) -> Estimate:
    """Estimates stacked on a leading axis -> their mean.

    A particle with a non-finite gradient (backpropagation through a diverged run) costs itself, not
    the estimate: its gradient counts as zero.
    """
    finite = [jnp.isfinite(x).reshape(len(x), -1).all(axis=1) for x in jax.tree.leaves(particles)]
    good = jnp.stack(finite).all(axis=0)

    def zero_if_bad(x: jax.Array) -> jax.Array:
        return jnp.where(good.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)

    grad, info = jax.tree.map(zero_if_bad, (particles.grad, particles.info))
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), Estimate(grad, particles.loss, info))


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Leafwise `where` for a scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def add_scaled(theta: Theta, scale: float | jax.Array, direction: Theta) -> Theta:
    """theta + scale * direction."""
    return jax.tree.map(lambda t, d: t + scale * d, theta, direction)


def normal_like(key: Key, theta: Theta, sigma: float) -> Theta:
    """Independent normal noise of standard deviation sigma, in one draw for all leaves."""
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    return unravel(sigma * jax.random.normal(key, flat.shape, flat.dtype))


def partition(estimator: ParticleEstimator, parts: int) -> list[ParticleEstimator]:
    """The estimator's particles divided into `parts` contiguous ranges, as equal as possible.

    Raises:
      ValueError: there are more parts than particles, or none.
    """
    total = estimator.particles
    if not 1 <= parts <= total:
        raise ValueError(
            f"`parts` must be between 1 and the number of particles ({total}), got {parts}"
        )
    bounds = [total * i // parts for i in range(parts + 1)]
    return [
        dataclasses.replace(estimator, particles=high - low, first_particle=low)  # type: ignore
        for low, high in itertools.pairwise(bounds)
    ]


def combine(estimates: Sequence[Estimate], particles: Sequence[int]) -> Estimate:
    """Mean of the estimates of a partition, weighted by particles and always added in the order
    given.
    """
    total = sum(particles)
    weighted = [
        jax.tree.map(lambda x, n=n: x * (n / total), estimate)
        for estimate, n in zip(estimates, particles, strict=True)
    ]
    return jax.tree.map(lambda *xs: sum(xs[1:], start=xs[0]), *weighted)
