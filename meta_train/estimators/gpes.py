"""Generalised persistent evolution strategies (arXiv 2304.12180): new noise every few windows, the
family that reaches from persistent to noise-reuse evolution strategies.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import antithetic, base
from meta_train.unroll import InnerProblem


class Noise(NamedTuple):
    """The noise that is now in use, and the sum of all that were since the reset."""

    current: Theta
    total: Theta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GPES:
    """Unbiased for what `nres` estimates. One noise serves `reuse` windows of an episode: 1 is
    `pes`, all its windows are `nres`, and the variance falls from the one to the other.
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = False
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    sigma: float | tuple[tuple[str, float], ...] = base.static(0.01)
    shaping: str = base.static("none")
    clip_difference: float = base.static(math.inf)
    reuse: int = base.static(4)
    first_particle: int | jax.Array = 0

    def __post_init__(self):
        antithetic.check(self)
        if not isinstance(self.reuse, int) or self.reuse < 1:
            raise ValueError(f"`reuse` must be an integer of at least 1, got {self.reuse!r}")

    @property
    def unrolls(self) -> int:
        return 2

    def init(self, theta: Theta, key: base.Key) -> antithetic.Pair:
        return antithetic.init(self, theta, key, carried=Noise(theta, theta))

    def estimate(
        self, theta: Theta, state: antithetic.Pair, key: base.Key
    ) -> tuple[base.Estimate, antithetic.Pair]:
        def carry(past, new, window):
            # A window's smoothed loss depends on theta through each noise drawn since the reset,
            # and its derivative by theta under any one of them is that noise times the loss: it is
            # credited with each of them once, for however many windows it served.
            drawn = window % self.reuse == 0
            total = jax.tree.map(
                lambda p, n: jnp.where(window == 0, 0.0, p) + jnp.where(drawn, n, 0.0),
                past.total,
                new,
            )
            current = base.select(drawn, new, past.current)
            return current, total, Noise(current, total)

        return antithetic.estimate(self, theta, state, key, carry)


EXAMPLES = (GPES(particles=4, reuse=2),)
