"""The task that most families share: a network, rows to show it, and what is asked of it."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Key, Params, Split, relative_loss
from tasks.data import Batch, hash_words
from tasks.dynamic import Drawn, Dynamic


class Rows(Protocol):
    """What a network is shown, a pytree: `tasks.data.Dataset` or `tasks.text.Text`."""

    @property
    def classes(self) -> int: ...

    def rows(self, key: Key, split: Split, size: int, subset: float | jax.Array = 1.0) -> jax.Array:
        """int32 [size] numbers of rows of `split` (of the first `subset` of it)."""
        ...

    def take(self, rows: jax.Array) -> Batch: ...

    def example(self) -> jax.Array:
        """Zeros like the inputs of a batch of one row."""
        ...


class Network(Protocol):
    """A model without state, as two functions. It is a static field, so it is hashable and compares
    by value.
    """

    def init(self, key: Key, inputs: Any) -> Params: ...

    def apply(self, params: Params, inputs: Any, *activation: Any) -> Any:
        """`activation`: none, or a function that replaces the network's own."""
        ...


def as_it_is(key: Key, batch: Batch) -> Batch:
    del key
    return batch


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is asked of a network's outputs.

    Attributes:
      loss: (outputs, batch) -> a scalar, or one number per example, which are averaged.
      untrained: the loss that `normalize` maps to 1: what the best constant prediction costs on
        the training split, from its statistics.
      prepare: (key, batch) -> batch, with whatever else is random in the loss.
    """

    loss: Callable[[Any, Batch], jax.Array]
    untrained: float
    prepare: Callable[[Key, Batch], Batch] = as_it_is


READOUTS = ("readout", "head")


@dataclasses.dataclass(frozen=True)
class OneDraw:
    """`network` with all its initial params from one draw: generators are most of what there is to
    compile in an initialiser.

    Weights with two or more axes, the last of which is that of the outputs, are normal of variance
    gain / inputs, embeddings (by their name) 1 / outputs; the others are 1 where they are called
    scale and 0 elsewhere. Under mu-parametrization, with `growth` the width over the base width,
    embeddings have the variance that they have at the base width, and a readout (by its name)
    starts at 0 (arXiv:2406.00153).
    """

    network: Network
    growth: float | None = None
    gain: float = 1.0

    def init(self, key: Key, inputs: Any) -> Params:
        shapes = jax.eval_shape(self.network.init, key, inputs)
        paths, tree = jax.tree.flatten_with_path(shapes)
        sizes = [math.prod(leaf.shape) if leaf.ndim > 1 else 0 for _, leaf in paths]
        ends = list(itertools.accumulate(sizes))
        draws = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
        return jax.tree.unflatten(
            tree,
            [
                self._initial(jax.tree_util.keystr(path), leaf.shape, draw)
                for (path, leaf), draw in zip(paths, draws, strict=True)
            ],
        )

    def _initial(self, path: str, shape: tuple[int, ...], draw: jax.Array) -> jax.Array:
        if len(shape) < 2:
            return jnp.ones(shape) if "scale" in path else jnp.zeros(shape)
        if self.growth is not None and any(name in path for name in READOUTS):
            return jnp.zeros(shape)
        if "embed" in path:
            return draw.reshape(shape) * math.sqrt((self.growth or 1.0) / shape[-1])
        return draw.reshape(shape) * math.sqrt(self.gain / math.prod(shape[:-1]))

    def apply(self, params: Params, inputs: Any, *activation: Any) -> Any:
        return self.network.apply(params, inputs, *activation)

    def activations(self, params: Params, inputs: Any, *activation: Any) -> dict[str, jax.Array]:
        """Raises ValueError if the network does not tell them: those of flax nnx do."""
        if not hasattr(self.network, "activations"):
            raise ValueError(f"{self.network} does not tell its activations: take one of flax nnx")
        return self.network.activations(params, inputs, *activation)  # pyright: ignore[reportAttributeAccessIssue]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NetworkTask:
    """One network on one dataset under drawn conditions. It is also the family whose only member it
    is: `task(key)` is `task`.
    """

    data: Rows
    network: Network = dataclasses.field(metadata={"static": True})
    objective: Objective = dataclasses.field(metadata={"static": True})
    batch_size: int = dataclasses.field(metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})
    drawn: Drawn = dataclasses.field(default_factory=lambda: Dynamic().draw(jax.random.key(0)))

    def __call__(self, key: Key) -> "NetworkTask":
        return self

    def init(self, key: Key) -> Params:
        params = self.network.init(key, self._inputs())
        if self.dynamic.init_scale == (1.0, 1.0):
            return params
        return jax.tree.map(lambda p: self.drawn.init_scale * p if p.ndim > 1 else p, params)

    def _inputs(self) -> Any:
        row = self.data.example()
        return self.objective.prepare(jax.random.key(0), Batch(row, row)).inputs

    def batch(self, key: Key, split: Split) -> Batch:
        part = split == "train" and self.dynamic.subset != (1.0, 1.0)
        subset = jnp.asarray(self.drawn.subset) if part else 1.0
        rows = self.data.rows(key, split, self.batch_size, subset)
        if split == "train" and self.dynamic.batch_fraction != (1.0, 1.0):
            distinct = jnp.ceil(self.drawn.batch_fraction * self.batch_size).astype(jnp.int32)
            rows = rows[jnp.arange(self.batch_size) % distinct]
        batch = self.data.take(rows)
        if split == "train" and self.dynamic.label_noise != (0.0, 0.0):
            batch = batch._replace(targets=self._noisy(rows, batch.targets))
        return self.objective.prepare(key, batch)

    def _noisy(self, rows: jax.Array, targets: jax.Array) -> jax.Array:
        """A row's label is wrong for the whole episode, hence a hash of the row and not of the
        batch's key.
        """
        if targets.ndim != 1 or not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(
                f"`label_noise` is for one class per row, got targets {targets.dtype}"
                f"{list(targets.shape)} of {self.data!r}: leave it at (0, 0)"
            )
        seed = jnp.asarray(self.drawn.seed, jnp.uint32)
        chance, label = (hash_words([seed, np.uint32(i)], rows.astype(jnp.uint32)) for i in (0, 1))
        wrong = chance < self.drawn.label_noise * 2.0**32
        return jnp.where(
            wrong, (label % np.uint32(self.data.classes)).astype(targets.dtype), targets
        )

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        activation = self.dynamic.activations(self.drawn)
        outputs = self.network.apply(params, batch.inputs, *activation)
        loss = jnp.mean(self.objective.loss(outputs, batch))
        if self.dynamic.l2 != (0.0, 0.0):
            squares = [jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params)]
            loss += 0.5 * self.drawn.l2 * sum(squares, start=jnp.zeros(()))
        return loss

    def activations(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """The output of every layer by its name; of networks of flax nnx only."""
        activation = self.dynamic.activations(self.drawn)
        return self.network.activations(params, batch.inputs, *activation)  # pyright: ignore[reportAttributeAccessIssue]

    def normalize(self, loss: jax.Array) -> jax.Array:
        return relative_loss(loss, self.objective.untrained)


def drawn_task(family: Any, network: Network, objective: Objective, key: Key) -> NetworkTask:
    """A task of a family with the fields `data`, `batch_size` and `dynamic`, under conditions drawn
    from the task's key.
    """
    dynamic = family.dynamic
    return NetworkTask(
        family.data, network, objective, family.batch_size, dynamic, dynamic.draw(key)
    )
