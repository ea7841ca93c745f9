"""Recurrent language models of characters in haiku: LSTMs (Hochreiter and Schmidhuber, 1997) and
GRUs (arXiv:1406.1078).
"""

import dataclasses
import functools

import haiku as hk
import jax

from tasks.adapters import Haiku
from tasks.base import Key
from tasks.data import unknown_name
from tasks.dynamic import Dynamic
from tasks.fields import positive_integers
from tasks.losses import predict
from tasks.network import NetworkTask, OneDraw, drawn_task
from tasks.text import Text, load_text_field

CELLS = {"lstm": hk.LSTM, "gru": hk.GRU}


# Cached because haiku's functions compare by identity, and equal families should share one compiled
# program.
@functools.lru_cache(maxsize=128)
def _network(cell: str, symbols: int, embed: int, hidden: int) -> OneDraw:
    def apply(tokens: jax.Array) -> jax.Array:
        # not looked up: the derivative of an index is a scatter, slow when vmapped
        x = hk.Linear(embed, with_bias=False, name="embed")(jax.nn.one_hot(tokens, symbols))
        core = CELLS[cell](hidden)
        # not unrolled: that costs up to three times the compilation, and gains no time
        states, _ = hk.dynamic_unroll(core, x, core.initial_state(len(tokens)), time_major=False)
        return hk.Linear(symbols, name="readout")(states)

    return OneDraw(Haiku(hk.without_apply_rng(hk.transform(apply))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RnnLM:
    """The next character at every position of a window of `length`, by a recurrent network of one
    layer that starts from the zero state.

    Args:
      data: a text, or a name for `tasks.text.load_text`.
      cell: lstm or gru, with `hidden` units, on characters embedded in `embed` dimensions.
      dynamic: all but the activation and the labels: the cell has its own.
    """

    data: Text | str = "python_docs/meta_train"
    cell: str = dataclasses.field(default="lstm", metadata={"static": True})
    embed: int = dataclasses.field(default=16, metadata={"static": True})
    hidden: int = dataclasses.field(default=32, metadata={"static": True})
    length: int = dataclasses.field(default=16, metadata={"static": True})
    batch_size: int = dataclasses.field(default=16, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})

    def __post_init__(self) -> None:
        load_text_field(self)
        positive_integers(self, "embed", "hidden")
        if self.cell not in CELLS:
            raise ValueError(unknown_name("cell", self.cell, CELLS))
        if self.dynamic.activation:
            raise ValueError(
                f"`dynamic`: the activations of an {self.cell} are its own, got "
                f"{self.dynamic.activation}; leave `activation` out"
            )

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Text)
        return drawn_task(
            self,
            _network(self.cell, self.data.classes, self.embed, self.hidden),
            predict(self.data),
            key,
        )


EXAMPLES = (RnnLM(data="markov", embed=4, hidden=8, length=12, batch_size=8),)
