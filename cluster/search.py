"""The job that searches for an optimizer: in this process or on Ray, with a live table, checkpoints
and resume; then the funnel, a shorter program, the artifact and the report.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Group
from rich.live import Live
from rich.syntax import Syntax
from rich.table import Table

from cluster import run_directory
from cluster.console import console
from cluster.jobs import check_workers, provenance
from evaluation import search_report
from learned_opt import artifact
from learned_opt.symbolic.analysis import cost, simplified
from learned_opt.symbolic.program import Program, parse
from learned_opt.symbolic.rule import Symbolic
from meta_train.recipes.base import families
from meta_train.search import funnel, journal
from meta_train.search.behaviour import behaviour
from meta_train.search.evaluator import Evaluator, Local, try_all
from meta_train.search.evolution import Search
from meta_train.search.proxies import Proxies, score
from meta_train.search.recipe import SearchRecipe
from meta_train.search.simplification import simplify

CHECKPOINT, JOURNAL, FUNNEL, BEST = "search.json", "journal.jsonl", "funnel.json", "best.py"
CANDIDATES = 48
SHOWN = 12  # programs that were once the best, in the report
TOLERANCE = 2e-3  # of log loss, for the simplification
ROWS = {
    "generated": "generated",
    "invalid": "invalid draws",
    "not_finite": "not finite on probes",
    "structural_hits": "known by dataflow",
    "functional_hits": "known by updates",
    "evaluated": "tried",
}


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
    metaval: str = "metaval/small",
    metaval_steps: int = 500,
    checkpoint_seconds: float = 20.0,
) -> Path:
    """Searches by the recipe (None: that of the run in the directory), and returns the exported
    artifact's path. A finished run is not run again.

    Args:
      asynchronous: workers never wait for one another, and the result depends on their timing.
      metaval: a suite, or one task family with its fields, for the funnel.
      metaval_steps: of a run on it.

    Raises:
      ValueError, TypeError, OSError: before any work, and before anything is written; the tasks are
        not those of the run that is resumed.
    """
    check_workers(workers, address)
    if asynchronous and not workers:
        raise ValueError("`asynchronous` needs `workers` of at least 1, got 0")
    recipe = run_directory.choose_recipe(directory, recipe, resume, SearchRecipe)
    recipe.program()
    recipe.proxies()
    stages = funnel.stages(recipe.proxies(), metaval, metaval_steps)
    path = directory / run_directory.ARTIFACT
    if path.exists():
        artifact.read(path)
        console.print(f"{directory} is finished: {path}")
        return path
    with open_evaluator(workers, address) as evaluator, run_directory.opened(directory, recipe):
        search, seconds = _search(recipe, directory, evaluator, asynchronous, checkpoint_seconds)
        return _conclude(search, seconds, directory, evaluator, stages, path)


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
            _check_tasks(search, evaluator)
            console.print(f"resuming after {search.counts['evaluated']:,} programs")
        else:
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
                metrics.write(rounds, seconds=round(seconds, 3), **search.summary())
                rounds += 1
                show()
                if seconds - last_saved > checkpoint_seconds or search.done:
                    save()
                    last_saved = seconds
        return search, time.perf_counter() - began


def _check_tasks(search: Search, evaluator: Evaluator) -> None:
    """Raises ValueError if the first program does not fare as it did when the run began."""
    assert search.first is not None
    assert search.reference is not None
    (losses,) = try_all(evaluator, [search.first.program], search.recipe.proxies())
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
            yield lambda: live.update(_table(search, time.perf_counter() - began, rate()))
        return

    def line() -> None:
        nonlocal shown
        counts = search.counts
        if counts["evaluated"] * 10 // goal != shown or search.done:
            shown = counts["evaluated"] * 10 // goal
            assert search.best is not None
            console.print(
                f"tried {counts['evaluated']:,} of {goal:,}, generated {counts['generated']:,}, "
                f"best {percent(search.best.fitness)}, {rate():.0f} tried per second"
            )

    yield line


def percent(fitness: float) -> str:
    """Log loss relative to the first program's, in words."""
    return f"{100 * math.expm1(fitness):+.1f}% loss"


