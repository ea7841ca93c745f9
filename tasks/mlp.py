"""Multilayer perceptrons of any width and depth in flax nnx, under standard or mu-parametrization:
the tasks of arXiv:2406.00153. For small ones under drawn conditions see `tasks.image_mlp`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from flax import nnx

from tasks.base import Key
from tasks.data import Dataset, load_field, synthetic
from tasks.dynamic import Dynamic
from tasks.fields import positive_integers
from tasks.losses import outputs, predict
from tasks.network import NetworkTask, drawn_task
from tasks.nnx_network import scalable


class Network(nnx.Module):
    """Flattened inputs, `depth` hidden layers of `width` units, a linear layer."""

    def __init__(
        self, inputs: int, width: int, depth: int, outputs: int, growth: float, rngs: nnx.Rngs
    ):
        self.growth = growth
        self.input = nnx.Linear(inputs, width, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(depth - 1)])
        self.readout = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(
        self, inputs: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    ) -> jax.Array:
        x = activation(self.input(inputs.reshape(len(inputs), -1)))
        for layer in self.hidden:
            x = activation(layer(x))
        return self.readout(x / self.growth)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLP:
    """MLPs on images or tables: `depth` hidden layers of `width` units. Weights start with variance
    2 / inputs (arXiv:1502.01852), so that deep ones of relu train. With a
    `base_width` they are under mu-parametrization: at that width the standard ones, but for a
    readout that starts at 0.
    """

    data: Dataset | str = "glyphs@8x8"
    width: int = dataclasses.field(default=64, metadata={"static": True})
    depth: int = dataclasses.field(default=3, metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    base_width: int | None = dataclasses.field(default=None, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})

    def __post_init__(self) -> None:
        load_field(self)
        positive_integers(self, "width", "depth", "base_width")

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        sizes = (math.prod(self.data.shape), self.width, self.depth, outputs(self.data))
        network = scalable(Network, *sizes, width=self.width, base_width=self.base_width, gain=2.0)
        return drawn_task(self, network, predict(self.data), key)


EXAMPLES = (MLP(data=synthetic(), width=8, depth=2, batch_size=16),)
