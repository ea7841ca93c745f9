"""Changes of one statement of a program, as arXiv 2302.06675 makes them, but proposed by kind: a
draw is nearly always a valid program.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from learned_opt.symbolic.analysis import Kind, KindError, check, variables
from learned_opt.symbolic.operators import OPERATORS
from learned_opt.symbolic.program import (
    Argument,
    Program,
    ProgramError,
    Statement,
    constants,
)

NAMES = tuple(OPERATORS)
ATTEMPTS = 200
LARGEST = 1e10  # of constants
Scope = dict[str, Kind]  # the variables that a statement may read


class Mutation(NamedTuple):
    """What was done: with the parent it gives the child.

    `statement` is that which stands at `index` afterwards; None if one was deleted.
    """

    change: Literal["insert", "delete", "modify"]
    index: int
    statement: Statement | None


def apply(program: Program, mutation: Mutation) -> Program:
    new = () if mutation.statement is None else (mutation.statement,)
    before, index = program.statements, mutation.index
    return Program((*before[:index], *new, *before[index + (mutation.change != "insert") :]))


def scope(program: Program, index: int) -> Scope:
    """What statement `index` may read.

    Raises:
      KindError: a statement before it is ill-typed.
    """
    return variables(Program(program.statements[:index]))


def admissible(operator: str, position: int, known: Scope) -> list[str]:
    """Variables of the kind that the argument at `position` may be."""
    scalar = position in OPERATORS[operator].scalars
    return [name for name, kind in known.items() if not scalar or kind == Kind.SCALAR]


def targets(known: Scope) -> list[str]:
    """What a statement may assign: what there is, or one new name."""
    fresh = next(name for i in range(len(known) + 1) if (name := f"x{i}") not in known)
    return [*known, *(["update"] if "update" not in known else []), fresh]


@dataclasses.dataclass(frozen=True)
class Mutator:
    """Draws changes.

    Args:
      most_statements: with so many, none is inserted.
      constants: share of the changes that move a constant and nothing else.
      only_constants: no other change.
      p_constant: that a drawn argument is a new constant.
    """

    most_statements: int = 30
    constants: float = 0.3
    only_constants: bool = False
    p_constant: float = 0.25

    def __call__(self, program: Program, random: np.random.Generator) -> tuple[Mutation, int]:
        """A change that leaves the program valid, and how many were drawn that did not.

        Raises:
          ProgramError: none was found, as of a program without constants when only these may
            change.
        """
        for failed in range(ATTEMPTS):
            try:
                mutation = self.propose(program, random)
                if mutation is not None:
                    check(apply(program, mutation))
                    return mutation, failed
            except KindError:
                continue
        raise ProgramError(f"no valid change was found in {ATTEMPTS} draws")

    def propose(self, program: Program, random: np.random.Generator) -> Mutation | None:
        """A change that may be invalid, None if there was none of the kind that was drawn."""
        if self.only_constants or random.random() < self.constants:
            return _rescaled(program, random)
        change = random.choice(("insert", "delete", "modify"))
        length = len(program.statements)
        impossible = length >= self.most_statements if change == "insert" else not length
        if impossible:
            return None
        if change == "insert":
            index = int(random.integers(length + 1))
            return Mutation("insert", index, self.statement(scope(program, index), random))
        index = int(random.integers(length))
        if change == "delete":
            return Mutation("delete", index, None)
        return self._modified(program, index, random)

    def _modified(
        self, program: Program, index: int, random: np.random.Generator
    ) -> Mutation | None:
        statement = program.statements[index]
        if not statement.arguments:
            return None
        position = int(random.integers(len(statement.arguments)))
        argument = self._argument(statement.operator, position, scope(program, index), random)
        return Mutation("modify", index, replaced(statement, position, argument))

    def statement(self, known: Scope, random: np.random.Generator) -> Statement:
        """Any, of variables that may be read."""
        operator = NAMES[random.integers(len(NAMES))]
        arguments = tuple(
            self._argument(operator, position, known, random)
            for position in range(OPERATORS[operator].arity)
        )
        return Statement(_one_of(targets(known), random), operator, arguments)

    def _argument(
        self, operator: str, position: int, known: Scope, random: np.random.Generator
    ) -> Argument:
        choices = admissible(operator, position, known)
        if not choices or random.random() < self.p_constant:
            return float(random.normal())
        return _one_of(choices, random)


def _rescaled(program: Program, random: np.random.Generator) -> Mutation | None:
    """A constant times 2 ** N(0, 1); half of the time, if it lies in (0, 1), it is its distance
    from 1 that is multiplied: decays.
    """
    found = constants(program)
    if not found:
        return None
    index, position, value = found[random.integers(len(found))]
    factor = float(2.0 ** random.normal())
    if 0.0 < value < 1.0 and random.random() < 0.5:
        moved = 1.0 - (1.0 - value) * factor
    else:
        moved = float(np.clip(value * factor, -LARGEST, LARGEST))
    return Mutation("modify", index, replaced(program.statements[index], position, moved))


def replaced(statement: Statement, position: int, argument: Argument) -> Statement:
    arguments = list(statement.arguments)
    arguments[position] = argument
    return dataclasses.replace(statement, arguments=tuple(arguments))


def _one_of(choices: list[str], random: np.random.Generator) -> str:
    return choices[random.integers(len(choices))]


def random_program(mutator: Mutator, random: np.random.Generator) -> tuple[Program, int]:
    """A valid program of up to `most_statements` random statements, and how many were drawn that
    are not.

    Raises:
      ProgramError: none was found.
    """
    for failed in range(ATTEMPTS):
        statements: list[Statement] = []
        most = mutator.most_statements
        length = int(random.integers(min(3, most), most + 1))
        try:
            for index in range(length):
                known = scope(Program(tuple(statements)), index)
                statements.append(mutator.statement(known, random))
            check(Program(tuple(statements)))
        except KindError:
            continue
        return Program(tuple(statements)), failed
    raise ProgramError(f"no valid program was found in {ATTEMPTS} draws")
