"""Transformer language models of characters in flax nnx: decoders as in GPT (Radford et al., 2018),
normalised before each branch.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from flax import nnx

from tasks.base import Key
from tasks.dynamic import Dynamic
from tasks.fields import positive_integers
from tasks.losses import predict
from tasks.network import NetworkTask, drawn_task
from tasks.nnx_network import scalable
from tasks.text import Text, load_text_field
from tasks.transformer import Block


class Network(nnx.Module):
    """Characters and their learned positions, `depth` causal blocks, a norm and a linear layer:
    [B, length] integers -> logits [B, length, symbols].
    """

    def __init__(
        self,
        symbols: int,
        length: int,
        width: int,
        depth: int,
        heads: int,
        growth: float,
        rngs: nnx.Rngs,
    ):
        self.symbols, self.growth = symbols, growth
        self.embed = nnx.Linear(symbols, width, use_bias=False, rngs=rngs)
        self.position_embedding = nnx.Param(
            jax.random.normal(rngs.params(), (length, width)) / math.sqrt(width)
        )
        self.blocks = nnx.List([Block(width, heads, True, growth, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.readout = nnx.Linear(width, symbols, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
    ) -> jax.Array:
        # not looked up: the derivative of an index is a scatter, slow when vmapped
        x = self.embed(jax.nn.one_hot(tokens, self.symbols)) + self.position_embedding[None]
        for block in self.blocks:
            x = block(x, activation)
        return self.readout(self.norm(x) / self.growth)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransformerLM:
    """The next character at every position of a window of `length`, by `depth` blocks of `width`
    with `heads` attention heads.

    `data` may be a name for `tasks.text.load_text`. With a `base_width` they are
    under mu-parametrization: at that width the standard ones, but for a readout that starts at 0.
    """

    data: Text | str = "python_docs/meta_train"
    width: int = dataclasses.field(default=32, metadata={"static": True})
    depth: int = dataclasses.field(default=1, metadata={"static": True})
    heads: int = dataclasses.field(default=2, metadata={"static": True})
    length: int = dataclasses.field(default=16, metadata={"static": True})
    batch_size: int = dataclasses.field(default=8, metadata={"static": True})
    base_width: int | None = dataclasses.field(default=None, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})

    def __post_init__(self) -> None:
        load_text_field(self)
        positive_integers(self, "width", "depth", "heads", "base_width")
        if self.width % self.heads:
            raise ValueError(
                f"`width` must be a multiple of `heads`, got {self.width} and {self.heads}"
            )

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Text)
        sizes = (self.data.classes, self.length, self.width, self.depth, self.heads)
        network = scalable(Network, *sizes, width=self.width, base_width=self.base_width)
        return drawn_task(self, network, predict(self.data), key)


EXAMPLES = (TransformerLM(data="markov", width=8, length=12, batch_size=8),)
