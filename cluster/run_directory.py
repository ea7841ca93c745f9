"""A run is a directory: config.json, metrics.jsonl, checkpoints/, theta.safetensors, results.json,
report.html. Nothing is a pickle.
"""

import json
import os
from pathlib import Path
from typing import Any

from meta_train.recipes.base import Recipe

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ARTIFACT = "theta.safetensors"
RESULTS = "results.json"
REPORT = "report.html"
EVENTS = "tensorboard"


def open_run(directory: Path, recipe: Recipe, resume: bool, default: Recipe) -> Recipe:
    """Creates the directory, or finds the run in it when `resume`; returns the recipe to run.

    A run that is resumed keeps the recipe it was started with: `recipe` must be that one or, where
    no option was given, the `default`.

    Raises:
      FileExistsError: the directory is not empty, and `resume` was not asked for.
      ValueError: the recipe is not that of the run; or there is something, but no run, to resume.
    """
    config = directory / CONFIG
    occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if occupied and not resume:
        raise FileExistsError(
            f"`run_dir` {directory} exists and is not empty: choose another, or add --resume"
        )
    if occupied and not config.is_file():
        raise ValueError(f"`run_dir` {directory} is not empty and holds no run (no {CONFIG})")
    if occupied:
        saved = read_recipe(directory)
        if recipe not in (saved, default):
            changed = [
                f"{name}: {old!r} in the run, {new!r} asked for"
                for name, old in vars(saved).items()
                if old != (new := getattr(recipe, name))
            ]
            raise ValueError(f"`run_dir` {directory} has another recipe: {'; '.join(changed)}")
        return saved
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{CONFIG}"
    temporary.write_text(recipe.to_json() + "\n")
    os.replace(temporary, config)
    return recipe


def read_recipe(directory: Path) -> Recipe:
    """The recipe of a run.

    Raises:
      FileNotFoundError: the directory holds no run.
      ValueError: its config.json is not one of this version.
    """
    config = directory / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"`run_dir` {directory} holds no run: there is no {CONFIG} in it")
    try:
        return Recipe.from_json(config.read_text())
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{config} is not a recipe of this version: {error}") from None


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl, one per outer step."""
    path = directory / METRICS
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def event_writer(directory: Path) -> Any | None:
    """A TensorBoard writer into the directory where the extra `tensorboard` is installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / EVENTS))


class MetricsLog:
    """Appends one line per outer step. Opening it drops the lines of steps that will be run
    again.
    """

    def __init__(self, directory: Path, step: int):
        kept = [line for line in read_metrics(directory) if line["step"] < step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        temporary = directory / f".{METRICS}"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, directory / METRICS)
        self._file = (directory / METRICS).open("a", buffering=1)
        self._events = event_writer(directory)

    def write(self, step: int, **values: float) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()
