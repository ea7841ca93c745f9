"""Several task families in one outer step: the weighted mean of their losses. Shapes are static, so
each family has an estimator, and a program, of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import base
from meta_train.estimators.base import Estimate, Key, ParticleEstimator


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture:
    """Estimates the gradient of sum_i w_i loss_i, w being `weights` by their sum: unbiased where
    its members are.

    The i-th member gets the key fold_in(key, i), so members share no randomness. The state is the
    tuple of theirs. A mixture cannot be named on the command line: a recipe makes it of a suite.

    Args:
      members: an estimator for each family, or these compiled.
      weights: positive, one for each member; any scale.
      names: of the families, all different, for the diagnostics.
    """

    members: tuple[ParticleEstimator, ...]
    weights: tuple[float, ...] = base.static()
    names: tuple[str, ...] = base.static()

    def __post_init__(self):
        counts = len(self.members), len(self.weights), len(self.names)
        if len(set(counts)) > 1 or not self.members:
            raise ValueError(
                "`members`, `weights` and `names` must be as many, and at least one, got "
                f"{counts[0]}, {counts[1]} and {counts[2]}"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"`weights` must be positive, got {self.weights}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"`names` must differ, got {self.names}")

    @property
    def particles(self) -> int:
        """Those of all members together."""
        return sum(member.particles for member in self.members)

    def init(self, theta: Theta, key: Key) -> tuple[Any, ...]:
        pairs = zip(self.members, keys(self, key), strict=True)
        return tuple(member.init(theta, key) for member, key in pairs)

    def estimate(
        self, theta: Theta, state: tuple[Any, ...], key: Key
    ) -> tuple[Estimate, tuple[Any, ...]]:
        triples = zip(self.members, state, keys(self, key), strict=True)
        pairs = [member.estimate(theta, state, key) for member, state, key in triples]
        estimates, states = zip(*pairs, strict=True)
        return self.weighted(estimates), states

    def weighted(self, estimates: Sequence[Estimate]) -> Estimate:
        """The mixture's estimate from its members', always added in their order.

        In `info` stand the weighted means of what all members tell alike; of each member its
        `loss/NAME` and `diverged/NAME`; and `gradient_variance`, that of the weighted mean: the
        members are independent, so it is sum_i w_i^2 (variance of the i-th mean).
        """
        particles = tuple(member.particles for member in self.members)
        return _weighted(tuple(estimates), self.weights, self.names, particles)


@functools.partial(jax.jit, static_argnames=("weights", "names", "particles"))
def _weighted(
    estimates: tuple[Estimate, ...],
    weights: tuple[float, ...],
    names: tuple[str, ...],
    particles: tuple[int, ...],
) -> Estimate:
    told = [{(name, jnp.shape(x)) for name, x in e.info.items()} for e in estimates]
    alike = sorted(name for name, _ in set.intersection(*told))
    mean = base.combine(
        [e._replace(info={name: e.info[name] for name in alike}) for e in estimates], weights
    )
    info = {name: x for name, x in mean.info.items() if name not in base.MOMENTS}
    for estimate, name in zip(estimates, names, strict=True):
        info[f"loss/{name}"] = estimate.loss
        if "diverged" in estimate.info:
            info[f"diverged/{name}"] = estimate.info["diverged"]
    if "squared_norm" in alike:
        variances = []
        for estimate, weight, n in zip(estimates, weights, particles, strict=True):
            squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(estimate.grad)]
            signal = sum(squares, start=jnp.zeros(()))
            variance = base.variance_of_mean(signal, estimate.info["squared_norm"], n)
            variances.append((weight / sum(weights)) ** 2 * variance)
        info["gradient_variance"] = jnp.asarray(sum(variances))
    return mean._replace(info=info)


def members(estimator: ParticleEstimator | Mixture) -> tuple[ParticleEstimator, ...]:
    """Those of a mixture; any other estimator is its own one."""
    return estimator.members if isinstance(estimator, Mixture) else (estimator,)


def keys(estimator: ParticleEstimator | Mixture, key: Key) -> list[Key]:
    """What each of the members gets for `key`."""
    if not isinstance(estimator, Mixture):
        return [key]
    return [jax.random.fold_in(key, i) for i in range(len(estimator.members))]


def divided(
    estimator: ParticleEstimator | Mixture, workers: int
) -> list[tuple[int, ParticleEstimator]]:
    """Parts for `workers` to share, in order: the index of a member, and a range of its particles.

    Many members stay whole; few are divided, each among as many workers as it has particles for. No
    measurement has a say: how particles are grouped decides how sums are rounded, and a run must
    not depend on how fast a machine was.

    Raises:
      ValueError: there are fewer parts than workers.
    """
    if not isinstance(estimator, Mixture):
        return [(0, part) for part in base.partition(estimator, workers)]
    few = len(estimator.members) < 2 * workers
    found = []
    for i, member in enumerate(estimator.members):
        divisible = few and not base.compares_particles(member)
        count = min(workers, member.particles) if divisible else 1
        found += [(i, part) for part in base.partition(member, count)]
    if len(found) < workers:
        raise ValueError(
            f"`workers` must be at most {len(found)}, as many as {len(estimator.members)} tasks "
            f"with `particles` {', '.join(str(m.particles) for m in estimator.members)} make "
            f"parts, got {workers}"
        )
    return found
