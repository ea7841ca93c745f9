"""A meta-training job from recipe to exported optimizer, in this process or on Ray, with progress,
checkpoints and resume.
"""

import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

import learned_opt
from cluster import run_directory, selection, task_costs
from cluster.console import console, progress
from learned_opt import artifact, compat, discovery
from learned_opt.base import Theta
from meta_train import preflight
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.base import diagnostics
from meta_train.estimators.compiled import compiled
from meta_train.estimators.mixture import divided, members
from meta_train.memory import available_bytes
from meta_train.outer_loop import MetaState, burn_in, meta_train, start
from meta_train.recipes.base import Recipe


def check_workers(workers: int, address: str | None) -> None:
    """Raises ValueError unless these two options go together."""
    if workers < 0:
        raise ValueError(f"`workers` must be 0 (this process) or more, got {workers}")
    if address is not None and workers == 0:
        raise ValueError(f"`address` {address} needs `workers` of at least 1, got 0")


@contextmanager
def open_estimator(
    estimator: Any, workers: int, address: str | None, costs: list[float] | None = None
) -> Iterator[Any]:
    """The estimator compiled here (`workers` 0) or spread over Ray workers, a mixture's members by
    their `costs`; ray is imported only for the latter.
    """
    if workers == 0:
        yield compiled(estimator)
        return
    from cluster.remote import Remote

    remote = Remote(estimator, workers, address, costs=costs)
    try:
        yield remote
    finally:
        remote.close()


class Phase(NamedTuple):
    """A run that is not finished, of a recipe and maybe on the way to another."""

    directory: Path
    recipe: Recipe
    estimator: Any


def run(
    recipe: Recipe | None,
    directory: Path,
    workers: int = 0,
    address: str | None = None,
    resume: bool = False,
    checkpoint_every: int = 100,
    time_budget: float | None = None,
) -> Path:
    """Meta-trains by the recipe (None: that of the run in the directory) and returns the exported
    artifact's path. A finished run is not run again. Where `start` names a recipe, that is run
    first, in the directory's first/.

    Raises:
      ValueError, TypeError, OSError: before any work, and before anything is written.
    """
    check_workers(workers, address)
    if checkpoint_every < 1:
        raise ValueError(f"`checkpoint_every` must be at least 1, got {checkpoint_every}")
    if recipe is not None and time_budget is not None:
        recipe = task_costs.recipe_within(recipe, time_budget)
    recipe = run_directory.choose_recipe(directory, recipe, resume)
    path = directory / run_directory.ARTIFACT
    if _finished(directory, recipe):
        console.print(f"{directory} is finished: {path}")
        return path
    phases = _phases(directory, recipe, time_budget)
    for phase in phases:
        if workers:
            divided(phase.estimator, workers)
        preflight.check(
            phase.estimator, phase.recipe.build_rule(), _available_bytes(workers, address)
        )
    for i, phase in enumerate(phases):
        costs = task_costs.of_recipe(phase.recipe) if workers else None
        with ExitStack() as held:
            with open_estimator(phase.estimator, workers, address, costs) as spread:
                # also those that come later: what is stopped in its first phase can be resumed
                for later in reversed(phases[i:]):
                    held.enter_context(run_directory.opened(later.directory, later.recipe))
                state = _meta_train(phase, spread, checkpoint_every)
            # the workers have ended: their cores are free
            _conclude(phase, state, workers)
    return path


def _finished(directory: Path, recipe: Recipe) -> bool:
    path = directory / run_directory.ARTIFACT
    if not path.exists():
        return False
    card = artifact.read(path)[2]
    # `export` may have written the last theta before one was chosen
    chosen = not recipe.select_on or selection.CARD_ENTRY in card
    return chosen and card.get("outer_steps") == recipe.outer_steps


def _phases(directory: Path, recipe: Recipe, time_budget: float | None) -> list[Phase]:
    """What is left to run, in order; the last is that of the recipe."""
    recipe.check()
    earlier, first = [], recipe.first()
    if first is not None:
        inside = directory / run_directory.FIRST
        if (inside / run_directory.CONFIG).is_file():
            first = run_directory.read_recipe(inside)
        elif time_budget is not None:
            first = task_costs.recipe_within(first, time_budget)
        if not _finished(inside, first):
            earlier = _phases(inside, first, time_budget)
    return [*earlier, Phase(directory, recipe, recipe.build_estimator())]


