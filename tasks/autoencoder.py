"""Multilayer perceptrons that reproduce their inputs through a bottleneck (doi:10.1126/
science.1127647) in flax nnx, a family of VeLO's (arXiv:2211.09760).
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.base import Key
from tasks.data import Batch, Dataset, load_field, synthetic
from tasks.dynamic import Dynamic
from tasks.fields import positive_integers
from tasks.network import NetworkTask, Objective, drawn_task
from tasks.nnx_network import nnx_network


class MLP(nnx.Module):
    """Linear layers between `sizes`, the activation between layers. Inputs are flattened."""

    def __init__(self, sizes: tuple[int, ...], rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(
        self, inputs: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    ) -> jax.Array:
        x = inputs.reshape(len(inputs), -1)
        for i, layer in enumerate(self.layers):
            x = layer(activation(x) if i else x)
        return x


def squared_error(reproduced: jax.Array, batch: Batch) -> jax.Array:
    """[B], the mean over a row's entries; `reproduced` is [B, entries]."""
    return jnp.mean(jnp.square(reproduced - batch.inputs.reshape(reproduced.shape)), axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Autoencoders of images or tables with `hidden` units per layer and linear outputs. Untrained
    is the variance of the inputs: what the mean of the rows costs.
    """

    data: Dataset | str = "digits/meta_train"
    hidden: tuple[int, ...] = dataclasses.field(default=(32, 8, 32), metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})

    def __post_init__(self) -> None:
        load_field(self)
        positive_integers(self, "hidden")

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        entries = math.prod(self.data.shape)
        return drawn_task(
            self,
            nnx_network(MLP, (entries, *self.hidden, entries)),
            Objective(squared_error, self.data.statistics.variance),
            key,
        )


EXAMPLES = (Autoencoder(data=synthetic(), hidden=(8, 2, 8), batch_size=16),)
