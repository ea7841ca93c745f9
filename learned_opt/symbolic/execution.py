"""Running a program, statement by statement: on trees of jax arrays, as an optimizer does, or on
flat numpy arrays of many probes at once, for hashes and references.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from learned_opt.symbolic.analysis import INPUT_KINDS, Kind, kinds
from learned_opt.symbolic.operators import OPERATORS
from learned_opt.symbolic.program import OUTPUTS, Program, constants

Typed = tuple[Kind, Any]


class Backend(Protocol):
    """How values of the three kinds are held. A scalar may also be a number."""

    xp: Any

    def map(self, kind: Kind, function: Callable[..., Any], arguments: Sequence[Typed]) -> Any:
        """`function`, number by number, of arguments that broadcast to `kind`."""
        ...

    def sums(self, value: Any) -> Any:
        """Of weights the sum over every tensor."""
        ...

    def total(self, kind: Kind, value: Any) -> Any:
        """The sum of all numbers, each once however far it would broadcast."""
        ...


def run(
    program: Program,
    backend: Backend,
    inputs: Mapping[str, Any],
    numbers: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """The outputs of one step.

    Args:
      numbers: in the order of the text, to be used instead of the constants in it.

    Raises:
      ProgramError: the program is ill-typed.
    """
    current: dict[str, Typed] = {name: (INPUT_KINDS[name], x) for name, x in inputs.items()}
    left = iter(numbers if numbers is not None else places(program))
    for statement, kind in zip(program.statements, kinds(program), strict=True):
        arguments = [
            current[a] if isinstance(a, str) else (Kind.SCALAR, next(left))
            for a in statement.arguments
        ]
        current[statement.target] = kind, _apply(backend, statement.operator, kind, arguments)
    return {name: current[name][1] for name in OUTPUTS}


def places(program: Program) -> list[float]:
    """The constants of a program, one for each place where one stands."""
    return [value for _, _, value in constants(program)]


def _apply(backend: Backend, name: str, kind: Kind, arguments: list[Typed]) -> Any:
    operator, xp = OPERATORS[name], backend.xp
    if operator.function is not None:
        function = operator.function
        return backend.map(kind, lambda *values: function(xp, *values), arguments)
    (of, x), *others = arguments
    if operator.form == "norm":
        if of != Kind.WEIGHTS:
            return backend.map(kind, xp.abs, arguments)
        squares = backend.map(of, xp.square, [(of, x)])
        return backend.map(kind, xp.sqrt, [(kind, backend.sums(squares))])
    product = lambda *pair: backend.total(of, backend.map(of, xp.multiply, pair))  # noqa: E731
    length = xp.sqrt(product((of, x), (of, x)))
    if operator.form == "global_norm":
        return length
    (other,) = others
    if operator.form == "clip":
        factor = xp.minimum(1.0, other[1] / length)
        return backend.map(kind, xp.multiply, [(of, x), (Kind.SCALAR, factor)])
    dot = product((of, x), other)
    return dot if operator.form == "dot" else dot / (length * xp.sqrt(product(other, other)))


class Tree:
    """Weights and per-tensor scalars as lists of jax arrays, one for every tensor."""

    xp = jnp

    def map(self, kind, function, arguments):
        if kind == Kind.SCALAR:
            return function(*(value for _, value in arguments))
        tensors = next(len(value) for of, value in arguments if of != Kind.SCALAR)
        return [
            function(*(value if of == Kind.SCALAR else value[i] for of, value in arguments))
            for i in range(tensors)
        ]

    def sums(self, value):
        return [jnp.sum(x) for x in value]

    def total(self, kind, value):
        if kind == Kind.SCALAR:
            return value
        return sum((jnp.sum(x) for x in value), start=jnp.float32(0.0))


@dataclass(frozen=True)
class Flat:
    """Float64 numpy: weights [probes, elements], per-tensor scalars [probes, tensors], scalars
    [probes, 1] or numbers.
    """

    sizes: tuple[int, ...]  # of the tensors, one after another

    xp = np

    def map(self, kind, function, arguments):
        return function(*(self._widened(kind, of, value) for of, value in arguments))

    def _widened(self, kind, of, value):
        if kind == Kind.WEIGHTS and of == Kind.PER_TENSOR:
            return np.repeat(value, self.sizes, axis=1)
        return value

    def sums(self, value):
        starts = np.cumsum((0, *self.sizes[:-1]))
        return np.add.reduceat(value, starts, axis=1)

    def total(self, kind, value):
        return value if kind == Kind.SCALAR else np.sum(value, axis=1, keepdims=True)
