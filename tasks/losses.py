"""Losses that the tasks share, written to be cheap when vmapped over particles, on CPU too."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Softmax cross-entropy per example, [..., classes] and integers [...] -> [...], in nats.

    The target's logit is picked by a mask: the derivative of an index is a scatter, which does not
    fuse.
    """
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    picked = targets[..., None] == jax.lax.broadcasted_iota(
        targets.dtype, logits.shape, logits.ndim - 1
    )
    hit = jnp.sum(jnp.where(picked, shifted, 0.0), axis=-1)
    return jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)) - hit
