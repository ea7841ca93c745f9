"""Bootstrapped meta-gradients (BMG, arXiv 2109.04504): theta learns to be, after one window, where
it would be after several; backpropagation runs through that one window only.
"""

import dataclasses
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from learned_opt.base import Theta
from meta_train.estimators import base
from meta_train.estimators.truncated_es import Trajectory, after, begin, init_trajectory
from meta_train.unroll import InnerProblem, Key, State


@runtime_checkable
class Bootstrappable(InnerProblem, Protocol):
    """An inner problem on which a target can be set, such as `Training`."""

    def descend(self, theta: Theta, state: State, key: Key, learning_rate: float) -> State:
        """The state after one step of plain gradient descent on the inner loss."""
        ...

    def distance(self, target: State, state: State) -> jax.Array:
        """How far (scalar, at least 0) the state is from the target; differentiable in the
        state.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BMG:
    """The gradient of the distance between a window's end and a target. A heuristic: not the
    gradient of any loss of the episode, though it looks further than a window.

    The target is where `bootstrap` more windows under theta, none of them beyond the episode, and
    one step of gradient descent lead from the window's end; theta is not differentiated there. The
    trajectory goes on from the window's end. With `bootstrap` 0 and a squared Euclidean distance
    this is 2 * `learning_rate` times the gradient of the inner loss at the window's end.
    `Estimate.loss` is the window's mean loss; the distance is in `info`.

    Raises:
      TypeError: the problem is not `Bootstrappable`.
    """

    truncated: ClassVar[bool] = True
    backpropagates: ClassVar[bool] = True
    requires: ClassVar[type] = Bootstrappable
    problem: Bootstrappable = base.UNBOUND
    particles: int = base.static(16)
    bootstrap: int = base.static(1)
    learning_rate: float = base.static(0.1)
    first_particle: int | jax.Array = 0

    def __post_init__(self):
        base.check_particles(self)
        if not isinstance(self.bootstrap, int) or self.bootstrap < 0:
            raise ValueError(f"`bootstrap` must be an integer from 0 up, got {self.bootstrap!r}")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}")
        # jax rebuilds pytrees with placeholders, which have no methods at all
        if hasattr(self.problem, "unroll") and not isinstance(self.problem, Bootstrappable):
            raise TypeError(
                f"`problem` must have methods `descend` and `distance` for BMG, as `Training` has, "
                f"got {type(self.problem).__name__}; add them or choose another estimator"
            )

    @property
    def unrolls(self) -> int:
        return 1 + self.bootstrap

    init = init_trajectory

    def estimate(
        self, theta: Theta, state: Trajectory, key: base.Key
    ) -> tuple[base.Estimate, Trajectory]:
        def particle(key, run):
            reset_key, unroll_key, target_key = jax.random.split(key, 3)

            def distance(theta):
                # the reset is inside: an initial state that depends on theta has its gradient
                start = begin(self.problem, theta, run, reset_key)
                rollout, inner = self.problem.unroll(theta, start, unroll_key)
                target = self.target(*lax.stop_gradient((theta, inner, rollout.done)), target_key)
                return self.problem.distance(target, inner), (rollout, inner)

            (value, (rollout, inner)), grad = jax.value_and_grad(distance, has_aux=True)(theta)
            loss = jnp.mean(rollout.losses)
            info = base.by_window(self.problem, run.window, loss, rollout.diverged)
            estimate = base.Estimate(grad, loss, info | {"distance": value})
            return estimate, after(run, inner, rollout.done)

        estimates, state = base.over_particles(self, particle, key, state)
        return base.mean_estimate(estimates), state

    def target(self, theta: Theta, inner: State, done: jax.Array, key: base.Key) -> State:
        """Where the run would be after `bootstrap` more windows, or at its end, and a step of
        gradient descent.
        """
        descent_key, key = jax.random.split(key)

        def window(carry, key):
            inner, done = carry
            rollout, new = self.problem.unroll(theta, inner, key)
            return (base.select(done, inner, new), done | rollout.done), None

        keys = jax.random.split(key, self.bootstrap)
        (inner, _), _ = lax.scan(window, (inner, done), keys)
        return self.problem.descend(theta, inner, descent_key, self.learning_rate)


EXAMPLES = (BMG(particles=4),)
