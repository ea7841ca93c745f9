"""Tuning a baseline on one task: its grid runs on some seeds to choose; it, or the chosen entry
alone, on others to be judged.
"""

import contextlib
import functools
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluation.baselines import ADAM, Baseline, Scheduled
from evaluation.cache import cached, content_hash, default_directory
from evaluation.curve import Curve, MakeOptimizer, Train, envelope, seed_keys, train_from
from evaluation.timing import compile_steps, reference_adam, step_seconds
from tasks.base import Key, TaskFamily

Criterion = Literal["mean", "final", "train"]


class Tuned(NamedTuple):
    """A baseline on one task, on the evaluation seeds."""

    curve: Curve  # of the chosen hyperparameters; its `envelope` is that of `grid`, if there is one
    chosen: dict[str, float]
    at_edge: bool  # the chosen learning rate is the grid's least or greatest: it may be too narrow
    grid: Curve | None  # [G, seeds, ...], its envelope [1, steps]; None if only the chosen ran
    hypers: dict[str, np.ndarray]  # each [G]
    scores: np.ndarray  # [G] what was minimised, from the tuning seeds


def tune(
    baseline: Baseline,
    family: TaskFamily,
    *,
    steps: int,
    seeds: int,
    key: Key,
    tuning_seeds: int = 2,
    criterion: Criterion = "mean",
    evals: int = 20,
    eval_batches: int = 4,
    whole_grid: bool = True,
    keep: bool = True,
    cache_dir: str | Path | None = None,
    train: Train = train_from,
) -> Tuned:
    """Runs the grid, or reads it from the cache, and chooses by `criterion`.

    Evaluation seeds are those of `curve.train_curves` with the same `key`; tuning seeds are others.

    Args:
      criterion: normalised validation loss, "mean" over the evaluations of a run (speed counts) or
        "final"; or "train", the mean training loss, the reference's best case in that metric.
      whole_grid: whether all of it runs on the evaluation seeds, too, or only what was chosen: the
        same choice and, up to rounding, the same curve, for G * tuning_seeds + seeds runs instead
        of G * (tuning_seeds + seeds), but no `grid`.
      keep: False neither reads nor writes the cache.
      cache_dir: see `cache.default_directory` for None. Grids in it do not depend on `criterion`.
      train: what runs a grid that is not in the cache, with the arguments of `curve.train_from`;
        only this process writes the cache.
    """
    if criterion not in (criteria := get_args(Criterion)):
        raise ValueError(f"`criterion` must be one of {', '.join(criteria)}, got {criterion!r}")
    if min(seeds, tuning_seeds) < 1:
        raise ValueError(
            f"`seeds` and `tuning_seeds` must be at least 1, got {seeds}, {tuning_seeds}"
        )
    hypers = baseline.grid()
    budget = {"steps": steps, "evals": evals, "eval_batches": eval_batches}
    own_keys = seed_keys(key, seeds)
    tuning_key = jax.random.fold_in(key, np.uint32(0xFFFFFFFF))  # no seed has that index
    tuning_keys = seed_keys(tuning_key, tuning_seeds)

    def run(piece: str, hypers: dict[str, np.ndarray], keys: Key, *decides: Any) -> Curve:
        """All `hypers` from all `keys`. `decides` is what tells pieces of one `baseline` apart."""

        def sweep() -> dict[str, np.ndarray]:
            make = Scheduled(baseline.make, steps, baseline.evaluated)
            return train(family, make, hypers, keys, **budget)._asdict()

        if not keep:
            return Curve(**sweep())
        counts = (*decides, *budget.values())
        name = content_hash(family, baseline, counts, _key_bytes(key))
        path = Path(cache_dir or default_directory()) / f"{baseline.name}-{piece}{name[:32]}.npz"
        return Curve(**cached(path, Curve._fields, sweep))

    if whole_grid:
        keys = jnp.concatenate([own_keys, tuning_keys])
        runs = run("", hypers, keys, seeds, tuning_seeds)
        tuning = slice(seeds, None)
    else:
        runs = run("tuning-", hypers, tuning_keys, tuning_seeds)
        tuning = slice(None)
    losses = (runs.train if criterion == "train" else runs.valid_normalized)[:, tuning]
    with np.errstate(invalid="ignore"):  # infinities of both signs
        losses = losses.astype(np.float64).mean(axis=1)
        scores = losses[:, -1] if criterion == "final" else losses.mean(axis=1)
    best = int(np.argmin(np.where(np.isfinite(scores), scores, np.inf)))
    if whole_grid:
        grid = runs._replace(
            train=runs.train[:, :seeds],
            valid=runs.valid[:, :seeds],
            test=runs.test[:, :seeds],
            valid_normalized=runs.valid_normalized[:, :seeds],
            envelope=envelope(runs.train[:, :seeds]),
        )
        curve = grid.pick(best)._replace(envelope=grid.envelope)
    else:
        # A file of its own, so that other criteria and numbers of seeds find the grid's.
        grid, alone = None, {name: values[best : best + 1] for name, values in hypers.items()}
        entry = {name: float(values[0]) for name, values in alone.items()}
        curve = run("chosen-", alone, own_keys, seeds, entry).pick(0)
    rates = hypers["learning_rate"]
    return Tuned(
        curve=curve,
        chosen={name: float(f"{values[best]:.6g}") for name, values in hypers.items()},
        at_edge=rates.min() < rates.max() and rates[best] in (rates.min(), rates.max()),
        grid=grid,
        hypers=hypers,
        scores=scores,
    )


