"""Augmentations: families made of families. Every one wraps the tasks of its family in an
`AugmentedTask` and says in a `Change` what differs, so that they compose in any order.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from tasks.base import Batch, Key, Params, Split, Task

Drawn = Any  # a pytree: what an augmentation drew for one task
Loss = Callable[[Params, Batch], jax.Array]


def _same_params(drawn: Drawn, params: Params) -> Params:
    del drawn
    return params


def _same_batch(drawn: Drawn, draw: Callable[[Key], Batch], key: Key) -> Batch:
    del drawn
    return draw(key)


def _itself(batch: Batch) -> Batch:
    return batch


def _same_loss(drawn: Drawn, loss: Loss, params: Params, batch: Batch) -> jax.Array:
    del drawn
    return loss(params, batch)


@dataclasses.dataclass(frozen=True)
class Change:
    """What an augmentation does, as functions of what was drawn for the task; by default nothing.

    They are the functions of a module, never closures: a `Change` is static, and equal ones must
    compare equal.

    Attributes:
      init: (drawn, initial params of the wrapped task) -> those of the augmented one.
      batch: (drawn, key -> training batch of the wrapped task, key) -> training batch.
      loss: (drawn, loss of the wrapped task, params, batch) -> loss.
      wrapped_batch: batch -> the batch of the wrapped task in it.
      gradients: drawn -> the transformation that stands before every optimizer.
    """

    init: Callable[[Drawn, Params], Params] = _same_params
    batch: Callable[[Drawn, Callable[[Key], Batch], Key], Batch] = _same_batch
    loss: Callable[[Drawn, Loss, Params, Batch], jax.Array] = _same_loss
    wrapped_batch: Callable[[Batch], Batch] = _itself
    gradients: Callable[[Drawn], optax.GradientTransformation] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AugmentedTask:
    """`task` with one `change`. Batches of the other splits than "train", and `normalize`, are
    those of `task`. Its gradients are with respect to its own params, not to those of `task`.
    """

    task: Task
    drawn: Drawn
    change: Change = dataclasses.field(metadata={"static": True})

    def init(self, key: Key) -> Params:
        return self.change.init(self.drawn, self.task.init(key))

    def batch(self, key: Key, split: Split) -> Batch:
        draw = functools.partial(self.task.batch, split=split)
        return self.change.batch(self.drawn, draw, key) if split == "train" else draw(key)

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        return self.change.loss(self.drawn, self.task.loss, params, batch)

    def normalize(self, loss: jax.Array) -> jax.Array:
        return self.task.normalize(loss)

    # Properties, so that these exist exactly when the wrapped task has them.
    @property
    def smooth(self) -> Loss:
        smooth = self.task.smooth  # pyright: ignore[reportAttributeAccessIssue]
        return functools.partial(self.change.loss, self.drawn, smooth)

    @property
    def extra_args(self) -> Callable[[Batch], dict[str, Any]]:
        """As the wrapped task gives them: one that speaks of its parameters (a prox) still means
        those of the wrapped task.
        """
        extra_args = self.task.extra_args  # pyright: ignore[reportAttributeAccessIssue]
        return lambda batch: extra_args(self.change.wrapped_batch(batch))

    @property
    def gradients(self) -> optax.GradientTransformation:
        """The wrapped task's first, then that of the change; there is none if neither has one."""
        if self.change.gradients is None:
            return self.task.gradients  # pyright: ignore[reportAttributeAccessIssue]
        own, inner = self.change.gradients(self.drawn), getattr(self.task, "gradients", None)
        return own if inner is None else optax.chain(inner, own)


def at_least_float32(tree: Any) -> Any:
    """`tree` with its floating leaves cast where they have less: augmentations compute in that."""

    def cast(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating else x

    return jax.tree.map(cast, tree)


def normal_like(key: Key, tree: Any) -> Any:
    """Standard normal numbers in the shapes and the one dtype of `tree`, all from one draw:
    generators are much of what there is to compile.
    """
    flat, unravel = ravel_pytree(tree)
    return unravel(jax.random.normal(key, flat.shape, flat.dtype))


def log_uniform_count(key: Key, between: tuple[int, int]) -> jax.Array:
    """int32 in [low, high], n with a probability proportional to log((n + 1) / n)."""
    low, high = between
    count = jnp.floor(low * ((high + 1) / low) ** jax.random.uniform(key))
    return jnp.clip(count, low, high).astype(jnp.int32)


def check_range(name: str, between: tuple[float, float], most: float = math.inf) -> None:
    """Raises ValueError if the field `name` is not a range of positive numbers."""
    low, high = between
    if not (0 < low <= high <= most and high < math.inf):
        limit = "" if most == math.inf else f" <= {most:g}"
        raise ValueError(f"`{name}` must be (low, high) with 0 < low <= high{limit}, got {between}")


def check_counts(name: str, between: tuple[int, int]) -> None:
    """Raises ValueError if the field `name` is not a range of positive integers."""
    low, high = between
    if not (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high):
        raise ValueError(
            f"`{name}` must be integers (low, high) with 1 <= low <= high, got {between}"
        )
