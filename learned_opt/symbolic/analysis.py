"""What can be told of a program without running it: kinds of its values, which statements matter,
and a hash that is the same for programs that compute the same by other names or in another order.
"""

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from learned_opt.symbolic.operators import OPERATORS
from learned_opt.symbolic.program import (
    INPUTS,
    OUTPUTS,
    Argument,
    Program,
    ProgramError,
    Statement,
    with_lines,
)


class Kind(IntEnum):
    """From narrow to wide: a narrow value broadcasts to a wider one."""

    SCALAR = 0
    PER_TENSOR = 1
    WEIGHTS = 2


INPUT_KINDS = {name: Kind.WEIGHTS for name in INPUTS} | {"lr": Kind.SCALAR}


class KindError(ProgramError):
    """A statement whose arguments do not suit its operator."""

    def __init__(self, why: str, index: int | None = None):
        super().__init__(why)
        self.why, self.index = why, index


def kind_of(operator: str, arguments: tuple[Kind, ...]) -> Kind:
    """The kind of a result by those of the arguments.

    Raises:
      KindError: an argument that must be a scalar is none, or the two of a product differ.
    """
    op = OPERATORS[operator]
    for position in op.scalars:
        if arguments[position] != Kind.SCALAR:
            raise KindError(f"argument {position + 1} of {operator} must be a scalar")
    if op.form == "constant":
        return Kind.SCALAR
    if op.form == "norm":
        return min(arguments[0], Kind.PER_TENSOR)
    if op.form in ("dot", "cosine_sim") and arguments[0] != arguments[1]:
        raise KindError(f"the arguments of {operator} must be of one kind")
    if op.form in ("global_norm", "dot", "cosine_sim"):
        return Kind.SCALAR
    return max(arguments)


def kinds(program: Program) -> list[Kind]:
    """Of the result of every statement.

    Raises:
      KindError: a statement is ill-typed or reads what is not assigned; the message says which.
    """
    return _kinds(program)[0]


def variables(program: Program) -> dict[str, Kind]:
    """Of everything that is assigned at its end, inputs included. Raises as `kinds`."""
    return _kinds(program)[1]


def check(program: Program) -> None:
    """Refuses what is no optimizer.

    Raises:
      KindError: as `kinds`; or an output is not assigned, or not of the kind of the weights.
    """
    outputs = variables(program)
    for name in OUTPUTS:
        if name not in outputs:
            raise KindError(f"{name} is never assigned")
        if outputs[name] != Kind.WEIGHTS:
            raise KindError(f"{name} must end as an array like the weights, and is a number")


def read(text: str, source: str) -> Program:
    """A program from its text, checked.

    Args:
      source: what errors call it, such as the name of its file.

    Raises:
      ProgramError: it is malformed or ill-typed; the message names the line.
    """
    program, lines = with_lines(text, source)
    try:
        check(program)
    except KindError as error:
        where = source if error.index is None else f"{source}, line {lines[error.index]}"
        raise ProgramError(f"{where}: {error.why}") from None
    return program


def _kinds(program: Program) -> tuple[list[Kind], dict[str, Kind]]:
    current: dict[str, Kind] = dict(INPUT_KINDS)
    found = []
    for index, statement in enumerate(program.statements):
        try:
            of = tuple(_kind(current, argument) for argument in statement.arguments)
            kind = kind_of(statement.operator, of)
        except KindError as error:
            raise KindError(f"'{statement}': {error.why}", index) from None
        current[statement.target] = kind
        found.append(kind)
    return found, current


def _kind(current: dict[str, Kind], argument: Argument) -> Kind:
    if not isinstance(argument, str):
        return Kind.SCALAR
    if argument not in current:
        raise KindError(f"{argument} is read before it is assigned")
    return current[argument]


Source = int | str | float  # the statement that computes it, the input, or the constant


@dataclass(frozen=True)
class Dataflow:
    """A program without names: where every argument and every output comes from."""

    operators: tuple[str, ...]
    arguments: tuple[tuple[Source, ...], ...]
    outputs: tuple[Source, ...]  # of update, m, v