def untuned(tuned: Tuned, **hyper: float) -> Curve:
    """The grid's curve at given hyperparameters, as its own reference. ValueError if not in it."""
    if tuned.grid is None:
        raise ValueError("`tuned` holds only what was chosen: tune with `whole_grid`")
    distances = [
        abs(tuned.hypers[name] / value - 1 if value else tuned.hypers[name])
        for name, value in hyper.items()
    ]
    distance = np.sum(distances, axis=0)
    if distance.min() > 1e-3:
        raise ValueError(f"`hyper` {hyper} is not in the grid {tuned.hypers}")
    return tuned.grid.pick(int(distance.argmin()))


@dataclass(frozen=True)
class StepTime:
    """`timing.step_seconds` of an optimizer, kept in the file `path` if it has one.

    Both figures come from one measurement, so their ratio stays meaningful on another day.
    """

    family: TaskFamily
    make_optimizer: MakeOptimizer
    key: Key
    path: Path | None = None

    def prepare(self) -> None:
        """Compiles what is to be measured, if anything: that may be done side by side."""
        if self.path is None or not self.path.exists():
            compile_steps(self.family, self.make_optimizer, self.key)

    def seconds(self) -> tuple[float, float]:
        """The optimizer's and Adam's, measured or read. Nothing else should run meanwhile."""

        def measure() -> dict[str, np.ndarray]:
            return {"seconds": np.array(step_seconds(self.family, self.make_optimizer, self.key))}

        found = measure() if self.path is None else cached(self.path, ("seconds",), measure)
        own, adam = found["seconds"]
        return float(own), float(adam)


def step_time(
    baseline: Baseline, family: TaskFamily, *, key: Key, cache_dir: str | Path | None = None
) -> StepTime:
    """Of a baseline: measured once per task and `machine`."""
    name = content_hash(family, baseline, "seconds", machine())
    path = Path(cache_dir or default_directory()) / f"{baseline.name}-seconds-{name[:32]}.npz"
    return StepTime(family, fixed(baseline), key, path)


@functools.cache
def machine() -> tuple[str | int | None, ...]:
    """What time per step depends on: the host, its processor and cores, jax's backend and device.

    Rented hosts share names, so the name alone does not do.
    """
    host = (platform.node(), platform.machine(), _processor(), os.cpu_count())
    return (*host, jax.default_backend(), jax.devices()[0].device_kind)


def _processor() -> str:
    # On Linux `platform.processor` is empty or no more than the architecture.
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def fixed(baseline: Baseline) -> MakeOptimizer:
    """`baseline` at the first entry of its grid, with Python numbers: what a user would write."""
    if baseline.make == ADAM and baseline.weight_decays == (0.0,):
        return reference_adam
    return Fixed(baseline.make, baseline.learning_rates[0], baseline.weight_decays[0])


class Fixed(NamedTuple):
    """See `fixed`; hashable by value, so that it is compiled once."""

    make: Callable
    learning_rate: float
    weight_decay: float

    def __call__(self, _: Any) -> optax.GradientTransformation:
        return self.make(lambda count: self.learning_rate, self.weight_decay)


def _key_bytes(key: Key) -> bytes:
    return np.asarray(jax.random.key_data(key)).tobytes()
