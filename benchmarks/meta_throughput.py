"""Inner training steps per second of meta-training on the 8x8 MLP: how fast one estimate is.

Every row is measured in a process of its own, with nothing cached: the rule, the number of
particles, who runs them (the devices of one process, or Ray workers of one core each), the steps of
all trajectories per second (the best of several estimates, and their median), the seconds to the
first estimate, and the process's peak memory. Beside each rule stand the floors of one inner step:
its floating-point operations, and the bytes of the state that it reads and writes. `--json FILE`
writes the best row of every rule.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.devices import one_per_core
from cluster.jobs import open_estimator
from learned_opt.celo2 import Celo2
from learned_opt.small_fc import SmallFC
from learned_opt.velo import Velo
from meta_train.estimators.nres import NRES
from meta_train.unroll import Training
from tasks.base import train_step
from tasks.image_mlp import ImageMLP

CONFIGS = {
    "small_fc4": SmallFC(4),
    "small_fc32": SmallFC(32),
    "celo2": Celo2(),
    "velo_small": Velo(lstm=128, bank=64),
}
HORIZON, TRUNCATION = 500, 50


def problem_of(name: str) -> Training:
    return Training(ImageMLP("digits/meta_train"), CONFIGS[name], HORIZON, TRUNCATION)


def floors(name: str) -> dict[str, float]:
    """FLOPs and bytes of one inner step: the operations that XLA counts, and the batch, the params,
    the gradient and the optimizer's state, each read and (but the batch) written once.
    """
    problem, key = problem_of(name), jax.random.key(0)
    task = problem.family(key)
    optimizer = problem.rule.optimizer(problem.rule.init(key), HORIZON)
    params, batch = task.init(key), task.batch(key, "train")
    opt_state = optimizer.init(params)
    step = jax.jit(lambda p, s, b: train_step(task, optimizer, p, s, b))
    analysis = step.lower(params, opt_state, batch).cost_analysis()
    assert isinstance(analysis, dict)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    touched = size(batch) + 2 * size((params, params, opt_state))
    return {"flops": analysis["flops"], "bytes": touched}


def measure(name: str, particles: int, workers: int, repeats: int) -> dict[str, float]:
    """One row, in this process."""
    one_per_core()
    key = jax.random.key(0)
    problem = problem_of(name)
    theta = problem.rule.init(key)
    with open_estimator(NRES(problem, particles=particles), workers, None) as estimator:
        state = jax.block_until_ready(estimator.init(theta, key))
        seconds = []
        for i in range(repeats + 1):
            began = time.perf_counter()
            estimate, state = estimator.estimate(theta, state, jax.random.fold_in(key, i))
            jax.block_until_ready(estimate)
            seconds.append(time.perf_counter() - began)
    steps = particles * 2 * TRUNCATION
    rates = steps / np.array(seconds[1:])
    return {
        "inner_steps_per_s": float(rates.max()),
        "median": float(np.median(rates)),
        "compile_s": seconds[0] - steps / float(rates.max()),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_own_process(*row: Any) -> dict[str, float]:
    # nothing that an earlier run has compiled
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, __file__, "--row", *map(str, row)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--particles", nargs="+", type=int, default=[8, 32, 128, 512])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        name, *numbers = arguments.row
        print(json.dumps(measure(name, *map(int, numbers))))
        return
    columns = ("rule", "MFLOP", "KiB", "particles", "Ray workers")
    table = Table(*columns, "best steps/s", "median", "compile s", "peak MiB")
    best: dict[str, dict[str, float]] = {}
    for name in arguments.configs:
        floor = floors(name)
        # with Ray at one number of particles: what differs is who runs them
        rows = [(p, w) for w in arguments.workers for p in arguments.particles if not w or p == 32]
        for particles, workers in rows:
            found = in_own_process(name, particles, workers, arguments.repeats)
            table.add_row(
                name,
                f"{floor['flops'] / 1e6:.2f}",
                f"{floor['bytes'] / 1024:.0f}",
                str(particles),
                str(workers or "none"),
                f"{found['inner_steps_per_s']:,.0f}",
                f"{found['median']:,.0f}",
                f"{found['compile_s']:.1f}",
                f"{found['peak_mib']:.0f}",
            )
            if name not in best or found["inner_steps_per_s"] > best[name]["inner_steps_per_s"]:
                best[name] = found
    Console(width=120).print(table)
    if arguments.json:
        keys = ("inner_steps_per_s", "compile_s", "peak_mib")
        chosen = {name: {key: row[key] for key in keys} for name, row in best.items()}
        arguments.json.write_text(json.dumps(chosen, indent=1) + "\n")


if __name__ == "__main__":
    main()
