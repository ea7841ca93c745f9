"""Searches for optimizer programs against their controls, at equal CPU seconds on one core: the
table of docs/search.md.

Evolution, the constants of AdamW alone, random programs, and changes without selection start from
AdamW with a tuned learning rate; of each the best on the proxies go through the same choice (other
seeds) and is judged on held-out families with other initial params and gradient scales. AdamW and
Lion are tuned on the proxies over learning rate and weight decay.

Takes two hours on two cores with the defaults; what is done is kept, the same command goes on.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ARMS = ("evolution", "constants", "random", "walk")
TOP = 24
HELD_OUT = "heldout/proxies"
FIRST_SEED = 2000  # of what neither searches nor choices have used


def single_core() -> None:
    """Before jax is imported: a search has one core, as a worker has."""
    os.environ["NPROC"] = "1"
    import jax

    from tasks.data import cache_directory

    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "jax"))


def search(job: tuple[str, int, float, Path]) -> None:
    """One arm from one seed, for so many CPU seconds; its curve and its best programs in a file."""
    arm, seed, seconds, path = job
    single_core()
    from meta_train.search.evaluator import Local
    from meta_train.search.evolution import Search
    from meta_train.search.recipe import SearchRecipe

    best: dict[str, float] = {}

    def keep(born: Any) -> None:
        if born.how in ("evaluated", "start"):
            best[str(born.individual.program)] = born.individual.fitness
            if len(best) > 4 * TOP:
                for program in sorted(best, key=best.__getitem__)[TOP:]:
                    del best[program]

    recipe = SearchRecipe(mode=arm, seed=seed, evaluated=10**9, generated=10**9)  # pyright: ignore[reportArgumentType]
    found, evaluator = Search(recipe, keep), Local()
    found.begin(evaluator)  # compiles, which is not counted
    began, curve = time.process_time(), []
    while (spent := time.process_time() - began) < seconds:
        found.round(evaluator)
        assert found.best is not None
        curve.append((spent, found.counts["evaluated"], found.best.fitness))
    result = {
        "arm": arm,
        "seed": seed,
        "counts": found.counts,
        "summary": found.summary(),
        "curve": curve,
        "programs": sorted(best.items(), key=lambda item: item[1])[:TOP],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    os.replace(partial, path)
    print(
        f"{arm} {seed}: {found.counts['evaluated']} tried, best {found.best.fitness:+.4f}",
        flush=True,
    )  # pyright: ignore[reportOptionalMemberAccess]


def tuned(name: str) -> list[str]:
    """AdamW or Lion over learning rates and weight decays on the proxies; the best few."""
    from learned_opt.symbolic import PROGRAMS, parse
    from meta_train.search.evaluator import runs
    from meta_train.search.evolution import FACTORS, scaled_rate
    from meta_train.search.proxies import Proxies, score

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


def choose(programs: list[str]) -> str:
    """The best of a few on other seeds of the proxies."""
    from learned_opt.symbolic import parse
    from meta_train.search import funnel
    from meta_train.search.evaluator import runs
    from meta_train.search.proxies import Proxies, score

    (fresh, *_) = funnel.stages(Proxies(), HELD_OUT, 1)
    tried = runs(fresh.proxies)
    losses = {text: tried(parse(text)) for text in programs}
    reference = losses[programs[0]]
    return min(programs, key=lambda text: score(losses[text], reference))


def judged(text: str, tasks: str, steps: int, seeds: int) -> list[float]:
    from learned_opt.symbolic import parse
    from meta_train.search.evaluator import runs
    from meta_train.search.proxies import Proxies

    return runs(Proxies(tasks, steps, seeds, FIRST_SEED))(parse(text)).tolist()


def report(directory: Path, seeds: int, arms: Sequence[str]) -> str:
    """Markdown: of every arm the median over its seeds, and the range."""
    import numpy as np

    from learned_opt.symbolic import parse
    from learned_opt.symbolic.analysis import simplified
    from meta_train.search.proxies import score

    path = directory / "judged.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    entries: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for arm in ("adamw", "lion", *arms):
        names = [arm] if arm in ("adamw", "lion") else [f"{arm}-{seed}" for seed in range(seeds)]
        for name in names:
            file = directory / f"{name}.json"
            result = json.loads(file.read_text()) if file.exists() else {}
            if name not in known:
                few = [text for text, _ in result["programs"]] if result else tuned(name)
                text = str(simplified(parse(choose(few))))
                known[name] = {
                    "program": text,
                    "proxies": judged(text, "train/proxies", 200, 3),
                    "held out": judged(text, HELD_OUT, 200, 3),
                    "held out, longer": judged(text, HELD_OUT, 1000, 2),
                }
                path.write_text(json.dumps(known, indent=1))
            entries.setdefault(arm, []).append((name, result))
    columns = ("proxies", "held out", "held out, longer")
    lines = [
        "| | tried | best on the proxies | " + " | ".join(columns) + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for arm, runs_of_arm in entries.items():
        tried = [result["counts"]["evaluated"] for _, result in runs_of_arm if result]
        best = [result["curve"][-1][2] for _, result in runs_of_arm if result]
        cells = [f"{int(np.median(tried)):,}" if tried else "68", percents(best)]
        for column in columns:
            reference = np.array(known["adamw"][column])
            scores = [score(np.array(known[name][column]), reference) for name, _ in runs_of_arm]
            cells.append(percents(scores))
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percents(values: list[float]) -> str:
    """Of log losses, as percents: the median, and the range of several."""
    import numpy as np

    found = 100 * np.expm1(values)
    if len(found) < 2:
        return f"{found[0]:+.1f}%" if len(found) else ""
    return f"{np.median(found):+.1f}% ({found.min():+.1f} to {found.max():+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/search_comparison"))
    arguments = parser.parse_args()
    jobs = [
        (arm, seed, arguments.seconds, arguments.out / f"{arm}-{seed}.json")
        for seed in range(arguments.seeds)
        for arm in arguments.arms
    ]
    left = [job for job in jobs if not job[3].exists()]
    with multiprocessing.get_context("spawn").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for _ in pool.imap_unordered(search, left):
            pass
    single_core()
    print(report(arguments.out, arguments.seeds, arguments.arms))


if __name__ == "__main__":
    main()
