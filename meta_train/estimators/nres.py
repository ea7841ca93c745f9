"""Noise-reuse evolution strategies (arXiv 2304.12180): one noise per episode, reused by all its
windows.
"""

import dataclasses
import math
from typing import ClassVar

import jax

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NRES:
    """Unbiased, with the least variance of the persistent family.

    What it estimates is the gradient of the smoothed mean loss of an episode; where horizons vary,
    every window weighs the same, so long episodes count for their length. ES-Single (arXiv
    2304.11153) is the same mechanism.
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
        return 2

    def init(self, theta: Theta, key: base.Key) -> antithetic.Pair:
        return antithetic.init(self, theta, key, carried=theta)

    def estimate(
        self, theta: Theta, state: antithetic.Pair, key: base.Key
    ) -> tuple[base.Estimate, antithetic.Pair]:
        def carry(past, new, window):
            noise = base.select(window == 0, new, past)
            return noise, noise, noise

        return antithetic.estimate(self, theta, state, key, carry)


EXAMPLES = (NRES(particles=4),)
