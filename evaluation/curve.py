"""Training curves: what a run leaves behind, for a whole grid of runs in one compiled program."""

import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.base import Key, TaskFamily, behind, classes, train_step

Scalar = np.ndarray | np.floating | float
MakeOptimizer = Callable[[Any], optax.GradientTransformation]
Train = Callable[..., "Curve"]  # `train_from`, or what gives its results by other means

STATIC = ("steps", "evals", "eval_batches", "keys_at_once")


class Curve(NamedTuple):
    """One optimizer on one task. Losses are raw and keep their NaN and infinities: failure is data.

    A grid of curves has one more leading axis on the loss arrays; `pick` takes one of them out.
    """

    train: np.ndarray  # [seeds, steps] loss on the training batch before each step
    valid: np.ndarray  # [seeds, evals] mean over the same few batches at every evaluation
    test: np.ndarray  # [seeds, evals]
    valid_normalized: np.ndarray  # [seeds, evals] `task.normalize(valid)`: 2 at worst, also for NaN
    eval_steps: np.ndarray  # [evals] steps taken before each evaluation; the last is `steps`
    envelope: np.ndarray  # [seeds or 1, steps] best smoothed training loss so far, see `envelope`
    seconds_per_step: Scalar  # NaN until measured by `timing.step_seconds`
    adam_seconds_per_step: Scalar  # optax.adam, measured in alternation with the above
    state_bytes_per_param: Scalar

    def pick(self, index: int) -> "Curve":
        """Curve `index` of a grid; its envelope becomes its own, one per seed.

        A copy, which does not keep the grid in memory.
        """
        train = self.train[index].copy()
        return self._replace(
            train=train,
            valid=self.valid[index].copy(),
            test=self.test[index].copy(),
            valid_normalized=self.valid_normalized[index].copy(),
            envelope=envelope(train[None]),
        )


def train_curves(
    family: TaskFamily,
    make_optimizer: MakeOptimizer,
    hypers: Any,
    *,
    steps: int,
    seeds: int,
    key: Key,
    evals: int = 20,
    eval_batches: int = 4,
    parallel: int = 32,
) -> Curve:
    """Trains every hyperparameter of a grid from every seed.

    Seed i draws from `fold_in(key, i)` alone, so all optimizers meet the same tasks, initial params
    and batches: `task_key, init_key, batch_key, eval_key = split(fold_in(key, i), 4)`, and step t
    trains on `task.batch(fold_in(batch_key, t), "train")`.

    Args:
      family: a pytree whose arrays become arguments of the compiled program.
      make_optimizer: hashable; called in the trace with one entry of `hypers`. Where it has an
        `evaluated` that is not None, valid and test losses are of `evaluated(opt_state, params)`.
      hypers: pytree of arrays with leading axis G.
      evals: evaluations on `valid` and `test`, evenly spaced, the last after the last step.
      eval_batches: batches averaged at each evaluation, the same ones every time.
      parallel: runs advanced at once; bounds memory on the device.

    Returns:
      A `Curve` of numpy arrays whose losses have shape [G, seeds, ...]; timings are NaN.
    """
    if seeds < 1:
        raise ValueError(f"`seeds` must be at least 1, got {seeds}")
    budget = {"steps": steps, "evals": evals, "eval_batches": eval_batches}
    keys = seed_keys(key, seeds)
    return train_from(family, make_optimizer, hypers, keys, **budget, parallel=parallel)


def seed_keys(key: Key, seeds: int) -> jax.Array:
    """[seeds] the keys that `train_curves` draws from."""
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(jnp.arange(seeds))


