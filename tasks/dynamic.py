"""Dynamic configuration: what differs between the episodes of one compiled program.

A family's static configuration decides shapes, hence the program; its dynamic configuration is
drawn from the task's key inside of it (as in VeLO, arXiv:2211.09760).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Key
from tasks.data import unknown_name

Range = tuple[float, float]
Scalar = np.ndarray | jax.Array
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "leaky_relu": jax.nn.leaky_relu,
}


class Drawn(NamedTuple):
    """One episode's values of the fields of `Dynamic`, scalars; `seed` decides which labels are
    wrong.
    """

    activation: Scalar
    init_scale: Scalar
    batch_fraction: Scalar
    subset: Scalar
    label_noise: Scalar
    l2: Scalar
    seed: Scalar


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """Ranges from which every episode draws. What has a single value is not drawn.

    Args:
      activation: names, one of which is drawn; none for the network's own.
      init_scale: multiplier of all initial weights with two or more axes, log-uniform.
      batch_fraction: share of a training batch's rows that are distinct, uniform; they are repeated
        up to its size.
      subset: share of the training split that is used, log-uniform.
      label_noise: share of training labels that are replaced by a random one, uniform. Which ones
        is fixed for the episode.
      l2: coefficient of half the sum of squares of the params, which is added to the loss,
        log-uniform; (0, 0) for none.
    """

    activation: tuple[str, ...] = ()
    init_scale: Range = (1.0, 1.0)
    batch_fraction: Range = (1.0, 1.0)
    subset: Range = (1.0, 1.0)
    label_noise: Range = (0.0, 0.0)
    l2: Range = (0.0, 0.0)

    def __post_init__(self) -> None:
        for name in self.activation:
            if name not in ACTIVATIONS:
                raise ValueError(unknown_name("activation", name, ACTIVATIONS))
        limits = {"init_scale": math.inf, "batch_fraction": 1, "subset": 1, "l2": math.inf}
        for name, most in limits.items():
            low, high = getattr(self, name)
            if not (0 < low <= high <= most or (name == "l2" and low == high == 0)):
                raise ValueError(
                    f"`{name}` must be (low, high) with 0 < low <= high <= {most}, got {low, high}"
                )
        if not 0 <= self.label_noise[0] <= self.label_noise[1] <= 1:
            raise ValueError(
                "`label_noise` must be (low, high) with 0 <= low <= high <= 1, "
                f"got {self.label_noise}"
            )

    def draw(self, key: Key) -> Drawn:
        which, scale, fraction, subset, noise, l2, labels = (
            jax.random.fold_in(key, i) for i in range(len(Drawn._fields))
        )
        activation, seed = np.zeros((), np.int32), np.zeros((), np.uint32)
        if len(self.activation) > 1:
            activation = jax.random.randint(which, (), 0, len(self.activation))
        if self.label_noise[1]:
            seed = jax.random.bits(labels)
        return Drawn(
            activation=activation,
            init_scale=log_uniform(scale, self.init_scale),
            batch_fraction=uniform(fraction, self.batch_fraction),
            subset=log_uniform(subset, self.subset),
            label_noise=uniform(noise, self.label_noise),
            l2=log_uniform(l2, self.l2),
            seed=seed,
        )

    def activations(self, drawn: Drawn) -> tuple[Callable[[jax.Array], jax.Array], ...]:
        """The drawn activation as the last argument of a network, or no argument."""
        functions = [ACTIVATIONS[name] for name in self.activation]
        if len(functions) < 2:
            return tuple(functions)
        return (lambda x: jax.lax.switch(drawn.activation, functions, x),)


def uniform(key: Key, between: Range) -> Scalar:
    low, high = between
    if low == high:
        return np.asarray(low, np.float32)
    return jax.random.uniform(key, minval=low, maxval=high)


def log_uniform(key: Key, between: Range) -> Scalar:
    low, high = between
    if low == high:
        return np.asarray(low, np.float32)
    return jnp.exp(jax.random.uniform(key, minval=math.log(low), maxval=math.log(high)))


CONFIGURATIONS = {"dynamic": Dynamic()}
