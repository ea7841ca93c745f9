"""What every family costs at its default size: parameters, seconds to compile the training of 16
runs, seconds per inner step of one run alone, and of each of 16 at once. Adam on one core; nothing
is taken from a cache. `--suite NAME` measures the tasks of a suite instead.
"""

import argparse
import os

# One core, as a Ray worker has: XLA's thread pool is sized once, when jax starts.
os.environ["NPROC"] = "1"

from rich.console import Console
from rich.table import Table

import tasks
from evaluation import task_cost
from learned_opt import discovery
from tasks.suites import suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite")
    name = parser.parse_args().suite
    if name:
        families = suite(name)
    else:
        members = {type(example) for example in discovery.examples(tasks)}
        # those that need no other family have defaults for all their fields
        families = {
            discovery.name_of(cls): cls()
            for cls in sorted(members, key=lambda cls: cls.__name__)
            if "family" not in discovery.fields_of(cls)
        }
    table = Table("task", "params", "compile s", "step µs alone", "step µs of 16")
    for task, family in families.items():
        cost = task_cost.measure(family)
        table.add_row(
            task,
            f"{cost.params:,}",
            f"{cost.compile_seconds:.1f}",
            f"{1e6 * cost.step_seconds:,.1f}",
            f"{1e6 * cost.step_seconds_together:,.1f}",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
