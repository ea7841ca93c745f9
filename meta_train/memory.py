"""Memory: what a program will need, predicted from its jaxpr before anything is compiled; and what
there is.

XLA stores what matrix products, convolutions, loops, sorts, gathers and random numbers read and
write, what reductions write, and what the program returns; elementwise operations between these it
computes where they are needed. The prediction is the most that is stored at any one time if the
program runs in the order it is written in. On CPUs, XLA takes between this and twice this.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# how the names of primitives begin
STORED = (
    *("dot_general", "conv_general", "scan", "while", "cond", "sort", "top_k", "gather", "scatter"),
    *("dynamic", "concatenate", "cum", "reduce", "arg", "random_bits", "threefry", "cholesky"),
    *("lu", "qr", "geqrf", "householder", "eig", "svd", "triangular", "fft", "ffi", "custom"),
)
REDUCTIONS = ("reduce", "arg")


class Value:
    """One array; told from others by identity, since a jaxpr may be called more than once."""

    def __init__(self, variable: Any):
        shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
        self.bytes = math.prod(shape) * getattr(dtype, "itemsize", 8)


class Operation(NamedTuple):
    primitive: str
    params: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]


def predicted_bytes(function: Callable, *args: Any) -> int:
    """What `function` needs with its arguments, arrays or their shapes, and its results."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    given = [*jaxpr.invars, *jaxpr.constvars]
    return sum(Value(variable).bytes for variable in given) + _peak(jaxpr)


def _peak(jaxpr: Jaxpr, reusable: slice = slice(0)) -> int:
    """The most bytes that are stored at a time beside the inputs, of which a range may be written
    over.
    """
    values = {variable: Value(variable) for variable in [*jaxpr.invars, *jaxpr.constvars]}
    reused = [values[variable] for variable in jaxpr.invars[reusable]]
    program = list(_flat(jaxpr, values))
    results = {values[v] for v in jaxpr.outvars if not isinstance(v, Literal)}
    stored = set(results)
    for operation in program:
        if operation.primitive.startswith(STORED):
            stored.update(operation.outputs)
            if not operation.primitive.startswith(REDUCTIONS):
                stored.update(operation.inputs)
    last_use = _last_uses(program, stored) | dict.fromkeys(results, len(program))
    freed = defaultdict(int, {0: 0})
    for value in reused:
        freed[last_use.get(value, 0)] += value.bytes
    live = most = sum(value.bytes for value in reused)
    start = live
    for i, operation in enumerate(program):
        written = [value for value in operation.outputs if value in stored]
        for value in written:
            freed[last_use.get(value, i)] += value.bytes
        new = sum(value.bytes for value in written)
        # a scan and elementwise operations write over what they are the last to read
        in_place = operation.primitive == "scan" or not operation.primitive.startswith(STORED)
        over = freed[i] if in_place else 0
        most = max(most, live + new - over + _inside(operation))
        live += new - freed[i]
    return most - start


def _last_uses(program: list[Operation], stored: set[Value]) -> dict[Value, int]:
    """The index of the operation that is the last to read a value. What is not stored reads its own
    inputs where it is read itself.
    """
    last = {}
    for i, operation in reversed(list(enumerate(program))):
        when = i
        if not stored.intersection(operation.outputs):
            when = max((last.get(value, i) for value in operation.outputs), default=i)
        for value in operation.inputs:
            last[value] = max(last.get(value, 0), when)
    return last


def _inside(operation: Operation) -> int:
    """What the body of a loop, or the larger of two branches, needs beside inputs and outputs."""
    carry = slice(0)
    if operation.primitive == "scan":
        consts = operation.params["num_consts"]
        carry = slice(consts, consts + operation.params["num_carry"])
    return max((_peak(body, carry) for body in bodies(operation.params)), default=0)


def bodies(params: dict[str, Any]) -> list[Jaxpr]:
    """The programs among the parameters of a primitive: of a call, a loop, a branch."""
    is_jaxpr = lambda x: isinstance(x, ClosedJaxpr | Jaxpr)  # noqa: E731
    found = filter(is_jaxpr, jax.tree.leaves(list(params.values()), is_leaf=is_jaxpr))
    return [body.jaxpr if isinstance(body, ClosedJaxpr) else body for body in found]


def _flat(jaxpr: Jaxpr, values: dict[Any, Value]) -> Iterator[Operation]:
    """The operations with all calls inlined; the variables get their `values`."""
    for eqn in jaxpr.eqns:
        name, inner = eqn.primitive.name, bodies(eqn.params)
        inputs = [values[v] if not isinstance(v, Literal) else Value(v) for v in eqn.invars]
        is_call = len(inner) == 1 and len(inner[0].invars) == len(inputs)
        if is_call and not name.startswith(("scan", "reduce")):
            (body,) = inner
            within = dict(zip(body.invars, inputs, strict=True))
            within |= {v: Value(v) for v in body.constvars}
            yield from _flat(body, within)
            for outer, v in zip(eqn.outvars, body.outvars, strict=True):
                values[outer] = Value(v) if isinstance(v, Literal) else within[v]
        else:
            values.update((v, Value(v)) for v in eqn.outvars)
            yield Operation(name, eqn.params, inputs, [values[v] for v in eqn.outvars])


def available_bytes(devices: Sequence[Any]) -> int | None:
    """The memory of accelerators together, or what is free on the machine whose processors the
    devices are; None where nothing says.
    """
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [limit for limit in limits if limit is not None]
    if len(known) == len(devices):
        return sum(known)
    if devices[0].platform != "cpu":
        return None
    found = []
    with suppress(OSError, ValueError):  # ValueError: the container has no limit
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min(found, default=None)
