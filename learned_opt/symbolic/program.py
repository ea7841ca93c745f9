"""Update rules as programs: straight-line assignments, one function call each, that are real Python
(the language of arXiv 2302.06675).

    def train(w, g, m, v, lr):
        m = interpolate(g, m, 0.9)
        update = sign(m)
        update = update * lr
        return update, m, v

`w` are the weights, `g` the gradient, `m` and `v` two states that start at zero, `lr` the value of
a schedule with peak 1; then w - update are the new weights.
"""

import ast
import math
from dataclasses import dataclass
from typing import Any

from learned_opt.symbolic.operators import OPERATORS, SYMBOLS

INPUTS = ("w", "g", "m", "v", "lr")
OUTPUTS = ("update", "m", "v")
SYNTAX = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
Argument = str | float  # a variable's name, or a constant


class ProgramError(ValueError):
    """What is wrong with a program, and in which line."""


@dataclass(frozen=True)
class Statement:
    """target = operator(*arguments)."""

    target: str
    operator: str
    arguments: tuple[Argument, ...]

    def __post_init__(self) -> None:
        numbers = [a if isinstance(a, str) else _number(a) for a in self.arguments]
        object.__setattr__(self, "arguments", tuple(numbers))

    def __str__(self) -> str:
        arguments = [a if isinstance(a, str) else repr(a) for a in self.arguments]
        symbol = OPERATORS[self.operator].symbol
        if symbol:
            return f"{self.target} = {arguments[0]} {symbol} {arguments[1]}"
        return f"{self.target} = {self.operator}({', '.join(arguments)})"


@dataclass(frozen=True)
class Program:
    """`str(program)` is its Python; `parse` reads it back."""

    statements: tuple[Statement, ...]

    def __str__(self) -> str:
        body = "".join(f"    {statement}\n" for statement in self.statements)
        return f"def train({', '.join(INPUTS)}):\n{body}    return {', '.join(OUTPUTS)}\n"


def constants(program: Program) -> list[tuple[int, int, float]]:
    """Every constant, in the order of the text: its statement, its position there, its value."""
    return [
        (index, position, argument)
        for index, statement in enumerate(program.statements)
        for position, argument in enumerate(statement.arguments)
        if isinstance(argument, float)
    ]


def parse(text: str, source: str = "program") -> Program:
    """The program that `text` is; whether its statements suit one another, `analysis.check` tells.

    Args:
      source: what errors call it, such as the name of its file.

    Raises:
      ProgramError: it is no Python, or more than assignments of single calls; a function is
        unknown; a call has the wrong number of arguments. The message names the line.
    """
    return with_lines(text, source)[0]


def with_lines(text: str, source: str) -> tuple[Program, list[int]]:
    """`parse`, and the line of every statement."""
    try:
        return _read(ast.parse(text), source)
    except ProgramError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise ProgramError(f"{source}: no Python: {error}") from None
    except SyntaxError as error:
        where = f"{source}, line {error.lineno}" if error.lineno else source
        raise ProgramError(f"{where}: no Python: {error.msg}") from None


def _read(module: ast.Module, source: str) -> tuple[Program, list[int]]:
    def wrong(node: ast.AST | None, why: str) -> ProgramError:
        line = getattr(node, "lineno", None)
        return ProgramError(f"{source}{f', line {line}' if line else ''}: {why}")

    signature = f"def train({', '.join(INPUTS)}):"
    function, *others = [node for node in module.body if not _is_preamble(node)] or [None]
    if others or not isinstance(function, ast.FunctionDef):
        raise wrong(others[0] if others else function, f"must hold one {signature}")
    if ast.unparse(function).partition("\n")[0] != signature:
        raise wrong(function, f"must begin with {signature}")
    body = [node for node in function.body if not _is_preamble(node)]
    if not body or ast.unparse(body[-1]) != f"return ({', '.join(OUTPUTS)})":
        where = body[-1] if body else function
        raise wrong(where, f"must end with return {', '.join(OUTPUTS)}")
    statements = tuple(_statement(node, wrong) for node in body[:-1])
    return Program(statements), [node.lineno for node in body[:-1]]


def _is_preamble(node: ast.stmt) -> bool:
    """Docstrings and imports, which a file may have for its readers."""
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return docstring or isinstance(node, ast.Import | ast.ImportFrom)


def _statement(node: ast.stmt, wrong) -> Statement:
    if not (
        isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
    ):
        raise wrong(node, f"'{ast.unparse(node)}' is not of the form name = function(...)")
    target, value = node.targets[0].id, node.value
    if target in OPERATORS:
        raise wrong(node, f"{target} is the name of a function and cannot be assigned")
    if isinstance(value, ast.BinOp) and type(value.op) in SYNTAX:
        operator, arguments = SYMBOLS[SYNTAX[type(value.op)]], [value.left, value.right]
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and not value.keywords:
        operator, arguments = value.func.id, value.args
    else:
        raise wrong(node, f"'{ast.unparse(value)}' is neither a single call nor x + y, - * or /")
    if operator not in OPERATORS:
        raise wrong(node, f"unknown function {operator}; there are {', '.join(OPERATORS)}")
    arity = OPERATORS[operator].arity
    if len(arguments) != arity:
        raise wrong(node, f"{operator} takes {arity} arguments, got {len(arguments)}")
    return Statement(target, operator, tuple(_argument(a, wrong) for a in arguments))


def _argument(node: ast.expr, wrong) -> Argument:
    if isinstance(node, ast.Name):
        return node.id
    try:
        return _number(ast.literal_eval(node))
    except (ValueError, TypeError, RecursionError, MemoryError):
        why = f"'{ast.unparse(node)}' is neither a variable nor a finite number"
        raise wrong(node, why) from None


def _number(value: Any) -> float:
    """As programs hold them: there is no -0.0, as it equals 0.0.

    Raises:
      ValueError: it is no finite number.
    """
    try:
        number = math.nan if isinstance(value, bool | str) else float(value) + 0.0
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"constants must be finite numbers, got {value!r}")
    return number
