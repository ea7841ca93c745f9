"""Multilayer perceptrons in haiku, of any widths and activation, over images or tabular rows."""

import dataclasses
import functools

import haiku as hk
import jax

from tasks.adapters import from_haiku
from tasks.base import Key
from tasks.data import Dataset, load, synthetic, unknown_name
from tasks.losses import cross_entropy
from tasks.network import NetworkTask

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jax.nn.tanh, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


# Cached because haiku's functions compare by identity, and equal families should share one compiled
# program.
@functools.lru_cache(maxsize=128)
def _network(sizes: tuple[int, ...], activation: str) -> hk.Transformed:
    def apply(inputs: jax.Array) -> jax.Array:
        return hk.nets.MLP(sizes, activation=ACTIVATIONS[activation])(hk.Flatten()(inputs))

    return hk.transform(apply)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HaikuMLP:
    """MLPs with `hidden` units per layer and haiku's initialisation; `data` may be a name for
    `tasks.data.load`.
    """

    data: Dataset | str = "digits/held_out"
    hidden: tuple[int, ...] = dataclasses.field(default=(48, 24), metadata={"static": True})
    activation: str = dataclasses.field(default="tanh", metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})

    def __post_init__(self) -> None:
        if isinstance(self.data, str):  # otherwise a dataset, or one of jax's placeholders
            object.__setattr__(self, "data", load(self.data))
        if self.activation not in ACTIVATIONS:
            raise ValueError(unknown_name("activation", self.activation, ACTIVATIONS))

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        network = _network((*self.hidden, self.data.classes), self.activation)
        return from_haiku(network, cross_entropy, self.data, batch_size=self.batch_size)


EXAMPLES = (HaikuMLP(data=synthetic(), hidden=(6, 5), batch_size=16),)
