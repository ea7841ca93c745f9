"""An estimator compiled in this process. The problem's data travel as arguments: they are never
baked into the program.
"""

from typing import Any

import jax

from learned_opt.base import Theta
from meta_train.estimators.base import Estimate, Key, ParticleEstimator

_init = jax.jit(lambda estimator, theta, key: estimator.init(theta, key))
# the state is not donated: an interrupt between two steps must find the old one whole
_estimate = jax.jit(lambda estimator, theta, state, key: estimator.estimate(theta, state, key))


class Compiled:
    """The same two methods, jitted."""

    def __init__(self, estimator: ParticleEstimator):
        self.estimator = jax.device_put(estimator)

    def init(self, theta: Theta, key: Key) -> Any:
        return _init(self.estimator, theta, key)

    def estimate(self, theta: Theta, state: Any, key: Key) -> tuple[Estimate, Any]:
        return _estimate(self.estimator, theta, state, key)
