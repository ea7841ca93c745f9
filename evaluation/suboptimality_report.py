"""Proximal optimizers on sets of convex problems, side by side: one self-contained report.html, and
tables for documents and terminals.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import rich.box
import rich.table
from matplotlib.figure import Figure

from evaluation.atomic import replacing
from evaluation.plots import BASELINE_COLOURS, CONTENDER_COLOURS, STYLE, svg
from evaluation.report import STYLESHEET
from evaluation.suboptimality import Interval, Summary

REFERENCE = "fista_restart"
TOLD = (1e-2, 1e-4, 1e-6, 1e-8)  # thresholds in tables
MIDDLE = 1e-6  # where there is room for one
ROUNDING = 1e-12  # a mean below it says nothing
LOWEST = 1e-10  # of the figures: far below the last threshold
MOST_SHADED = 3  # rows with a band in a figure
KINDS = {"contender": "judged here", "tuned": "tuned for the set", "reference": "not tuned"}


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer on a set.

    Attributes:
      kind: one of `KINDS`.
      params, x: what is told of the params, and of the last proximal point where there is one.
      note: what was chosen by tuning, or how many runs of a kind were pooled.
    """

    kind: str
    params: Summary
    x: Summary | None = None
    note: str = ""

    def plain(self) -> dict[str, Any]:
        x = None if self.x is None else self.x.plain()
        return {"kind": self.kind, "params": self.params.plain(), "x": x, "note": self.note}

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> "Row":
        x = plain["x"] and Summary.of_plain(plain["x"])
        return cls(plain["kind"], Summary.of_plain(plain["params"]), x, plain["note"])


class Comparison(NamedTuple):
    """`about` says what was run: {title, text, iterations}; `sets` are rows by name, by set."""

    about: dict[str, Any]
    sets: dict[str, dict[str, Row]]


class Cell(NamedTuple):
    """Texts, and "win" or "loss" where the interval is clear of that of `REFERENCE`."""

    estimate: str
    interval: str = ""
    verdict: str = ""


def render(found: Comparison, path: str | Path) -> None:
    """Writes the report to `path`: one HTML file without scripts, needing no network."""
    title = escape(found.about["title"])
    sections = [
        f"<h1>{title}</h1><p>{escape(found.about['text'])}</p>",
        f"<p class=note>{_reading(found)}</p>",
        "<h2>Relative suboptimality by iteration</h2>",
        svg(figure(found)),
        "<p class=note>Median over instances; the shade holds 80% of them. Both axes are "
        "logarithmic; what leaves the frame below is solved to ten digits.</p>",
        *(f"<h2>{escape(name)}</h2>{_html_table(found, name)}" for name in found.sets),
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLESHEET}</style><body>{''.join(sections)}</body></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode())


def _reading(found: Comparison) -> str:
    return (
        "Relative suboptimality is (F - F*) / F* in float64. Iterations: the median number until "
        f"it is at most the threshold, &gt;{found.about['iterations']} where half of the runs do "
        "not get there; in small the 95% bootstrap interval over instances, and under x the same "
        "of the last proximal point instead of the params. Mean: its mean over instances. "
        "Diverged: F not finite at the end, or 1% above F(0). "
        "<span class=loss>Red</span>: worse than restarted FISTA, the intervals being disjoint; "
        "<span class=win>blue</span>: better."
    )


def columns(found: Comparison) -> list[str]:
    """Headings of the tables, but for the first."""
    first = next(row for rows in found.sets.values() for row in rows.values())
    steps = [f"to {threshold:.0e}" for threshold in TOLD]
    return [*steps, *(f"mean at {k}" for k in first.params.at), "diverged"]


def cells(found: Comparison, rows: Mapping[str, Row], name: str) -> list[Cell]:
    """Of one row, as `columns`."""
    summary, reference = rows[name].params, rows.get(REFERENCE)
    told = [(_iterations(found, summary.to[t]), summary.to[t]) for t in TOLD]
    told += [(_mean(at["mean"]), at["mean"]) for at in summary.at.values()]
    others: Iterable[Interval | None] = itertools.repeat(None)
    if reference is not None and name != REFERENCE:
        means = [at["mean"] for at in reference.params.at.values()]
        others = [*(reference.params.to[t] for t in TOLD), *means]
    judged = [
        Cell(estimate, interval, _verdict(own, other))
        for ((estimate, interval), own), other in zip(told, others, strict=False)
    ]
    return [*judged, Cell(f"{100 * summary.diverged:.3g}%", "", "loss" * (summary.diverged > 0))]


def _verdict(own: Interval, other: Interval | None) -> str:
    if other is None or max(own.high, other.high) < ROUNDING:
        return ""
    return "win" if own.high < other.low else "loss" if own.low > other.high else ""


def _iterations(found: Comparison, interval: Interval) -> tuple[str, str]:
    texts = [f"{v:.0f}" if v < math.inf else f">{found.about['iterations']}" for v in interval]
    return texts[0], _between(texts)


def _mean(interval: Interval) -> tuple[str, str]:
    least = f"<{ROUNDING:.0e}"
    texts = [least if v < ROUNDING else f"{v:.1e}" if v < math.inf else "inf" for v in interval]
    return texts[0], _between(texts)


def _between(texts: list[str]) -> str:
    return "" if len(set(texts)) == 1 else f"{texts[1]}\N{EN DASH}{texts[2]}"


