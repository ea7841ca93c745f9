"""A linear inner problem whose meta-gradients are known exactly, whole and truncated."""

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearSystem:
    """x_0 = 0, x_t = A x_{t-1} + theta, loss c.x_t: at every step, or (`terminal`) at the last
    alone (the mean over the episode is then c.x_T / T).
    """

    horizon: int = dataclasses.field(metadata={"static": True})
    truncation: int = dataclasses.field(metadata={"static": True})
    terminal: bool = dataclasses.field(default=False, metadata={"static": True})
    decay: float = dataclasses.field(default=1.0, metadata={"static": True})
    size: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def windows(self) -> int:
        return self.horizon // self.truncation

    def matrix(self) -> np.ndarray:
        """A rotation (for two dimensions or more) times `decay`."""
        a = np.eye(self.size, dtype=np.float32)
        if self.size > 1:
            a[:2, :2] = [[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]]
        return self.decay * a

    def weights(self) -> np.ndarray:
        return 1.0 + np.arange(self.size, dtype=np.float32)

    def reset(self, theta, key, episode=0, stagger=False):
        phase = jax.random.randint(key, (), 1, self.windows + 1)
        end = jnp.where(jnp.equal(episode, 0) & stagger, phase, self.windows)
        return State(jnp.zeros_like(theta), jnp.zeros((), jnp.int32), end * self.truncation)

    def unroll(self, theta, state, key):
        def step(carry, _):
            x, t = carry
            x, t = self.matrix() @ x + theta, t + 1
            counts = (t == self.horizon) if self.terminal else True
            return (x, t), jnp.where(counts, self.weights() @ x, 0.0)

        (x, t), losses = jax.lax.scan(step, (state.x, state.step), None, self.truncation)
        return Rollout(losses, t >= state.end), State(x, t, state.end)

    def gradient(self, truncated: bool) -> np.ndarray:
        """d mean loss / d theta, summed by hand: through all earlier steps, or only those of the
        same window.
        """
        a, c = self.matrix().astype(np.float64), self.weights().astype(np.float64)
        total = np.zeros(self.size)
        for t in range(1, self.horizon + 1):
            if self.terminal and t != self.horizon:
                continue
            begin = (t - 1) // self.truncation * self.truncation if truncated else 0
            for k in range(begin, t):
                total += c @ np.linalg.matrix_power(a, t - 1 - k)
        return total / self.horizon
