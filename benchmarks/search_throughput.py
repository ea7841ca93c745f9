"""How fast programs are searched: on one task, an MLP of 874 params trained for 300 steps, with one
worker per core.

`--generated 300000 --evaluated 25000` is a search of the size that arXiv 2302.06675 made.
"""

import argparse
import os
import time

import numpy as np

from cluster.search import open_evaluator
from learned_opt.symbolic import PROGRAMS
from learned_opt.symbolic.analysis import structural_hash
from learned_opt.symbolic.functional import functional_hash
from meta_train.search.evaluator import try_all
from meta_train.search.evolution import Search
from meta_train.search.mutation import apply
from meta_train.search.recipe import SearchRecipe

TASK = "image_mlp(data='digits@4x4', hidden=(32,), batch_size=128)"


def microseconds(work, items) -> float:
    began = time.perf_counter()
    for item in items:
        work(item)
    return 1e6 * (time.perf_counter() - began) / len(items)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generated", type=int, default=30_000)
    parser.add_argument("--evaluated", type=int, default=3_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    recipe = SearchRecipe(
        tasks=TASK, steps=300, generated=arguments.generated, evaluated=arguments.evaluated
    )
    search, proxies = Search(recipe), recipe.proxies()
    with open_evaluator(arguments.workers, None) as evaluator:
        adamw = PROGRAMS["adamw"]
        try_all(evaluator, [adamw] * 8 * arguments.workers, proxies)  # compiles
        began = time.perf_counter()
        count = 100 * arguments.workers
        try_all(evaluator, [adamw] * count, proxies)
        whole = count / (time.perf_counter() - began)
        search.begin(evaluator)
        began = time.perf_counter()
        while not search.done:
            search.round(evaluator)
        seconds = time.perf_counter() - began
    random, program, programs = np.random.default_rng(0), adamw, []
    mutate = search.mutator
    for _ in range(500):
        programs.append(program := apply(program, mutate(program, random)[0]))
    counts = search.counts
    rows = {
        "whole runs of AdamW (9 statements) per second": f"{whole:.0f}",
        "tried per second, in the search": f"{counts['evaluated'] / seconds:.0f}",
        "made per second, in the search": f"{counts['generated'] / seconds:.0f}",
        "made, tried": f"{counts['generated']:,}, {counts['evaluated']:,}",
        "seconds": f"{seconds:.0f}",
        "a change": f"{microseconds(lambda p: mutate(p, random), programs):.0f} us",
        "hash of the dataflow": f"{microseconds(structural_hash, programs):.0f} us",
        "hash of what it does": f"{microseconds(functional_hash, programs):.0f} us",
    }
    print(f"{arguments.workers} workers of one core, {TASK}, 300 steps\n")
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
