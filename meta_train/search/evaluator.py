"""Trying programs in this process. `cluster.search_workers` does it on Ray."""

import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from learned_opt.symbolic.program import Program
from meta_train.search.proxies import Proxies, Runs


class Evaluator(Protocol):
    """Tries programs, here or elsewhere."""

    slots: int  # programs that can be tried at once

    def submit(self, ticket: int, program: Program, proxies: Proxies) -> None: ...

    def collect(self) -> Iterable[tuple[int, np.ndarray]]:
        """Waits for at least one program; tickets and normalised losses of those that are done."""
        ...


@functools.lru_cache(maxsize=2)
def runs(proxies: Proxies) -> Runs:
    """Drawn and compiled once per process, as long as it is in use: batches of a whole run are
    much.
    """
    return Runs(proxies)


class Local:
    """One program at a time, in the order in which they come."""

    slots = 1

    def __init__(self):
        self._waiting: list[tuple[int, Program, Proxies]] = []

    def submit(self, ticket: int, program: Program, proxies: Proxies) -> None:
        self._waiting.append((ticket, program, proxies))

    def collect(self) -> Iterable[tuple[int, np.ndarray]]:
        ticket, program, proxies = self._waiting.pop(0)
        return [(ticket, runs(proxies)(program))]


def try_all(
    evaluator: Evaluator, programs: Sequence[Program], proxies: Proxies
) -> list[np.ndarray]:
    """Normalised losses of every program, in their order; nothing else is under way."""
    for ticket, program in enumerate(programs):
        evaluator.submit(ticket, program, proxies)
    found: dict[int, np.ndarray] = {}
    while len(found) < len(programs):
        found |= dict(evaluator.collect())
    return [found[ticket] for ticket in range(len(programs))]
