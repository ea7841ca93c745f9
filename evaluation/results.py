"""What an evaluation found, as plain data that a JSON file holds completely."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from evaluation.atomic import replacing

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows are optimizers. Scores are higher-is-better ratios, see `metrics`; null where undefined.

    Attributes:
      about: what was run, on what: steps, seeds, versions, machine, seconds; from the command line
        also the name of the suite.
      rows: name -> {"kind": contender | tuned | default | oracle,
        "chosen": {task: hyperparameters}}.
      scores: reference ("default" or "tuned" Adam) -> row -> task -> metric -> [seeds].
      summary: row -> column -> [estimate, low, high], see `summary.COLUMNS`.
      curves: row -> task -> {"steps", "mean", "low", "high"}: smoothed training loss, thinned; the
        band is the range over seeds.
    """

    about: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    scores: dict[str, dict[str, dict[str, dict[str, list[float]]]]]
    summary: dict[str, dict[str, list[float] | None]]
    curves: dict[str, dict[str, dict[str, list[float | None]]]]


def save(results: Results, path: str | Path) -> None:
    """Writes JSON, atomically."""
    text = json.dumps(
        {"schema": SCHEMA, **dataclasses.asdict(results)}, allow_nan=False, separators=(",", ":")
    )
    with replacing(path) as file:
        file.write(text.encode())


def load(path: str | Path) -> Results:
    """Reads what `save` wrote. ValueError if it is damaged or of another schema."""
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(
            f"`path` {path} is not a results file ({error}); evaluate again"
        ) from error
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    names = {field.name for field in dataclasses.fields(Results)}
    if schema != SCHEMA or set(data) != names:
        raise ValueError(
            f"`path` {path} has results of schema {schema}, this version reads {SCHEMA}; "
            "evaluate again"
        )
    return Results(**data)
