"""From curves to scores and intervals: every row against default and against tuned Adam."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.curve import Curve, smooth
from evaluation.metrics import METRICS, loss_ratio
from evaluation.results import Results
from evaluation.stats import iqm, stratified_bootstrap

POINTS = 200  # of a stored curve
# Summary column -> (reference, metric): interquartile means over tasks x seeds, 1 = the reference.
COLUMNS = {
    "mean_train_vs_default": ("default", "mean_train_loss"),
    "mean_train_vs_tuned": ("tuned", "mean_train_loss"),
    "final_train_vs_tuned": ("tuned", "final_train_loss"),
    "held_out_vs_tuned": ("tuned", "held_out_loss"),
    "speedup_vs_tuned": ("tuned", "speedup"),
    "time_to_target_vs_tuned": ("tuned", "time_to_target"),
}


def summarize(
    about: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    curves: dict[str, dict[str, Curve]],
    *,
    default: str,
    tuned: str,
) -> Results:
    """Scores of every row.

    Args:
      curves: row -> task -> curve, timed.
      default, tuned: the rows of default and of tuned Adam.
    """
    references = {"default": curves[default], "tuned": curves[tuned]}
    scores = {
        reference: {
            name: {
                task: _scores(rows[name], c, reference_curves[task]) for task, c in tasks.items()
            }
            for name, tasks in curves.items()
        }
        for reference, reference_curves in references.items()
    }
    return Results(
        about=about,
        rows=rows,
        scores=scores,
        summary={name: _summary(name, curves[name], scores) for name in curves},
        curves={
            name: {task: thin(rows[name], curve) for task, curve in tasks.items()}
            for name, tasks in curves.items()
        },
    )


def oracle(curve: Curve) -> Curve:
    """The curve that always equals the envelope; it has a training loss and nothing else."""
    nothing = np.full_like(curve.valid[:1], np.nan)
    return curve._replace(
        train=curve.envelope[:1], valid=nothing, test=nothing, valid_normalized=nothing
    )


def _scores(row, curve: Curve, reference: Curve) -> dict[str, list[float]]:
    if row["kind"] == "oracle":
        # An envelope is smooth, and is compared with the reference's smoothed loss.
        best, smoothed = curve.train.astype(np.float64), smooth(reference.train)
        pairs = {
            "mean_train_loss": (smoothed.mean(axis=1), best.mean()),
            "final_train_loss": (smoothed[:, -1], best[0, -1]),
        }
        scores = {name: loss_ratio(*pair) for name, pair in pairs.items()}
    else:
        scores = {name: metric(curve, reference) for name, metric in METRICS.items()}
    return {name: np.round(values, 6).tolist() for name, values in scores.items()}


def _summary(name, curves: dict[str, Curve], scores) -> dict[str, list[float] | None]:
    def interval(reference, metric, statistic):
        tasks = scores[reference][name]
        if any(metric not in task for task in tasks.values()):
            return None
        return stratified_bootstrap({t: s[metric] for t, s in tasks.items()}, statistic)

    columns: dict[str, Sequence[float] | None] = {
        column: interval(reference, metric, iqm)
        for column, (reference, metric) in COLUMNS.items()
    }  # fmt: skip
    survival = interval("tuned", "survival", np.mean)
    measured = survival is not None
    columns["divergence_rate"] = (
        [1 - survival[0], 1 - survival[2], 1 - survival[1]] if measured else None
    )
    # These have no seeds: the mean over tasks and the range.
    relative = [c.seconds_per_step / c.adam_seconds_per_step for c in curves.values()]
    columns["step_time_vs_adam"] = _range(relative) if measured else None
    columns["seconds_per_step"] = (
        _range([c.seconds_per_step for c in curves.values()]) if measured else None
    )
    columns["state_bytes_per_param"] = (
        _range([c.state_bytes_per_param for c in curves.values()]) if measured else None
    )
    return {
        column: None if values is None else [float(f"{value:.6g}") for value in values]
        for column, values in columns.items()
    }


def _range(values) -> list[float] | None:
    values = np.asarray(values, np.float64)
    return [values.mean(), values.min(), values.max()] if np.isfinite(values).all() else None


def thin(row, curve: Curve) -> dict[str, list[float | None]]:
    """At most POINTS points of the smoothed training loss: mean over seeds and range; null if not
    finite."""
    train = curve.train if row["kind"] == "oracle" else smooth(curve.train)
    steps = train.shape[1]
    kept = np.unique(np.linspace(0, steps - 1, min(POINTS, steps)).round().astype(int))
    bands = {"mean": train.mean(axis=0), "low": train.min(axis=0), "high": train.max(axis=0)}

    def plain(values):
        return [float(f"{v:.5g}") if np.isfinite(v) else None for v in values[kept]]

    return {
        "steps": (kept + 1).tolist(),
        **{name: plain(values) for name, values in bands.items()},
    }
