"""What exists, by name: for `learned-opt show`."""

import dataclasses
import json
from typing import Any

from rich.table import Table

import learned_opt
import meta_train.estimators
import tasks
from cluster import card as cards
from cluster.cli import recipes
from cluster.console import console
from evaluation.baselines import BASELINES, GROUPS
from learned_opt import artifact, base, discovery
from tasks.sources import SOURCES
from tasks.suites import SUITES
from tasks.text import TEXTS


def show(name: str | None) -> None:
    """Prints an artifact's rule and card, or all names.

    Raises:
      FileNotFoundError, ValueError: as `artifact.read`.
    """
    if name is None:
        console.print(_everything(), soft_wrap=False)
        return
    rule, theta, card = artifact.read(name)
    count = sum(leaf.size for leaf in base.flatten(theta).values())
    console.print(f"{artifact.find(name)}\n{discovery.spec_of(rule)}\n{count} meta-parameters")
    rest, readable = cards.shown(card)
    console.print_json(json.dumps(rest))
    for part in readable:
        console.print(part, soft_wrap=False)


def _fields(member: Any) -> str:
    """The fields of a class with their defaults, as one would write them in a spec; of a
    configured instance, what it is.
    """
    if not isinstance(member, type):
        return discovery.spec_of(member)
    shown = []
    for field in dataclasses.fields(member):
        if field.name in ("problem", "first_particle"):  # bound by the recipe and by `partition`
            continue
        given = "" if field.default is dataclasses.MISSING else f"={field.default!r}"
        shown.append(field.name + given)
    return ", ".join(shown)


def _everything() -> Table:
    table = Table("kind", "name", "fields (and their defaults)", title="learned-opt")
    for kind, package in (
        ("rule", learned_opt),
        ("task", tasks),
        ("estimator", meta_train.estimators),
    ):
        for name, member in sorted(discovery.members(package).items()):
            table.add_row(kind, name, _fields(member))
    for kind, names in (
        ("dataset", [*SOURCES, "tfds:NAME", "stream:NAME"]),
        ("text", TEXTS),
        ("suite", SUITES),
        ("baseline", [*BASELINES, *GROUPS]),
        ("recipe", recipes()),
        ("pretrained", artifact.pretrained()),
    ):
        for name in names:
            table.add_row(kind, name, "")
    return table
