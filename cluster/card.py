"""What an artifact's card says of how good it is: scores from evaluations, known failures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from scipy import stats

import learned_opt
from cluster import run_directory
from cluster.evaluate import row_label
from cluster.selection import CARD_ENTRY
from evaluation import results as evaluation_results
from evaluation.results import Results
from learned_opt import artifact

SCORES, FAILURES = "scores", "known_failures"


def write(
    name: str,
    results: tuple[Path, ...],
    failures: tuple[str, ...],
    out: Path | None,
    other_seeds: tuple[Path, ...] = (),
) -> Path:
    """Writes the artifact with what the files say of it, with known failures and with the
    meta-validation scores of the same recipe's runs from other seeds in its card, to `out` or in
    its place; rule and theta stay. What is not given stays as the card has it.

    Raises:
      ValueError, OSError: before anything is written.
    """
    if not (results or failures or out or other_seeds):
        raise ValueError(
            "`results`, `failure`, `other_seeds` or `out` must be given: there is nothing to write"
        )
    rule, theta, card = artifact.read(name)
    path = out or artifact.find(name)
    run_directory.check_writable("out" if out else "name", path)
    scores: dict[str, Any] = {}
    for file in results:
        key, columns = _scores(row_label(name), file)
        if key in scores:
            raise ValueError(f"`results` {file} is a second one of {key}: give one of them")
        scores[key] = columns
    if other_seeds:
        card |= {CARD_ENTRY: _with_seeds(card, other_seeds)}
    card |= {SCORES: scores} if results else {}
    card |= {FAILURES: list(failures)} if failures else {}
    learned_opt.save(path, rule, theta, card)
    return path


def _with_seeds(card: dict[str, Any], files: tuple[Path, ...]) -> dict[str, Any]:
    """The card's meta-validation with the score of each seed, and where that of one more is to be
    expected: [mean, low, high] of the 95% prediction interval of a normal variable.
    """
    if CARD_ENTRY not in card:
        raise ValueError("`other_seeds` is for artifacts whose theta was selected (`select_on`)")
    scores = {card["recipe"]["seed"]: card[CARD_ENTRY]["score"]}
    for file in files:
        other = artifact.read(file)[2]
        if {**other.get("recipe", {}), "seed": 0} != {**card["recipe"], "seed": 0}:
            raise ValueError(f"`other_seeds` {file} is not of the same recipe")
        if (seed := other["recipe"]["seed"]) in scores:
            raise ValueError(f"`other_seeds` {file} is a second one of seed {seed}")
        scores[seed] = other[CARD_ENTRY]["score"]
    values, n = np.array(list(scores.values())), len(scores)
    width = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) * np.sqrt(1 + 1 / n)
    expected = [float(f"{values.mean() + x:.4g}") for x in (0.0, -width, width)]
    by_seed = {str(seed): score for seed, score in sorted(scores.items())}
    return {**card[CARD_ENTRY], "score_by_seed": by_seed, "score_of_another_seed": expected}


def _scores(row: str, file: Path) -> tuple[str, dict[str, list[float]]]:
    """What was run, and the columns of the row in which something is stated."""
    try:
        found = evaluation_results.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"`results` {file} cannot be read: {error}") from None
    if row not in found.summary:
        raise ValueError(
            f"`results` {file} has no row '{row}', which is what this artifact is called in "
            f"evaluations. It has: {', '.join(found.summary)}"
        )
    return _what(found), {name: x for name, x in found.summary[row].items() if x is not None}


def _what(found: Results) -> str:
    about = found.about
    tasks = about["tasks"]
    # results of older versions do not name their suite
    suite = about.get("suite") or (tasks[0] if len(tasks) == 1 else f"{len(tasks)} tasks")
    # otherwise the same as of an optimizer that ran as it is
    rates = ", ".join(f"{rate:g}" for rate in about.get("learning_rates", ()))
    tuned = f", learning rate of {rates}" if rates else ""
    return f"{suite}, {about['steps']} steps, {about['seeds']} seeds{tuned}"


def shown(card: dict[str, Any]) -> tuple[dict[str, Any], list[RenderableType]]:
    """The part of a card that is shown as it is, and the rest: scores as short tables, failures as
    lines. A part of another form than `write` and `jobs.export` give it is shown as it is.
    """
    rest, readable = dict(card), []
    for part, form in (
        (CARD_ENTRY, _meta_validation),
        (SCORES, _all_scores),
        (FAILURES, _failures),
    ):
        if part not in card:
            continue
        try:
            readable += list(form(card[part]))
        except (TypeError, ValueError, KeyError, AttributeError):
            continue
        del rest[part]
    return rest, readable


def _meta_validation(found: dict[str, Any]) -> Iterator[RenderableType]:
    yield Text(
        f"\nmeta-validation on {found['suite']}, {found['steps']} steps, {found['seeds']} seeds: "
        f"theta after outer step {found['outer_step']}, score {found['score']:.3f}"
    )
    yield _table({name: x for name, x in found.items() if isinstance(x, list)})


def _all_scores(scores: dict[str, dict[str, list[float]]]) -> Iterator[RenderableType]:
    for what, columns in scores.items():
        yield Text(f"\nscores on {what}")
        yield _table(columns)


def _failures(failures: list[str]) -> Iterator[RenderableType]:
    if not isinstance(failures, list):
        raise TypeError(f"`{FAILURES}` must be a list, got {failures!r}")
    yield Text("\n".join(["\nknown failures", *(f"  - {failure}" for failure in failures)]))


def _table(columns: dict[str, list[float]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, (estimate, low, high) in columns.items():
        table.add_row(Text(f"  {name}"), Text(f"{estimate:.3g}"), Text(f"[{low:.3g}, {high:.3g}]"))
    return table
