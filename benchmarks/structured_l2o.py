"""CPU-seconds of one meta-update of L2O-PA, 20 iterations of 64 LASSO problems by truncated
backpropagation, and how long a recipe of 2,500 takes; beside the published implementation's figure
where it was measured (torch 2, CPU, 50 x 100: 0.47 CPU-s). Best of several estimates, compilation
apart. `--json FILE` writes the rows.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from cluster.devices import one_per_core
from meta_train.estimators.compiled import compiled
from meta_train.recipes.l2o_pa import RECIPE

# problems per particle: as many as a core's cache holds
TASKS = {
    "50 x 100": ("side_by_side(lasso(), count=8)", 8),
    "250 x 500": ("side_by_side(lasso(rows=250, columns=500), count=2)", 32),
}
PUBLISHED = {"50 x 100": 0.47}


def measure(task: str, particles: int, repeats: int, devices: int) -> dict[str, float]:
    estimator = f"truncated_bptt(particles={particles})"
    recipe = dataclasses.replace(RECIPE, task=task, estimator=estimator)
    key = jax.random.key(recipe.seed)
    theta = recipe.build_rule().init(key)
    run = compiled(recipe.build_estimator(), jax.devices()[:devices])
    began = time.perf_counter()
    state = run.init(theta, key)
    estimate, state = run.estimate(theta, state, key)
    jax.block_until_ready(estimate)
    first, cpu, wall = time.perf_counter() - began, [], []
    for i in range(repeats):
        start = time.process_time(), time.perf_counter()
        estimate, state = run.estimate(theta, state, jax.random.fold_in(key, i))
        jax.block_until_ready(estimate)
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    minutes = min(wall) * recipe.outer_steps / 60
    return {"cpu": min(cpu), "wall": min(wall), "first": first, "minutes": minutes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    one_per_core()
    rows = {
        (size, devices): measure(task, particles, arguments.repeats, devices)
        for size, (task, particles) in TASKS.items()
        for devices in sorted({1, len(jax.devices())})
    }
    headings = ("LASSO", "devices", "CPU-s", "published", "times less", "wall s", "recipe, min")
    table = Table(*headings, "first estimate, s", title="A meta-update of L2O-PA")
    for (size, devices), row in rows.items():
        known = PUBLISHED.get(size)
        compared = (f"{known}", f"{known / row['cpu']:.1f}") if known else ("-", "-")
        figures = f"{row['wall']:.3f}", f"{row['minutes']:.1f}", f"{row['first']:.0f}"
        table.add_row(size, str(devices), f"{row['cpu']:.3f}", *compared, *figures)
    Console(width=110).print(table)
    if arguments.json:
        plain = [{"size": size, "devices": n, **row} for (size, n), row in rows.items()]
        arguments.json.write_text(json.dumps(plain, indent=2) + "\n")


if __name__ == "__main__":
    main()
