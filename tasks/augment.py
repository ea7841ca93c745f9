"""Reparametrisation: the same losses in rescaled coordinates, so that no scale can be relied on.

The augmentation of VeLO (arXiv:2211.09760): the optimizer sees q, the model p = c * q with c drawn
once per task.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tasks.base import Batch, Key, Params, Split, Task, TaskFamily
from tasks.data import synthetic, unknown_name
from tasks.image_mlp import ImageMLP

LEVELS = ("global", "tensor", "parameter")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReparamTask:
    """`task` in the coordinates q = p / scales. The loss at `init` is unchanged; the gradient is
    multiplied by `scales`.
    """

    task: Task
    scales: Any  # the params' tree; scalars, or arrays of the params' shapes

    def init(self, key: Key) -> Params:
        return jax.tree.map(lambda p, c: p / c.astype(p.dtype), self.task.init(key), self.scales)

    def batch(self, key: Key, split: Split) -> Batch:
        return self.task.batch(key, split)

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        return self.task.loss(self.model_params(params), batch)

    def normalize(self, loss: jax.Array) -> jax.Array:
        return self.task.normalize(loss)

    def model_params(self, params: Params) -> Params:
        """What the wrapped task is given: scales * params."""
        return jax.tree.map(lambda q, c: q * c.astype(q.dtype), params, self.scales)

    # Properties, so that these two exist exactly when the wrapped task has them.
    @property
    def smooth(self) -> Any:
        smooth = self.task.smooth  # pyright: ignore[reportAttributeAccessIssue]
        return lambda params, batch: smooth(self.model_params(params), batch)

    @property
    def extra_args(self) -> Any:
        """As the wrapped task gives them: one that speaks of its parameters (a prox) still means p,
        not q.
        """
        return self.task.extra_args  # pyright: ignore[reportAttributeAccessIssue]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reparam:
    """Family -> family. Scales are log-uniform in `scale`: one per task (global), per tensor, or
    per parameter.
    """

    family: TaskFamily
    level: str = dataclasses.field(default="global", metadata={"static": True})
    scale: tuple[float, float] = dataclasses.field(default=(1e-3, 1e3), metadata={"static": True})

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(unknown_name("level", self.level, LEVELS))
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"`scale` must be (low, high) with 0 < low <= high, got {self.scale}")

    def __call__(self, key: Key) -> ReparamTask:
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
        return ReparamTask(task, jax.tree.unflatten(tree, scales))


EXAMPLES = tuple(
    Reparam(ImageMLP(data=synthetic(), hidden=(4,), batch_size=16), level, (0.5, 2.0))
    for level in LEVELS
)
