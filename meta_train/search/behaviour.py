"""Whether a program behaves like Lion, told from its updates and not from its text."""

import itertools
from typing import NamedTuple

import numpy as np

from learned_opt.symbolic.analysis import cost, simplified
from learned_opt.symbolic.execution import Flat, run
from learned_opt.symbolic.program import Program

STEPS, ELEMENTS, SKIPPED = 120, 400, 20
DECAYS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)


class Behaviour(NamedTuple):
    """On random gradients with a drift, at weights of zero, where decay does nothing.

    Attributes:
      spread: deviation of the updates' magnitudes over coordinates, relative to their mean; 0 of a
        sign.
      scale: how much the updates change when all gradients are ten times as large, relative to
        their norm; 0 of what is invariant.
      agreement: share of coordinates and steps at which the update has the sign of Lion's, with the
        betas for which that is most.
      betas: these.
      states: buffers that it needs.
    """

    spread: float
    scale: float
    agreement: float
    betas: tuple[float, float]
    states: int

    @property
    def like_lion(self) -> bool:
        """Nearly a sign, of nearly what Lion takes the sign of, whatever the gradients' scale, with
        one state.
        """
        signs = self.spread < 0.2 and self.agreement > 0.95
        return signs and self.scale < 0.1 and self.states == 1


def behaviour(program: Program) -> Behaviour:
    program = simplified(program)
    random = np.random.default_rng(0)
    drift = random.normal(size=(1, ELEMENTS))
    gradients = 0.05 * (0.3 * drift + random.normal(size=(STEPS, 1, ELEMENTS)))
    updates = _updates(program, gradients)
    larger = _updates(program, 10.0 * gradients)
    magnitudes = np.abs(updates)
    spread = np.std(magnitudes, axis=1) / np.maximum(np.mean(magnitudes, axis=1), 1e-30)
    change = np.linalg.norm(larger - updates) / max(np.linalg.norm(updates), 1e-30)
    agreement, betas = max(
        (float(np.mean(np.sign(updates) == _lion(gradients, *pair)[SKIPPED:])), pair)
        for pair in itertools.product(DECAYS, DECAYS)
    )
    return Behaviour(
        float(np.median(spread)), float(change), agreement, betas, cost(program).states
    )


def _updates(program: Program, gradients: np.ndarray) -> np.ndarray:
    """[steps - SKIPPED, elements] at a constant learning rate."""
    zero = np.zeros((1, ELEMENTS))
    states, found = {"m": zero, "v": zero}, []
    with np.errstate(all="ignore"):
        for g in gradients:
            inputs = {"w": zero, "g": g, "lr": np.full((1, 1), 0.5), **states}
            outputs = run(program, Flat((ELEMENTS,)), inputs)
            states = {name: outputs[name] for name in states}
            found.append(outputs["update"][0])
    return np.stack(found[SKIPPED:])


def _lion(gradients: np.ndarray, b1: float, b2: float) -> np.ndarray:
    m, found = np.zeros(ELEMENTS), []
    for (g,) in gradients:
        found.append(np.sign(b1 * m + (1.0 - b1) * g))
        m = b2 * m + (1.0 - b2) * g
    return np.stack(found)
