"""Losses that the tasks share, written to be cheap when vmapped over particles, on CPU too."""

from typing import Any

import jax
import jax.numpy as jnp

from tasks.data import Batch, Dataset
from tasks.network import Objective


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


def of_targets(outputs: jax.Array, batch: Batch) -> jax.Array:
    """Cross-entropy of logits [B, ..., classes] where targets are integers, and of real targets [B]
    the squared error of outputs [B, 1].
    """
    if jnp.issubdtype(batch.targets.dtype, jnp.integer):
        return cross_entropy(outputs, batch.targets)
    return jnp.square(outputs[:, 0] - batch.targets)


def predict(data: Dataset | Any) -> Objective:
    """To predict the targets: classes, tokens or real numbers. Untrained is the best constant
    prediction: the entropy of the labels, or their variance.
    """
    return Objective(of_targets, data.statistics.target)


def outputs(data: Dataset | Any) -> int:
    """How many outputs `predict` takes."""
    return data.classes or 1