def train_from(
    family: TaskFamily,
    make_optimizer: MakeOptimizer,
    hypers: Any,
    keys: jax.Array,
    *,
    steps: int,
    evals: int,
    eval_batches: int,
    parallel: int = 32,
) -> Curve:
    """`train_curves` from given seed keys [S]. Grids of one optimizer that have a chunk of the same
    size, the greatest divisor of G that is at most `parallel`, share one compiled program.
    """
    check_family(family)
    if not 1 <= evals <= steps:
        raise ValueError(f"`evals` must be in 1..`steps`, got {evals} and {steps}: lower `evals`")
    program = _program(jax.default_backend(), classes(family), make_optimizer)
    count = len(jax.tree.leaves(hypers)[0])
    size = _divisor(count, parallel)
    chunks = []
    for start in range(0, count, size):
        losses = program(
            family, jax.tree.map(lambda hyper, at=start: hyper[at : at + size], hypers), keys,
            steps=steps, evals=evals, eval_batches=eval_batches,
            keys_at_once=_divisor(len(keys), parallel // size),
        )  # fmt: skip
        chunks.append([np.asarray(loss) for loss in losses])
    train, valid, test, normalized = map(np.concatenate, zip(*chunks, strict=True))
    return Curve(
        train=train,
        valid=valid,
        test=test,
        valid_normalized=normalized,
        eval_steps=eval_steps(steps, evals),
        envelope=envelope(train),
        seconds_per_step=np.float32(np.nan),
        adam_seconds_per_step=np.float32(np.nan),
        state_bytes_per_param=np.float32(state_bytes_per_param(family, make_optimizer, hypers)),
    )


def check_family(family: TaskFamily) -> None:
    """Raises TypeError if `family` cannot be an argument of a compiled program."""
    for leaf in jax.tree.leaves(family):
        if not isinstance(leaf, jax.Array | np.ndarray | int | float):
            raise TypeError(
                f"`family` must be a pytree of arrays, but holds {leaf!r}: make it a dataclass "
                "under jax.tree_util.register_dataclass, with all but arrays static"
            )


def eval_steps(steps: int, evals: int) -> np.ndarray:
    """[evals] steps taken before each evaluation."""
    return np.arange(1, evals + 1) * steps // evals


def compiler_options(backend: str) -> dict[str, int] | None:
    """Options for programs that run once: on CPU, LLVM's full effort costs more than it saves. None
    where XLA_FLAGS asks for a level.

    Measured on 2 cores with 8x8 digits: level 1 halves compilation, runs an MLP as fast, and a conv
    net a fifth to a half slower.
    """
    level = "xla_backend_optimization_level"
    asked = level in os.environ.get("XLA_FLAGS", "")
    return {level: 1} if backend == "cpu" and not asked else None


@functools.lru_cache(maxsize=16)
def _program(backend: str, family_classes: tuple, make_optimizer: MakeOptimizer):
    """A jit for each family's classes, see `tasks.base.classes`, and for each optimizer: what is
    compiled takes some 10 MB, and goes when its jit goes.
    """
    del family_classes
    train = functools.partial(_train, make_optimizer)
    return jax.jit(train, static_argnames=STATIC, compiler_options=compiler_options(backend))


def _train(make_optimizer, family, hypers, keys, *, steps, evals, eval_batches, keys_at_once):
    """Losses [G, S, ...]: train, valid, test, normalised valid."""
    stops = jnp.asarray(eval_steps(steps, evals))
    starts = jnp.concatenate([jnp.zeros(1, stops.dtype), stops[:-1]])
    evaluated = getattr(make_optimizer, "evaluated", None) or (lambda opt_state, params: params)

    def run(key, hyper):
        task_key, init_key, batch_key, eval_key = jax.random.split(key, 4)
        task = family(task_key)
        optimizer = behind(task, make_optimizer(hyper))
        params = task.init(init_key)

        def step(t, carry):
            params, opt_state, losses = carry
            batch = task.batch(jax.random.fold_in(batch_key, t), "train")
            params, opt_state, loss = train_step(task, optimizer, params, opt_state, batch)
            return params, opt_state, losses.at[t].set(loss)

        held_out = [
            jax.vmap(functools.partial(task.batch, split=split))(
                jax.random.split(jax.random.fold_in(eval_key, index), eval_batches)
            )
            for index, split in enumerate(("valid", "test"))
        ]
        held_out = jax.tree.map(lambda *parts: jnp.concatenate(parts), *held_out)

        def segment(carry, bounds: tuple[jax.Array, jax.Array]):
            carry = jax.lax.fori_loop(*bounds, step, carry)
            judged = evaluated(carry[1], carry[0])
            losses = jax.lax.map(lambda batch: task.loss(judged, batch), held_out)
            return carry, losses.reshape(2, eval_batches).mean(axis=1)

        carry = (params, optimizer.init(params), jnp.zeros(steps))
        carry, losses = jax.lax.scan(segment, carry, (starts, stops))
        valid, test = losses[:, 0], losses[:, 1]
        return carry[2], valid, test, jax.vmap(task.normalize)(valid)

    def grid(key):
        # Runs that share a seed share its batches, which are drawn once. One run alone is not
        # vmapped: on CPU that would cost large matrix products a factor of three.
        if len(jax.tree.leaves(hypers)[0]) > 1:
            return jax.vmap(run, (None, 0))(key, hypers)
        return jax.tree.map(lambda x: x[None], run(key, jax.tree.map(lambda h: h[0], hypers)))

    batch_size = keys_at_once if keys_at_once > 1 else None
    losses = jax.lax.map(grid, keys, batch_size=batch_size)
    return jax.tree.map(lambda loss: jnp.swapaxes(loss, 0, 1), losses)


def _divisor(count: int, at_most: int) -> int:
    # lax.map compiles the body a second time for a remainder, hence only whole chunks.
    return max(d for d in range(1, max(1, at_most) + 1) if count % d == 0)


def smooth(losses: np.ndarray) -> np.ndarray:
    """Bias-corrected exponential moving average over the last axis, [..., steps] -> the same shape.

    Its time constant is steps / 50, from 1 to 20 steps (20 is VeLO's decay of 0.95,
    arXiv:2211.09760; a short curve would be distorted by it). From a NaN or
    infinity on, it is infinite.
    """
    decay = 1.0 - 1.0 / float(np.clip(losses.shape[-1] / 50, 1.0, 20.0))
    failed = np.logical_or.accumulate(~np.isfinite(losses), axis=-1)
    alive = np.where(failed, 0.0, losses).astype(np.float64)
    average = np.zeros(losses.shape[:-1])
    smoothed = np.empty(losses.shape)
    for t in range(losses.shape[-1]):
        average = decay * average + (1.0 - decay) * alive[..., t]
        smoothed[..., t] = average / (1.0 - decay ** (t + 1))
    return np.where(failed, np.inf, smoothed)


def envelope(grid_train: np.ndarray) -> np.ndarray:
    """The lowest loss that any member of a grid has reached by each step.

    Args:
      grid_train: [G, seeds, steps].

    Returns:
      [1, steps]: smoothed mean over seeds, least over the grid, cumulative minimum over steps. For
      a grid of one, [seeds, steps], without the mean: a curve is its own reference, seed by seed.
    """
    if len(grid_train) > 1:
        with np.errstate(invalid="ignore"):  # infinities of both signs
            grid_train = grid_train.mean(axis=1, keepdims=True, dtype=np.float64)
    best = smooth(grid_train).min(axis=0)
    return np.minimum.accumulate(best, axis=-1)


def state_bytes_per_param(family: TaskFamily, make_optimizer: MakeOptimizer, hypers: Any) -> float:
    """Bytes of optimizer state per parameter, counters included; nothing is computed."""

    def shapes(family, hypers):
        params = family(jax.random.key(0)).init(jax.random.key(0))
        return params, make_optimizer(jax.tree.map(lambda h: h[0], hypers)).init(params)

    params, state = jax.eval_shape(shapes, family, hypers)
    state_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    return state_bytes / max(1, sum(math.prod(x.shape) for x in jax.tree.leaves(params)))
