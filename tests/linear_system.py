"""A linear inner problem, with a linear or a quadratic loss, whose meta-gradients are known
exactly, whole and truncated.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_train.unroll import Rollout


class State(NamedTuple):
    x: jax.Array
    step: jax.Array
    end: jax.Array
    episode: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearSystem:
    """x_0 = 0, x_t = A x_{t-1} + theta, A a rotation (in the first two dimensions) times `decay`;
    T steps: `horizon`, less `cut` windows.

    The loss is c.x_t + curvature/2 |x_t|^2: at every step, or (`terminal`) at the last alone (the
    mean over the episode is then that of x_T by T). It is at most quadratic in the thetas of all
    steps, so differences of antithetic pairs are exact: smoothing changes no gradient.

    `noise` disturbs x_0 and the start of every window. It has mean zero and the gradient is linear
    in x, so it leaves the mean gradient as it is. Every loss of a particle's n-th episode is
    greater by n times `drift`; from episode `lost` on, all runs have diverged.

    All numbers but those that give shapes are leaves: systems of equal shapes share a program.
    """

    horizon: int = dataclasses.field(metadata={"static": True})
    truncation: int = dataclasses.field(metadata={"static": True})
    terminal: bool = False
    decay: float = 1.0
    size: int = dataclasses.field(default=1, metadata={"static": True})
    curvature: float = 0.0
    noise: float = 0.0
    angle: float = 0.3
    cut: int = 0
    drift: float = 0.0
    lost: int = 1000

    @property
    def windows(self) -> int:
        return self.horizon // self.truncation

    @property
    def steps(self) -> int:
        return self.horizon - self.cut * self.truncation

    def matrix(self) -> jax.Array:
        a = jnp.eye(self.size)
        if self.size > 1:
            cos, sin = jnp.cos(self.angle), jnp.sin(self.angle)
            a = a.at[:2, :2].set(jnp.array([[cos, -sin], [sin, cos]]))
        return self.decay * a

    def weights(self) -> np.ndarray:
        return 1.0 + np.arange(self.size, dtype=np.float32)

    def reset(self, theta, key, episode=0, stagger=False):
        start_key, phase_key = jax.random.split(key)
        windows = self.windows - self.cut
        phase = jax.random.randint(phase_key, (), 1, windows + 1)
        end = jnp.where(jnp.equal(episode, 0) & stagger, phase, windows)
        start = self.noise * jax.random.uniform(start_key, theta.shape, minval=-1.0)
        zero = jnp.zeros((), jnp.int32)
        return State(start, zero, end * self.truncation, zero + episode)

    def unroll(self, theta, state, key):
        a, c = self.matrix(), self.weights()
        disturbed = state.x + self.noise * jax.random.uniform(key, theta.shape, minval=-1.0)

        def step(carry, _):
            x, t = carry
            x, t = a @ x + theta, t + 1
            loss = c @ x + 0.5 * self.curvature * x @ x + self.drift * state.episode
            return (x, t), jnp.where(jnp.logical_not(self.terminal) | (t == self.steps), loss, 0)

        (x, t), losses = jax.lax.scan(step, (disturbed, state.step), None, self.truncation)
        state = State(x, t, state.end, state.episode)
        return Rollout(losses, t >= state.end, state.episode >= self.lost), state

    def trajectory(self, theta) -> np.ndarray:
        """x_1, ..., x_T under theta, [T, size]."""
        a, x = np.asarray(self.matrix(), np.float64), np.zeros(self.size)
        return np.array([x := a @ x + np.asarray(theta) for _ in range(self.steps)])

    def losses(self, theta) -> np.ndarray:
        """The loss of every step of the first episode under theta, without noise, [T]."""
        x = self.trajectory(theta)
        losses = x @ self.weights() + 0.5 * self.curvature * np.sum(x**2, axis=1)
        counts = np.arange(1, self.steps + 1) >= (self.steps if self.terminal else 0)
        return np.where(counts, losses, 0.0)

    def gradient(self, truncated: bool, theta=0.0) -> np.ndarray:
        """d mean loss / d theta, summed by hand: through all earlier steps, or only those of the
        same window.
        """
        a, jacobian = np.asarray(self.matrix(), np.float64), np.zeros((self.size, self.size))
        total = np.zeros(self.size)
        for t, x in enumerate(self.trajectory(theta), start=1):
            if truncated and (t - 1) % self.truncation == 0:
                jacobian = np.zeros_like(jacobian)
            jacobian = a @ jacobian + np.eye(self.size)
            if not self.terminal or t == self.steps:
                total += (self.weights() + self.curvature * x) @ jacobian
        return total / self.steps
