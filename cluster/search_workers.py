"""Trying programs on Ray actors of one core each. An actor draws and compiles the tasks once; of a
program it gets the text. One that dies is restarted by Ray, and what it was at repeated.
"""

import os
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from cluster.remote import actors, connect, end, process_ids
from learned_opt.symbolic.program import Program, parse
from meta_train.search.evaluator import runs
from meta_train.search.proxies import Proxies


class Tryer:
    """Keeps nothing but what it drew and compiled."""

    def losses(self, text: str, proxies: Proxies) -> np.ndarray:
        return runs(proxies)(parse(text))

    def pid(self) -> int:
        return os.getpid()


class SearchWorkers:
    """An `Evaluator` of `workers` actors, each of which has two programs at a time, so that it need
    not wait for the next.
    """

    def __init__(self, workers: int, address: str | None = None):
        self._connected = connect(address, cpus=workers)
        import ray

        self._ray, self.slots = ray, workers
        self._actors = actors(Tryer, workers)
        self._waiting: deque[tuple[int, Program, Proxies]] = deque()
        self._calls: dict[Any, tuple[int, int]] = {}  # call -> ticket, actor
        self._load = [0] * workers

    def submit(self, ticket: int, program: Program, proxies: Proxies) -> None:
        self._waiting.append((ticket, program, proxies))
        self._hand_out()

    def collect(self) -> Iterable[tuple[int, np.ndarray]]:
        calls = list(self._calls)
        self._ray.wait(calls, num_returns=1)
        done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        found = []
        for call in done:
            ticket, actor = self._calls.pop(call)
            self._load[actor] -= 1
            found.append((ticket, self._ray.get(call)))
        self._hand_out()
        return found

    def _hand_out(self) -> None:
        while self._waiting and min(self._load) < 2:
            actor = int(np.argmin(self._load))
            ticket, program, proxies = self._waiting.popleft()
            call = self._actors[actor].losses.remote(str(program), proxies)
            self._calls[call] = ticket, actor
            self._load[actor] += 1

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return process_ids(self._actors)

    def close(self) -> None:
        """Ends the workers, and the connection (with it a local cluster) if it was made here."""
        end(self._actors, self._connected)
