"""Logistic, softmax and linear regression on tables, and small multilayer perceptrons."""

import dataclasses

import jax

from tasks.base import Key
from tasks.data import Dataset, load_field
from tasks.dynamic import Dynamic
from tasks.fields import positive_integers
from tasks.image_mlp import Layers
from tasks.losses import outputs, predict
from tasks.network import NetworkTask, OneDraw, drawn_task


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TabularMLP:
    """MLPs with `hidden` units per layer on the rows of a table; without any, regression. With the
    default `dynamic` every episode draws relu or tanh.

    `data` may be a name for `tasks.data.load`; its targets are classes (cross-entropy) or real
    numbers (squared error).
    """

    data: Dataset | str = "breast_cancer"
    hidden: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(
        default=Dynamic(activation=("relu", "tanh"), init_scale=(0.5, 2.0)),
        metadata={"static": True},
    )

    def __post_init__(self) -> None:
        load_field(self)
        positive_integers(self, "hidden")
        # jax rebuilds pytrees with placeholders for arrays
        shape = getattr(getattr(self.data, "inputs", None), "shape", (0, 0))
        if len(shape) != 2:
            raise ValueError(
                f"`data` must be a table, got rows of shape {tuple(shape[1:])} in {self.data!r}: "
                "images are for image_mlp"
            )

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        return drawn_task(
            self, OneDraw(Layers((*self.hidden, outputs(self.data)))), predict(self.data), key
        )


EXAMPLES = (TabularMLP(data="synthetic_table", hidden=(4,), batch_size=16),)
