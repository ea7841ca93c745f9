"""What a job's tasks cost on this machine: which of them are kept to a time budget, and how they
are spread over workers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cluster.console import console, progress
from evaluation import task_cost
from evaluation.task_cost import TaskCost
from meta_train.recipes.base import Recipe, families


def measured(tasks: Mapping[str, Any]) -> dict[str, TaskCost]:
    """The cost of every task; those that were never measured on this machine are now."""
    unknown = {name: family for name, family in tasks.items() if task_cost.known(family) is None}
    if unknown:
        with progress("measuring tasks", len(unknown)) as advance:
            for name, family in unknown.items():
                task_cost.cost(family)
                advance(name)
    return {name: task_cost.cost(family) for name, family in tasks.items()}


def within(tasks: Mapping[str, Any], time_budget: float | None) -> dict[str, Any]:
    """The tasks within the budget, all if there is none; says which are left out.

    Raises:
      ValueError: none is within it; says what each is predicted to cost.
    """
    if time_budget is None:
        return dict(tasks)
    task_cost.check_budget(time_budget)
    measured(tasks)
    kept, over = task_cost.within_budget(tasks, time_budget)
    if over:
        console.print(f"over the time budget, left out: {task_cost.said(over)}")
    return kept


def recipe_within(recipe: Recipe, time_budget: float | None) -> Recipe:
    """The recipe without the tasks that are over the budget."""
    chosen = _of(recipe)
    kept = within(chosen, time_budget)
    return dataclasses.replace(
        recipe, without=recipe.without + tuple(name for name in chosen if name not in kept)
    )


def of_recipe(recipe: Recipe) -> list[float] | None:
    """Seconds per inner step and particle of each of a suite's tasks; None where there is one."""
    chosen = _of(recipe)
    if len(chosen) < 2:
        return None
    return [cost.step_seconds_together for cost in measured(chosen).values()]


def _of(recipe: Recipe) -> dict[str, Any]:
    tasks = families(recipe.task)
    return {name: family for name, family in tasks.items() if name not in recipe.without}