def _html_table(found: Comparison, chosen: str) -> str:
    rows, body = found.sets[chosen], []
    for name, row in rows.items():
        x = [""] * len(columns(found))
        if row.x is not None:
            x = [f"x: {_iterations(found, row.x.to[t])[0]}" for t in TOLD]
            x += [f"x: {_mean(at['mean'])[0]}" for at in row.x.at.values()] + [""]
        texts = [
            f'<td><span class="{cell.verdict}">{escape(cell.estimate)}</span>'
            f"<small>{escape(cell.interval)}</small><small>{escape(point)}</small></td>"
            for cell, point in zip(cells(found, rows, name), x, strict=True)
        ]
        note = f"{KINDS[row.kind]}{': ' * bool(row.note)}{row.note}"
        head = f"<td>{escape(name)}<small>{escape(note)}</small></td>"
        body.append(f"<tr class={row.kind}>{head}{''.join(texts)}</tr>")
    heads = "".join(f"<th>{escape(heading)}</th>" for heading in ("optimizer", *columns(found)))
    return (
        f"<div class=wide><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def markdown(found: Comparison) -> str:
    """A table per set, with intervals; worse than restarted FISTA is in italics, better in bold."""
    marks, lines = {"": "", "win": "**", "loss": "*"}, []
    for chosen, rows in found.sets.items():
        heads = ["optimizer", *columns(found)]
        lines += [f"### {chosen}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for name in rows:
            texts = [
                f"{marks[cell.verdict]}{cell.estimate}{marks[cell.verdict]}"
                + f" ({cell.interval})" * bool(cell.interval)
                for cell in cells(found, rows, name)
            ]
            lines.append(f"| {' | '.join([name, *texts])} |")
        lines.append("")
    return "\n".join(lines)


def table(found: Comparison) -> rich.table.Table:
    """For a terminal: median iterations to `MIDDLE`, sets by optimizers."""
    view = rich.table.Table(
        title=found.about["title"],
        caption=f"Median iterations to a relative suboptimality of {MIDDLE:g}. Red is worse than "
        "restarted FISTA with the whole 95% interval, blue better; ! says that runs diverged.",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    names = list(next(iter(found.sets.values())))
    view.add_column("set", no_wrap=True)
    for name in names:
        view.add_column(name.replace("_", "_\n"), justify="right", overflow="fold")
    colours, at = {"win": "[blue]", "loss": "[red]"}, TOLD.index(MIDDLE)
    for chosen, rows in found.sets.items():
        texts = []
        for name in names:
            cell, diverged = cells(found, rows, name)[at], rows[name].params.diverged > 0
            texts.append(f"{colours.get(cell.verdict, '')}{cell.estimate}{'!' * diverged}")
        view.add_row(chosen, *texts)
    return view


def figure(found: Comparison) -> Figure:
    """Median relative suboptimality by iteration, a panel for each set."""
    count = len(found.sets)
    across = min(4 if count > 9 else 3, count)
    down = math.ceil(count / across)
    looks = _looks(found)
    with matplotlib.rc_context(STYLE):
        width = max(6.5, 3.4 * across)
        size = (width, 2.7 * down + 0.25 * math.ceil(len(looks) / (width / 2.2)) + 0.3)
        drawn = Figure(figsize=size, layout="constrained")
        panels = drawn.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for panel, (title, rows) in zip(panels.flat, found.sets.items(), strict=False):
            for name, (style, shaded) in looks.items():
                _draw(panel, rows[name].params.curve, name, style, shaded)
            panel.set_title(title, loc="left", fontsize=11, fontweight="bold")
        tops = [
            row.params.curve["median"][0] for rows in found.sets.values() for row in rows.values()
        ]
        panels[0, 0].set(xscale="log", yscale="log", ylim=(LOWEST, 3 * max(1.0, *tops)))
        for panel in panels[:, 0]:
            panel.set_ylabel("relative suboptimality")
        for panel in panels.flat[max(0, count - across) : count]:
            panel.set_xlabel("iteration")
            panel.xaxis.set_tick_params(labelbottom=True)
        for panel in panels.flat[count:]:
            panel.set_visible(False)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        columns = max(1, min(len(labels), int(width / 2.2)))
        drawn.legend(handles, labels, loc="outside lower center", frameon=False, ncols=columns)
    return drawn


def _draw(panel: Any, curve: Mapping[str, Any], name: str, style: dict, shaded: bool) -> None:
    steps = np.maximum(curve["k"], 1)[1:]  # the start has no place on a logarithmic axis
    median, low, high = (
        np.clip(np.array(curve[each][1:], np.float64), LOWEST / 10, 1e30)
        for each in ("median", "p10", "p90")
    )
    panel.plot(steps, median, label=name, **style)
    if shaded:
        panel.fill_between(
            steps, low, high, color=style["color"], alpha=0.15, linewidth=0, zorder=1
        )


def _looks(found: Comparison) -> dict[str, tuple[dict[str, Any], bool]]:
    """Style of each row, and whether it has a band: contenders thick."""
    rows = next(iter(found.sets.values()))
    contenders = [name for name, row in rows.items() if row.kind == "contender"]
    lines = "-", (0, (5, 1)), (0, (1, 1))
    own = itertools.cycle(itertools.product(lines, CONTENDER_COLOURS))
    free = [c for c in BASELINE_COLOURS if c not in CONTENDER_COLOURS[: len(contenders)]]
    others = itertools.cycle(itertools.product(lines, free))
    banded = [REFERENCE, *contenders][:MOST_SHADED]
    looks = {}
    # the reference first, for the strongest of the others' colours
    for name in sorted(rows, key=lambda name: name != REFERENCE):
        dashes, colour = next(own if name in contenders else others)
        width, order = (2.4, 4) if name in contenders else (1.4, 3)
        style = {"color": colour, "linestyle": dashes, "linewidth": width, "zorder": order}
        looks[name] = (style, name in banded)
    return {name: looks[name] for name in rows}
