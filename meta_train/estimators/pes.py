"""Persistent evolution strategies (arXiv 2112.13835): new noise each window, credited with all
noise since the reset.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PES:
    """Unbiased for what `nres` estimates; its variance grows with the windows per episode."""

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
            # An episode answers for no noise before its reset. The published code lets go of the
            # old noise one step early, when the episode's last loss is still to be credited, and is
            # biased by it.
            credit = jax.tree.map(lambda p, n: jnp.where(window == 0, 0.0, p) + n, past, new)
            return new, credit, credit

        return antithetic.estimate(self, theta, state, key, carry)


EXAMPLES = (PES(particles=4),)
