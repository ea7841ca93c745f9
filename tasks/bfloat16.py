"""Params in bfloat16: an optimizer meets rounded params and gradients, and its small updates are
lost. An augmentation of VeLO (arXiv:2211.09760).
"""

import dataclasses

import jax
import jax.numpy as jnp

from tasks.augment import AugmentedTask, Change, Loss, at_least_float32
from tasks.base import Batch, Key, Params, TaskFamily
from tasks.data import synthetic
from tasks.image_mlp import ImageMLP


def _init(drawn: None, params: Params) -> Params:
    del drawn
    return jax.tree.map(
        lambda p: p.astype(jnp.bfloat16) if jnp.issubdtype(p.dtype, jnp.floating) else p, params
    )


def _loss(drawn: None, loss: Loss, params: Params, batch: Batch) -> jax.Array:
    del drawn
    return loss(at_least_float32(params), batch)


ROUNDED = Change(init=_init, loss=_loss)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bfloat16:
    """Family -> family. Params, gradients and updates are bfloat16; the wrapped task computes in
    float32.
    """

    family: TaskFamily

    def __call__(self, key: Key) -> AugmentedTask:
        return AugmentedTask(self.family(key), None, ROUNDED)


EXAMPLES = (Bfloat16(ImageMLP(data=synthetic(), hidden=(4,), batch_size=16)),)
