"""Meta-training a tiny learned optimizer is itself a task (as in VeLO's population,
arXiv:2211.09760): its loss is that of a short training of others, its gradient backpropagation
through it.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tasks.base import Key, Params, Split, relative_loss
from tasks.dynamic import log_uniform
from tasks.fields import positive_integers

FEATURES = 4


class Regressions(NamedTuple):
    """Least squares, inputs @ x = 0 in the mean over rows, from a start; so 0 is the optimum."""

    inputs: jax.Array  # [problems, 2 D, D]
    start: jax.Array  # [problems, D]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TinyOptimizerTask:
    """Params are the weights theta of an optimizer, an MLP applied to every coordinate: from the
    gradient and its moving average, as they are and ten times larger, each squashed by tanh, to the
    update over 0.1.

    The loss is the inner one, mean over regressions and the points after each of their steps, over
    its mean at the start. The three splits are the same distribution, endless.
    """

    curvature: jax.Array  # scalar, the mean eigenvalue of the inner Hessians
    dimension: int = dataclasses.field(metadata={"static": True})
    unroll: int = dataclasses.field(metadata={"static": True})
    hidden: int = dataclasses.field(metadata={"static": True})
    batch_size: int = dataclasses.field(metadata={"static": True})

    def init(self, key: Key) -> Params:
        """Normal of variance 1 / inputs, the last layer times 0.1: next to doing nothing."""
        drawn = jax.random.normal(key, (FEATURES + 1, self.hidden))
        return {
            "hidden": {"w": drawn[:-1] / math.sqrt(FEATURES), "b": jnp.zeros(self.hidden)},
            "out": {"w": 0.1 * drawn[-1] / math.sqrt(self.hidden), "b": jnp.zeros(())},
        }

    def batch(self, key: Key, split: Split) -> Regressions:
        shape = (self.batch_size, 2 * self.dimension + 1, self.dimension)
        drawn = jax.random.normal(key, shape)
        return Regressions(jnp.sqrt(self.curvature) * drawn[:, :-1], drawn[:, -1])

    def loss(self, params: Params, batch: Regressions) -> jax.Array:
        rows = 2 * self.dimension
        hessians = jnp.einsum("pnd,pne->pde", batch.inputs, batch.inputs) / rows

        def step(state, _):
            x, momentum, gradient = state
            momentum = 0.9 * momentum + 0.1 * gradient
            x += 0.1 * update(params, gradient, momentum)
            gradient = jnp.einsum("pde,pe->pd", hessians, x)
            return (x, momentum, gradient), 0.5 * jnp.sum(x * gradient, axis=1)

        gradient = jnp.einsum("pde,pe->pd", hessians, batch.start)
        before = 0.5 * jnp.sum(batch.start * gradient, axis=1)
        state = (batch.start, jnp.zeros_like(gradient), gradient)
        losses = jax.lax.scan(step, state, length=self.unroll)[1]  # [unroll, problems]
        return jnp.mean(losses) / jnp.mean(before)

    def normalize(self, loss: jax.Array) -> jax.Array:
        """Relative to doing nothing."""
        return relative_loss(loss, 1.0)


def update(theta: Params, gradient: jax.Array, momentum: jax.Array) -> jax.Array:
    """What the optimizer adds to each coordinate, over 0.1; any shape."""
    features = jnp.stack([gradient, momentum, 10 * gradient, 10 * momentum], axis=-1)
    hidden = jnp.tanh(
        jnp.tensordot(jnp.tanh(features), theta["hidden"]["w"], 1)
        + jnp.broadcast_to(theta["hidden"]["b"], (*gradient.shape, len(theta["hidden"]["b"])))
    )
    return jnp.tensordot(hidden, theta["out"]["w"], 1) + theta["out"]["b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TinyOptimizer:
    """Optimizers with `hidden` units, meta-trained on batches of `batch_size` random least-squares
    problems in `dimension` coordinates, each for `unroll` steps.

    Args:
      curvature: range of the mean eigenvalue of the inner Hessians, log-uniform, one per task.
    """

    dimension: int = dataclasses.field(default=4, metadata={"static": True})
    unroll: int = dataclasses.field(default=16, metadata={"static": True})
    hidden: int = dataclasses.field(default=8, metadata={"static": True})
    batch_size: int = dataclasses.field(default=8, metadata={"static": True})
    curvature: tuple[float, float] = dataclasses.field(
        default=(0.3, 3.0), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        positive_integers(self, "dimension", "unroll", "hidden", "batch_size")
        if not 0 < self.curvature[0] <= self.curvature[1] < math.inf:
            raise ValueError(
                f"`curvature` must be (low, high) with 0 < low <= high, got {self.curvature}"
            )

    def __call__(self, key: Key) -> TinyOptimizerTask:
        curvature = jnp.asarray(log_uniform(key, self.curvature))
        return TinyOptimizerTask(
            curvature, self.dimension, self.unroll, self.hidden, self.batch_size
        )


EXAMPLES = (TinyOptimizer(dimension=2, unroll=10, hidden=4, batch_size=4),)
