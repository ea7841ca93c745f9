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


def scalable(
    module: Callable[..., Any],
    *arguments: Any,
    width: int,
    base_width: int | None,
    gain: float = 1.0,
) -> OneDraw:
    """`nnx_network` of a module whose last argument is `growth`, `width` over `base_width`. Under
    standard parametrization, `base_width` None, that is 1.
    """
    growth = None if base_width is None else width / base_width
    return OneDraw(Nnx(Build(module, (*arguments, growth or 1.0))), growth, gain)
