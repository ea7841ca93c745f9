"""The optimizers of optax and optax.contrib as `make(learning_rate, weight_decay)`, with a schedule
and a scalar that may both be traced: one compiled program then runs a whole grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

Params = Any
Make = Callable[[optax.Schedule, Any], optax.GradientTransformation]


@dataclass(frozen=True)
class Alias:
    """An optax function that takes schedules. Equal by value, so equal ones compile once.

    `decay` names its keyword for the weight decay; without one, weight decay is ignored.
    """

    function: Callable[..., optax.GradientTransformation]
    decay: str | None = None
    options: tuple[tuple[str, Any], ...] = ()  # keywords, where not optax's defaults

    def __call__(self, learning_rate, weight_decay) -> optax.GradientTransformation:
        decay = {} if self.decay is None else {self.decay: weight_decay}
        return self.function(learning_rate, **decay, **dict(self.options))


def decayed(function: Callable[..., optax.GradientTransformation], **options: Any) -> Alias:
    """An optax function whose keyword `weight_decay` is tuned."""
    return Alias(function, "weight_decay", tuple(options.items()))


def plain(function: Callable[..., optax.GradientTransformation], **options: Any) -> Alias:
    """An optax function of a learning rate alone."""
    return Alias(function, None, tuple(options.items()))


def relative(learning_rate: optax.Schedule) -> optax.Schedule:
    """The schedule as a share of its start, for what needs a number for a learning rate."""
    return lambda count: learning_rate(count) / learning_rate(0)


def cocob(learning_rate, weight_decay):
    """A scaling of its gradients cancels out of COCOB's steps. What sets their size at the start is
    1 / alpha, so that is tuned: a learning rate of 1 is optax's alpha of 100.
    """
    alpha = 100.0 / learning_rate(0)
    return contrib.cocob(relative(learning_rate), alpha=alpha, weight_decay=weight_decay)


def mechanize(learning_rate, weight_decay):
    """Mechanic around Adam: the learning rate multiplies what it finds."""
    return contrib.mechanize(optax.adam(learning_rate), weight_decay=weight_decay)


def polyak_sgd(learning_rate, weight_decay):
    """The learning rate is the cap of Polyak's step; the schedule scales the capped step."""
    del weight_decay
    return optax.polyak_sgd(learning_rate(0), scaling=relative(learning_rate))


def rprop(learning_rate, weight_decay):
    """The learning rate is the step that every parameter starts with."""
    del weight_decay
    scale = optax.scale_by_schedule(relative(learning_rate))
    return optax.chain(optax.rprop(learning_rate(0)), scale)


def sam(learning_rate, weight_decay):
    """Every other step climbs (rho 0.05, its authors'), so SGD with momentum takes half the steps
    and sees the schedule at twice its count.
    """
    del weight_decay
    descend = optax.sgd(lambda count: learning_rate(2 * count), momentum=0.9)
    climb = optax.chain(contrib.normalize(), optax.sgd(0.05))
    # optax's says that it takes any extra argument, and refuses `value`
    return optax.GradientTransformation(*contrib.sam(descend, climb))


def sm3(learning_rate, weight_decay):
    """optax.sm3, which takes no schedule."""
    del weight_decay
    return optax.chain(optax.scale_by_sm3(0.9), optax.scale_by_learning_rate(learning_rate))


def averaged(opt_state: Any, params: Params) -> Params:
    """Schedule-Free's x, the weighted average of its z; what trains are its y."""
    return contrib.schedule_free_eval_params(_only(contrib.ScheduleFreeState, opt_state), params)


def synchronized(opt_state: Any, params: Params) -> Params:
    """Where SAM stands; on every other step what trains are the params that it has climbed to."""
    state = _only(contrib.SAMState, opt_state)
    climbed = state.steps_since_sync > 0
    return jax.tree.map(lambda old, new: jnp.where(climbed, old, new), state.cache, params)


def _only(cls: Any, opt_state: Any) -> Any:
    """The one state of that class, wherever in a chain it is."""
    states = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, cls))
    (found,) = (state for state in states if isinstance(state, cls))
    return found