def _table(search: Search, seconds: float, rate: float) -> Group:
    counts, best = search.counts, search.best
    assert best is not None
    table = Table("", "", "of generated", box=None)
    for name, label in ROWS.items():
        share = f"{counts[name] / max(1, counts['generated']):.1%}" if name != "generated" else ""
        table.add_row(label, f"{counts[name]:,}", share)
    summary = search.summary()
    table.add_row("tried per second", f"{rate:.0f}", "")
    table.add_row("seconds", f"{seconds:.0f}", "")
    table.add_row("restarts", f"{search.restarts}", "")
    table.add_row("best", percent(best.fitness), f"program {best.number:,}")
    table.add_row("median of the population", percent(summary["median"]), "")
    table.add_row("different programs alive", f"{summary['distinct']:,}", "")
    table.add_row("redundant statements", f"{summary['redundant_for_updates']:.0%}", "")
    return Group(table, Syntax(str(simplified(best.program)), "python", theme="ansi_dark"))


class _Remembered:
    """Losses of programs on proxies; what was tried before this run was stopped is in a file."""

    def __init__(self, evaluator: Evaluator, path: Path):
        self._evaluator, self._path = evaluator, path
        self._known = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, programs: Any, proxies: Proxies) -> list[np.ndarray]:
        known = self._known.setdefault(repr(proxies), {})
        new = [p for p in dict.fromkeys(programs) if str(p) not in known]
        for program, losses in zip(new, try_all(self._evaluator, new, proxies), strict=True):
            known[str(program)] = losses.tolist()
        if new:
            run_directory.write(self._path, json.dumps(self._known))
        return [np.array(known[str(program)]) for program in programs]


def _conclude(
    search: Search,
    seconds: float,
    directory: Path,
    evaluator: Evaluator,
    stages: tuple[funnel.Stage, ...],
    path: Path,
) -> Path:
    """The funnel, a shorter program, best.py, the report, and last the artifact."""
    assert search.first is not None
    tried = [entry for entry in journal.read(directory / JOURNAL) if entry.how == "evaluated"]
    tried = tried or [next(journal.read(directory / JOURNAL))]
    fitness = [entry.fitness for entry in tried]
    chosen = [tried[i] for i in funnel.stratified(fitness, CANDIDATES)] or [tried[0]]
    programs = [parse(entry.program or "") for entry in chosen]
    remembered = _Remembered(evaluator, directory / FUNNEL)
    console.print(f"funnel: {len(programs)} programs through {', '.join(s.name for s in stages)}")
    first = simplified(search.first.program)
    ranking = funnel.select(programs, first, stages, remembered)
    winner = simplified(programs[ranking.winner])

    def on(proxies: Proxies, some: list[Program]) -> list[float]:
        reference, *losses = remembered([first, *some], proxies)
        return [score(x, reference) for x in losses]

    short = simplify(winner, lambda some: on(stages[0].proxies, [*some]), TOLERANCE)
    before, after = on(stages[1].proxies, [winner, short])
    if after > before + 10 * TOLERANCE:
        console.print(
            f"the shorter program loses {after - before:.3f} on {stages[1].name}: not taken"
        )
        short = winner
    scores = {stage.name: on(stage.proxies, [short])[0] for stage in stages}
    bests = _bests(tried)
    others = on(stages[1].proxies, [parse(entry.program or "") for _, entry in bests])
    validated = [
        (count, entry.fitness, other) for (count, entry), other in zip(bests, others, strict=True)
    ]
    card = {
        "recipe": vars(search.recipe),
        "program": str(short),
        "number": chosen[ranking.winner].number,
        "log_loss_vs_first_program": {"search": chosen[ranking.winner].fitness, **scores},
        "beats_the_first_program_in_every_stage": ranking.beats,
        "counts": search.counts,
        "seconds": round(seconds, 1),
        **provenance(),
    }
    told = ", ".join(f"{name} {percent(x)}" for name, x in scores.items())
    about = (
        f'"""Found by {search.counts["generated"]:,} changes of {search.recipe.start}, of which '
        f"{search.counts['evaluated']:,} programs were tried.\n\n"
        f"Against the first program (learning rate tuned): {told}.\n"
        '"""\n\n'
    )
    run_directory.write(directory / BEST, about + str(short))
    search_report.render(
        _report(search, seconds, directory, short, ranking, chosen)._replace(validated=validated),
        directory / run_directory.REPORT,
    )
    rule = Symbolic(str(short), schedule="cosine")
    artifact.save(
        path, rule, {"moved": jnp.zeros_like(rule.init(jax.random.key(0))["moved"])}, card
    )
    console.print(str(short), highlight=False, markup=False)
    console.print(f"{cost(short).statements} statements, {cost(short).states} states; {told}")
    if not ranking.beats:
        console.print("no program beat the first one in every stage")
    return path


