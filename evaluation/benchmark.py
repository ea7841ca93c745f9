"""Judges optimizers on a suite of tasks, beside baselines tuned per task."""

import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from evaluation.baselines import BASELINES, Baseline, find
from evaluation.curve import Curve, check_family, train_curves
from evaluation.results import Results
from evaluation.summary import oracle, summarize
from evaluation.timing import compile_steps, step_seconds
from evaluation.tuning import Criterion, Tuned, baseline_seconds, prepare_seconds, tune, untuned
from tasks.base import Key, TaskFamily

Contender = Callable[[int], optax.GradientTransformation]  # horizon -> optax
Progress = Callable[[str, float], None]  # what was just done, share of the work done

DEFAULT, ORACLE = "adam (lr 0.001)", "adam (oracle)"
DEFAULT_HYPER = {"learning_rate": 1e-3, "cosine": 0.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class Horizon:
    """A contender as `train_curves` wants it; hashable, so that it is compiled once."""

    contender: Contender
    steps: int

    def __call__(self, _) -> optax.GradientTransformation:
        return self.contender(self.steps)


def evaluate(
    contenders: Mapping[str, Contender],
    suite: Mapping[str, TaskFamily],
    *,
    steps: int,
    seeds: int,
    baselines: str | Iterable[str] = "baselines/quick",
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
    key: Key | None = None,
    tuning_seeds: int = 2,
    criterion: Criterion = "mean",
    evals: int = 20,
    workers: int = 2,
) -> Results:
    """Trains everything on everything and scores it against default and tuned Adam.

    Rows: each contender; each baseline, tuned per task (Adam always); Adam at its default learning
    rate; and an oracle that is at every step as low as the best of Adam's whole grid.

    Args:
      contenders: name -> (horizon -> optax transformation).
      suite: name -> task family.
      progress: called with a description and the share of work done, by one thread at a time.
      key: all randomness; None for `jax.random.key(0)`.
      workers: threads that compile and train side by side.

    Raises:
      ValueError, TypeError: before any work, for unknown baselines, taken names or an empty suite.
    """
    start = time.perf_counter()
    key = jax.random.key(0) if key is None else key
    chosen = {tuned_name(b): b for b in find(["adam", *_names(baselines)])}
    _check(contenders, suite, chosen)
    budget = {"steps": steps, "seeds": seeds, "evals": evals, "key": key}
    tuning = {"tuning_seeds": tuning_seeds, "criterion": criterion, "cache_dir": cache_dir}

    lines: dict[tuple, dict[tuple[str, str], Callable[[], Curve | Tuned]]] = {}
    for task, family in suite.items():
        for name, baseline in chosen.items():
            # Those that share a compiled program wait in one line, so that it is compiled once.
            job = partial(_tune, baseline, family, **budget, **tuning)
            lines.setdefault((task, baseline.make), {})[name, task] = job
        for name, contender in contenders.items():
            lines[task, name] = {(name, task): partial(_train, contender, family, **budget)}
    outcomes = _run(list(lines.values()), workers, progress)

    rows = {name: {"kind": "contender", "chosen": {}} for name in contenders}
    rows |= {name: {"kind": "tuned", "chosen": {}} for name in chosen}
    rows |= {DEFAULT: {"kind": "default", "chosen": {}}, ORACLE: {"kind": "oracle", "chosen": {}}}
    curves: dict[str, dict[str, Curve]] = {name: {} for name in rows}
    adam = tuned_name(BASELINES["adam"])
    for count, (task, family) in enumerate(suite.items(), 1):
        # Time per step is measured here, alone: the other threads would have disturbed it.
        for name, contender in contenders.items():
            seconds = step_seconds(family, Horizon(contender, steps), key)
            curves[name][task] = _timed(outcomes[name, task], seconds)
        for name, baseline in chosen.items():
            seconds = baseline_seconds(baseline, family, key=key, cache_dir=cache_dir)
            tuned = outcomes[name, task]
            curves[name][task] = _timed(tuned.curve, seconds)
            rows[name]["chosen"][task] = {**tuned.chosen, "at_edge": bool(tuned.at_edge)}
        seconds = baseline_seconds(BASELINES["adam"], family, key=key, cache_dir=cache_dir)
        curves[DEFAULT][task] = _timed(untuned(outcomes[adam, task], **DEFAULT_HYPER), seconds)
        curves[ORACLE][task] = oracle(curves[adam][task])
        if progress:
            progress(f"{task}: time per step", 0.8 + 0.2 * count / len(suite))

    about = _about(start) | {
        "tasks": list(suite),
        "steps": steps,
        "seeds": seeds,
        "tuning_seeds": tuning_seeds,
        "criterion": criterion,
        "grids": {b.name: len(b.grid()["learning_rate"]) for b in chosen.values()},
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


def _names(baselines: str | Iterable[str]) -> list[str]:
    return [baselines] if isinstance(baselines, str) else list(baselines)


def _check(contenders, suite, baselines) -> None:
    if not suite:
        raise ValueError("`suite` must hold at least one task family, got none")
    taken = sorted({DEFAULT, ORACLE, *baselines} & set(contenders))
    if taken:
        raise ValueError(f"`contenders` uses names of baselines, got {taken}: call them otherwise")
    for family in suite.values():
        check_family(family)


def _train(contender: Contender, family: TaskFamily, *, steps: int, **budget) -> Curve:
    make = Horizon(contender, steps)
    compile_steps(family, make, budget["key"])
    return train_curves(family, make, np.zeros(1), steps=steps, **budget).pick(0)


def _tune(baseline: Baseline, family: TaskFamily, *, key: Key, cache_dir, **budget) -> Tuned:
    # Time per step is measured one by one later on; compiling for it can be done here, in parallel.
    prepare_seconds(baseline, family, key=key, cache_dir=cache_dir)
    return tune(baseline, family, key=key, cache_dir=cache_dir, **budget)


def _run(lines, workers: int, progress: Progress | None) -> dict:
    """Outcome of every job: lines side by side, the jobs of a line one after another."""
    lock, total, done = threading.Lock(), sum(map(len, lines)), []

    def run(line):
        outcomes = {}
        for (name, task), job in line.items():
            outcomes[name, task] = job()
            with lock:
                done.append(name)
                if progress:
                    progress(f"{task}: {name}", 0.8 * len(done) / total)
        return outcomes

    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        futures = [pool.submit(run, line) for line in lines]
        return {job: outcome for f in futures for job, outcome in f.result().items()}
    finally:  # after an error or Ctrl-C, what has not begun is dropped
        pool.shutdown(cancel_futures=True)


def _timed(curve: Curve, seconds: tuple[float, float]) -> Curve:
    return curve._replace(seconds_per_step=seconds[0], adam_seconds_per_step=seconds[1])
