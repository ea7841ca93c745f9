"""Noisy quadratics whose optimum, Hessian and condition number are known exactly."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from tasks.base import Key, Split, relative_loss
from tasks.data import unknown_name
from tasks.fields import positive_integers


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


def _with_ends(key: Key, dimension: int) -> jax.Array:
    """Uniform on [0, 1], the first 0, the last of several 1."""
    drawn = jax.random.uniform(key, (dimension,)).at[0].set(0.0)
    return drawn if dimension == 1 else drawn.at[-1].set(1.0)


def _log_uniform(key: Key, log_condition: jax.Array, dimension: int) -> jax.Array:
    return jnp.exp(-_with_ends(key, dimension) * log_condition)


def _uniform(key: Key, log_condition: jax.Array, dimension: int) -> jax.Array:
    return 1 + _with_ends(key, dimension) * jnp.expm1(-log_condition)


def _power_law(key: Key, log_condition: jax.Array, dimension: int) -> jax.Array:
    del key
    exponent = log_condition / math.log(max(dimension, 2))
    return jnp.arange(1.0, dimension + 1) ** -exponent


def _two_clusters(key: Key, log_condition: jax.Array, dimension: int) -> jax.Array:
    del key
    return jnp.where(jnp.arange(dimension) < (dimension + 1) // 2, 1.0, jnp.exp(-log_condition))


# (key, log of the condition number, dimension) -> eigenvalues
SPECTRA = {
    "log_uniform": _log_uniform,
    "uniform": _uniform,
    "power_law": _power_law,
    "two_clusters": _two_clusters,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic:
    """Quadratics with standard normal optima.

    Args:
      condition: range of the condition number k, log-uniform. The eigenvalues lie between 1 / k and
        1, both of which are among them.
      noise: deviation of the gradient noise per coordinate.
      spectrum: of the eigenvalues i = 1, ..., D: log_uniform and uniform are drawn, power_law is
        i^-a with a = log k / log D, two_clusters are 1 for the first half (rounded up), else 1 / k.
      rotated: by a random orthogonal matrix; otherwise the Hessian is diagonal.
    """

    dimension: int = dataclasses.field(default=10, metadata={"static": True})
    condition: tuple[float, float] = dataclasses.field(
        default=(1.0, 1e3), metadata={"static": True}
    )
    noise: float = dataclasses.field(default=0.0, metadata={"static": True})
    spectrum: str = dataclasses.field(default="log_uniform", metadata={"static": True})
    rotated: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        positive_integers(self, "dimension")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"`noise` must be finite and not negative, got {self.noise}")
        if self.spectrum not in SPECTRA:
            raise ValueError(unknown_name("spectrum", self.spectrum, SPECTRA))
        if not 1 <= self.condition[0] <= self.condition[1]:
            raise ValueError(
                f"`condition` must be (low, high), 1 <= low <= high, got {self.condition}"
            )

    def __call__(self, key: Key) -> QuadraticTask:
        key_condition, key_spectrum, key_rotation, key_optimum = jax.random.split(key, 4)
        low, high = jnp.log(jnp.array(self.condition))
        log_condition = jax.random.uniform(key_condition, minval=low, maxval=high)
        spectrum = SPECTRA[self.spectrum](key_spectrum, log_condition, self.dimension)
        hessian = jnp.diag(spectrum)
        if self.rotated:
            rotation = jnp.linalg.qr(jax.random.normal(key_rotation, (self.dimension,) * 2))[0]
            hessian = (rotation * spectrum[None]) @ rotation.T
        return QuadraticTask(hessian, jax.random.normal(key_optimum, (self.dimension,)), self.noise)


EXAMPLES = (Quadratic(dimension=4, condition=(1.0, 10.0), noise=0.01),)
