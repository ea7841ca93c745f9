"""The small tasks on which programs are tried: every program starts from the same params and meets
the same batches, drawn once, and stops when it is lost.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from learned_opt.symbolic import machine
from learned_opt.symbolic.analysis import cost
from learned_opt.symbolic.program import Program
from learned_opt.symbolic.rule import cosine
from meta_train.recipes.base import families
from tasks.base import Key, TaskFamily, behind, classes, train_step

WORST = 2.0  # normalised loss, that of NaN
LEAST = 1e-3
CHUNK = 25  # steps between looks at whether a run is lost
CAPACITY = 40  # statements
CAPACITIES = (12, 20, CAPACITY)  # of machines: registers that a program has no use for cost time


@dataclasses.dataclass(frozen=True)
class Proxies:
    """Tasks to try programs on, as plain values.

    Args:
      tasks: a suite, or a task family with its fields.
      steps: of every run, along a cosine from 1 to 0.
      seeds: runs on every task, from other initial params with other batches.
      first_seed: of them.
      valid_batches: on which the loss after the run is taken.
    """

    tasks: str = "train/proxies"
    steps: int = 200
    seeds: int = 1
    first_seed: int = 0
    valid_batches: int = 16

    def __post_init__(self):
        for name in ("steps", "seeds", "valid_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not families(self.tasks):
            raise ValueError(f"`tasks` {self.tasks} holds no task: there is nothing to try on")


class Trial(NamedTuple):
    """All that a run needs besides the program."""

    task: Any
    params: Any
    batches: Any  # [steps, ...]
    valid: Any  # [valid_batches, ...]


class Runs:
    """Runs of any program on the proxies. Compiles a program for every task, once."""

    def __init__(self, proxies: Proxies):
        self._runs = []
        for family in families(proxies.tasks).values():
            program = _jitted(_run, classes(family), steps=proxies.steps)
            for seed in range(proxies.first_seed, proxies.first_seed + proxies.seeds):
                key = jax.random.fold_in(jax.random.key(0), seed)
                trial = prepare(family, key, proxies.steps, proxies.valid_batches)
                self._runs.append(functools.partial(program, trial))

    def __call__(self, program: Program) -> np.ndarray:
        """[tasks * seeds] normalised losses after training, in [0, 2]."""
        needed = cost(program).statements
        code = machine.encode(program, next((c for c in CAPACITIES if needed <= c), CAPACITY))
        return np.array([float(run(code)) for run in self._runs])


def score(losses: np.ndarray, reference: np.ndarray) -> float:
    """Mean log ratio to the reference's losses: -0.05 is 5% less loss."""
    floor = functools.partial(np.maximum, LEAST)
    return float(np.mean(np.log(floor(losses)) - np.log(floor(reference))))


def prepare(family: TaskFamily, key: Key, steps: int, valid_batches: int) -> Trial:
    """Draws what `evaluation.curve` would from the same key, once for all programs."""
    draw = _jitted(_draw, classes(family), steps=steps, valid_batches=valid_batches)
    return draw(family, key)


def _draw(family: TaskFamily, key: Key, *, steps: int, valid_batches: int) -> Trial:
    task_key, init_key, batch_key, eval_key = jax.random.split(key, 4)
    task = family(task_key)
    fold = jax.vmap(lambda t: jax.random.fold_in(batch_key, t))
    train = jax.vmap(functools.partial(task.batch, split="train"))
    valid = jax.vmap(functools.partial(task.batch, split="valid"))
    keys = jax.random.split(jax.random.fold_in(eval_key, 0), valid_batches)
    return Trial(task, task.init(init_key), train(fold(jnp.arange(steps))), valid(keys))


@functools.lru_cache(maxsize=64)
def _jitted(function: Callable[..., Any], family_classes: tuple, **static: int) -> Any:
    """A jit for each family's classes, see `tasks.base.classes`."""
    del family_classes
    return jax.jit(functools.partial(function, **static))


def _run(trial: Trial, code: machine.Code, *, steps: int) -> jax.Array:
    """The normalised loss on `valid` after the run; 2 for a run that was lost."""
    task = trial.task
    optimizer = behind(task, machine.optimizer(code, cosine(steps)))
    untrained = task.normalize(task.loss(trial.params, jax.tree.map(lambda x: x[0], trial.batches)))
    limit = 1.02 * untrained + 0.05

    def step(t: jax.Array, carry: Any) -> Any:
        params, state, total = carry
        batch = jax.tree.map(lambda x: x[t], trial.batches)
        params, state, loss = train_step(task, optimizer, params, state, batch)
        return params, state, total + task.normalize(loss)

    def chunk(carry: Any) -> Any:
        first, _, params, state = carry
        last = jnp.minimum(first + CHUNK, steps)
        params, state, total = jax.lax.fori_loop(first, last, step, (params, state, jnp.zeros(())))
        mean = total / (last - first)
        return last, (mean > limit) | (mean >= WORST), params, state

    def goes_on(carry: Any) -> jax.Array:
        return (carry[0] < steps) & ~carry[1]

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((), bool),
        trial.params,
        optimizer.init(trial.params),
    )
    _, lost, params, _ = jax.lax.while_loop(goes_on, chunk, start)
    losses = jax.lax.map(lambda batch: task.loss(params, batch), trial.valid)
    return jnp.where(lost, WORST, task.normalize(jnp.mean(losses)))
