"""A small convolutional network in flax nnx; its convolutions are matrix products, for speed."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.adapters import from_flax
from tasks.base import Key
from tasks.data import Dataset, load, synthetic
from tasks.losses import cross_entropy
from tasks.network import NetworkTask


def windows(images: jax.Array) -> jax.Array:
    """The 3x3 windows of [B, H, W, C] images, stride 2, zeros outside: [B, ceil(H / 2), ceil(W /
    2), 9 * C].
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [padded[:, i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifts, axis=-1)


class Network(nnx.Module):
    """relu(convolution 3x3, stride 2) per entry of `channels`, then the mean over positions and a
    linear layer.
    """

    def __init__(self, inputs: int, channels: tuple[int, ...], classes: int, rngs: nnx.Rngs):
        sizes = (inputs, *channels)
        # A batched convolution with a kernel per particle takes XLA's slow path on CPU: 3x the
        # time, 3x the compilation.
        self.layers = nnx.List(
            [nnx.Linear(9 * a, b, rngs=rngs) for a, b in zip(sizes[:-1], channels, strict=True)]
        )
        self.head = nnx.Linear(sizes[-1], classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images if images.ndim == 4 else images[..., None]
        for layer in self.layers:
            x = jax.nn.relu(layer(windows(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class _Build:
    """Compares by value, unlike a lambda, so that equal families share one compiled program."""

    inputs: int
    channels: tuple[int, ...]
    classes: int

    def __call__(self, rngs: nnx.Rngs) -> Network:
        return Network(self.inputs, self.channels, self.classes, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvNet:
    """Convolutional networks on images; `channels` gives the width of each layer, which halves
    height and width.
    """

    data: Dataset | str = "digits/held_out"
    channels: tuple[int, ...] = dataclasses.field(default=(8, 16), metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # otherwise a dataset, or one of jax's placeholders
            object.__setattr__(self, "data", load(self.data))

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        shape = self.data.inputs.shape[1:]
        if len(shape) not in (2, 3):
            raise ValueError(f"`data` must hold images, got rows of shape {shape} in {self.data!r}")
        build = _Build(shape[2] if len(shape) == 3 else 1, self.channels, self.data.classes)
        return from_flax(build, cross_entropy, self.data, batch_size=self.batch_size)


EXAMPLES = (ConvNet(data=synthetic(), channels=(4,), batch_size=16),)
