"""The report's figure of a meta-training run, from the records of its metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.plots import STYLE

Records = Sequence[Mapping[str, Any]]

# Key of the records -> title, label of the axis, the value worth a line and its name.
SERIES = {
    "loss": ("Meta-loss", "loss", None),
    "gradient_snr": ("Gradient: signal to noise", "ratio", (1.0, "noise alone")),
    "effective_sample_size": ("Effective sample size", "particles", None),
    "diverged": ("Diverged inner runs", "share", None),
}
STAGES = {"first tenth": "#999999", "middle tenth": "#E69F00", "last tenth": "#D55E00"}


def meta_training(records: Records, truncation: int | None = None) -> Figure:
    """What the records tell over outer steps, raw and averaged; and the mean loss by inner step, in
    the first, the middle and the last tenth of the records.

    Args:
      records: of metrics.jsonl, in order. Of the keys of `SERIES` and `loss_by_window` any but
        `loss` may be missing; None is a gap.
      truncation: inner steps of a window; None leaves the losses by window out.
    """
    drawn = [key for key in SERIES if key == "loss" or _series(records, key)[0].size]
    by_window = [r["loss_by_window"] for r in records if r.get("loss_by_window")]
    count = len(drawn) + bool(by_window and truncation)
    columns = min(2, count)
    rows = math.ceil(count / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 2.7 * rows + 0.3), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel in panels[count:]:
            panel.set_visible(False)
        _over_outer_steps(panels[0], records, "loss")
        handles, labels = panels[0].get_legend_handles_labels()
        if by_window and truncation:
            _by_inner_step(panels.pop(1), by_window, truncation)
        for panel, key in zip(panels[1:], drawn[1:], strict=False):
            _over_outer_steps(panel, records, key)
        figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=2)
    return figure


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Outer steps and values where there is a value."""
    known = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    steps, values = zip(*known, strict=True) if known else ((), ())
    return np.array(steps, np.float64), np.array(values, np.float64)


def _over_outer_steps(panel: Axes, records: Records, key: str) -> None:
    title, unit, reference = SERIES[key]
    steps, values = _series(records, key)
    window = max(5, len(values) // 30)
    # Each point averages the window before it, fewer at the start.
    totals = np.cumsum(np.concatenate([np.zeros(1), values]))
    starts = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    average = (totals[1:] - totals[starts]) / (np.arange(1, len(values) + 1) - starts)
    panel.plot(steps, values, color="#b9d7ea", linewidth=0.8, label="each outer step")
    panel.plot(steps, average, color="#0072B2", linewidth=2, label=f"mean of the last {window}")
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
    panel.set_xlabel("outer step")
    panel.set_ylabel(unit)
    if key == "diverged":
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        panel.set_ylim(0, max(0.05, 1.05 * float(values.max())))
    elif key == "effective_sample_size":
        panel.set_ylim(0)
    else:
        _logarithmic(panel, values)
    if reference:
        value, name = reference
        panel.axhline(value, color="#777777", linewidth=1.2, linestyle="--", label=name)
        panel.legend(*_only(panel, name), loc="best", frameon=False, fontsize=9)


def _logarithmic(panel: Axes, values: np.ndarray) -> None:
    """If the values allow it."""
    if not values.size or values.min() <= 0:
        return
    panel.set_yscale("log")
    plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_major_formatter(plain)
    # within a decade there may be no major tick at all
    narrow = values.max() < 10 * values.min()
    panel.yaxis.set_minor_formatter(plain if narrow else matplotlib.ticker.NullFormatter())


def _only(panel: Axes, name: str) -> tuple[list[Any], list[str]]:
    handles, labels = panel.get_legend_handles_labels()
    return [handles[labels.index(name)]], [name]


def _by_inner_step(panel: Axes, by_window: Sequence[Sequence[float | None]], truncation: int):
    losses_RW = np.array(by_window, np.float64)  # records x windows, nan for None
    inner_steps = truncation * np.arange(1, losses_RW.shape[1] + 1)
    count = max(1, len(losses_RW) // 10)
    begins = (0, (len(losses_RW) - count) // 2, len(losses_RW) - count)
    drawn = []
    for (stage, colour), begin in zip(STAGES.items(), begins, strict=True):
        pooled = losses_RW[begin : begin + count]
        known = ~np.isnan(pooled)
        seen = known.any(axis=0)
        means = np.nansum(pooled, axis=0)[seen] / known.sum(axis=0)[seen]
        drawn.append(means)
        marker = "o" if len(means) < 30 else None
        panel.plot(
            inner_steps[seen], means, color=colour, linewidth=2, label=stage,
            marker=marker, markersize=3,
        )  # fmt: skip
    _logarithmic(panel, np.concatenate(drawn))
    panel.set_title("Loss by inner step", loc="left", fontsize=11, fontweight="bold")
    panel.set_xlabel("inner step")
    panel.set_ylabel("loss")
    panel.set_xlim(0)
    panel.legend(title="of the meta-training", frameon=False, fontsize=9, title_fontsize=9)
