"""The job that searches for an optimizer: in this process or on Ray, with a live table, checkpoints
and resume; then the funnel, a shorter program, the artifact and the report.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.syntax import Syntax
from rich.table import Table

from cluster import run_directory
from cluster.console import console
from cluster.jobs import check_workers
from cluster.search_conclusion import JOURNAL, ROWS, conclude, percent
from learned_opt import artifact
from learned_opt.symbolic.analysis import simplified
from meta_train.recipes.base import families
from meta_train.search import journal
from meta_train.search.evaluator import Evaluator, Local, try_all
from meta_train.search.evolution import Search
from meta_train.search.recipe import SearchRecipe

CHECKPOINT = "search.json"


@contextmanager
def open_evaluator(workers: int, address: str | None) -> Iterator[Evaluator]:
    """This process (`workers` 0) or Ray workers."""
    if workers == 0:
        yield Local()
        return
    from cluster.search_workers import SearchWorkers

    remote = SearchWorkers(workers, address)
    try:
        yield remote
    finally:
        remote.close()


def run(
    recipe: SearchRecipe | None,
    directory: Path,
    workers: int = 0,
    address: str | None = None,
    resume: bool = False,
    asynchronous: bool = False,
    checkpoint_seconds: float = 20.0,
) -> Path:
    """Searches by the recipe (None: that of the run in the directory), and returns the exported
    artifact's path. A finished run is not run again.

    Args:
      asynchronous: workers never wait for one another, and the result depends on their timing.

    Raises:
      ValueError, TypeError, OSError: before any work, and before anything is written; the tasks are
        not those of the run that is resumed.
    """
    check_workers(workers, address)
    if asynchronous and not workers:
        raise ValueError("`asynchronous` needs `workers` of at least 1, got 0")
    recipe = recipe and recipe.with_text()
    recipe = run_directory.choose_recipe(directory, recipe, resume, SearchRecipe)
    recipe.check()
    path = directory / run_directory.ARTIFACT
    if path.exists():
        artifact.read(path)
        console.print(f"{directory} is finished: {path}")
        return path
    with open_evaluator(workers, address) as evaluator, run_directory.opened(directory, recipe):
        search, seconds = _search(recipe, directory, evaluator, asynchronous, checkpoint_seconds)
        return conclude(search, seconds, directory, evaluator)


def _search(
    recipe: SearchRecipe,
    directory: Path,
    evaluator: Evaluator,
    asynchronous: bool,
    checkpoint_seconds: float,
) -> tuple[Search, float]:
    """The search, gone on with where its checkpoint was and brought to its end; seconds it took."""
    checkpoint = directory / CHECKPOINT
    saved = json.loads(checkpoint.read_text()) if checkpoint.exists() else None
    log = journal.Journal(directory / JOURNAL, saved["journal"] if saved else 0)
    search = Search(recipe, log.write)
    with closing(log):
        console.print(f"preparing {recipe.tasks}: {', '.join(families(recipe.tasks))}")
        if saved:
            search.restore(saved["state"])
            search.asynchronous |= asynchronous
            _check_tasks(search, evaluator)
            console.print(f"resuming after {search.counts['evaluated']:,} programs")
        else:
            search.asynchronous = asynchronous
            search.begin(evaluator)
        rounds = saved["rounds"] if saved else 0
        began = time.perf_counter() - (saved["seconds"] if saved else 0.0)
        last_saved = -math.inf

        def save() -> None:
            state = {"state": search.state(), "journal": log.flush(), "rounds": rounds}
            state["seconds"] = time.perf_counter() - began
            run_directory.write(checkpoint, json.dumps(state))

        with (
            closing(run_directory.MetricsLog(directory, rounds)) as metrics,
            _watched(search, began) as show,
        ):
            while not search.done:
                if asynchronous:
                    pause = time.perf_counter() + checkpoint_seconds
                    search.run_asynchronously(evaluator, lambda: time.perf_counter() > pause)  # noqa: B023
                else:
                    search.round(evaluator)
                seconds = time.perf_counter() - began
                summary = search.summary()
                metrics.write(rounds, seconds=round(seconds, 3), **summary)
                rounds += 1
                show(summary)
                if seconds - last_saved > checkpoint_seconds or search.done:
                    save()
                    last_saved = seconds
        return search, time.perf_counter() - began


def _check_tasks(search: Search, evaluator: Evaluator) -> None:
    """Raises ValueError if the first program does not fare as it did when the run began."""
    assert search.first is not None
    assert search.reference is not None
    (losses,) = try_all(evaluator, [search.first.program], search.proxies)
    if losses.shape != search.reference.shape or not np.allclose(
        losses, search.reference, rtol=1e-2
    ):
        raise ValueError(
            f"`resume`: {search.recipe.tasks} are not the tasks of this run: the first program's "
            f"losses were {search.reference.round(4).tolist()}, now they are "
            f"{losses.round(4).tolist()}. Start a new run"
        )


@contextmanager
def _watched(search: Search, began: float) -> Iterator[Any]:
    """A live table where output is a terminal, else a line at every tenth of the way."""
    first, start = search.counts["evaluated"], time.perf_counter()
    goal = search.recipe.evaluated
    shown = first * 10 // goal

    def rate() -> float:
        return (search.counts["evaluated"] - first) / max(1e-9, time.perf_counter() - start)

    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield lambda summary: live.update(
                _table(search, summary, time.perf_counter() - began, rate())
            )
        return

    def line(summary: dict[str, Any]) -> None:
        nonlocal shown
        del summary
        counts = search.counts
        if counts["evaluated"] * 10 // goal != shown or search.done:
            shown = counts["evaluated"] * 10 // goal
            assert search.best is not None
            console.print(
                f"tried {counts['evaluated']:,} of {goal:,}, generated {counts['generated']:,}, "
                f"best {percent(search.best.fitness)}, {rate():.0f} tried per second"
            )

    yield line


def _table(search: Search, summary: dict[str, Any], seconds: float, rate: float) -> Group:
    counts, best = search.counts, search.best
    assert best is not None
    table = Table("", "", "of generated", box=None)
    for name, label in ROWS.items():
        share = f"{counts[name] / max(1, counts['generated']):.1%}" if name != "generated" else ""
        table.add_row(label, f"{counts[name]:,}", share)
    table.add_row("tried per second", f"{rate:.0f}", "")
    table.add_row("seconds", f"{seconds:.0f}", "")
    table.add_row("restarts", f"{search.restarts}", "")
    table.add_row("best", percent(best.fitness), f"program {best.number:,}")
    table.add_row("median of the population", percent(summary["median"]), "")
    table.add_row("different programs alive", f"{summary['distinct']:,}", "")
    table.add_row("redundant statements", f"{summary['redundant_for_updates']:.0%}", "")
    return Group(table, Syntax(str(simplified(best.program)), "python", theme="ansi_dark"))
