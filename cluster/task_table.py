"""What there is to train, by suite, with size, cost, data and licence: for `learned-opt tasks`."""

from collections.abc import Mapping
from typing import Any

import rich.box
from rich.markup import escape
from rich.table import Table

from cluster.console import console
from cluster.task_costs import measured
from evaluation import task_cost
from learned_opt.discovery import name_of
from tasks.suites import SUITES, provenance, suite


def show(name: str | None, measure: bool) -> None:
    """Prints the tasks of one suite, or of all. Costs are those known of this machine; `measure`
    measures the others first.

    Raises:
      ValueError: no such suite.
    """
    chosen = {s: suite(s) for s in ([name] if name else SUITES)}
    tasks = {
        f"{s}/{task}": family for s, families in chosen.items() for task, family in families.items()
    }
    if measure:
        measured(tasks)
    for s, families in chosen.items():
        console.print(_table(s, families), soft_wrap=False)
    console.print(_sources(tasks), soft_wrap=False)
    unknown = sum(task_cost.known(family) is None for family in tasks.values())
    if unknown:
        console.print(f"{unknown} tasks were never measured on this machine: add --measure")


def _table(title: str, families: Mapping[str, Any]) -> Table:
    view = Table(title=title, box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    view.add_column("task", no_wrap=True)
    view.add_column("family")
    for heading in ("params", "ms\nalone", f"ms\nof {task_cost.TOGETHER}", "compi-\nling s"):
        view.add_column(heading, justify="right", no_wrap=True)
    view.add_column("data", no_wrap=True)
    for task, family in families.items():
        cost = task_cost.known(family)
        figures = ["-"] * 3
        if cost is not None:
            steps = (cost.step_seconds, cost.step_seconds_together)
            figures = [
                *(f"{1e3 * seconds:.2g}" for seconds in steps),
                f"{cost.compile_seconds:.1f}",
            ]
        data = [source for source, *_ in provenance(family)]
        params = f"{task_cost.count_params(family):,}"
        view.add_row(task, _family(family), params, *figures, escape(", ".join(data) or "none"))
    return view


def _sources(tasks: Mapping[str, Any]) -> Table:
    view = Table(title="data", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    view.add_column("source", no_wrap=True)
    view.add_column("rows")
    view.add_column("licence")
    for row in sorted({row for family in tasks.values() for row in provenance(family)}):
        view.add_row(*map(escape, row))
    return view


def _family(family: Any) -> str:
    """Its name, those of augmentations outside in."""
    inner = getattr(family, "family", None)
    name = name_of(type(family))
    return name if inner is None else f"{name} of {_family(inner)}"
