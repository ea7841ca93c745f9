"""Plain multilayer perceptrons on a dataset, over initial scales: the task of arXiv:2203.11860."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

from tasks.base import Key, Params, Split, relative_loss
from tasks.data import Batch, Dataset, load, synthetic
from tasks.losses import cross_entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLPTask:
    """relu network; weights [inputs, outputs] start as init_scale * normal / sqrt(inputs), biases
    at 0.
    """

    data: Dataset
    init_scale: jax.Array  # scalar
    hidden: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    batch_size: int = dataclasses.field(metadata={"static": True})

    def init(self, key: Key) -> Params:
        sizes = (math.prod(self.data.inputs.shape[1:]), *self.hidden, self.data.classes)
        shapes = list(itertools.pairwise(sizes))
        ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
        # one draw: the generator is most of what there is to compile
        draws = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
        return {
            f"linear_{i}": {
                "w": self.init_scale / math.sqrt(shape[0]) * draw.reshape(shape),
                "b": jnp.zeros(shape[1]),
            }
            for i, (shape, draw) in enumerate(zip(shapes, draws, strict=True))
        }

    def batch(self, key: Key, split: Split) -> Batch:
        return self.data.batch(key, split, self.batch_size)

    def loss(self, params: Params, batch: Batch) -> jax.Array:
        x = batch.inputs.reshape(len(batch.inputs), -1)
        for i in range(len(params)):
            x = jax.nn.relu(x) if i else x
            x = x @ params[f"linear_{i}"]["w"] + params[f"linear_{i}"]["b"][None]
        return jnp.mean(cross_entropy(x, batch.targets))

    def normalize(self, loss: jax.Array) -> jax.Array:
        return relative_loss(loss, math.log(self.data.classes))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageMLP:
    """MLPs with `hidden` units per layer; the multiplier of the initial weights is log-uniform in
    `init_scale`.

    `data` may be a name for `tasks.data.load`, and tabular.
    """

    data: Dataset | str = "digits/meta_train"
    hidden: tuple[int, ...] = dataclasses.field(default=(32,), metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    init_scale: tuple[float, float] = dataclasses.field(
        default=(0.5, 2.0), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        # jax rebuilds pytrees with placeholders for `data`, so only a name is looked at.
        if isinstance(self.data, str):
            object.__setattr__(self, "data", load(self.data))
        if self.batch_size < 1 or any(units < 1 for units in self.hidden):
            raise ValueError(
                "`batch_size` and `hidden` must be positive, "
                f"got {self.batch_size} and {self.hidden}"
            )
        if not 0 < self.init_scale[0] <= self.init_scale[1]:
            raise ValueError(
                f"`init_scale` must be (low, high), 0 < low <= high, got {self.init_scale}"
            )

    def __call__(self, key: Key) -> MLPTask:
        low, high = map(math.log, self.init_scale)
        init_scale = jnp.exp(jax.random.uniform(key, minval=low, maxval=high))
        assert isinstance(self.data, Dataset)
        return MLPTask(self.data, init_scale, self.hidden, self.batch_size)


EXAMPLES = (ImageMLP(data=synthetic(), hidden=(8,), batch_size=16),)