def _bests(tried: list[journal.Entry]) -> list[tuple[int, journal.Entry]]:
    """Programs that were the best when they were tried, a dozen spread over the search at most, and
    how many had been tried.
    """
    found: list[tuple[int, journal.Entry]] = []
    for count, entry in enumerate(tried, 1):
        if not found or entry.fitness < found[-1][1].fitness:
            found.append((count, entry))
    shown = min(len(found), SHOWN)
    return [found[round(i * (len(found) - 1) / max(1, shown - 1))] for i in range(shown)]


def _report(
    search: Search,
    seconds: float,
    directory: Path,
    short: Program,
    ranking: funnel.Ranking,
    chosen: list[journal.Entry],
) -> search_report.Found:
    assert search.first is not None
    entries = list(journal.read(directory / JOURNAL))
    line = journal.lineage(entries, chosen[ranking.winner].number)
    stages = {"search": {i: entry.fitness for i, entry in enumerate(chosen)}, **ranking.scores}
    pairs = itertools.pairwise(stages)
    counts = search.counts
    return search_report.Found(
        title=f"Search from {search.recipe.start} ({search.recipe.mode})",
        facts={
            "tasks": f"{search.recipe.tasks}, {search.recipe.steps} steps",
            **{label: f"{counts[name]:,}" for name, label in ROWS.items()},
            "seconds": f"{seconds:.0f}",
            "tried per second": f"{counts['evaluated'] / seconds:.0f}",
            "seed": str(search.recipe.seed),
            **_behaviour(short),
            "beats the first program in every stage": "yes" if ranking.beats else "no",
        },
        programs={
            "start": str(simplified(search.first.program)),
            "winner": str(simplified(line[-1][1])),
            "winner, simplified": str(short),
        },
        records=run_directory.read_metrics(directory),
        fitness=[entry.fitness for entry in entries if entry.how == "evaluated"],
        lineage=[
            (entry.number, entry.how, _words(entry.change), entry.fitness) for entry, _ in line
        ],
        stages=stages,
        correlations=[(a, b, *funnel.rank_correlation(stages[a], stages[b])) for a, b in pairs],
        winner=ranking.winner,
    )


def _behaviour(program: Program) -> dict[str, str]:
    found = behaviour(program)
    b1, b2 = found.betas
    return {
        "states": str(found.states),
        "spread of the updates' magnitudes (a sign: 0)": f"{found.spread:.2f}",
        "change when gradients are ten times as large": f"{found.scale:.0%}",
        "signs in common with Lion": f"{found.agreement:.0%}, at betas {b1} and {b2}",
        "behaves like Lion": "yes" if found.like_lion else "no",
    }


def _words(change: list[Any] | None) -> str:
    if change is None:
        return ""
    what, index, text = change
    return f"{what} {index + 1}" + (f": {text}" if text else "")
