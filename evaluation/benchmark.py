"""Judges optimizers on a suite of tasks, beside baselines tuned per task."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from evaluation.baselines import BASELINES, Baseline, cosine_only, find
from evaluation.curve import Curve, Train, check_family, seed_keys, train_from
from evaluation.lines import Job, Progress, longest_first, run
from evaluation.results import Results
from evaluation.summary import oracle, summarize
from evaluation.timing import forget
from evaluation.tuning import Criterion, StepTime, fixed, step_time, tune, untuned
from tasks.base import Key, TaskFamily

Contender = Callable[[int], optax.GradientTransformation]  # horizon -> optax

DEFAULT, ORACLE = "adam (lr 0.001)", "adam (oracle)"
DEFAULT_HYPER = {"learning_rate": 1e-3, "cosine": 0.0, "weight_decay": 0.0}
EVALS, EVAL_BATCHES = 20, 4


@dataclass(frozen=True)
class Horizon:
    """A contender as `train_curves` wants it; hashable, so that it is compiled once."""

    contender: Contender
    steps: int

    def __call__(self, _) -> optax.GradientTransformation:
        return self.contender(self.steps)


@dataclass(frozen=True)
class Multiplied:
    """A contender whose updates a learning rate multiplies: what `Baseline.make` is. Hashable."""

    contender: Contender
    steps: int

    def __call__(
        self, learning_rate: optax.Schedule, weight_decay: Any
    ) -> optax.GradientTransformation:
        del weight_decay
        # not negated: a contender's updates are added as they are
        scale = optax.scale_by_learning_rate(learning_rate, flip_sign=False)
        return optax.chain(self.contender(self.steps), scale)


class Outcome(NamedTuple):
    """A row on one task."""

    curve: Curve
    chosen: dict[str, Any] | None  # hyperparameters, of a row that was tuned
    step_time: StepTime


def evaluate(
    contenders: Mapping[str, Contender],
    suite: Mapping[str, TaskFamily],
    *,
    steps: int,
    seeds: int,
    baselines: str | Iterable[str] = "baselines/quick",
    learning_rates: Sequence[float] = (),
    cosine_baselines: str | Iterable[str] = (),
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    key: Key | None = None,
    tuning_seeds: int = 2,
    criterion: Criterion = "mean",
    evals: int = EVALS,
    workers: int = 2,
    train: Train = train_from,
) -> Results:
    """Trains everything on everything and scores it against default and tuned Adam.

    Rows: each contender; each baseline, tuned per task (Adam always); each of `cosine_baselines`;
    Adam at its default learning rate; and an oracle that is at every step as low as the best of
    Adam's whole grid, which alone runs on the evaluation seeds.

    What a baseline did on a task is in the cache as soon as it is done, so that an evaluation that
    was ended goes on from there.

    Args:
      contenders: name -> (horizon -> optax transformation).
      suite: name -> task family.
      learning_rates: what every contender is tuned over, per task and as baselines are: each
        multiplies its updates, with a cosine schedule to zero. Without any, contenders run as they
        are. Tuned contenders are not in the cache.
      cosine_baselines: baselines that are tuned over just these, too, see `baselines.cosine_only`.
      progress: called with a description and the share of work done, by one thread at a time.
      key: all randomness; None for `jax.random.key(0)`.
      workers: threads that compile and train side by side.
      train: what trains, with the arguments of `curve.train_from`; called by all these threads.

    Raises:
      ValueError, TypeError: before any work, for unknown baselines, taken names, learning rates
        that are none, or an empty suite.
    """
    start = time.perf_counter()
    key = jax.random.key(0) if key is None else key
    adam, rates = tuned_name(BASELINES["adam"]), tuple(learning_rates)
    grids = {tuned_name(b): b for b in find(["adam", *_names(baselines)])}
    sizes = {b.name: len(b.grid()["learning_rate"]) for b in grids.values()}
    cosine = {cosine_name(b): b for b in cosine_only(cosine_baselines, rates)}
    sizes |= dict.fromkeys(cosine, len(rates))
    grids |= cosine
    _check(contenders, suite, grids)
    if rates:
        for name, contender in contenders.items():
            grids[name] = Baseline(name, Multiplied(contender, steps), rates, ("cosine",))
    budget = {"steps": steps, "seeds": seeds, "evals": evals, "key": key, "train": train}
    tuning = {"tuning_seeds": tuning_seeds, "criterion": criterion, "cache_dir": cache_dir}

    lines: dict[tuple, list[Job]] = {}
    for task, family in suite.items():
        for name, baseline in grids.items():
            # Those that share a compiled program wait in one line, so that it is compiled once.
            size, whole = len(baseline.grid()["learning_rate"]), name == adam
            runs = size * tuning_seeds + seeds * (size if whole else 1)
            options = {"whole_grid": whole, "keep": name not in contenders}
            work = partial(_tune, name, baseline, family, **budget, **tuning, **options)
            lines.setdefault((task, baseline.make), []).append(Job(task, name, runs, work))
        for name, contender in contenders.items() if not rates else ():
            work = partial(_train, name, contender, family, **budget)
            lines[task, name] = [Job(task, name, seeds, work)]
    outcomes = run(longest_first(list(lines.values()), suite), workers, _share_of(progress, 0.8))

    rows = {name: {"kind": "contender", "chosen": {}} for name in contenders}
    rows |= {name: {"kind": "tuned", "chosen": {}} for name in grids if name not in contenders}
    rows |= {DEFAULT: {"kind": "default", "chosen": {}}, ORACLE: {"kind": "oracle", "chosen": {}}}
    curves: dict[str, dict[str, Curve]] = {name: {} for name in rows}
    for count, (task, family) in enumerate(suite.items(), 1):
        # the other two share tuned Adam's
        own_times = [outcomes[n, task].step_time for n in rows if n not in (DEFAULT, ORACLE)]
        _prepare(own_times, workers)
        # Time per step is measured here, alone: the other threads would have disturbed it.
        for name, row in rows.items():
            outcome = outcomes[name, task]
            own, adams = outcome.step_time.seconds()
            curves[name][task] = outcome.curve._replace(
                seconds_per_step=own, adam_seconds_per_step=adams
            )
            if outcome.chosen is not None:
                row["chosen"][task] = outcome.chosen
        forget(family)
        if progress:
            progress(f"{task}: time per step", 0.8 + 0.2 * count / len(suite))

    about = _about(start) | {
        "tasks": list(suite),
        "steps": steps,
        "seeds": seeds,
        "tuning_seeds": tuning_seeds,
        "criterion": criterion,
        "grids": sizes,
        "learning_rates": list(rates),
    }
    return summarize(about, rows, curves, default=DEFAULT, tuned=adam)


def _about(start: float) -> dict[str, Any]:
    """What was run on, and how long it took since `start` (of time.perf_counter)."""
    return {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def tuned_name(baseline: Baseline) -> str:
    """The row of a baseline."""
    return f"{baseline.name} (tuned)"


def cosine_name(baseline: Baseline) -> str:
    """The row of a baseline that was tuned over few learning rates, with the cosine schedule."""
    rates = ", ".join(f"{rate:g}" for rate in baseline.learning_rates)
    return f"{baseline.name} ({rates}; cosine)"


def _names(baselines: str | Iterable[str]) -> list[str]:
    return [baselines] if isinstance(baselines, str) else list(baselines)


def _check(contenders: Mapping, suite: Mapping[str, TaskFamily], rows: Iterable[str]) -> None:
    if not suite:
        raise ValueError("`suite` must hold at least one task family, got none")
    taken = sorted({DEFAULT, ORACLE, *rows} & set(contenders))
    if taken:
        raise ValueError(f"`contenders` uses names of baselines, got {taken}: call them otherwise")
    for family in suite.values():
        check_family(family)


def _train(
    name: str, contender: Contender, family: TaskFamily, *, steps, seeds, key, train, evals
) -> dict[str, Outcome]:
    make = Horizon(contender, steps)
    budget = {"steps": steps, "evals": evals, "eval_batches": EVAL_BATCHES}
    curve = train(family, make, np.zeros(1), seed_keys(key, seeds), **budget).pick(0)
    return {name: Outcome(curve, None, StepTime(family, make, key))}


def _tune(
    row: str,
    baseline: Baseline,
    family: TaskFamily,
    *,
    key: Key,
    cache_dir,
    whole_grid,
    keep,
    **options,
) -> dict[str, Outcome]:
    if keep:
        timed = step_time(baseline, family, key=key, cache_dir=cache_dir)
    else:
        timed = StepTime(family, fixed(baseline), key)
    tuned = tune(
        baseline,
        family,
        key=key,
        cache_dir=cache_dir,
        eval_batches=EVAL_BATCHES,
        whole_grid=whole_grid,
        keep=keep,
        **options,
    )
    # The grid ends here: of many tasks it would not fit in memory.
    chosen = {**tuned.chosen, "at_edge": bool(tuned.at_edge)}
    outcomes = {row: Outcome(tuned.curve, chosen, timed)}
    if whole_grid:  # Adam's
        default = untuned(tuned, **DEFAULT_HYPER)
        outcomes[DEFAULT] = Outcome(default, None, timed)
        outcomes[ORACLE] = Outcome(oracle(tuned.curve), None, timed)
    return outcomes


def _prepare(times: list[StepTime], workers: int) -> None:
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for _ in pool.map(StepTime.prepare, times):
            pass


def _share_of(progress: Progress | None, share: float) -> Progress | None:
    """Progress of a part that is so much of the whole, and its beginning."""
    return progress and (lambda what, done: progress(what, share * done))
