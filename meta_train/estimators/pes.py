"""Persistent evolution strategies (arXiv 2112.13835): new noise each window, credited with all
noise since the reset.
"""

import dataclasses
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
    sigma: float = base.static(0.01)
    first_particle: int | jax.Array = 0

    __post_init__ = antithetic.check

    @property
    def unrolls(self) -> int:
        return 2

    def init(self, theta: Theta, key: base.Key) -> antithetic.Pair:
        return antithetic.init(self, theta, key)

    def estimate(
        self, theta: Theta, state: antithetic.Pair, key: base.Key
    ) -> tuple[base.Estimate, antithetic.Pair]:
        def carry(past, new, fresh):
            # An episode answers for no noise before its reset. The published code lets go of the
            # old noise one step early, when the episode's last loss is still to be credited, and is
            # biased by it.
            return new, jax.tree.map(lambda p, n: jnp.where(fresh, 0.0, p) + n, past, new)

        return antithetic.estimate(self, theta, state, key, carry)


EXAMPLES = (PES(particles=4),)
