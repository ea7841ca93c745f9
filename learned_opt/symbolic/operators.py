"""The 44 operators that programs are made of, each written once for numpy and jax.numpy (the
language of arXiv 2302.06675, with its protected division and logarithms).

Values have one of three kinds: a scalar, a scalar for every tensor, or the weights (one array per
tensor). What works number by number takes the widest kind of its arguments; reductions are told
apart, as what they mean depends on how a backend holds the three kinds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

EPSILON = 1e-8
Form = Literal["constant", "elementwise", "norm", "global_norm", "dot", "cosine_sim", "clip"]


@dataclass(frozen=True)
class Operator:
    """One function of the language.

    Attributes:
      form: "constant" and "elementwise" have a `function`; the others are reductions of their
        arguments, which every backend has for itself.
      function: (numpy or jax.numpy, *arguments) -> result, number by number.
      scalars: arguments that must be scalars, by position.
      flops: of an element; a transcendental function counts ten.
    """

    name: str
    arity: int
    form: Form
    function: Callable[..., Any] | None = None
    symbol: str | None = None  # how it is written between two arguments
    commutative: bool = False
    scalars: tuple[int, ...] = ()
    flops: int = 1


def _unary(name: str, function: Callable[[Any, Any], Any], flops: int = 10) -> Operator:
    return Operator(name, 1, "elementwise", function, flops=flops)


def _of_numpy(*names: str, flops: int = 10) -> list[Operator]:
    """Those that numpy has by the same name."""
    return [_unary(name, lambda xp, x, name=name: getattr(xp, name)(x), flops) for name in names]


def _constant(name: str, value: float) -> Operator:
    return Operator(name, 0, "constant", lambda xp: value, flops=0)


def _binary(name: str, function: Callable[..., Any], symbol: str | None = None, **fields: Any):
    return Operator(name, 2, "elementwise", function, symbol, **fields)


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        _constant("get_pi", math.pi),
        _constant("get_e", math.e),
        _constant("get_eps", EPSILON),
        *_of_numpy("cos", "sin", "tan", "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"),
        *_of_numpy("arcsinh", "arccosh", "arctanh", "exp", "exp2", "expm1", "cbrt"),
        *_of_numpy("abs", "square", "sign", "negative", flops=1),
        _unary("exp10", lambda xp, x: xp.power(10.0, x)),
        _unary("log", lambda xp, x: xp.log(xp.abs(x))),
        _unary("log10", lambda xp, x: xp.log10(xp.abs(x))),
        _unary("log2", lambda xp, x: xp.log2(xp.abs(x))),
        # log |1 + x|, precise at small x
        _unary("log1p", lambda xp, x: xp.log1p(xp.maximum(x, -2.0 - x))),
        _unary("sqrt", lambda xp, x: xp.sqrt(xp.abs(x))),
        _unary("cube", lambda xp, x: x * x * x, flops=2),
        _unary("reciprocal", lambda xp, x: xp.divide(1.0, x)),
        _binary("add", lambda xp, x, y: x + y, "+", commutative=True),
        _binary("subtract", lambda xp, x, y: x - y, "-"),
        _binary("multiply", lambda xp, x, y: x * y, "*", commutative=True),
        _binary("divide", lambda xp, x, y: xp.divide(x, y + EPSILON), "/", flops=5),
        _binary("maximum", lambda xp, x, y: xp.maximum(x, y), commutative=True),
        _binary("minimum", lambda xp, x, y: xp.minimum(x, y), commutative=True),
        _binary("power", lambda xp, x, y: xp.power(x, y), flops=10),
        Operator(
            "interpolate", 3, "elementwise", lambda xp, x, y, a: (1.0 - a) * x + a * y,
            scalars=(2,), flops=4,
        ),
        Operator("norm", 1, "norm", flops=2),
        Operator("global_norm", 1, "global_norm", flops=2),
        Operator("dot", 2, "dot", commutative=True, flops=2),
        Operator("cosine_sim", 2, "cosine_sim", commutative=True, flops=6),
        Operator("clip_by_global_norm", 2, "clip", scalars=(1,), flops=3),
    )
}  # fmt: skip
SYMBOLS = {operator.symbol: name for name, operator in OPERATORS.items() if operator.symbol}
