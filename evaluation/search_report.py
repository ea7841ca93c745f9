"""One self-contained report.html of a search for optimizer programs (arXiv 2302.06675): what was
found, how the search went, and how much of the gain holds on tasks that it did not see.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from evaluation.atomic import replacing
from evaluation.plots import STYLE, svg
from evaluation.report import STYLESHEET

# Key of the records -> name of the line, colour, and style where lines may coincide.
RATES = {
    "structural_hits": ("dataflow seen before", "#0072B2"),
    "functional_hits": ("updates seen before", "#56B4E9"),
    "evaluated": ("tried", "#D55E00"),
    "not_finite": ("not finite on probes", "#777777"),
}
REDUNDANT = {
    "redundant": ("reach no output", "#0072B2", "-"),
    "redundant_for_updates": ("never matter for an update", "#D55E00", "--"),
}
HOW = {
    "start": "first program",
    "restart": "restart without dead code",
    "evaluated": "tried",
    "structural": "dataflow seen before",
    "functional": "updates seen before",
}
MOST_DOTS, MOST_INTERVALS, MOST_STEPS = 3000, 60, 60
NEUTRAL = 1e-4  # log loss
CSS = """
.programs{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:0 1.2rem}
.programs div{min-width:0} h3{margin:.8rem 0 .3rem;font-size:14px}
pre{margin:0;padding:.7rem;background:#f6f6f6;overflow-x:auto;font-size:12.5px;line-height:1.4}
th:nth-child(-n+3),td:nth-child(-n+3){text-align:left} tr.neutral td{color:#8a8a8a}
.facts td:first-child{color:#666} .facts td{padding-block:.15rem}
figure{margin:1.2rem 0 2rem} figcaption{max-width:75ch;color:#444}
"""


class Found(NamedTuple):
    """All that the report tells. A fitness is the log of the ratio of a loss to the first
    program's: lower is better, and what is not finite counts as a lost run.
    """

    title: str
    facts: Mapping[str, str]
    programs: Mapping[str, str]  # heading -> Python text
    records: Sequence[Mapping[str, Any]]  # of metrics.jsonl, in order; counts are totals so far
    fitness: Sequence[float]  # of the programs tried, in order
    lineage: Sequence[tuple[int, str, str, float]]  # number, how, change, fitness
    stages: Mapping[str, Mapping[int, float]]  # stage -> {candidate: fitness}
    correlations: Sequence[tuple[str, str, float, float, int]]
    # stage, next stage, Spearman's, top-10 recall, programs
    winner: int | None  # candidate
    validated: Sequence[tuple[int, float, float]] = ()
    # of programs that were the best at their time: tried before, fitness, that of meta-validation


def render(found: Found, path: str | Path) -> None:
    """Writes the report to `path`: one HTML file without scripts, needing no network."""
    programs = "".join(
        f"<div><h3>{escape(heading)}</h3><pre>{escape(text)}</pre></div>"
        for heading, text in found.programs.items()
    )
    facts = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>"
        for name, text in found.facts.items()
    )
    drawn = "".join(
        f"<figure>{svg(figure)}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, figure in figures(found)
    )
    sections = [
        f"<h1>{escape(found.title)}</h1><table class=facts>{facts}</table>",
        f"<h2>Programs</h2><div class=programs>{programs}</div>" if programs else "",
        f"<h2>The search</h2>{drawn}" if drawn else "",
        _correlations(found) if found.correlations else "",
        _lineage(found) if found.lineage else "",
    ]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(found.title)}</title>'
        f"<style>{STYLESHEET}{CSS}</style><body>{''.join(sections)}</body></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode())


def figures(found: Found) -> list[tuple[str, Figure]]:
    """Captions and figures; what there is no data for is left out."""
    pairs = [
        (before, after)
        for before, after in itertools.pairwise(found.stages)
        if found.stages[before].keys() & found.stages[after].keys()
    ]
    drawn = []
    with matplotlib.rc_context(STYLE):
        if found.fitness:
            drawn.append(_fitness(found))
        if found.records:
            drawn.append(_rates(found.records))
        if found.validated:
            drawn.append(_validation(found.validated))
        if pairs:
            drawn.append(_funnel(found, pairs))
    return drawn


def _fitness(found: Found) -> tuple[str, Figure]:
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    panel = figure.subplots()
    changes = _changes(found.fitness)
    best = np.minimum.accumulate(np.concatenate([np.zeros(1), changes]))
    medians = _changes([_value(record, "median") for record in found.records])
    tried = np.array([_value(record, "evaluated") for record in found.records])
    gain = max(0.02, -best[-1])
    usual = np.median([0.0, *medians[np.isfinite(medians)]])
    top = max(gain, 1.1 * min(1.0, usual))  # where a population is bad for long, it is shown
    every = math.ceil(len(changes) / MOST_DOTS)
    panel.plot(
        np.arange(1, len(best))[::every], np.minimum(changes, top)[::every], ".",
        color="#8fbfdd", markersize=4 if len(best) > 1000 else 6, markeredgewidth=0,
        clip_on=False, zorder=2,
        label="program tried" + (f" (one in {every})" if every > 1 else ""),
    )  # fmt: skip
    panel.axhline(0.0, color="#777777", linewidth=1.2, linestyle="--", label="first program")
    panel.plot(
        tried, np.where(np.isfinite(medians), medians, np.nan), color="#0072B2", linewidth=1,
        alpha=0.7, marker="o" if len(tried) < 3 else None, label="median of the population",
    )  # fmt: skip
    panel.plot(best, color="#D55E00", linewidth=2.6, drawstyle="steps-post", label="best so far")
    totals = [0, *(_value(record, "restarts") for record in found.records)]
    restarts = [at for at, (a, b) in zip(tried, itertools.pairwise(totals), strict=True) if b > a]
    for index, at in enumerate(restarts):
        label = None if index else "restart"
        panel.axvline(at, color="#009E73", linewidth=1, linestyle=":", label=label, zorder=1)
    panel.set_ylim(best[-1] - 0.08 * (gain + top), top)
    panel.set_xlim(0, 1.01 * len(changes))
    _name(panel, "Loss of the programs tried", "programs tried", "loss against the first program's")
    _count(panel)
    panel.yaxis.set_major_formatter(FuncFormatter(_change))
    figure.legend(loc="outside lower center", frameon=False, ncols=5)
    caption = (
        "Loss on the search's own tasks, after training, against that of the first program: "
        f"{_change(-0.1)} is a tenth less. Runs that were lost, and all above the frame, are "
        "at its upper edge."
    )
    return caption, figure


def _rates(records: Sequence[Mapping[str, Any]]) -> tuple[str, Figure]:
    figure = Figure(figsize=(10.5, 3.5), layout="constrained")
    hits, redundancy, variety = figure.subplots(1, 3)
    every = math.ceil(len(records) / MOST_INTERVALS)
    records = records[::-1][::every][::-1]  # with the last
    generated = np.array([record["generated"] for record in records], np.float64)
    lengths = np.diff(generated, prepend=0.0)
    marker = "o" if len(records) < 30 else None
    style: dict[str, Any] = {"linewidth": 1.8, "marker": marker, "markersize": 3}
    for key, (name, colour) in RATES.items():
        counts = np.diff([_value(record, key) for record in records], prepend=0.0)
        shares = counts[lengths > 0] / lengths[lengths > 0]
        hits.plot(generated[lengths > 0], shares, color=colour, label=name, **style)
    for key, (name, colour, dashes) in REDUNDANT.items():
        shares = [_value(record, key) for record in records]
        redundancy.plot(generated, shares, dashes, color=colour, label=name, **style)
    distinct = [_value(record, "distinct") for record in records]
    variety.plot(generated, distinct, color="#0072B2", **style)
    _name(hits, "Programs generated", "programs generated", "share")
    _name(redundancy, "Redundant statements", "programs generated", "share in the population")
    _name(variety, "Distinct programs", "programs generated", "in the population")
    for panel in (hits, redundancy):
        panel.set_ylim(-0.02, 1.02)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=9)
    variety.set_ylim(0, 1.08 * np.nanmax([1.0, *distinct]))
    for panel in (hits, redundancy, variety):
        _count(panel)
        panel.set_xlim(0)
    caption = (
        "Left: what became of the programs generated since the point before. Those whose dataflow, "
        "or whose updates on probes, were seen already take over a known fitness; only the others "
        "are tried. Middle: statements that no output of a program depends on, and those without "
        "which all updates of a run were the same. Right: programs of different dataflow."
    )
    return caption, figure


def _validation(validated: Sequence[tuple[int, float, float]]) -> tuple[str, Figure]:
    figure = Figure(figsize=(7.0, 3.4), layout="constrained")
    panel = figure.subplots()
    tried, *fitness = zip(*validated, strict=True)
    names = {"on the search's own tasks": "#D55E00", "on other tasks": "#0072B2"}
    for (name, colour), values in zip(names.items(), fitness, strict=True):
        changes = np.minimum(_changes(values), 1.0)
        panel.plot(tried, changes, "o-", color=colour, linewidth=1.8, markersize=4, label=name)
    panel.axhline(0.0, color="#777777", linewidth=1.2, linestyle="--", label="first program")
    _name(panel, "The best so far, meta-validated", "programs tried", "loss against the first's")
    _count(panel)
    panel.yaxis.set_major_formatter(FuncFormatter(_change))
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    caption = (
        "Programs that were the best when they were tried. Where a lower loss on the search's own "
        "tasks no longer brings a lower one on others, the search overfits its tasks."
    )
    return caption, figure


def _funnel(found: Found, pairs: Sequence[tuple[str, str]]) -> tuple[str, Figure]:
    figure = Figure(figsize=(max(5.0, 3.5 * len(pairs)), 4.0), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False).flat
    told = {(before, after): spearman for before, after, spearman, *_ in found.correlations}
    labels: dict[str, Any] = {}
    for panel, (before, after) in zip(panels, pairs, strict=True):
        both = [i for i in found.stages[before] if i in found.stages[after]]
        xy = [_within(_changes([found.stages[s][i] for i in both])) for s in (before, after)]
        equal = panel.axline((0, 0), slope=1, color="#777777", linewidth=1.2, linestyle="--")
        panel.axhline(0.0, color="#bbbbbb", linewidth=1, zorder=0)
        panel.axvline(0.0, color="#bbbbbb", linewidth=1, zorder=0)
        (dots,) = panel.plot(*xy, "o", color="#0072B2", ms=4.5, alpha=0.6, markeredgewidth=0)
        labels |= {"candidate": dots, "the same in both": equal}
        if found.winner in both:
            at = both.index(found.winner)
            (labels["winner"],) = panel.plot(
                xy[0][at], xy[1][at], "*", color="#D55E00", markersize=15, markeredgecolor="white"
            )
        spearman = told.get((before, after), math.nan)
        _name(panel, f"Spearman {_known(spearman, '.2f')}, {len(both)} programs", before, after)
        panel.xaxis.set_major_formatter(FuncFormatter(_change))
        panel.yaxis.set_major_formatter(FuncFormatter(_change))
        panel.locator_params(nbins=5)
    figure.legend([*labels.values()], [*labels], loc="outside lower center", frameon=False, ncols=3)
    caption = (
        "Loss of candidates against the first program's, in a stage and in the next: left of and "
        "below the grey lines it is less. Above the dashed line some of the gain is lost: it was "
        "luck, or of the former tasks alone. Runs that were lost, and far worse ones, are at the "
        "edge."
    )
    return caption, figure


def _correlations(found: Found) -> str:
    rows = [
        ("", [before, after, _known(spearman, ".2f"), _known(recall, ".0%"), f"{count}"])
        for before, after, spearman, recall, count in found.correlations
    ]
    head = ["stage", "next stage", "Spearman", "top-10 recall", "programs"]
    return (
        f"<h2>From stage to stage</h2>{_table(head, rows)}<p class=note>Rank correlation of the "
        "losses of programs that saw both stages, and the share of the next stage's ten best that "
        "were among the ten best of the stage.</p>"
    )


def _lineage(found: Found) -> str:
    """All steps, or if these are too many the first, the last, and those to a new least loss."""
    rows, left_out = [], {"neutral": 0, "other": 0}
    before, least, last = math.nan, math.inf, len(found.lineage) - 1
    for index, (number, how, change, fitness) in enumerate(found.lineage):
        neutral = fitness == before or abs(fitness - before) <= NEUTRAL
        kind = "neutral" if neutral else "lower" if fitness < least else "other"
        if kind == "lower" or index in (0, last) or last < MOST_STEPS:
            loss = _change(_changes([fitness])[0], form=".2f")
            rows.append((kind, [f"{number:,}", change, HOW.get(how, how), loss]))
        else:
            left_out[kind] += 1
        before, least = fitness, np.fmin(least, fitness)
    note = "Grey: neutral steps, which leave the loss as it is."
    if any(left_out.values()):
        note += f" Left out are {left_out['neutral']} of them, and {left_out['other']} other steps "
        note += "that led to no lower loss than those before."
    head = ["program", "change", "how its loss is known", "loss against the first"]
    heading = "<h2>From the first program to the one found</h2>"
    return f"{heading}{_table(head, rows)}<p class=note>{note}</p>"


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Rows are a CSS class and cells."""
    body = "".join(
        f"<tr class='{kind}'>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for kind, cells in rows
    )
    heads = "".join(f"<th>{escape(heading)}</th>" for heading in head)
    return (
        f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _value(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return math.nan if value is None else float(value)


def _changes(fitness: Sequence[float]) -> np.ndarray:
    """Of the loss, by the first program's: -0.1 is a tenth less; infinite for lost runs."""
    known = np.array(fitness, np.float64)
    return np.expm1(np.where(np.isfinite(known), known, np.inf))


def _within(changes: np.ndarray) -> np.ndarray:
    """Bounded above, lest a few bad programs squeeze all others."""
    return np.minimum(changes, min(1.0, 3 * max(0.02, -changes.min())))


def _change(change: float, position: int | None = None, form: str = "g") -> str:
    """Position is what matplotlib calls it with."""
    del position
    if not math.isfinite(change):
        return "lost"
    value = round(100 * change, 6)
    return f"{value:+{form}}%".replace("-", "\N{MINUS SIGN}") if value else "0%"


def _known(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _name(panel: Axes, title: str, x: str, y: str) -> None:
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    panel.set_xlabel(x, parse_math=False)
    panel.set_ylabel(y, parse_math=False)


def _count(panel: Axes) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
