"""Searches for optimizer programs against their controls, at equal CPU seconds on one core: the
table of docs/search.md.

Evolution, the constants of AdamW alone, random programs, and changes without selection start from
AdamW with a tuned learning rate. Of each search the best few on the proxies go through the same
choice (other seeds), and what is chosen is judged on held-out families with other initial params
and gradient scales, once as it is and once with its updates times the best of nine factors for each
task, lest a learning rate decide. AdamW and Lion are tuned on the proxies over learning rate and
weight decay.

Takes two hours on two cores with the defaults; what is done is kept, the same command goes on.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["NPROC"] = "1"  # before jax: a search has one core, as a worker has

import jax
import numpy as np

from evaluation.atomic import replacing
from learned_opt.symbolic import PROGRAMS, Program, Statement, parse
from learned_opt.symbolic.analysis import simplified
from meta_train.search import funnel
from meta_train.search.behaviour import behaviour
from meta_train.search.evaluator import Local, runs
from meta_train.search.evolution import FACTORS, Born, Search, scaled_rate
from meta_train.search.proxies import Proxies, score
from meta_train.search.recipe import SearchRecipe
from tasks.data import cache_directory

ARMS = ("evolution", "constants", "random", "walk")
TOP = 24
HELD_OUT = "heldout/proxies"
FIRST_SEED = 2000  # of what neither searches nor choices have used
TUNING_SEED = 3000  # and of what none of these have
MULTIPLIERS = tuple(10.0 ** (i / 4) for i in range(-4, 5))
COLUMNS = {  # name -> tasks, whether the updates are multiplied by the best factor for each
    "proxies": (Proxies("train/proxies", 200, 3, FIRST_SEED), False),
    "held out, as it is": (Proxies(HELD_OUT, 200, 3, FIRST_SEED), False),
    "held out, rate tuned": (Proxies(HELD_OUT, 200, 3, FIRST_SEED), True),
    "held out, 1,000 steps, rate tuned": (Proxies(HELD_OUT, 1000, 2, FIRST_SEED), True),
}


def search(job: tuple[Any, int, float, Path]) -> None:
    """One arm from one seed, for so many CPU seconds; its curve and its best programs in a file."""
    arm, seed, seconds, path = job
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "jax"))
    best: dict[str, float] = {}

    def keep(born: Born) -> None:
        if born.how in ("evaluated", "start"):
            best[str(born.individual.program)] = born.individual.fitness
            if len(best) > 4 * TOP:
                for program in sorted(best, key=best.__getitem__)[TOP:]:
                    del best[program]

    recipe = SearchRecipe(mode=arm, seed=seed, evaluated=10**9, generated=10**9)
    found, evaluator = Search(recipe, keep), Local()
    found.begin(evaluator)  # compiles, which is not counted
    began, curve = time.process_time(), []
    while (spent := time.process_time() - began) < seconds:
        found.round(evaluator)
        assert found.best is not None
        curve.append((spent, found.counts["evaluated"], found.best.fitness))
    result = {
        "counts": found.counts,
        "summary": found.summary(),
        "curve": curve,
        "programs": sorted(best.items(), key=lambda item: item[1])[:TOP],
    }
    with replacing(path) as file:
        file.write(json.dumps(result).encode())
    print(f"{arm} {seed}: {found.counts['evaluated']} tried, best {curve[-1][2]:+.4f}", flush=True)


def tuned(name: str) -> list[str]:
    """AdamW or Lion over learning rates and weight decays on the proxies; the best few."""
    text = str(PROGRAMS[name])
    grid = [
        scaled_rate(parse(text.replace("w * 0.01", f"w * {decay}")), factor)
        for decay in (0.0001, 0.001, 0.01, 0.1)
        for factor in FACTORS
    ]
    tried = runs(Proxies())
    reference = tried(PROGRAMS[name])
    ranked = sorted(grid, key=lambda program: score(tried(program), reference))
    return [str(program) for program in ranked[:TOP]]


def choose(programs: Sequence[str]) -> str:
    """The best of a few on other seeds of the proxies."""
    tried = runs(funnel.stages(Proxies(), HELD_OUT, 1)[0].proxies)
    losses = [tried(parse(text)) for text in programs]
    scores = [score(x, losses[0]) for x in losses]
    return programs[int(np.argmin(scores))]


def judge(names: Sequence[str], directory: Path) -> dict[str, dict[str, Any]]:
    """Of every search, and of tuned AdamW and Lion: the program chosen, and its losses."""
    path = directory / "judged.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        if name not in known:
            file = directory / f"{name}.json"
            few = [p for p, _ in json.loads(file.read_text())["programs"]] if file.exists() else []
            known[name] = {"program": str(simplified(parse(choose(few or tuned(name)))))}
    for column, (proxies, rate_tuned) in COLUMNS.items():  # one by one: their batches are large
        missing = [name for name in names if column not in known[name]]
        factors = {name: [1.0] for name in missing}
        if rate_tuned:
            one = runs(dataclasses.replace(proxies, seeds=1, first_seed=TUNING_SEED))
            for name in missing:
                losses = [one(times(known[name]["program"], f)) for f in MULTIPLIERS]
                factors[name] = [MULTIPLIERS[i] for i in np.argmin(losses, axis=0)]
        for name in missing:
            tried = {f: runs(proxies)(times(known[name]["program"], f)) for f in {*factors[name]}}
            tasks = len(next(iter(tried.values()))) // proxies.seeds
            chosen = np.repeat(factors[name], proxies.seeds * tasks // len(factors[name]))
            known[name][column] = [float(tried[f][i]) for i, f in enumerate(chosen)]
        with replacing(path) as file:
            file.write(json.dumps(known, indent=1).encode())
    return known


def times(text: str, factor: float) -> Program:
    """The program with its updates multiplied."""
    program = parse(text)
    if factor == 1.0:
        return program
    return Program((*program.statements, Statement("update", "multiply", ("update", factor))))


def report(directory: Path, arms: dict[str, list[str]]) -> str:
    """Markdown: of every arm the median over its seeds, and the range; then what was chosen."""
    known = judge([name for names in arms.values() for name in names], directory)
    lines = [
        "| | seeds | tried, median | best fitness in the search | "
        + " | ".join(COLUMNS)
        + " |\n|---|---|---|---|"
        + "---|" * len(COLUMNS)
    ]
    for arm, names in arms.items():
        files = [directory / f"{name}.json" for name in names]
        results = [json.loads(file.read_text()) for file in files if file.exists()]
        tried = [result["counts"]["evaluated"] for result in results]
        cells = [
            f"{len(results)}" if results else "",
            f"{int(np.median(tried)):,}" if tried else f"{4 * len(FACTORS)}",
            percents([result["curve"][-1][2] for result in results]),
        ]
        for column in COLUMNS:
            reference = np.array(known["adamw"][column])
            cells.append(percents([score(np.array(known[n][column]), reference) for n in names]))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for name, found in known.items():
        lines.append(f"\n{name}: {behaviour(parse(found['program']))}\n\n{found['program']}")
    return "\n".join(lines)


def percents(values: Sequence[float]) -> str:
    """Of log losses, as percents: the median, and the range of several."""
    found = 100 * np.expm1(values)
    if len(found) < 2:
        return f"{found[0]:+.1f}%" if len(found) else ""
    return f"{np.median(found):+.1f}% ({found.min():+.1f} to {found.max():+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/search_comparison"))
    arguments = parser.parse_args()
    arms = {arm: [f"{arm}-{seed}" for seed in range(arguments.seeds)] for arm in arguments.arms}
    jobs = [
        (arm, seed, arguments.seconds, path)
        for arm, names in arms.items()
        for seed, name in enumerate(names)
        if not (path := arguments.out / f"{name}.json").exists()
    ]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for _ in pool.imap_unordered(search, jobs):
            pass
    print(report(arguments.out, {"adamw": ["adamw"], "lion": ["lion"], **arms}))


if __name__ == "__main__":
    main()
