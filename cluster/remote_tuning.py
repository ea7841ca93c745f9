"""`evaluation.curve.train_from` on Ray actors of one core each: the whole grids of baselines, which
need nothing of one another. Whoever calls it cannot tell where it ran.

An actor is a pure function that remembers compiled programs. One that dies is restarted by Ray and
its call repeated.
"""

import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cluster.remote import actors, connect, end, process_ids
from evaluation.curve import Curve, MakeOptimizer, train_from
from tasks.base import TaskFamily


class Trainer:
    """Runs grids. A family comes as a list with a reference to it and is fetched once: one program
    serves all grids of a family only if it is the same object.
    """

    def __init__(self):
        self._families: dict[Any, TaskFamily] = {}

    def train(
        self,
        reference: list[Any],
        make_optimizer: MakeOptimizer,
        hypers: Any,
        key_data: np.ndarray,
        budget: dict[str, int],
    ) -> Curve:
        import ray

        (name,) = reference
        if name not in self._families:
            self._families[name] = ray.get(name)
        keys = jax.random.wrap_key_data(jnp.asarray(key_data))
        return train_from(self._families[name], make_optimizer, hypers, keys, **budget)

    def pid(self) -> int:
        return os.getpid()


class TrainingWorkers:
    """`train_from` on `workers` actors; as many threads may call it at once, others wait."""

    def __init__(self, workers: int, address: str | None = None):
        self._connected = connect(address, cpus=workers)
        import ray

        self._ray = ray
        self._actors = actors(Trainer, workers)
        self._idle = list(range(workers))
        self._change = threading.Condition()
        self._last: dict[Any, int] = {}  # program -> who has compiled it
        self._families: dict[int, tuple[TaskFamily, list[Any]]] = {}

    def __call__(
        self,
        family: TaskFamily,
        make_optimizer: MakeOptimizer,
        hypers: Any,
        keys: jax.Array,
        **budget: int,
    ) -> Curve:
        key_data, hypers = jax.device_get((jax.random.key_data(keys), hypers))
        worker = self._take((id(family), make_optimizer))
        try:
            call = self._actors[worker].train.remote(
                self._reference(family), make_optimizer, hypers, key_data, budget
            )
            return self._ray.get(call)
        finally:
            with self._change:
                self._idle.append(worker)
                self._change.notify()

    def _take(self, program: Any) -> int:
        with self._change:
            self._change.wait_for(lambda: self._idle)
            worker = self._last.get(program, -1)
            worker = worker if worker in self._idle else self._idle[0]
            self._idle.remove(worker)
            self._last[program] = worker
            return worker

    def _reference(self, family: TaskFamily) -> list[Any]:
        with self._change:
            if id(family) not in self._families:
                # the family is kept too, so that no other gets its id
                reference = [self._ray.put(jax.device_get(family))]
                self._families[id(family)] = family, reference
            return self._families[id(family)][1]

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return process_ids(self._actors)

    def close(self) -> None:
        """Ends the workers, and the connection (with it a local cluster) if it was made here."""
        end(self._actors, self._connected)
