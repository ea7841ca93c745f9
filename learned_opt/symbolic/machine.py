"""A register machine for programs as data: compiled once for the shapes of a network, it runs any
program, where compiling each would take a second.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from learned_opt import base
from learned_opt.symbolic.analysis import INPUT_KINDS, Kind, Source, dataflow, kinds, live
from learned_opt.symbolic.operators import OPERATORS, Operator
from learned_opt.symbolic.program import INPUTS, OUTPUTS, Program, ProgramError

OPCODES = {name: code for code, name in enumerate(OPERATORS)}
FIRST = len(INPUTS)  # register of the first statement's result


class Code(NamedTuple):
    """A program for a machine of some capacity.

    The registers hold the inputs, then the result of every statement; the negative number -1 - i
    stands for constant i.
    """

    operators: np.ndarray  # [statements] int32
    arguments: np.ndarray  # [statements, 3] int32
    kinds: np.ndarray  # [statements] int32, of the first argument
    constants: np.ndarray  # [3 statements] float32
    outputs: np.ndarray  # [3] int32
    length: np.ndarray  # [] int32, statements that there are


def encode(program: Program, capacity: int) -> Code:
    """Only what matters for the updates is kept; a state that does not matter is never changed.

    Args:
      capacity: statements that there is room for.

    Raises:
      ProgramError: the program is ill-typed, or has more statements that matter.
    """
    found_kinds, flow = kinds(program), dataflow(program)
    kept, states = live(flow)
    if len(kept) > capacity:
        raise ProgramError(f"{len(kept)} statements matter, and there is room for {capacity}")
    constants: dict[float, int] = {}
    registers: dict[Source, int] = {name: row for row, name in enumerate(INPUTS)}
    registers |= {index: FIRST + row for row, index in enumerate(sorted(kept))}

    def place(source: Source) -> int:
        if isinstance(source, float):
            return -1 - constants.setdefault(source, len(constants))
        return registers[source]

    operators, arguments = np.zeros(capacity, np.int32), np.zeros((capacity, 3), np.int32)
    of = np.zeros(capacity, np.int32)
    for row, index in enumerate(sorted(kept)):
        sources = flow.arguments[index]
        operators[row] = OPCODES[flow.operators[index]]
        arguments[row, : len(sources)] = [place(source) for source in sources]
        of[row] = _kind(sources[0], found_kinds) if sources else Kind.SCALAR
    outputs = [
        place(source if name == "update" or name in states else name)
        for name, source in zip(OUTPUTS, flow.outputs, strict=True)
    ]
    numbers = np.zeros(3 * capacity)
    numbers[: len(constants)] = list(constants)
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    return Code(
        operators, arguments, of, numbers, np.array(outputs, np.int32),
        np.array(len(kept), np.int32),
    )  # fmt: skip


def _kind(source: Source, found_kinds: list[Kind]) -> Kind:
    if isinstance(source, str):
        return INPUT_KINDS[source]
    return found_kinds[source] if isinstance(source, int) else Kind.SCALAR


class MachineState(NamedTuple):
    count: jax.Array
    m: jax.Array  # [elements]
    v: jax.Array


def optimizer(code: Code, schedule: optax.Schedule) -> optax.GradientTransformation:
    """What `Symbolic` with the same program is, for any params, at some 1.5 times its cost.

    Args:
      schedule: gives the programs' `lr`.
    """

    def init(params: base.Params) -> MachineState:
        zeros = jnp.zeros(sum(np.size(leaf) for leaf in jax.tree.leaves(params)))
        return MachineState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates, state, params=None):
        sizes = tuple(np.size(leaf) for leaf in jax.tree.leaves(params))
        g, unravel = ravel_pytree(base.float32(updates))
        w, _ = ravel_pytree(base.float32(params))
        inputs = (w, g, state.m, state.v, jnp.broadcast_to(schedule(state.count), w.shape))
        found, m, v = run(code, sizes, inputs)
        return base.like_params(unravel(-found), params), MachineState(state.count + 1, m, v)

    return optax.GradientTransformation(init, update)


def run(code: Code, sizes: tuple[int, ...], inputs: Sequence[jax.Array]) -> list[jax.Array]:
    """update, m, v [elements] of one step.

    Args:
      sizes: of the tensors, which lie one after another in the elements.
      inputs: w, g, m, v and lr, each [elements] float32.
    """
    elements, code = sum(sizes), jax.tree.map(jnp.asarray, code)

    def read(registers: jax.Array, place: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice(registers, (jnp.maximum(place, 0), 0), (1, elements))[0]
        return jnp.where(place < 0, code.constants[jnp.maximum(-1 - place, 0)], row)

    branches = [_branch(operator, sizes) for operator in OPERATORS.values()]

    def statement(i: jax.Array, registers: jax.Array) -> jax.Array:
        arguments = [read(registers, code.arguments[i, k]) for k in range(3)]
        result = jax.lax.switch(code.operators[i], branches, *arguments, code.kinds[i])
        return jax.lax.dynamic_update_slice(registers, result[None], (FIRST + i, 0))

    # Made anew at every step: carried along, constants and all, they would be copied twice.
    registers = jnp.zeros((FIRST + len(code.operators), elements))
    registers = registers.at[:FIRST].set(jnp.stack(inputs))
    registers = jax.lax.fori_loop(0, code.length, statement, registers)
    return [read(registers, code.outputs[k]) for k in range(len(OUTPUTS))]


def _branch(operator: Operator, sizes: tuple[int, ...]) -> Callable[..., jax.Array]:
    """The operator on three registers (those that it has no use for hold anything), and the kind of
    the first.
    """
    elements, bounds = sum(sizes), list(itertools.pairwise(np.cumsum((0, *sizes))))
    # by kind, how much an element counts in sums, so that what was broadcast counts once
    per_tensor = np.repeat(1.0 / np.array(sizes), sizes)
    counts = np.stack([np.full(elements, 1.0 / elements), per_tensor, np.ones(elements)])
    counts = counts.astype(np.float32)

    def full(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (elements,))

    def norm(x: jax.Array, kind: jax.Array) -> jax.Array:
        sums = [jnp.broadcast_to(jnp.sum(jnp.square(x[a:b])), (b - a,)) for a, b in bounds]
        lengths = jnp.sqrt(jnp.concatenate(sums))
        return jnp.where(kind == Kind.WEIGHTS, lengths, jnp.abs(x))

    def call(x: jax.Array, y: jax.Array, z: jax.Array, kind: jax.Array) -> jax.Array:
        if operator.function is not None:
            return full(jnp.float32(operator.function(jnp, *(x, y, z)[: operator.arity])))
        if operator.form == "norm":
            return norm(x, kind)
        count = jnp.asarray(counts)[kind]
        length = jnp.sqrt(jnp.sum(x * x * count))
        if operator.form == "global_norm":
            return full(length)
        if operator.form == "clip":
            return x * jnp.minimum(1.0, y / length)
        dot = jnp.sum(x * y * count)
        if operator.form == "dot":
            return full(dot)
        return full(dot / (length * jnp.sqrt(jnp.sum(y * y * count))))

    return call