def _start_theta(directory: Path, recipe: Recipe) -> Theta | None:
    """What the recipe's `start` stands for, once what comes first is finished."""
    if recipe.first() is None:
        return recipe.start_theta()
    return artifact.read(directory / run_directory.FIRST / run_directory.ARTIFACT)[1]


def _meta_train(phase: Phase, spread: Any, checkpoint_every: int) -> MetaState:
    """The state after the last outer step; from the newest checkpoint, if there is one."""
    directory, recipe, estimator = phase
    rule, optimizer = recipe.build_rule(), recipe.build_optimizer()
    snapshots = set(recipe.snapshot_steps())
    with closing(Checkpoints(directory / run_directory.CHECKPOINTS)) as checkpoints:
        began = time.perf_counter()
        state = start(rule, spread, optimizer, recipe.seed, _start_theta(directory, recipe))
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

            def on_step(step, estimate, norm, theta):
                if step + 1 in snapshots:
                    card = {"outer_step": step + 1}
                    learned_opt.save(selection.snapshot(directory, step + 1), rule, theta, card)
                loss = float(estimate.loss)
                log.write(
                    step=step,
                    loss=loss,
                    grad_norm=float(norm),
                    seconds=round(time.perf_counter() - began, 3),
                    **diagnostics(estimate, estimator.particles),
                )
                advance(f"meta-loss {loss:.3f}")

            return meta_train(
                spread, optimizer, state, recipe.outer_steps, checkpoints, checkpoint_every, on_step
            )


def _conclude(phase: Phase, state: MetaState, workers: int) -> None:
    """Exports the last theta of a run, or the best of its snapshots."""
    directory, recipe, _ = phase
    about: dict[str, Any] = {"workers": workers}
    if recipe.select_on:
        theta, about[selection.CARD_ENTRY] = selection.select(directory, recipe)
        state = state._replace(theta=theta)
    export(directory, recipe, state, directory / run_directory.ARTIFACT, about)


def _available_bytes(workers: int, address: str | None) -> int | None:
    """Memory for all particles; None where they are spread over machines of which nothing is
    known.
    """
    if address is not None:
        return None
    # local workers run on the processors and share this machine
    return available_bytes(jax.local_devices(backend="cpu") if workers else jax.local_devices())


def provenance() -> dict[str, Any]:
    """What every card says of where and with what it was made."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.default_backend()}",
        "code": {
            name: importlib.metadata.version(name) for name in ("learned-opt", "jax", "optax")
        },
        "licence": "Apache-2.0",
    }


def export(
    directory: Path,
    recipe: Recipe,
    state: MetaState,
    path: Path,
    about: dict[str, Any] | None = None,
) -> Path:
    """Writes the run's theta as an artifact whose card says how it was made, and `about`. The cost
    is that of all phases.
    """
    metrics = run_directory.read_metrics(directory)
    of_tasks = members(recipe.build_estimator())
    per_step = recipe.truncation * sum(e.particles * e.unrolls for e in of_tasks)
    losses = [line["loss"] for line in metrics[-50:] if line["loss"] is not None]
    inner_steps = (int(state.step) + recipe.burn_in) * per_step
    seconds = metrics[-1]["seconds"] if metrics else None
    card = {"recipe": vars(recipe), "outer_steps": int(state.step)}
    if recipe.first() is not None:
        _, _, earlier = artifact.read(directory / run_directory.FIRST / run_directory.ARTIFACT)
        kept = ("recipe", "outer_steps", "inner_steps", "seconds", selection.CARD_ENTRY, "first")
        card["first"] = {name: earlier[name] for name in kept if name in earlier}
        inner_steps += earlier["inner_steps"]
        if None not in (seconds, earlier["seconds"]):
            seconds = round(seconds + earlier["seconds"], 3)
    card |= {
        "inner_steps": inner_steps,
        "meta_loss": sum(losses) / len(losses) if losses else None,
        "seconds": seconds,
        **(about or {}),
        **provenance(),
    }
    learned_opt.save(path, recipe.build_exported_rule(), state.theta, card)
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
        rule, compiled(recipe.build_estimator()), recipe.build_optimizer(), recipe.seed
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
