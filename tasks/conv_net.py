"""A small convolutional network in flax nnx, VeLO's second family (arXiv:2211.09760)."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.base import Key
from tasks.data import Dataset, load_field, synthetic
from tasks.dynamic import Dynamic
from tasks.fields import positive_integers
from tasks.images import image_shape, windows, with_channels
from tasks.losses import outputs, predict
from tasks.network import NetworkTask, drawn_task
from tasks.nnx_network import nnx_network


class Network(nnx.Module):
    """A convolution 3x3 of stride 2 and the activation per entry of `channels`, then the mean over
    positions and a linear layer.
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], outputs: int, rngs: nnx.Rngs):
        sizes = (inputs, *channels)
        self.layers = nnx.List(
            [nnx.Linear(9 * a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )
        self.head = nnx.Linear(sizes[-1], outputs, rngs=rngs)

    def __call__(
        self, images: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
    ) -> jax.Array:
        x = with_channels(images)
        for layer in self.layers:
            x = activation(layer(windows(x, stride=2)))
        return self.head(jnp.mean(x, axis=(1, 2)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvNet:
    """Convolutional networks on images; `channels` gives the width of each layer, which halves
    height and width.
    """

    data: Dataset | str = "digits/held_out"
    channels: tuple[int, ...] = dataclasses.field(default=(8, 16), metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})

    def __post_init__(self) -> None:
        load_field(self)
        positive_integers(self, "channels")

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        inputs = image_shape(self.data)[-1]
        return drawn_task(
            self,
            nnx_network(Network, inputs, self.channels, outputs(self.data)),
            predict(self.data),
            key,
        )


EXAMPLES = (ConvNet(data=synthetic(), channels=(4,), batch_size=16),)
