"""What a meta-gradient estimator is, and what all of them share: particles by global index, means
over them, and what these means tell about the estimate.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from learned_opt.base import Theta
from meta_train import chunk
from meta_train.unroll import InnerProblem

Key = jax.Array
EstState = Any


class Estimate(NamedTuple):
    """Mean over particles of the gradient (like theta), the loss (scalar) and named diagnostics
    (scalars, or vectors over the windows of an episode), which `diagnostics` reads.
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
    that of the episode; a class that has another bias says so. `backpropagates` tells the problem
    to rematerialise. `unrolls` counts the unrolls that an estimate takes per particle.
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
    """`function(key of the particle, *its states)` for all particles, stacked on a leading axis.

    On CPUs as many particles at a time as a core's cache can hold.
    """
    indices = estimator.first_particle + jnp.arange(estimator.particles)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    if jax.default_backend() != "cpu":
        return jax.vmap(function)(keys, *states)
    return chunk.mapped(function, keys, *states)


def mean_estimate(particles: Estimate) -> Estimate:
    """Estimates stacked on a leading axis -> their mean, and in `info` the mean `squared_norm` of
    their gradients.

    A particle with a non-finite gradient (backpropagation through a diverged run) costs itself, not
    the estimate: its gradient counts as zero. So does each diagnostic that is not finite, alone:
    that the run diverged is still told.
    """
    leaves = jax.tree.leaves((particles.grad, particles.loss))
    finite = [jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in leaves]
    good = jnp.stack(finite).all(axis=0)

    def zero_if_bad(x: jax.Array) -> jax.Array:
        return jnp.where(good.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)

    grad = jax.tree.map(zero_if_bad, particles.grad)
    squares = [jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(grad)]
    info = particles.info | {"squared_norm": sum(squares, start=jnp.zeros_like(particles.loss))}
    info = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), info)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), Estimate(grad, particles.loss, info))


def no_episodes(estimator: ParticleEstimator, theta: Theta, key: Key) -> jax.Array:
    """int32 [particles]: how many episodes each particle has had, the state of estimators that run
    whole ones.
    """
    return jnp.zeros(estimator.particles, jnp.int32)


def compares_particles(estimator: ParticleEstimator) -> bool:
    """Whether all particles must be in one program."""
    return getattr(estimator, "shaping", None) == "rank"


def by_window(
    problem: InnerProblem, window: jax.Array, loss: jax.Array, diverged: bool | jax.Array
) -> dict[str, jax.Array]:
    """Diagnostics, scalar and [windows], of a particle whose `window`-th window of the episode had
    mean loss `loss`; `diverged` is of any shape, one entry per run.
    """
    here = jnp.arange(problem.windows) == window
    return {
        "diverged": jnp.any(diverged).astype(jnp.float32),
        "loss_by_window": jnp.where(here, loss, 0.0),
        "share_by_window": here.astype(loss.dtype),
    }


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
      ValueError: there are more parts than particles, or none; or the estimator compares all
        particles and there is more than one part.
    """
    total = estimator.particles
    if not 1 <= parts <= total:
        raise ValueError(
            f"`parts` must be between 1 and the number of particles ({total}), got {parts}"
        )
    if parts > 1 and compares_particles(estimator):
        raise ValueError(
            "`shaping`='rank' compares all particles with each other, so it needs `workers` of at "
            f"most 1, got {parts}; the other shapings work with any number"
        )
    bounds = [total * i // parts for i in range(parts + 1)]
    return [
        dataclasses.replace(estimator, particles=high - low, first_particle=low)  # type: ignore
        for low, high in itertools.pairwise(bounds)
    ]


def combine(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Weighted mean of estimates, those of a partition by their particles; always added in the
    order given.
    """
    total = sum(weights)
    weighted = [
        jax.tree.map(lambda x, w=w: x * (w / total), estimate)
        for estimate, w in zip(estimates, weights, strict=True)
    ]
    return jax.tree.map(lambda *xs: sum(xs[1:], start=xs[0]), *weighted)


MOMENTS = {"squared_norm", "squared_difference", "fourth_difference", "gradient_variance"}
BY_WINDOW = {"loss_by_window", "share_by_window"}


def variance_of_mean(signal: Any, squared_norm: Any, particles: int) -> Any:
    """The variance, summed over all entries, of the mean of `particles` gradients, from the squared
    norm of that mean and the mean of their squared norms (scalar arrays); nan for one particle,
    which has no spread.
    """
    if particles == 1:
        return math.nan * squared_norm
    # gradients that are all equal differ by rounding
    spread = (squared_norm - signal).clip(float(np.finfo(np.float32).eps) * squared_norm)
    return spread / (particles - 1)


def diagnostics(estimate: Estimate, particles: int) -> dict[str, Any]:
    """What the means in `estimate.info` over all `particles` tell, as numbers for a log; None for
    what they cannot tell (one particle has no spread).

    `gradient_snr`: |mean gradient|^2 by the variance of that mean, estimated from the particles;
    about 1 if there is nothing but noise; a mixture brings its `gradient_variance`, since the
    particles of its members are not alike. `effective_sample_size` (evolution strategies): how many
    particles of equal loss difference are worth as much as these; few are, if a few differences
    dwarf the rest. `loss_by_window`: the mean loss of the particles in each window of the episode.
    Everything else in `info` is told as it is; `diverged` is the share of particles whose run was
    lost.
    """
    info = {name: np.asarray(value, np.float64) for name, value in estimate.info.items()}
    told: dict[str, Any] = {}
    leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(estimate.grad)]
    signal = sum(float(np.sum(np.square(g))) for g in leaves)
    if "squared_norm" in info:
        variance = variance_of_mean(signal, info["squared_norm"], particles)
        told["gradient_snr"] = _ratio(signal, float(variance))
    if "gradient_variance" in info:
        told["gradient_snr"] = _ratio(signal, float(info["gradient_variance"]))
    if info.keys() >= {"squared_difference", "fourth_difference"}:
        second, fourth = float(info["squared_difference"]), float(info["fourth_difference"])
        told["effective_sample_size"] = _ratio(particles * second**2, fourth)
    if info.keys() >= BY_WINDOW:
        pairs = zip(info["loss_by_window"], info["share_by_window"], strict=True)
        told["loss_by_window"] = [_ratio(float(loss), float(share)) for loss, share in pairs]
    for name in info.keys() - MOMENTS - BY_WINDOW:
        value = info[name].tolist()
        told[name] = (
            [_ratio(v, 1.0) for v in value] if isinstance(value, list) else _ratio(value, 1.0)
        )
    return told


def _ratio(a: float, b: float) -> float | None:
    """a / b, or None where that is no finite number."""
    return a / b if b > 0 and math.isfinite(a) and math.isfinite(a / b) else None
