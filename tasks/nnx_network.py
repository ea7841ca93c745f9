"""A flax nnx class and its arguments as a network. It compares by value, unlike a lambda, so that
equal families share one compiled program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from tasks.adapters import Nnx
from tasks.network import OneDraw


@dataclasses.dataclass(frozen=True)
class Build:
    module: Callable[..., Any]
    arguments: tuple[Any, ...]

    def __call__(self, rngs: Any) -> Any:
        return self.module(*self.arguments, rngs=rngs)


def nnx_network(module: Callable[..., Any], *arguments: Any) -> OneDraw:
    """`module(*arguments, rngs=rngs)`, its params from one draw; `arguments` are hashable."""
    return OneDraw(Nnx(Build(module, arguments)))
