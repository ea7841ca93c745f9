"""Smaller training batches under one static shape, as gradients of any noise are to be met with.

An augmentation of VeLO (arXiv:2211.09760).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tasks.augment import AugmentedTask, Change, check_range
from tasks.base import Batch, Key, TaskFamily
from tasks.data import Batch as Rows
from tasks.data import synthetic
from tasks.dynamic import uniform
from tasks.image_mlp import ImageMLP


def _is_rows(node: Any) -> bool:
    return isinstance(node, Rows)


def size_of(batch: Batch) -> int:
    """The number of rows of the `tasks.data.Batch` that `batch` is or holds.

    Raises:
      ValueError: there is none, or its arrays do not have the same first axis.
    """
    nodes = jax.tree.leaves(batch, is_leaf=_is_rows)
    leaves = jax.tree.leaves([node for node in nodes if _is_rows(node)])
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "`batch` must hold rows, a tasks.data.Batch whose arrays have the same first axis, got "
            f"{jax.tree.map(lambda x: jax.typeof(x).str_short(), batch)}"
        )
    return sizes.pop()[0]


def repeated_rows(batch: Batch, count: int | jax.Array) -> Batch:
    """`batch` with its first `count` rows instead of all, repeated cyclically up to its size.

    Where the size is no multiple of `count`, the first rows occur once more than the others. What
    is in `batch` besides rows (a key) is left as it is.

    Args:
      count: 1..size, may be traced.

    Raises:
      ValueError: see `size_of`.
    """
    rows = jnp.arange(size_of(batch)) % count

    def repeat(node: Any) -> Any:
        take = lambda x: x.at[rows].get(mode="promise_in_bounds")  # noqa: E731
        return jax.tree.map(take, node) if _is_rows(node) else node

    return jax.tree.map(repeat, batch, is_leaf=_is_rows)


def _batch(fraction: jax.Array, draw: Callable[[Key], Batch], key: Key) -> Batch:
    batch = draw(key)
    count = jnp.ceil(fraction * size_of(batch)).astype(jnp.int32)
    return repeated_rows(batch, count)


REDUCED = Change(batch=_batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReducedBatch:
    """Family -> family. Only the first ceil(f * size) rows of a training batch count, see
    `repeated_rows`; f is uniform in `fraction`.

    A family whose batches are no rows raises ValueError at its first training batch.
    """

    family: TaskFamily
    fraction: tuple[float, float] = dataclasses.field(
        default=(0.01, 1.0), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        check_range("fraction", self.fraction, most=1.0)

    def __call__(self, key: Key) -> AugmentedTask:
        key_task, key_fraction = jax.random.split(key)
        fraction = uniform(key_fraction, self.fraction)
        return AugmentedTask(self.family(key_task), fraction, REDUCED)


EXAMPLES = (ReducedBatch(ImageMLP(data=synthetic(), hidden=(4,), batch_size=16), (0.3, 1.0)),)
