"""What a task costs: seconds per inner step, measured once per machine, then read from disk. It is
the prediction by which tasks are kept to a time budget and spread over workers.
"""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax

import tasks
from evaluation.cache import cached, read
from evaluation.cost import no_compilation_cache
from evaluation.curve import check_family, compiler_options
from evaluation.timing import reference_adam, steps
from evaluation.tuning import machine
from tasks.base import TaskFamily
from tasks.data import cache_directory

TOGETHER = 16
ROUNDS = 5
ROUND_SECONDS = 0.1


class TaskCost(NamedTuple):
    """One inner step is a batch, its gradient and an update of optax.adam."""

    params: int
    compile_seconds: float  # of training `TOGETHER` runs at once, nothing taken from a cache
    step_seconds: float  # one run alone
    step_seconds_together: float  # per run, of `TOGETHER` at once


def count_params(family: TaskFamily) -> int:
    """Of a task of the family; nothing is computed."""
    params = jax.eval_shape(lambda family, key: family(key).init(key), family, jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def measure(family: TaskFamily) -> TaskCost:
    """Compiles and times the family's training. A step's time is the least over some rounds, which
    is what a machine that does other things disturbs least.
    """
    check_family(family)
    key = jax.random.key(0)
    keys = jax.random.split(key, TOGETHER)

    one = functools.partial(steps, make_optimizer=reference_adam)
    _, alone = _timed(one, family, key)
    compile_seconds, together = _timed(jax.vmap(one, (None, 0, None)), family, keys)
    return TaskCost(count_params(family), compile_seconds, alone, together / TOGETHER)


def _timed(run: Callable, family: TaskFamily, keys: jax.Array) -> tuple[float, float]:
    """Seconds of compilation, and of a step."""
    began = time.perf_counter()
    with no_compilation_cache():
        options = compiler_options(jax.default_backend())
        program = jax.jit(run, compiler_options=options).lower(family, keys, 1).compile()
    compile_seconds = time.perf_counter() - began

    def once(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(family, keys, count))
        return (time.perf_counter() - began) / count

    once(1)
    count = max(1, min(1000, int(ROUND_SECONDS / once(10))))
    return compile_seconds, min(once(count) for _ in range(ROUNDS))


def known(family: TaskFamily, cache_dir: str | Path | None = None) -> TaskCost | None:
    """What was measured on this machine earlier, or None."""
    arrays = read(_path(family, cache_dir), TaskCost._fields)
    return None if arrays is None else _plain(arrays)


def cost(family: TaskFamily, cache_dir: str | Path | None = None) -> TaskCost:
    """What was measured on this machine earlier, or else `measure`."""

    def compute():
        return {name: np.array(value) for name, value in measure(family)._asdict().items()}

    return _plain(cached(_path(family, cache_dir), TaskCost._fields, compute))


def _plain(arrays: Mapping[str, np.ndarray]) -> TaskCost:
    return TaskCost(int(arrays["params"]), *(float(arrays[n]) for n in TaskCost._fields[1:]))


def _path(family: TaskFamily, cache_dir: str | Path | None) -> Path:
    what = repr((family, _source(), machine(), jax.__version__, optax.__version__))
    name = hashlib.sha256(what.encode()).hexdigest()[:32]
    return Path(cache_dir or cache_directory() / "task_costs") / f"{name}.npz"


@functools.cache
def _source() -> str:
    """Of all that decides what a family's text means."""
    files = sorted(Path(next(iter(tasks.__path__))).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def within_budget(
    suite: Mapping[str, TaskFamily], budget: float, cache_dir: str | Path | None = None
) -> tuple[dict[str, TaskFamily], dict[str, float]]:
    """The tasks whose predicted seconds per inner step, alone, are at most `budget`, and the
    predictions of those that are left out.

    Raises:
      ValueError: none is within it; says what each is predicted to cost.
    """
    check_budget(budget)
    predicted = {name: cost(family, cache_dir).step_seconds for name, family in suite.items()}
    over = {name: seconds for name, seconds in predicted.items() if seconds > budget}
    if len(over) == len(suite):
        raise ValueError(
            f"`time_budget` of {budget:g} seconds per inner step leaves no task: predicted are "
            f"{said(over)}; raise it, or choose smaller tasks"
        )
    return {name: family for name, family in suite.items() if name not in over}, over


def check_budget(budget: float) -> None:
    """Raises ValueError unless it is positive."""
    if not budget > 0:
        raise ValueError(f"`time_budget` must be positive, in seconds per inner step, got {budget}")


def said(predicted: Mapping[str, float]) -> str:
    """Predictions in words."""
    return ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in predicted.items())
