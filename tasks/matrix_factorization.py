"""Completion of a low-rank matrix (arXiv:0805.4471), planted at random, from some of its noisy
entries, by the product of two factors that start small (arXiv:1905.13655).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tasks.base import Key, Params, Split, relative_loss
from tasks.data import Batch, hash_words, random_rows
from tasks.fields import positive_integers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixFactorizationTask:
    """Mean squared error of left @ right^T on minibatches of entries. The splits are ranges of
    `order`, so they share no entry.
    """

    planted: Params  # {"left": [R, rank], "right": [C, rank]}; entries of variance 1
    entries: jax.Array  # [R * C], with noise
    order: jax.Array  # [R * C] int32, a permutation
    splits: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    batch_size: int = dataclasses.field(metadata={"static": True})
    init_scale: float = dataclasses.field(metadata={"static": True})

    def init(self, key: Key) -> Params:
        left, right = self.planted["left"].shape, self.planted["right"].shape
        drawn = self.init_scale * jax.random.normal(key, (left[0] + right[0], left[1]))
        return {"left": drawn[: left[0]], "right": drawn[left[0] :]}

    def batch(self, key: Key, split: Split) -> Batch:
        """Inputs are (row, column), [size, 2] int32, targets [size] their entries."""
        place = random_rows(key, self.splits, split, self.batch_size)
        entry = self.order.at[place].get(mode="promise_in_bounds")
        columns = self.planted["right"].shape[0]
        inputs = jnp.stack([entry // columns, entry % columns], axis=1)
        return Batch(inputs, self.entries.at[entry].get(mode="promise_in_bounds"))

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        # not looked up: the derivative of an index is a scatter, slow when vmapped
        left, right = (
            jax.nn.one_hot(batch.inputs[:, i], factor.shape[0]) @ factor
            for i, factor in enumerate((params["left"], params["right"]))
        )
        return jnp.mean(jnp.square(jnp.sum(left * right, axis=1) - batch.targets))

    def normalize(self, loss: jax.Array) -> jax.Array:
        """Relative to predicting 0 for all entries; the expectation of that over tasks is 1 +
        noise^2.
        """
        return relative_loss(loss, jnp.mean(jnp.square(self.entries)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixFactorization:
    """Matrices of [rows, columns], products of standard normal factors of `rank`, over its root.

    Args:
      observed: share of the entries in the training split; the others are halved into valid and
        test.
      noise: deviation of what is added to every entry, in all splits, once per task.
      init_scale: deviation of the initial factors.
    """

    rows: int = dataclasses.field(default=32, metadata={"static": True})
    columns: int = dataclasses.field(default=24, metadata={"static": True})
    rank: int = dataclasses.field(default=3, metadata={"static": True})
    observed: float = dataclasses.field(default=0.5, metadata={"static": True})
    noise: float = dataclasses.field(default=0.1, metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    init_scale: float = dataclasses.field(default=0.1, metadata={"static": True})

    def __post_init__(self) -> None:
        positive_integers(self, "rows", "columns", "rank", "batch_size")
        if self.rank > min(self.rows, self.columns):
            raise ValueError(
                f"`rank` must be at most {min(self.rows, self.columns)} for a matrix of "
                f"{self.rows}x{self.columns}, got {self.rank}"
            )
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"`noise` must be finite and not negative, got {self.noise}")
        if not 0 < self.init_scale < math.inf:
            raise ValueError(f"`init_scale` must be finite and positive, got {self.init_scale}")
        if any(stop <= start for start, stop in self._splits()):
            raise ValueError(
                "`observed` must leave an entry to each of train, valid and test, got "
                f"{self.observed} of {self.rows * self.columns} entries"
            )

    def _splits(self) -> tuple[tuple[int, int], ...]:
        count = self.rows * self.columns
        train = int(self.observed * count)
        valid = train + (count - train) // 2
        return (0, train), (train, valid), (valid, count)

    def __call__(self, key: Key) -> MatrixFactorizationTask:
        key_factors, key_noise, key_order = jax.random.split(key, 3)
        factors = jax.random.normal(key_factors, (self.rows + self.columns, self.rank))
        factors /= self.rank**0.25
        left, right = factors[: self.rows], factors[self.rows :]
        entries = (left @ right.T).reshape(-1)
        entries += self.noise * jax.random.normal(key_noise, entries.shape)
        numbers = jnp.arange(len(entries), dtype=jnp.uint32)
        words: Any = jax.random.key_data(key_order).reshape(-1)
        order = jnp.argsort(hash_words(list(words), numbers)).astype(jnp.int32)
        return MatrixFactorizationTask(
            {"left": left, "right": right},
            entries,
            order,
            self._splits(),
            self.batch_size,
            self.init_scale,
        )


EXAMPLES = (MatrixFactorization(rows=8, columns=6, rank=2, batch_size=16),)
