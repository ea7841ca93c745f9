"""Seconds per training step, always measured in alternation with optax.adam on the same task."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluation.curve import MakeOptimizer, check_family, compiler_options
from tasks.base import Key, TaskFamily, behind, classes, train_step


def reference_adam(_) -> optax.GradientTransformation:
    """The yardstick: optax.adam with its defaults."""
    return optax.adam(1e-3)


@functools.cache
def _program(backend: str, family_classes: tuple):
    del family_classes  # one jit each, see `tasks.base.classes`
    options = compiler_options(backend)
    # a function of its own: jits of one function share what was traced for equal arguments
    own = functools.partial(steps)
    return jax.jit(own, static_argnames="make_optimizer", compiler_options=options)


def steps(family, key, count, *, make_optimizer):
    task = family(key)
    params, optimizer = task.init(key), behind(task, make_optimizer(None))

    def step(t, carry):
        batch = task.batch(jax.random.fold_in(key, t), "train")
        return train_step(task, optimizer, carry[0], carry[1], batch)

    carry = (params, optimizer.init(params), jnp.zeros(()))
    return jax.lax.fori_loop(0, count, step, carry)


def compile_steps(family: TaskFamily, make_optimizer: MakeOptimizer, key: Key) -> None:
    """Compiles what `step_seconds` measures, for compiling several side by side."""
    check_family(family)
    program = _program(jax.default_backend(), classes(family))
    jax.block_until_ready(program(family, key, 1, make_optimizer=make_optimizer))


def forget(family: TaskFamily) -> None:
    """Frees what was compiled for the family's classes, which of many optimizers is much memory."""
    program: Any = _program(jax.default_backend(), classes(family))
    program.clear_cache()


def step_seconds(
    family: TaskFamily,
    make_optimizer: MakeOptimizer,
    key: Key,
    *,
    rounds: int = 9,
    seconds: float = 0.02,
) -> tuple[float, float]:
    """Seconds per whole training step (batch, gradient, update; one seed): the optimizer's, Adam's.

    Both are compiled first and then take turns, `rounds` times about `seconds` each. Adam's figure
    is its median; the optimizer's is that times the median over rounds of their ratio, because the
    ratio of neighbours in time is what a noisy machine spares. Machines differ: quote the ratio.
    Both are compiled under `curve.compiler_options`.
    """
    # Adam against itself is 1 by definition, and noise would say otherwise.
    own = () if make_optimizer is reference_adam else (make_optimizer,)
    contestants = (*own, reference_adam)
    for contestant in contestants:
        compile_steps(family, contestant, key)

    program = _program(jax.default_backend(), classes(family))

    def measure(contestant, count):
        start = time.perf_counter()
        jax.block_until_ready(program(family, key, count, make_optimizer=contestant))
        return (time.perf_counter() - start) / count

    count = max(1, min(1000, int(seconds / measure(reference_adam, 10))))
    times = np.array([[measure(c, count) for c in contestants] for _ in range(rounds)])
    adam = float(np.median(times[:, -1]))
    return float(np.median(times[:, 0] / times[:, -1])) * adam, adam
