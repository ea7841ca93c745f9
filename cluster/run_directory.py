"""A run is a directory: config.json, metrics.jsonl, checkpoints/, theta.safetensors, results.json,
report.html; thetas/ and selection.json where the exported theta is chosen among snapshots; and
first/, the run that comes first. Nothing is a pickle.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import filelock

from evaluation.atomic import replacing
from meta_train.recipes.base import Recipe
from meta_train.search.recipe import SearchRecipe

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
ARTIFACT = "theta.safetensors"
SNAPSHOTS = "thetas"
SELECTION = "selection.json"
FIRST = "first"
RESULTS = "results.json"
REPORT = "report.html"
EVENTS = "tensorboard"


AnyRecipe = TypeVar("AnyRecipe", Recipe, SearchRecipe)


def choose_recipe(
    directory: Path, asked: AnyRecipe | None, resume: bool, kind: type[AnyRecipe] = Recipe
) -> AnyRecipe:
    """What to run: `asked`, or that of the run in the directory when `resume`.

    A run that is resumed keeps its recipe; `asked` must then be None or the same. Writes nothing.

    Raises:
      FileExistsError: the directory is not empty, and `resume` was not asked for.
      ValueError: the recipe is not that of the run; or there is something, but no run, to resume.
    """
    occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if not occupied:
        return asked or kind()
    if not resume:
        raise FileExistsError(
            f"`run_dir` {directory} exists and is not empty: choose another, or add --resume"
        )
    if not (directory / CONFIG).is_file():
        raise ValueError(f"`run_dir` {directory} is not empty and holds no run (no {CONFIG})")
    saved = read_recipe(directory, kind)
    if asked not in (None, saved):
        changed = [
            f"{name}: {old!r} in the run, {new!r} asked for"
            for name, old in vars(saved).items()
            if old != (new := getattr(asked, name))
        ]
        raise ValueError(
            f"`run_dir` {directory} has another recipe ({'; '.join(changed)}): choose another "
            "directory, or leave these options out"
        )
    return saved


@contextmanager
def opened(directory: Path, recipe: Recipe | SearchRecipe) -> Iterator[None]:
    """Makes the directory with its config.json where it is missing, and holds it for one process.

    Raises:
      BlockingIOError: another process is at work in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(directory / ".lock", timeout=0):
            if not (directory / CONFIG).exists():
                write(directory / CONFIG, recipe.to_json() + "\n")
            yield
    except filelock.Timeout:
        raise BlockingIOError(f"`run_dir` {directory}: another process is at work in it") from None


def write(path: Path, text: str) -> None:
    """Writes a text file in one piece."""
    with replacing(path) as file:
        file.write(text.encode())


def check_writable(argument: str, path: Path) -> None:
    """Raises OSError if the file could not be written; makes nothing."""
    if path.is_dir():
        raise IsADirectoryError(f"`{argument}` {path} is a directory: name a file in it")
    nearest = next(folder for folder in path.absolute().parents if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise PermissionError(f"`{argument}` {path} cannot be written in {nearest}")


def read_recipe(directory: Path, kind: type[AnyRecipe] = Recipe) -> AnyRecipe:
    """The recipe of a run.

    Raises:
      FileNotFoundError: the directory holds no run.
      ValueError: its config.json is not one of this version.
    """
    config = directory / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"`run_dir` {directory} holds no run: there is no {CONFIG} in it")
    try:
        return kind.from_json(config.read_text())
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        what = "a search" if kind is SearchRecipe else "meta-training"
        raise ValueError(f"{config} is no recipe of {what} in this version: {error}") from None


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


def _finite(value: Any) -> Any:
    if isinstance(value, Sequence):
        return [_finite(item) for item in value]
    return value if value is not None and math.isfinite(value) else None


class MetricsLog:
    """Appends one line per outer step. Opening it drops the lines of steps that will be run
    again.
    """

    def __init__(self, directory: Path, step: int):
        kept = [line for line in read_metrics(directory) if line["step"] < step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        write(directory / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = (directory / METRICS).open("a", buffering=1)
        self._events = event_writer(directory)

    def write(self, step: int, **values: float | Sequence[float | None] | None) -> None:
        """Numbers that are not finite become null, which JSON has; TensorBoard gets what is left of
        the scalars.
        """
        known = {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **known}, allow_nan=False) + "\n")
        if self._events:
            for name, value in known.items():
                if isinstance(value, float | int):
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events:
            self._events.close()
