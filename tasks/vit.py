"""Vision transformers (arXiv:2010.11929) in flax nnx; the mean over tokens instead of a class
token.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.base import Key
from tasks.data import Dataset, load_field, synthetic
from tasks.dynamic import Dynamic
from tasks.fields import positive_integers
from tasks.images import image_shape, tiles, with_channels
from tasks.losses import outputs, predict
from tasks.network import NetworkTask, drawn_task
from tasks.nnx_network import scalable
from tasks.transformer import Block


class Network(nnx.Module):
    """Patches and their learned positions, `depth` blocks, a norm, the mean over tokens and a
    linear layer.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        outputs: int,
        growth: float,
        rngs: nnx.Rngs,
    ):
        height, length, channels = shape
        tokens = (height // patch) * (length // patch)
        self.patch, self.growth = patch, growth
        self.patches = nnx.Linear(patch * patch * channels, width, rngs=rngs)
        self.position_embedding = nnx.Param(
            jax.random.normal(rngs.params(), (tokens, width)) / math.sqrt(width)
        )
        self.blocks = nnx.List([Block(width, heads, False, growth, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, outputs, rngs=rngs)

    def __call__(
        self, images: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
    ) -> jax.Array:
        x = self.patches(tiles(with_channels(images), self.patch))
        x = x + self.position_embedding[None]
        for block in self.blocks:
            x = block(x, activation)
        return self.head(jnp.mean(self.norm(x), axis=1) / self.growth)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vit:
    """Vision transformers on images: `depth` blocks of `width` with `heads` attention heads, on
    squares of `patch` pixels a side. With a `base_width` they are under mu-parametrization: at
    that width the standard ones, but for a head that starts at 0.
    """

    data: Dataset | str = "digits/meta_train"
    patch: int = dataclasses.field(default=4, metadata={"static": True})
    width: int = dataclasses.field(default=16, metadata={"static": True})
    depth: int = dataclasses.field(default=2, metadata={"static": True})
    heads: int = dataclasses.field(default=2, metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    base_width: int | None = dataclasses.field(default=None, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})

    def __post_init__(self) -> None:
        load_field(self)
        positive_integers(self, "patch", "width", "depth", "heads", "base_width")
        if self.width % self.heads:
            raise ValueError(
                f"`width` must be a multiple of `heads`, got {self.width} and {self.heads}"
            )

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        shape = image_shape(self.data)
        if shape[0] % self.patch or shape[1] % self.patch:
            raise ValueError(
                f"`patch` must divide the height and width of the images, got {self.patch} for "
                f"{shape[0]}x{shape[1]} in {self.data!r}"
            )
        arguments = (shape, self.patch, self.width, self.depth, self.heads, outputs(self.data))
        network = scalable(Network, *arguments, width=self.width, base_width=self.base_width)
        return drawn_task(self, network, predict(self.data), key)


EXAMPLES = (Vit(data=synthetic(), patch=2, width=8, depth=1, batch_size=16),)
