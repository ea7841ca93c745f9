"""Reparametrisation: the same losses in rescaled coordinates, so that no scale can be relied on.

The augmentation of VeLO (arXiv:2211.09760): the optimizer sees q, the model p = c * q with c drawn
once per task.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tasks.augment import AugmentedTask, Change, Loss, check_range
from tasks.base import Batch, Key, Params, TaskFamily
from tasks.data import synthetic, unknown_name
from tasks.image_mlp import ImageMLP

LEVELS = ("global", "tensor", "parameter")


def model_params(scales: Any, params: Params) -> Params:
    """What the wrapped task is given: scales * params.

    Args:
      scales: the params' tree; scalars, or arrays of the params' shapes.
    """
    return jax.tree.map(lambda q, c: q * c.astype(q.dtype), params, scales)


def _init(scales: Any, params: Params) -> Params:
    return jax.tree.map(lambda p, c: p / c.astype(p.dtype), params, scales)


def _loss(scales: Any, loss: Loss, params: Params, batch: Batch) -> jax.Array:
    return loss(model_params(scales, params), batch)


RESCALED = Change(init=_init, loss=_loss)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reparam:
    """Family -> family. Scales are log-uniform in `scale`: one per task (global), per tensor, or
    per parameter.

    The loss at `init` is unchanged; the gradient is multiplied by the scales.
    """

    family: TaskFamily
    level: str = dataclasses.field(default="global", metadata={"static": True})
    scale: tuple[float, float] = dataclasses.field(default=(1e-3, 1e3), metadata={"static": True})

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(unknown_name("level", self.level, LEVELS))
        check_range("scale", self.scale)

    def __call__(self, key: Key) -> AugmentedTask:
        key_task, key_scales = jax.random.split(key)
        task = self.family(key_task)
        leaves, tree = jax.tree.flatten(jax.eval_shape(task.init, key))
        low, high = map(math.log, self.scale)

        def draw(key: Key, shape: tuple[int, ...]) -> jax.Array:
            return jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))

        if self.level == "global":
            scales = [draw(key_scales, ())] * len(leaves)
        else:
            keys = jax.random.split(key_scales, len(leaves))
            full = self.level == "parameter"
            scales = [draw(k, p.shape if full else ()) for k, p in zip(keys, leaves, strict=True)]
        return AugmentedTask(task, jax.tree.unflatten(tree, scales), RESCALED)


EXAMPLES = tuple(
    Reparam(ImageMLP(data=synthetic(), hidden=(4,), batch_size=16), level, (0.5, 2.0))
    for level in LEVELS
)
