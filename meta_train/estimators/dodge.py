"""DODGE (Silver et al., Learning by Directional Gradient Descent, ICLR 2022): the derivative along
one direction, by forward-mode differentiation carried along the episode. The directions are random,
as in forward gradients (arXiv 2202.08587).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from learned_opt.base import Theta
from meta_train.estimators import base
from meta_train.unroll import InnerProblem


class Directional(NamedTuple):
    """A particle: its inner state, the derivative of that along `direction` (None for leaves that
    are not of floats), the index of its next window in the episode (0: an episode starts next), and
    how many episodes it began.
    """

    inner: Any
    tangent: Any
    direction: Theta
    window: jax.Array
    episodes: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DODGE:
    """Unbiased for the loss of an episode itself, not a smoothed one; chaotic where that is.

    A direction v ~ N(0, I) is kept for an episode. A window's estimate is (v . dL/dtheta) v, with
    all that theta did since the reset. Memory is two inner states and v, whatever the horizon; the
    variance grows with the number of meta-parameters. Long episodes count for their length.
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = False
    differentiates: ClassVar[bool] = True  # forwards
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    first_particle: int | jax.Array = 0

    __post_init__ = base.check_particles

    @property
    def unrolls(self) -> int:
        return 1

    def init(self, theta: Theta, key: base.Key) -> Directional:
        def particle(key):
            shapes = jax.eval_shape(lambda: self.problem.reset(theta, key, 0, True))
            inner = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            zero, none = jax.tree.map(jnp.zeros_like, theta), jnp.zeros((), jnp.int32)
            return Directional(inner, separate(inner)[0], zero, none, none)

        return base.over_particles(self, particle, key)

    def estimate(
        self, theta: Theta, state: Directional, key: base.Key
    ) -> tuple[base.Estimate, Directional]:
        def particle(key, run):
            direction_key, reset_key, unroll_key = jax.random.split(key, 3)
            fresh, drawn = run.window == 0, base.normal_like(direction_key, theta, 1.0)
            direction = base.select(fresh, drawn, run.direction)
            floats, others = separate(run.inner)

            def unroll(theta, floats):
                # the reset is inside: an initial state that depends on theta has its derivative
                begun = self.problem.reset(theta, reset_key, run.episodes, True)
                start = base.select(fresh, begun, merge(floats, others))
                rollout, inner = self.problem.unroll(theta, start, unroll_key)
                floats_after, others_after = separate(inner)
                seen = others_after, rollout.done, jnp.any(rollout.diverged)
                return (jnp.mean(rollout.losses), floats_after), seen

            (loss, floats), (slope, tangent), (others, done, lost) = jax.jvp(
                unroll, (theta, floats), (direction, run.tangent), has_aux=True
            )
            grad = jax.tree.map(lambda v: slope * v, direction)
            info = base.by_window(self.problem, run.window, loss, lost)
            inner, window = merge(floats, others), jnp.where(done, 0, run.window + 1)
            run = Directional(inner, tangent, direction, window, run.episodes + fresh)
            return base.Estimate(grad, loss, info), run

        estimates, state = base.over_particles(self, particle, key, state)
        return base.mean_estimate(estimates), state


def separate(tree: Any) -> tuple[Any, Any]:
    """The tree with None for all leaves that have no derivative (integers, bools, keys), and the
    tree with None for all others.
    """
    smooth = jax.tree.map(lambda x: jnp.issubdtype(jnp.result_type(x), jnp.inexact), tree)
    return (
        jax.tree.map(lambda keep, x: x if keep else None, smooth, tree),
        jax.tree.map(lambda keep, x: None if keep else x, smooth, tree),
    )


def merge(floats: Any, others: Any) -> Any:
    """The tree that was separated."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, floats, others, is_leaf=lambda x: x is None
    )


EXAMPLES = (DODGE(particles=4),)
