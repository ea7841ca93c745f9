"""The block of a transformer (arXiv:1706.03762) with normalisation before each branch
(arXiv:2002.04745), for the vision transformer and the language model alike.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    """Multi-head self-attention, [B, T, width] -> [B, T, width], without biases: that of the keys
    would change nothing.

    Args:
      causal: what comes out at position t depends on no position after t.
      growth: under mu-parametrization the width over the base width. Scores are divided by the
        root of the size of a head and by that of `growth`, together by the size of a head but for
        a constant: what is trained is correlated (arXiv:2203.03466).

    Raises:
      ValueError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int, causal: bool, growth: float, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"`width` must be a multiple of `heads`, got {width} and {heads}")
        self.heads, self.causal, self.growth = heads, causal, growth
        self.query = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.key = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape

        def heads(linear: nnx.Linear) -> jax.Array:  # [B, T, H, D]
            return linear(x).reshape(batch, length, self.heads, -1)

        query, key, value = heads(self.query), heads(self.key), heads(self.value)
        scale = math.sqrt(width // self.heads * self.growth)
        scores = jnp.einsum("bthd,bshd->bhts", query, key) / scale
        scores = scores.astype(jnp.float32)
        if self.causal:
            past = jnp.tril(jnp.ones((length, length), bool))
            scores = jnp.where(past[None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bhts,bshd->bthd", weights, value)
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with one hidden layer of 4 * `width` units."""

    def __init__(self, width: int, heads: int, causal: bool, growth: float, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = Attention(width, heads, causal, growth, rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(
        self, x: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu
    ) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(activation(self.up(self.mlp_norm(x))))
