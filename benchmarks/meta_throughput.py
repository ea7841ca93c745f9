"""Inner training steps per second of meta-training on the 8x8 MLP, in this process.

One line per rule and number of particles: steps of all trajectories per second (the best and the
median of several estimates), and the seconds to compile one estimate.
"""

import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from learned_opt.small_fc import SmallFC
from meta_train.estimators.nres import NRES
from meta_train.unroll import Training
from tasks.image_mlp import ImageMLP


def measure(hidden: int, particles: int, repeats: int = 7) -> tuple[float, float, float]:
    """Best and median inner steps per second, and seconds to compile."""
    key = jax.random.key(0)
    problem = Training(ImageMLP("digits/meta_train"), SmallFC(hidden), 500, 50)
    estimator = NRES(problem, particles=particles)
    theta = problem.rule.init(key)
    state = estimator.init(theta, key)
    began = time.perf_counter()
    program = jax.jit(lambda e, t, s, k: e.estimate(t, s, k)).lower(estimator, theta, state, key)
    program = program.compile()
    compiled = time.perf_counter() - began
    seconds = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        _, state = jax.block_until_ready(
            program(estimator, theta, state, jax.random.fold_in(key, i))
        )
        seconds.append(time.perf_counter() - began)
    rates = particles * estimator.unrolls * problem.truncation / np.array(seconds[1:])
    return rates.max(), float(np.median(rates)), compiled


def main() -> None:
    table = Table("rule", "particles", "best steps/s", "median steps/s", "compile s")
    for hidden in (4, 32):
        for particles in (8, 32, 128):
            best, median, compiled = measure(hidden, particles)
            table.add_row(
                f"small_fc(hidden={hidden})",
                str(particles),
                f"{best:,.0f}",
                f"{median:,.0f}",
                f"{compiled:.1f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