def dataflow(program: Program) -> Dataflow:
    current: dict[str, Source] = {name: name for name in INPUTS}
    arguments = []
    for index, statement in enumerate(program.statements):
        arguments.append(
            tuple(current[a] if isinstance(a, str) else a for a in statement.arguments)
        )
        current[statement.target] = index
    operators = tuple(statement.operator for statement in program.statements)
    return Dataflow(operators, tuple(arguments), tuple(current[name] for name in OUTPUTS))


def reached(flow: Dataflow, roots: Iterable[Source]) -> tuple[set[int], set[str]]:
    """Statements and inputs on which the roots depend."""
    statements: set[int] = set()
    inputs: set[str] = set()
    pending = list(roots)
    while pending:
        source = pending.pop()
        if isinstance(source, str):
            inputs.add(source)
        elif isinstance(source, int) and source not in statements:
            statements.add(source)
            pending += flow.arguments[source]
    return statements, inputs


def live(flow: Dataflow) -> tuple[set[int], set[str]]:
    """Statements that matter for the updates of a whole run, and the states that are needed.

    The update is a root; what becomes of a state is one only if that state is read by what matters:
    the least fixed point.
    """
    states: set[str] = set()
    while True:
        roots = [flow.outputs[0], *(flow.outputs[OUTPUTS.index(state)] for state in sorted(states))]
        statements, inputs = reached(flow, roots)
        needed = inputs & {"m", "v"}
        if needed == states:
            return statements, states
        states = needed


def simplified(program: Program) -> Program:
    """Without the statements that do not matter for the updates. A state that is not needed is no
    longer assigned: where its name was used for something else, that gets a name of its own.
    """
    kept, states = live(dataflow(program))
    statements = [s for i, s in enumerate(program.statements) if i in kept]
    taken = {*INPUTS, *OUTPUTS, *(s.target for s in statements)}
    new: dict[Argument, str] = {}
    for state in sorted({"m", "v"} - states):
        new[state] = next(name for i in itertools.count() if (name := f"x{i}") not in taken)
        taken.add(new[state])
    return Program(
        tuple(
            Statement(
                new.get(s.target, s.target), s.operator,
                tuple(new.get(a, a) if isinstance(a, str) else a for a in s.arguments),
            )
            for s in statements
        )
    )  # fmt: skip


def redundant(program: Program) -> tuple[int, int]:
    """Statements on which no output depends (as the paper counts), and those that do not matter for
    the updates of a whole run.
    """
    flow = dataflow(program)
    count = len(program.statements)
    return count - len(reached(flow, flow.outputs)[0]), count - len(live(flow)[0])


def structural_hash(program: Program) -> bytes:
    """Equal for programs of the same live dataflow: names, order and dead code do not matter, nor
    does the order of the arguments of a commutative operator.
    """
    flow = dataflow(program)
    kept, states = live(flow)
    hashes: dict[int, bytes] = {}

    def of(source: Source) -> bytes:
        return hashes[source] if type(source) is int else repr(source).encode()

    for index in sorted(kept):
        operator = flow.operators[index]
        parts = [of(source) for source in flow.arguments[index]]
        if OPERATORS[operator].commutative:
            parts.sort()
        hashes[index] = _digest([operator.encode(), *parts])
    outputs = [of(flow.outputs[0])]
    outputs += [state.encode() + of(flow.outputs[OUTPUTS.index(state)]) for state in sorted(states)]
    return _digest(outputs)


def _digest(parts: list[bytes]) -> bytes:
    sha = hashlib.blake2b(digest_size=16)
    for part in parts:
        sha.update(len(part).to_bytes(4, "little") + part)
    return sha.digest()


@dataclass(frozen=True)
class Cost:
    """Of one step of a program without what does not matter."""

    statements: int
    flops: int  # of an element
    states: int  # buffers that it needs besides the weights


def cost(program: Program) -> Cost:
    kept, states = live(dataflow(program))
    flops = sum(OPERATORS[program.statements[i].operator].flops for i in kept)
    return Cost(len(kept), flops, len(states))
