"""A meta-training job from recipe to exported optimizer, in this process or on Ray, with progress,
checkpoints and resume.
"""

import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import learned_opt
import tasks
from cluster import run_directory
from evaluation import benchmark
from evaluation.baselines import BASELINES, GROUPS
from evaluation.report import render, table
from evaluation.results import load as load_results
from evaluation.results import save as save_results
from learned_opt import artifact, compat, discovery
from meta_train import preflight
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.base import diagnostics, partition
from meta_train.estimators.compiled import Compiled
from meta_train.memory import available_bytes
from meta_train.outer_loop import MetaState, burn_in, meta_train, start
from meta_train.recipes.base import Recipe
from tasks import suites
from tasks.suites import SUITES

console = Console(soft_wrap=True)  # paths stay whole where the output is not a terminal


@contextmanager
def open_estimator(estimator: Any, workers: int, address: str | None) -> Iterator[Any]:
    """The estimator compiled here (`workers` 0) or spread over Ray workers; ray is imported only
    for the latter.
    """
    if workers == 0:
        yield Compiled(estimator)
        return
    from cluster.remote import Remote

    remote = Remote(estimator, workers, address)
    try:
        yield remote
    finally:
        remote.close()


def run(
    recipe: Recipe | None,
    directory: Path,
    workers: int = 0,
    address: str | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
) -> Path:
    """Meta-trains by the recipe (None: that of the run in the directory) and returns the exported
    artifact's path. A finished run is not run again.

    Raises:
      ValueError, TypeError, OSError: before any work, and before anything is written.
    """
    if workers < 0:
        raise ValueError(f"`workers` must be 0 (this process) or more, got {workers}")
    if address is not None and workers == 0:
        raise ValueError(f"`address` {address} needs `workers` of at least 1, got 0")
    if checkpoint_every < 1:
        raise ValueError(f"`checkpoint_every` must be at least 1, got {checkpoint_every}")
    recipe = run_directory.choose_recipe(directory, recipe, resume)
    path = directory / run_directory.ARTIFACT
    if path.exists() and artifact.read(path)[2].get("outer_steps") == recipe.outer_steps:
        console.print(f"{directory} is finished: {path}")
        return path
    estimator, rule, optimizer = (
        recipe.build_estimator(),
        recipe.build_rule(),
        recipe.build_optimizer(),
    )
    if workers:
        partition(estimator, workers)
    preflight.check(estimator, rule, _available_bytes(workers, address))
    with (
        open_estimator(estimator, workers, address) as spread,
        run_directory.opened(directory, recipe),
        closing(Checkpoints(directory / run_directory.CHECKPOINTS)) as checkpoints,
    ):
        began = time.perf_counter()
        state = start(rule, spread, optimizer, recipe.seed)
        if checkpoints.latest() is not None:
            state = checkpoints.restore(state)
            console.print(f"resuming at outer step {int(state.step)}")
        elif recipe.burn_in:
            with progress("burn-in", recipe.burn_in) as advance:
                state = burn_in(spread, state, recipe.burn_in, advance)
        with (
            closing(run_directory.MetricsLog(directory, int(state.step))) as log,
            progress("meta-training", recipe.outer_steps, int(state.step)) as advance,
        ):
            began -= log.seconds

            def on_step(step, estimate, norm):
                loss = float(estimate.loss)
                log.write(
                    step=step,
                    loss=loss,
                    grad_norm=float(norm),
                    seconds=round(time.perf_counter() - began, 3),
                    **diagnostics(estimate, estimator.particles),
                )
                advance(f"meta-loss {loss:.3f}")

            state = meta_train(
                spread, optimizer, state, recipe.outer_steps, checkpoints, checkpoint_every, on_step
            )
        return export(directory, recipe, state, path)


def _available_bytes(workers: int, address: str | None) -> int | None:
    """Memory for all particles; None where they are spread over machines of which nothing is
    known.
    """
    if address is not None:
        return None
    # local workers run on the processors and share this machine
    return available_bytes(jax.local_devices(backend="cpu") if workers else jax.local_devices())


def export(directory: Path, recipe: Recipe, state: MetaState, path: Path) -> Path:
    """Writes the run's theta as an artifact whose card says how it was made."""
    metrics = run_directory.read_metrics(directory)
    estimator = recipe.build_estimator()
    per_step = estimator.particles * estimator.unrolls * recipe.truncation
    losses = [line["loss"] for line in metrics[-50:] if line["loss"] is not None]
    card = {
        "recipe": vars(recipe),
        "outer_steps": int(state.step),
        "inner_steps": (int(state.step) + recipe.burn_in) * per_step,
        "meta_loss": sum(losses) / len(losses) if losses else None,
        "seconds": metrics[-1]["seconds"] if metrics else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "code": {
            name: importlib.metadata.version(name) for name in ("learned-opt", "jax", "optax")
        },
        "licence": "Apache-2.0",
    }
    learned_opt.save(path, recipe.build_rule(), state.theta, card)
    return path


