"""Noisy quadratics whose optimum, Hessian and condition number are known exactly."""

import dataclasses

import jax
import jax.numpy as jnp

from tasks.base import Key, Split, relative_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuadraticTask:
    """loss(x, g) = (x - optimum)^T hessian (x - optimum) / 2 + g^T (x - optimum); its gradient
    noise g is the batch.

    The three splits are the same distribution. The loss at the optimum is 0; the noise can make it
    negative elsewhere.
    """

    hessian: jax.Array  # [D, D], symmetric, largest eigenvalue 1
    optimum: jax.Array  # [D]
    noise: float = dataclasses.field(metadata={"static": True})

    def init(self, key: Key) -> jax.Array:
        return jax.random.normal(key, self.optimum.shape)

    def batch(self, key: Key, split: Split) -> jax.Array:
        return self.noise * jax.random.normal(key, self.optimum.shape)

    def loss(self, params: jax.Array, batch: jax.Array) -> jax.Array:
        error = params - self.optimum
        return 0.5 * error @ (self.hessian @ error) + batch @ error

    def normalize(self, loss: jax.Array) -> jax.Array:
        """Relative to the expected loss of `init`, (trace(hessian) + optimum^T hessian optimum) /
        2.
        """
        untrained = 0.5 * (jnp.trace(self.hessian) + self.optimum @ (self.hessian @ self.optimum))
        return relative_loss(loss, untrained)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic:
    """Randomly rotated quadratics with standard normal optima.

    The condition number is log-uniform in `condition`; the eigenvalues are log-uniform between its
    inverse and 1, both of which are among them. `noise` is the deviation of the gradient noise per
    coordinate.
    """

    dimension: int = dataclasses.field(default=10, metadata={"static": True})
    condition: tuple[float, float] = dataclasses.field(
        default=(1.0, 1e3), metadata={"static": True}
    )
    noise: float = dataclasses.field(default=0.0, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"`dimension` must be positive, got {self.dimension}")
        if not 1 <= self.condition[0] <= self.condition[1]:
            raise ValueError(
                f"`condition` must be (low, high), 1 <= low <= high, got {self.condition}"
            )

    def __call__(self, key: Key) -> QuadraticTask:
        key_condition, key_spectrum, key_rotation, key_optimum = jax.random.split(key, 4)
        low, high = jnp.log(jnp.array(self.condition))
        log_condition = jax.random.uniform(key_condition, minval=low, maxval=high)
        exponent = jax.random.uniform(key_spectrum, (self.dimension,)).at[0].set(0.0)
        if self.dimension > 1:
            exponent = exponent.at[-1].set(1.0)
        spectrum = jnp.exp(-exponent * log_condition)
        rotation = jnp.linalg.qr(jax.random.normal(key_rotation, (self.dimension,) * 2))[0]
        hessian = (rotation * spectrum[None]) @ rotation.T
        return QuadraticTask(hessian, jax.random.normal(key_optimum, (self.dimension,)), self.noise)


EXAMPLES = (Quadratic(dimension=4, condition=(1.0, 10.0), noise=0.01),)
