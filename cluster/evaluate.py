"""An evaluation job: from names of optimizers and tasks to results.json and report.html."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cluster import run_directory, task_costs
from cluster.console import console, progress
from cluster.jobs import check_workers
from evaluation import benchmark
from evaluation.baselines import BASELINES, GROUPS, cosine_only, find
from evaluation.curve import Train, train_from
from evaluation.report import render, table
from evaluation.results import load as load_results
from evaluation.results import save as save_results
from learned_opt import artifact
from meta_train.recipes.base import families

THREADS = 2  # that compile and train side by side in this process


@contextmanager
def open_training(workers: int, address: str | None) -> Iterator[Train]:
    """What trains: this process (`workers` 0), or Ray workers; ray is imported only for them."""
    if workers == 0:
        yield train_from
        return
    from cluster.remote_tuning import TrainingWorkers

    remote = TrainingWorkers(workers, address)
    try:
        yield remote
    finally:
        remote.close()


def evaluate(
    names: tuple[str, ...],
    suite: str,
    steps: int,
    seeds: int,
    baselines: tuple[str, ...],
    directory: Path,
    workers: int = 0,
    address: str | None = None,
    time_budget: float | None = None,
    learning_rates: tuple[float, ...] = (),
    cosine_baselines: tuple[str, ...] = (),
) -> None:
    """Judges optimizers by name on a suite; prints the table, writes results.json and report.html.

    Args:
      learning_rates, cosine_baselines: see `benchmark.evaluate`; artifacts are its contenders.

    Raises:
      ValueError, OSError: before any work, for unknown names and clusters that do not answer.
    """
    for name, value in (("steps", steps), ("seeds", seeds)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    check_workers(workers, address)
    known = {*BASELINES, *GROUPS}
    artifacts = [name for name in names if name not in known]
    baselines = (*baselines, *(name for name in names if name in known))
    contenders = {}
    for name in artifacts:
        rule, theta, _ = artifact.read(name)
        if (label := row_label(name)) in contenders:
            raise ValueError(
                f"`optimizer` {name}: there is another called {label}; rename the file"
            )
        contenders[label] = partial(rule.optimizer, theta)
    find(baselines)
    cosine_only(cosine_baselines, learning_rates)
    if learning_rates and not contenders and not cosine_baselines:
        raise ValueError(
            "`learning_rates` tunes artifacts in `optimizer` and `cosine_baselines`, got neither"
        )
    whole = families(suite)
    chosen = task_costs.within(whole, time_budget)
    with open_training(workers, address) as train, progress("evaluating", 100) as advance:
        done = 0

        def report_progress(what: str, share: float) -> None:
            nonlocal done
            while done < int(100 * share):
                done += 1
                advance(what)

        results = benchmark.evaluate(
            contenders,
            chosen,
            steps=steps,
            seeds=seeds,
            baselines=baselines,
            learning_rates=learning_rates,
            cosine_baselines=cosine_baselines,
            progress=report_progress,
            evals=min(benchmark.EVALS, steps),
            workers=workers or THREADS,
            train=train,
        )
    parts = "" if len(chosen) == len(whole) else f" ({len(chosen)} of {len(whole)} tasks)"
    results.about["suite"] = suite + parts
    directory.mkdir(parents=True, exist_ok=True)
    save_results(results, directory / run_directory.RESULTS)
    console.print(table(results), soft_wrap=False)
    console.print(f"report: {report(directory)}")


def row_label(name: str) -> str:
    """Pretrained optimizers go by their name, files by that of their run."""
    path = Path(name).resolve()
    return path.parent.name if path.name == run_directory.ARTIFACT else path.stem


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
