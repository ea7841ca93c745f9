"""A hash of what a program does: equal for programs that do the same, whatever they are written
like.
"""

import hashlib

import numpy as np

from learned_opt.symbolic import execution
from learned_opt.symbolic.analysis import dataflow, live, simplified
from learned_opt.symbolic.program import OUTPUTS, Program

STEPS, PROBES, SIZES, BITS = 4, 5, (6, 3, 1), 26
SCALES = (1e-3, 3e-2, 0.3, 3.0, 30.0)
SCHEDULE = (1.0, 0.61, 0.17, 0.013)


def probes(seed: int = 20230213) -> list[dict[str, np.ndarray]]:
    """Weights, gradients of five scales and a falling learning rate, for every step."""
    random, elements = np.random.default_rng(seed), sum(SIZES)
    scales = np.array(SCALES)[:, None]
    return [
        {
            "w": random.normal(size=(PROBES, elements)),
            "g": scales * random.normal(size=(PROBES, elements)),
            "lr": np.full((PROBES, 1), rate * random.uniform(0.9, 1.0)),
        }
        for rate in SCHEDULE
    ]


FIXED = probes()


def updates(program: Program, inputs: list[dict[str, np.ndarray]]) -> np.ndarray:
    """[steps, probes, elements] float64, with states that start at zero."""
    return _run(program, inputs)["update"]


def _run(program: Program, inputs: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Of every output [steps, probes, elements]."""
    backend = execution.Flat(SIZES)
    zero = np.zeros_like(inputs[0]["g"])
    states: dict[str, np.ndarray] = {"m": zero, "v": zero}
    found: dict[str, list[np.ndarray]] = {name: [] for name in OUTPUTS}
    with np.errstate(all="ignore"):
        for step in inputs:
            outputs = execution.run(program, backend, {**step, **states})
            for name, value in outputs.items():
                found[name].append(value)
            states = {name: outputs[name] for name in states}
    return {name: np.stack(values) for name, values in found.items()}


def functional_hash(program: Program) -> bytes | None:
    """Of the updates, and of the states that matter, on fixed probes, rounded to 26 bits; None if
    an update is not finite. The names of the states do not matter.

    The states are in it as an update may hide them: the sign of an average hardly tells how long
    its memory is. Programs that differ only where no probe goes (a clip that never binds) are taken
    for equal; a value at the edge of rounding, or a state of another scale, may tell equal ones
    apart.
    """
    program = simplified(program)
    values = _run(program, FIXED)
    if not np.isfinite(values["update"]).all():
        return None
    states = sorted(_digest(values[name]) for name in live(dataflow(program))[1])
    return hashlib.blake2b(b"".join([_digest(values["update"]), *states]), digest_size=16).digest()


def _digest(values: np.ndarray) -> bytes:
    mantissa, exponent = np.frexp(values)
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, BITS)), exponent - BITS) + 0.0
    rounded[np.isnan(rounded)] = np.nan  # of one kind
    return hashlib.blake2b(rounded.tobytes(), digest_size=16).digest()
