"""Which theta of a run is exported: of some snapshots the one that does best on meta-validation
tasks, which are neither trained on nor held out.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import learned_opt
from cluster import run_directory
from cluster.console import console, progress
from evaluation import lines
from evaluation.baselines import BASELINES
from evaluation.benchmark import EVAL_BATCHES, EVALS
from evaluation.curve import seed_keys, train_from
from evaluation.metrics import METRICS
from evaluation.stats import iqm, stratified_bootstrap
from evaluation.tuning import tune
from learned_opt.base import LearnedOptimizer, Theta
from meta_train.recipes.base import Recipe, families
from tasks.base import TaskFamily

STATISTICS = {
    "speedup": iqm,
    "mean_train_loss": iqm,
    "final_train_loss": iqm,
    "held_out_loss": iqm,
    "survival": np.mean,
}
SCORED = ("speedup", "mean_train_loss", "held_out_loss")  # their geometric mean is the score
CARD_ENTRY = "meta_validation"
THREADS = 2  # that compile and train side by side

Scores = dict[str, np.ndarray]  # metric -> [snapshots, seeds]


@dataclasses.dataclass(frozen=True)
class AtHorizon:
    """A rule as `train_from` wants it, theta being what its grid is over; hashable, so that all
    snapshots are one compiled program.
    """

    rule: LearnedOptimizer
    steps: int

    def __call__(self, theta: Theta) -> optax.GradientTransformation:
        return self.rule.optimizer(theta, self.steps)


def snapshot(directory: Path, step: int) -> Path:
    """The file of a run's theta after so many outer steps."""
    return directory / run_directory.SNAPSHOTS / f"{step}.safetensors"


def select(directory: Path, recipe: Recipe) -> tuple[Theta, dict[str, Any]]:
    """Theta of the best snapshot of a run, and what its card says of that; writes selection.json.

    Rules are judged as they are meta-trained. Nothing is kept of a selection that is interrupted
    but tuned Adam, in the cache that `learned-opt evaluate` has, too.
    """
    steps = recipe.snapshot_steps()
    thetas = [learned_opt.read(snapshot(directory, step))[1] for step in steps]
    scores = judge(recipe, thetas)
    found = [summarize(scores, i) for i in range(len(thetas))]
    best = int(np.argmax([summary["score"] for summary in found]))
    budget = {
        "suite": recipe.select_on, "steps": recipe.select_steps, "seeds": recipe.select_seeds,
    }  # fmt: skip
    snapshots = [
        {
            "outer_step": step,
            **plain(summary),
            "runs": {
                task: {name: plain(values[i].tolist()) for name, values in of_task.items()}
                for task, of_task in scores.items()
            },
        }
        for i, (step, summary) in enumerate(zip(steps, found, strict=True))
    ]
    selection = {**budget, "outer_step": steps[best], "snapshots": snapshots}
    run_directory.write(directory / run_directory.SELECTION, json.dumps(selection, indent=1) + "\n")
    console.print(
        f"chosen: theta after outer step {steps[best]}, score {found[best]['score']:.3f} on "
        f"{recipe.select_on}"
    )
    return thetas[best], {**budget, "outer_step": steps[best], **plain(found[best])}


def judge(recipe: Recipe, thetas: list[Theta]) -> dict[str, Scores]:
    """Scores of all thetas on every task of the suite against Adam, tuned for the task."""
    suite = families(recipe.select_on)
    budget: dict[str, Any] = {
        "steps": recipe.select_steps,
        # as `learned-opt evaluate` has them, so that both read one cache
        "evals": min(EVALS, recipe.select_steps),
        "eval_batches": EVAL_BATCHES,
    }
    make = AtHorizon(recipe.build_rule(), recipe.select_steps)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *thetas)
    runs = len(thetas) * recipe.select_seeds

    def on(family: TaskFamily) -> Mapping[str, Scores]:
        key, seeds = jax.random.key(0), recipe.select_seeds
        adam = tune(BASELINES["adam"], family, seeds=seeds, key=key, **budget).curve
        curves = train_from(family, make, stacked, seed_keys(key, seeds), **budget)
        each = [curves.pick(i) for i in range(len(thetas))]
        return {"": {m: np.stack([METRICS[m](curve, adam) for curve in each]) for m in STATISTICS}}

    jobs = [[lines.Job(task, "", runs, partial(on, family))] for task, family in suite.items()]
    with progress("selecting theta", len(suite)) as advance:
        found = lines.run(
            lines.longest_first(jobs, suite), THREADS, lambda what, _: advance(what.rstrip(": "))
        )
    return {task: found["", task] for task in suite}  # in the suite's order, not in time's


def summarize(scores: Mapping[str, Scores], index: int) -> dict[str, Any]:
    """The score of a snapshot, and [estimate, low, high] of every metric over tasks x seeds."""
    intervals = {
        metric: list(
            stratified_bootstrap({t: s[metric][index] for t, s in scores.items()}, statistic)
        )
        for metric, statistic in STATISTICS.items()
    }
    product = np.prod([intervals[metric][0] for metric in SCORED])
    return {"score": float(product ** (1 / len(SCORED))), **intervals}


def plain(values: Any) -> Any:
    """Numbers to six digits, in whatever holds them."""
    if isinstance(values, dict):
        return {name: plain(value) for name, value in values.items()}
    if isinstance(values, list):
        return [plain(value) for value in values]
    return float(f"{values:.6g}")