def export_latest(directory: Path, path: Path) -> Path:
    """Exports the newest checkpoint of a run, finished or not.

    Raises:
      FileNotFoundError: there is no run or no checkpoint.
    """
    recipe = run_directory.read_recipe(directory)
    rule = recipe.build_rule()
    checkpoints = Checkpoints(directory / run_directory.CHECKPOINTS)
    template = start(
        rule, Compiled(recipe.build_estimator()), recipe.build_optimizer(), recipe.seed
    )
    return export(directory, recipe, checkpoints.restore(template), path)


def convert(files: tuple[Path, ...], name: str, licence: str | None, path: Path) -> Path:
    """Writes published weights as an artifact whose card names their files by checksum.

    Raises:
      ValueError, OSError: before anything is written, as `compat.read_published`.
    """
    rules = discovery.members(learned_opt)
    # a bare class is sized by the weights, a rule with fields is taken at its word
    rule = rules[name] if name in rules else discovery.build("rule", name, rules)
    run_directory.check_writable("out", path)
    rule, theta = compat.read_published(files, rule)
    checksums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    learned_opt.save(path, rule, theta, {"converted_from": checksums, "licence": licence})
    return path


def evaluate(
    names: tuple[str, ...],
    suite: str,
    steps: int,
    seeds: int,
    baselines: tuple[str, ...],
    directory: Path,
) -> None:
    """Judges optimizers by name on a suite; prints the table, writes results.json and report.html.

    Raises:
      ValueError, FileNotFoundError: before any work, for unknown names.
    """
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    known = {*BASELINES, *GROUPS}
    artifacts = [name for name in names if name not in known]
    baselines = (*baselines, *(name for name in names if name in known))
    contenders = {}
    for name in artifacts:
        rule, theta, _ = artifact.read(name)
        if (label := _label(name)) in contenders:
            raise ValueError(
                f"`optimizer` {name}: there is another called {label}; rename the file"
            )
        contenders[label] = partial(rule.optimizer, theta)
    with progress("evaluating", 100) as advance:
        done = 0

        def report_progress(what: str, share: float) -> None:
            nonlocal done
            while done < int(100 * share):
                done += 1
                advance(what)

        results = benchmark.evaluate(
            contenders,
            _families(suite),
            steps=steps,
            seeds=seeds,
            baselines=baselines,
            progress=report_progress,
            evals=min(20, steps),
        )
    directory.mkdir(parents=True, exist_ok=True)
    save_results(results, directory / run_directory.RESULTS)
    console.print(table(results), soft_wrap=False)
    console.print(f"report: {report(directory)}")


def _label(name: str) -> str:
    """Pretrained optimizers go by their name, files by that of their run."""
    path = Path(name).resolve()
    return path.parent.name if path.name == run_directory.ARTIFACT else path.stem


def _families(suite: str) -> dict[str, Any]:
    """The suite of that name, or a suite of the one task family that is described."""
    members = discovery.members(tasks)
    if suite in SUITES:
        return suites.suite(suite)
    if suite.partition("(")[0] not in members:
        raise ValueError(discovery.unknown("suite or task", suite, [*SUITES, *members]))
    return {suite: discovery.build("task", suite, members)}


def report(directory: Path) -> Path:
    """Writes report.html from the results.json, and the metrics.jsonl if there is one, of a
    directory.

    Raises:
      FileNotFoundError: there is no results.json.
    """
    results = directory / run_directory.RESULTS
    if not results.is_file():
        raise FileNotFoundError(f"{directory} holds no {results.name}: run learned-opt evaluate")
    path = directory / run_directory.REPORT
    metrics, truncation = run_directory.read_metrics(directory), None
    if metrics:
        recipe = run_directory.read_recipe(directory)
        # a final loss is that of an episode, not of a window
        truncation = None if recipe.objective.startswith("final") else recipe.truncation
    render(load_results(results), path, metrics=metrics, truncation=truncation)
    return path


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Any]:
    """A progress bar with ETA; where output is no terminal, a line at every tenth of the way."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")
            yield lambda note="": bar.update(task, advance=1, note=note)
        return
    began, first = time.perf_counter(), done

    def advance(note: str = "") -> None:
        nonlocal done
        done += 1
        if done * 10 // total != (done - 1) * 10 // total:
            elapsed = time.perf_counter() - began
            left = elapsed / (done - first) * (total - done)
            console.print(f"{what} {done}/{total} {note} {elapsed:.0f} s, ETA {left:.0f} s")

    yield advance
