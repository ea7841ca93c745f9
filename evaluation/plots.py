"""The report's figures. Drawn with matplotlib's object interface: no display, no global state."""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from evaluation.results import Results
from evaluation.stats import performance_profile

# Okabe and Ito's palette, told apart with any colour vision; contenders get its strongest colours.
CONTENDER_COLOURS = ("#D55E00", "#0072B2", "#CC79A7", "#009E73")
BASELINE_COLOURS = ("#000000", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # text stays text: small, searchable, sharp
    "font.family": "sans-serif",
}


MOST_TUNED, MOST_SHADED = 8, 7  # baselines in a figure, rows with a range
GREY = {"color": "#777777", "zorder": 2}


def ranked(results: Results) -> list[str]:
    """Rows, best mean training loss against tuned Adam first."""

    def rank(row: str) -> float:
        score = results.summary[row]["mean_train_vs_tuned"]
        assert score is not None, row  # every kind of row has a training loss
        return -score[0]

    return sorted(results.rows, key=rank)


def drawn(results: Results) -> list[str]:
    """The rows that figures have room for: of tuned baselines Adam and the best of the others."""
    adam, *others = (name for name, row in results.rows.items() if row["kind"] == "tuned")
    best = [adam, *(name for name in ranked(results) if name in others)]
    left_out = {*best[MOST_TUNED:]}
    return [name for name in results.rows if name not in left_out]


def shaded(results: Results) -> list[str]:
    """The rows whose range is drawn too: all, unless shade would then hide all lines."""
    names = drawn(results)
    if len(names) <= MOST_SHADED:
        return names
    adam = next(name for name in names if results.rows[name]["kind"] == "tuned")
    return [name for name in names if results.rows[name]["kind"] == "contender" or name == adam]


def looks(results: Results) -> dict[str, dict[str, Any]]:
    """Line style of each row that is `drawn`: contenders thick, default dashed, oracle dotted."""
    contenders = itertools.cycle(CONTENDER_COLOURS)
    count = sum(row["kind"] == "contender" for row in results.rows.values())
    free = [colour for colour in BASELINE_COLOURS if colour not in CONTENDER_COLOURS[:count]]
    tuned = itertools.product(("-", (0, (5, 1)), (0, (3, 1, 1, 1))), free)
    kinds = {
        "contender": lambda: {"color": next(contenders), "linewidth": 2.6, "zorder": 4},
        "tuned": lambda: (
            dict(zip(("linestyle", "color"), next(tuned), strict=True))
            | {"linewidth": 1.5, "zorder": 3}
        ),
        "default": lambda: {"linewidth": 1.5, "linestyle": "--", **GREY},
        "oracle": lambda: {"linewidth": 1.3, "linestyle": ":", **GREY},
    }
    return {name: kinds[results.rows[name]["kind"]]() for name in drawn(results)}


def loss_curves(results: Results) -> Figure:
    """Smoothed training loss, one panel per task, the range over seeds shaded."""
    tasks, styles, bands = results.about["tasks"], looks(results), shaded(results)
    columns = min(3 if len(tasks) <= 9 else 4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    with matplotlib.rc_context(STYLE):
        width = max(6.5, 3.7 * columns)
        legend_rows = math.ceil(len(styles) / max(2, int(width / 2.4)))
        height = 3.0 * rows + 0.25 * legend_rows + 0.3
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for panel, task in zip(panels.flat, tasks, strict=False):
            for name, style in styles.items():
                curve = _as_arrays(results.curves[name][task])
                (line,) = panel.plot(curve["steps"], curve["mean"], label=name, **style)
                if name in bands:
                    panel.fill_between(
                        curve["steps"], curve["low"], curve["high"], color=line.get_color(),
                        alpha=0.15, linewidth=0, zorder=1,
                    )  # fmt: skip
            _frame_losses(panel, [results.curves[name][task] for name in styles])
            panel.set_title(task, loc="left", fontsize=11, fontweight="bold")
        for panel in panels[:, 0]:
            panel.set_ylabel("training loss")
        for panel in panels.flat[max(0, len(tasks) - columns) : len(tasks)]:
            panel.set_xlabel("training step")  # of the last in every column
        for panel in panels.flat[len(tasks) :]:
            panel.set_visible(False)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", frameon=False,
            ncols=math.ceil(len(styles) / legend_rows),
        )  # fmt: skip
    return figure


def _as_arrays(curve: Mapping[str, Sequence[float | None]]) -> dict[str, np.ndarray]:
    return {name: np.array(values, np.float64) for name, values in curve.items()}


def _frame_losses(panel, curves) -> None:
    # A run that explodes would squeeze all others into a line: the frame ends at twice the
    # highest starting loss, and whatever leaves it is seen to leave.
    means = [_as_arrays(curve)["mean"] for curve in curves]
    finite = np.concatenate([mean[np.isfinite(mean)] for mean in means])
    if not finite.size or finite.min() <= 0:
        return
    panel.set_yscale("log")
    starts = [mean[0] for mean in means if np.isfinite(mean[0])]
    top = min(finite.max(), 2 * max(starts, default=finite.max()))
    low = max(finite.min(), top * 1e-6)
    panel.set_ylim(low / 1.3, top * 1.3)
    panel.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda loss, _: f"{loss:g}"))
    panel.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def profile(results: Results) -> Figure:
    """Share of runs whose mean training loss is at least tau times better than tuned Adam's."""
    taus = np.geomspace(1 / 16, 16.0, 401)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        panel = figure.subplots()
        for name, style in looks(results).items():
            tasks = results.scores["tuned"][name].values()
            shares = performance_profile([task["mean_train_loss"] for task in tasks], taus)
            panel.step(taus, shares, where="post", label=name, **style)
        panel.axvline(1.0, color="#bbbbbb", linewidth=1, zorder=0)
        panel.set_xscale("log", base=2)
        ticks = 2.0 ** np.arange(-4, 5)
        panel.set_xticks(ticks, [f"{t:g}x" if t >= 1 else f"1/{1 / t:g}x" for t in ticks])
        panel.set_ylim(-0.02, 1.02)
        panel.set_xlabel("mean training loss: at least this much better than tuned Adam")
        panel.set_ylabel("share of runs")
        figure.legend(loc="outside right center", frameon=False)
    return figure


def svg(figure: Figure) -> str:
    """A figure as an <svg> element to be placed in HTML, free of every outside address."""
    buffer = io.StringIO()
    # Without a salt the ids differ from run to run.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "evaluation"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML knows both namespaces


def save_png(figure: Figure, path: str | Path) -> None:
    """Writes a figure at 150 dots per inch."""
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=150, facecolor="white")
