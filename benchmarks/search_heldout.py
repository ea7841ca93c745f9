"""A found program on a suite it never saw, beside Adam, AdamW and Lion: these are tuned per task
over their whole grids, the program over one number that multiplies its updates.

Takes a quarter of an hour on two cores with the defaults.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import optax

from cluster.console import console, progress
from cluster.evaluate import open_training
from evaluation import benchmark
from evaluation.baselines import BASELINES, Baseline, half_decades
from evaluation.report import render, table
from learned_opt import artifact
from learned_opt.symbolic import Symbolic
from learned_opt.symbolic.analysis import read
from tasks.suites import suite


@dataclasses.dataclass(frozen=True)
class Multiplied:
    """The program, its updates times the learning rate: what `Baseline.make` is."""

    program: str
    steps: int

    def __call__(self, learning_rate: optax.Schedule, weight_decay: float):
        del weight_decay
        rule = Symbolic(self.program, schedule="cosine")
        optimizer = rule.optimizer(rule.init(jax.random.key(0)), self.steps)
        return optax.chain(optimizer, optax.scale_by_learning_rate(learning_rate, flip_sign=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--program", type=Path, required=True, help="best.py or .safetensors")
    parser.add_argument("--suite", default="heldout/small")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/search_heldout"))
    arguments = parser.parse_args()
    if arguments.program.suffix == ".py":
        text = str(read(arguments.program.read_text(), str(arguments.program)))
    else:
        text = str(artifact.read(arguments.program)[0].parsed())  # pyright: ignore[reportAttributeAccessIssue]
    rule = Symbolic(text, schedule="cosine")
    make = Multiplied(text, arguments.steps)
    found = Baseline("found", make, half_decades(1e-2, 10.0), schedules=("constant",))
    BASELINES["found"] = found
    with open_training(arguments.workers, None) as train, progress("evaluating", 100) as advance:
        done = 0

        def told(what: str, share: float) -> None:
            nonlocal done
            while done < int(100 * share):
                done += 1
                advance(what)

        results = benchmark.evaluate(
            {"found, as it is": lambda steps: rule.optimizer(rule.init(jax.random.key(0)), steps)},
            suite(arguments.suite),
            steps=arguments.steps,
            seeds=arguments.seeds,
            baselines=("adamw", "lion", "found"),
            criterion="final",
            workers=arguments.workers,
            train=train,
            progress=told,
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    console.print(table(results), soft_wrap=False)
    render(results, arguments.out / "report.html")


if __name__ == "__main__":
    main()
