"""Residual networks with the activation before each convolution (arXiv:1603.05027) in flax nnx,
with layer normalisation over channels (arXiv:2201.03545), which needs no statistics of the batch.
"""

import dataclasses
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
from tasks.nnx_network import scalable

Activation = Callable[[jax.Array], jax.Array]


class Residual(nnx.Module):
    """x + two convolutions 3x3, each after a norm and the activation. Where the stride is 2, x goes
    through a 1x1 convolution of stride 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, rngs: nnx.Rngs):
        self.stride = stride
        self.norms = nnx.List([nnx.LayerNorm(size, rngs=rngs) for size in (inputs, outputs)])
        self.convolutions = nnx.List(
            [nnx.Linear(9 * size, outputs, use_bias=False, rngs=rngs) for size in (inputs, outputs)]
        )
        if stride > 1:
            self.projection = nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, activation: Activation = jax.nn.relu) -> jax.Array:
        y = activation(self.norms[0](x))
        if self.stride > 1:
            x = self.projection(y[:, :: self.stride, :: self.stride])
        y = self.convolutions[0](windows(y, self.stride))
        return x + self.convolutions[1](windows(activation(self.norms[1](y)), 1))


class Network(nnx.Module):
    """A convolution of stride 2, stages of residual blocks, a norm, the activation, the mean over
    positions and a linear layer. Each stage but the first halves height and width and doubles the
    channels.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        blocks: tuple[int, ...],
        outputs: int,
        growth: float,
        rngs: nnx.Rngs,
    ):
        self.growth = growth
        self.stem = nnx.Linear(9 * inputs, width, use_bias=False, rngs=rngs)
        self.blocks = nnx.List()
        for stage, count in enumerate(blocks):
            for i in range(count):
                stride = 2 if stage and not i else 1
                self.blocks.append(Residual(width, width * stride, stride, rngs))
                width *= stride
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, images: jax.Array, activation: Activation = jax.nn.relu) -> jax.Array:
        x = self.stem(windows(with_channels(images), stride=2))
        for block in self.blocks:
            x = block(x, activation)
        x = jnp.mean(activation(self.norm(x)), axis=(1, 2))
        return self.head(x / self.growth)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Resnet:
    """Residual networks on images; `blocks` says how many each stage has, `width` how many channels
    the first. With a `base_width` they are under mu-parametrization: at that width the standard
    ones, but for a head that starts at 0.
    """

    data: Dataset | str = "digits/held_out"
    width: int = dataclasses.field(default=8, metadata={"static": True})
    blocks: tuple[int, ...] = dataclasses.field(default=(1, 1), metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    base_width: int | None = dataclasses.field(default=None, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})

    def __post_init__(self) -> None:
        load_field(self)
        positive_integers(self, "width", "blocks", "base_width")

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        arguments = (image_shape(self.data)[-1], self.width, self.blocks, outputs(self.data))
        network = scalable(Network, *arguments, width=self.width, base_width=self.base_width)
        return drawn_task(self, network, predict(self.data), key)


EXAMPLES = (Resnet(data=synthetic(), width=4, blocks=(1, 1), batch_size=16),)
