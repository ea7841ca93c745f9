"""Making a found program short: one change after another, none of which costs anything."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from learned_opt.symbolic.analysis import KindError, check, cost, simplified
from learned_opt.symbolic.functional import functional_hash
from learned_opt.symbolic.program import OUTPUTS, Argument, Program, Statement, constants
from meta_train.search.mutation import Mutation, apply, replaced

Scores = Callable[[Sequence[Program]], list[float]]  # log losses, lower is better


def simplify(program: Program, scores: Scores, tolerance: float = 2e-3) -> Program:
    """The program without what does not matter, then with every change of `simpler` that is worth
    it, the best first, while the whole costs less than `tolerance` of log loss; then with round
    constants.
    """
    program = simplified(program)
    (allowed,) = scores([program])
    allowed += tolerance
    for changes in (simpler, rounder):
        while found := list(dict.fromkeys(changes(program))):
            values = scores(found)
            best = min(range(len(found)), key=lambda i: values[i])
            if not values[best] <= allowed:
                break
            program = simplified(found[best])
    return program


def simpler(program: Program) -> Iterator[Program]:
    """Valid programs, most with fewer statements that matter, each by one change: a statement is
    left out, with an argument of its own, zero or one in place of its result, or its result gives
    way to what the variable was before; an interpolation of an interpolation becomes one.
    """
    statements = cost(program).statements
    for exact, changes in ((False, _without(program)), (True, _merged(program))):
        for changed in changes:
            try:
                check(changed)
            except KindError:
                continue
            shorter = cost(changed).statements < statements + exact
            if shorter and functional_hash(changed) is not None:
                yield simplified(changed)


def rounder(program: Program) -> Iterator[Program]:
    """Each with one constant rounded to one or two digits (of its distance from 1, between 0.5 and
    1).
    """
    for index, position, value in constants(program):
        for digits in (1, 2):
            rounded = round_constant(value, digits)
            if rounded == value:
                break
            yield _with(program, index, replaced(program.statements[index], position, rounded))


def round_constant(value: float, digits: int) -> float:
    """0.8991 -> 0.9, 0.99653 -> 0.997, 0.0004602 -> 0.0005."""
    if 0.5 < value < 1.0:
        return float(f"{1.0 - _significant(1.0 - value, digits):.12g}")
    return _significant(value, digits)


def _significant(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else value


def _without(program: Program) -> Iterator[Program]:
    for index, statement in enumerate(program.statements):
        rest = program.statements
        yield Program((*rest[:index], *rest[index + 1 :]))
        for replacement in (*statement.arguments, 0.0, 1.0):
            later = _renamed(rest[index + 1 :], statement.target, replacement)
            if later is not None:
                yield Program((*rest[:index], *later))


def _renamed(
    statements: Sequence[Statement], name: str, argument: Argument
) -> tuple[Statement, ...] | None:
    """With reads of `name` replaced until it is assigned again, or at the end given to it if it is
    an output; None where what is to be read is assigned before that.
    """
    found: list[Statement] = []
    for index, statement in enumerate(statements):
        arguments = tuple(argument if a == name else a for a in statement.arguments)
        found.append(dataclasses.replace(statement, arguments=arguments))
        if statement.target == name:
            return (*found, *statements[index + 1 :])
        if statement.target == argument and any(
            name in later.arguments for later in statements[index + 1 :]
        ):
            return None
    if name not in OUTPUTS:
        return tuple(found)
    if any(statement.target == argument for statement in statements):
        return None
    # an output must be assigned: 0 + x is what the language has for a copy
    return (*found, Statement(name, "add", (argument, 0.0)))


def _merged(program: Program) -> Iterator[Program]:
    """interpolate(g, interpolate(g, v, a), b) = interpolate(g, v, a * b)."""
    for second, outer in enumerate(program.statements):
        if outer.operator != "interpolate" or not isinstance(outer.arguments[2], float):
            continue
        for first, inner in enumerate(program.statements[:second]):
            same = inner.operator == "interpolate" and inner.target == outer.arguments[1]
            same &= inner.target not in inner.arguments
            between = program.statements[first:second]
            if not same or not isinstance(inner.arguments[2], float):
                continue
            read = {a for a in inner.arguments if isinstance(a, str)} | {inner.target}
            assigned = {s.target for s in between[1:]}
            if inner.arguments[0] == outer.arguments[0] and not read & assigned:
                share = inner.arguments[2] * outer.arguments[2]
                merged = (outer.arguments[0], inner.arguments[1], share)
                yield _with(program, second, dataclasses.replace(outer, arguments=merged))


def _with(program: Program, index: int, statement: Statement) -> Program:
    return apply(program, Mutation("modify", index, statement))
