"""A structured rule that keeps its steps where acceleration is stable, whatever its weights, and
sees nothing that changes when a problem is scaled. What arXiv 2305.18577 lacks, by means of
restarts (arXiv 1204.3982) and of equivariance (arXiv 2405.18222).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, coordinate_lstm, fields
from learned_opt.coordinate_lstm import LSTMState
from learned_opt.proximal import (
    RESTARTED,
    at_least_float32,
    descend,
    following,
    like,
    over_leaves,
    owned,
    told,
)

FEATURES = 10
TINY = 1e-30  # a norm that is none; its square is a float32 number
NEAR = 0.97  # of the bound: where the steps of an untrained rule are
DECAY = 0.9  # per step, of what was measured of the curvature

Sum = Callable[[Any], Any]  # over the coordinates of each problem, see `per_problem`


class BoundedState(NamedTuple):
    """Trees like the params, but `lstm`, which holds states by leaf.

    `x` is the solution so far, the last proximal point. `clock` is FISTA's t. `curvature` is the
    largest eigenvalue of the Hessian, relative to `lipschitz`, as far as recent steps tell; 0 at
    the start. Both are equal for all coordinates of a problem. `y` and `grads` are those of the
    last step.
    """

    x: Any
    lstm: Any
    clock: Any
    curvature: Any
    y: Any
    grads: Any


@dataclasses.dataclass(frozen=True)
class BoundedLSTM:
    """With y the params, g the gradients of f and all operations elementwise,

        x' = prox(y - p g / L, p / L),   y' = x' + a (x' - x),
        a = s m / (1 - m + s m),   p = f (2 + 2a) / (1 + 2a) / c,

    where an LSTM chooses f in (0, 1) and s > 0, coordinate by coordinate; m is FISTA's momentum,
    restarted where a step goes uphill, and c in [`least_curvature`, 1] the curvature, relative to
    the bound L, that the last steps saw: |dg|^2 / (L dg.dy), whose largest values are forgotten by
    a tenth per step. So

        a in [0, 1) and p c < (2 + 2a) / (1 + 2a) for all weights and inputs.

    That is the exact bound of stability of a mode of curvature c L under constant p and a. With
    `least_curvature` 1 it holds for all modes. It says nothing of p and a that vary, or differ
    between coordinates: a guarantee for these is `safeguarded`'s.

    All inputs of the LSTM are ratios: with (f, r, x) replaced by (s f, s r, x), or x by s x
    throughout, the trajectory is the same, or s times the same. `init` gives a network whose last
    layer is zero: f = 0.97, s = 1, a tuned classical method. Needs neither loss nor horizon, but
    `prox` and `lipschitz`, see `proximal.Proximal`; problems that are stacked, with `lipschitz`
    [P, 1] for params [P, N], are told apart.

    Args:
      hidden, layers: sizes of the LSTM.
      least_curvature: least c. Steps are at most 2 / (least_curvature L).
    """

    hidden: int = 16
    layers: int = 1
    least_curvature: float = 0.2

    def __post_init__(self):
        fields.at_least_one(self, "hidden", "layers")
        if not 0 < self.least_curvature <= 1:
            raise ValueError(f"`least_curvature` must be in (0, 1], got {self.least_curvature}")

    def init(self, key: base.Key) -> base.Theta:
        heads = {"w": jnp.zeros((2, self.hidden)), "b": jnp.zeros((2,))}
        return {
            "lstm": coordinate_lstm.init(key, FEATURES, self.hidden, self.layers),
            "heads": heads,
        }

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        theta = base.float32(theta)  # also where init has drawn float64

        def init(params: base.Params) -> BoundedState:
            base.check_params(params)
            x, zeros = owned(params), optax.tree.zeros_like
            lstm, clock = coordinate_lstm.start(theta["lstm"], params), optax.tree.ones_like(x)
            return BoundedState(x, lstm, clock, zeros(x), owned(params), zeros(x))

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            problem = told(self, extra_args)
            y = at_least_float32(params)
            whole = like(problem.step, y)
            # as steps of gradient descent: in the units of the params
            grads = jax.tree.map(jnp.multiply, whole, at_least_float32(updates))
            descent = optax.tree.sub(problem.prox(optax.tree.sub(y, grads), whole), y)
            ahead = jax.tree.map(following, state.clock)
            momentum = jax.tree.map(lambda t, ahead: (t - 1) / ahead, state.clock, ahead)
            over = functools.partial(per_problem, problem.step)
            curvature = self._curvature(over, state, y, grads)
            rows = _features(over, state, y, grads, descent, curvature, momentum)
            share, tilt, lstm = over_leaves(
                3, functools.partial(_heads, theta), y, rows, state.lstm
            )
            a = jax.tree.map(lambda m, s: s * m / (1 - m + s * m), momentum, tilt)
            p = jax.tree.map(lambda f, a, c: f * (2 + 2 * a) / (1 + 2 * a) / c, share, a, curvature)
            x = problem.prox(descend(y, p, grads), jax.tree.map(jnp.multiply, p, whole))
            moved = optax.tree.sub(x, state.x)
            climb = over(jax.tree.map(lambda y, x, p, d: (y - x) / p * d, y, x, p, moved))
            uphill = jax.tree.map(lambda climb: climb > 0, climb)
            new = jax.tree.map(lambda x, a, up, d: x + jnp.where(up, 0, a) * d, x, a, uphill, moved)
            clock = jax.tree.map(lambda up, t: jnp.where(up, RESTARTED, t), uphill, ahead)
            after = BoundedState(x, lstm, clock, curvature, y, grads)
            return base.like_params(optax.tree.sub(new, y), params), after

        return optax.GradientTransformationExtraArgs(init, update)

    def _curvature(self, over: Sum, state: BoundedState, y: Any, grads: Any) -> Any:
        """Of the quadratic that the last two gradients and points fit, or of those before, less a
        tenth per step.
        """
        change, way = optax.tree.sub(grads, state.grads), optax.tree.sub(y, state.y)
        along = over(jax.tree.map(jnp.multiply, change, way))
        norms = [over(jax.tree.map(jnp.square, tree)) for tree in (change, way)]

        def leaf(before: jax.Array, along: jax.Array, *squares: jax.Array) -> jax.Array:
            curved = along > 0
            change, way = (jnp.sqrt(jnp.where(curved, square, 1)) for square in squares)
            # |change|^2 / along, whose own derivative would overflow where steps are small
            cosine = along / change / way
            seen = jnp.where(curved, change / way / jnp.where(curved, cosine, 1), 1)
            # before there is anything to go by, and where nothing moved, the bound
            known = jnp.where(before > 0, jnp.maximum(seen, DECAY * before), 1)
            return jnp.clip(known, self.least_curvature, 1)

        return jax.tree.map(leaf, state.curvature, along, *norms)


def per_problem(step: jax.Array, tree: Any) -> Any:
    """Sums over all coordinates of a problem, broadcast to them again: over all leaves where `step`
    is a scalar, else over its axes of size 1.
    """
    axes = None if step.ndim == 0 else tuple(i for i, n in enumerate(step.shape) if n == 1)
    sums = [jnp.sum(x, axes, keepdims=axes is not None) for x in jax.tree.leaves(tree)]
    return like(sum(sums[1:], start=sums[0]), tree) if sums else tree


def _features(
    over: Sum, state: BoundedState, y: Any, grads: Any, descent: Any, curvature: Any, momentum: Any
) -> Any:
    """A list of `FEATURES` arrays for every leaf, none of which knows the problem's scale."""
    norm = lambda tree: over(jax.tree.map(jnp.square, tree))  # noqa: E731
    count = over(optax.tree.ones_like(y))
    ahead, change = optax.tree.sub(y, state.x), optax.tree.sub(grads, state.grads)
    trees = (descent, grads, y, ahead, change)
    norms = [norm(tree) for tree in trees]
    cosine = over(jax.tree.map(jnp.multiply, descent, ahead))

    def leaf(y, descent, count, curvature, momentum, cosine, *rest):
        values, squares = rest[: len(trees)], rest[len(trees) :]
        relative = [
            jnp.arcsinh(x * jnp.sqrt(count) / (jnp.sqrt(square) + TINY))
            for x, square in zip(values, squares, strict=True)
        ]
        both = jnp.sqrt(squares[0]) * jnp.sqrt(squares[3]) + TINY
        distance = jnp.log((jnp.sqrt(squares[0]) + TINY) / (jnp.sqrt(squares[2]) + TINY))
        zero = (y + descent == 0).astype(y.dtype)
        return [*relative, zero, curvature, momentum, cosine / both, jnp.clip(distance / 10, -2, 2)]

    return jax.tree.map(leaf, y, descent, count, curvature, momentum, cosine, *trees, *norms)


def _heads(
    theta: base.Theta, y: jax.Array, rows: list[jax.Array], state: LSTMState
) -> tuple[jax.Array, jax.Array, LSTMState]:
    """f and s, see `BoundedLSTM`."""
    out, state = coordinate_lstm.step(theta["lstm"], coordinate_lstm.inputs(*rows), state)
    share, tilt = coordinate_lstm.dense(theta["heads"], out)
    # so that 0, 1 and infinity stay out of reach, of rounding, too
    share, tilt = jnp.clip(share, -9, 9), jnp.clip(tilt, -9, 9)
    share, tilt = jax.nn.sigmoid(share + math.log(NEAR / (1 - NEAR))), jnp.exp(tilt)
    return share.astype(y.dtype), tilt.astype(y.dtype), state


EXAMPLES = (BoundedLSTM(hidden=4),)
CONFIGURATIONS = {"l2o_bounded": BoundedLSTM()}
