"""What follows a search: the funnel, a shorter program, best.py, the report and the artifact."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cluster import run_directory
from cluster.console import console, progress
from cluster.jobs import provenance
from evaluation import search_report
from learned_opt import artifact
from learned_opt.symbolic.analysis import cost, simplified
from learned_opt.symbolic.program import Program, parse
from learned_opt.symbolic.rule import Symbolic
from meta_train.search import funnel, journal
from meta_train.search.behaviour import behaviour
from meta_train.search.evaluator import Evaluator, try_all
from meta_train.search.evolution import Search
from meta_train.search.proxies import Proxies, score
from meta_train.search.simplification import simplify

JOURNAL, FUNNEL, BEST = "journal.jsonl", "funnel.json", "best.py"
CANDIDATES = 48
SHOWN = 12  # programs that were once the best, in the report
TOLERANCE = 5e-3  # of log loss, for the simplification
ROWS = {
    "generated": "generated",
    "invalid": "invalid draws",
    "not_finite": "not finite on probes",
    "structural_hits": "known by dataflow",
    "functional_hits": "known by updates",
    "evaluated": "tried",
}


def percent(fitness: float) -> str:
    """Log loss relative to the first program's, in words."""
    return f"{100 * np.expm1(fitness):+.1f}% loss"


class Remembered:
    """Losses of programs on proxies; what was tried before this run was stopped is in a file."""

    def __init__(self, evaluator: Evaluator, path: Path):
        self._evaluator, self._path = evaluator, path
        self._known = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, programs: Any, proxies: Proxies) -> list[np.ndarray]:
        known = self._known.setdefault(repr(proxies), {})
        new = [p for p in dict.fromkeys(programs) if str(p) not in known]
        if new:
            with progress(f"{proxies.tasks}, {proxies.steps} steps", len(new)) as advance:
                size = 2 * self._evaluator.slots
                for some in (new[i : i + size] for i in range(0, len(new), size)):
                    for program, losses in zip(
                        some, try_all(self._evaluator, some, proxies), strict=True
                    ):
                        known[str(program)] = losses.tolist()
                        advance()
                    run_directory.write(self._path, json.dumps(self._known))
        return [np.array(known[str(program)]) for program in programs]


def conclude(search: Search, seconds: float, directory: Path, evaluator: Evaluator) -> Path:
    """Chooses among the programs of a search that has ended, and returns the artifact's path."""
    assert search.first is not None
    entries = list(journal.read(directory / JOURNAL))
    tried = [entry for entry in entries if entry.how == "evaluated"]
    chosen = [tried[i] for i in funnel.stratified([e.fitness for e in tried], CANDIDATES)]
    programs = [parse(entry.program or "") for entry in chosen]
    stages, remembered = search.recipe.stages(), Remembered(evaluator, directory / FUNNEL)
    first = simplified(search.first.program)

    def on(stage: funnel.Stage, some: list[Program]) -> list[float]:
        reference, *losses = remembered([first, *some], stage.proxies)
        return [score(x, reference) for x in losses]

    ranking = funnel.select(programs, first, stages, remembered)
    if ranking.winner is None:
        number, winner = search.first.number, first
    else:
        number, winner = chosen[ranking.winner].number, simplified(programs[ranking.winner])
    short = simplify(winner, lambda some: on(stages[0], [*some]), TOLERANCE)
    pairs = {stage.name: on(stage, [winner, short]) for stage in stages}
    if any(after > before + 10 * TOLERANCE for before, after in pairs.values()):
        short = winner
    final = funnel.last(stages)
    scores = {stage.name: on(stage, [short])[0] for stage in (*stages, final)}
    facts = {
        "program": str(short),
        "number": number,
        "log_loss_vs_first_program": scores,
        "better_than_the_first_program": scores[final.name] < 0.0,
    }
    told = ", ".join(f"{name} {percent(x)}" for name, x in scores.items())
    bests = _bests(tried)
    others = on(stages[1], [parse(entry.program or "") for _, entry in bests])
    lineage = journal.lineage(entries, number)
    stage_scores = {"search": {i: e.fitness for i, e in enumerate(chosen)}, **ranking.scores}
    counts = search.counts
    found = search_report.Found(
        title=f"Search from {search.recipe.name} ({search.recipe.mode})",
        facts={
            "tasks": f"{search.recipe.tasks}, {search.recipe.steps} steps",
            **{label: f"{counts[name]:,}" for name, label in ROWS.items()},
            "seconds": f"{seconds:.0f}",
            "tried per second": f"{counts['evaluated'] / max(seconds, 1e-9):.0f}",
            "seed": str(search.recipe.seed),
            "against the first program": told,
            **_behaviour(short),
        },
        programs={
            "start": str(first),
            "winner": str(winner),
            "winner, simplified": str(short),
        },
        records=run_directory.read_metrics(directory),
        fitness=[entry.fitness for entry in tried],
        lineage=[
            (entry.number, entry.how, _words(entry.change), entry.fitness) for entry, _ in lineage
        ],
        stages=stage_scores,
        correlations=[
            (a, b, *funnel.rank_correlation(stage_scores[a], stage_scores[b]))
            for a, b in itertools.pairwise(stage_scores)
        ],
        winner=ranking.winner,
        validated=[
            (count, entry.fitness, other)
            for (count, entry), other in zip(bests, others, strict=True)
        ],
    )
    search_report.render(found, directory / run_directory.REPORT)
    made = f"{counts['generated']:,} programs made, {counts['evaluated']:,} tried"
    about = f'"""{found.title}: {made}.\n\nAgainst the first program: {told}.\n"""\n\n'
    run_directory.write(directory / BEST, about + str(short))
    rule = Symbolic(str(short), schedule="cosine")
    path = directory / run_directory.ARTIFACT
    card = {"recipe": vars(search.recipe), **facts, "counts": counts, **provenance()}
    card |= {"seconds": round(seconds, 1), "asynchronous": search.asynchronous}
    artifact.save(path, rule, rule.init(jax.random.key(0)), card)
    console.print(str(short), highlight=False, markup=False)
    console.print(f"{cost(short).statements} statements, {cost(short).states} states; {told}")
    if ranking.winner is None:
        console.print("no program beat the first one in every stage of the funnel: this is it")
    return path


def _bests(tried: list[journal.Entry]) -> list[tuple[int, journal.Entry]]:
    """Programs that were the best when they were tried, a dozen spread over the search at most, and
    how many had been tried.
    """
    found: list[tuple[int, journal.Entry]] = []
    best = 0.0  # of the first program
    for count, entry in enumerate(tried, 1):
        if entry.fitness < best:
            best = entry.fitness
            found.append((count, entry))
    shown = min(len(found), SHOWN)
    return [found[round(i * (len(found) - 1) / max(1, shown - 1))] for i in range(shown)]


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
