"""Multilayer perceptrons on images or tables: the tasks of arXiv:2203.11860 and VeLO's first family
(arXiv:2211.09760).
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from tasks.base import Key, Params
from tasks.data import Dataset, load_field, synthetic
from tasks.dynamic import Dynamic
from tasks.losses import outputs, predict
from tasks.network import NetworkTask, OneDraw, drawn_task


@dataclasses.dataclass(frozen=True)
class Layers:
    """Weights [inputs, outputs] and biases; relu between layers. Inputs are flattened."""

    widths: tuple[int, ...]

    def init(self, key: Key, inputs: Any) -> Params:
        sizes = (math.prod(inputs.shape[1:]), *self.widths)
        return {
            f"linear_{i}": {"w": jnp.zeros(shape), "b": jnp.zeros(shape[1])}
            for i, shape in enumerate(itertools.pairwise(sizes))
        }

    def apply(self, params: Params, inputs: Any, *activation: Any) -> jax.Array:
        (activate,) = activation or (jax.nn.relu,)
        x = inputs.reshape(len(inputs), -1)
        for i in range(len(self.widths)):
            x = activate(x) if i else x
            x = x @ params[f"linear_{i}"]["w"] + params[f"linear_{i}"]["b"][None]
        return x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageMLP:
    """MLPs with `hidden` units per layer; without any, softmax or linear regression.

    `data` may be a name for `tasks.data.load`, and tabular; its targets classes or real numbers.
    """

    data: Dataset | str = "digits/meta_train"
    hidden: tuple[int, ...] = dataclasses.field(default=(32,), metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(
        default=Dynamic(init_scale=(0.5, 2.0)), metadata={"static": True}
    )

    def __post_init__(self) -> None:
        load_field(self)
        if any(units < 1 for units in self.hidden):
            raise ValueError(f"`hidden` must be positive, got {self.hidden}")

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        network = OneDraw(Layers((*self.hidden, outputs(self.data))))
        return drawn_task(self, network, predict(self.data), key)


EXAMPLES = (ImageMLP(data=synthetic(), hidden=(8,), batch_size=16),)
