"""One self-contained report.html, and the same table for a terminal."""

import html
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
import rich.table

from evaluation import plots, training_plots
from evaluation.atomic import replacing
from evaluation.plots import ranked
from evaluation.results import Results
from evaluation.stats import iqm

# Summary column -> heading, unit; only ratios (x) can be won or lost.
COLUMNS = {
    "mean_train_vs_default": ("Train loss, mean vs default Adam", "x"),
    "mean_train_vs_tuned": ("Train loss, mean vs tuned Adam", "x"),
    "final_train_vs_tuned": ("Train loss, final vs tuned Adam", "x"),
    "held_out_vs_tuned": ("Held-out loss vs tuned Adam", "x"),
    "speedup_vs_tuned": ("Speedup over Adam's grid", "x"),
    "time_to_target_vs_tuned": ("Time to tuned Adam's best loss", "x"),
    "divergence_rate": ("Diverged", "%"),
    "step_time_vs_adam": ("Time per step vs Adam", "cost"),
    "state_bytes_per_param": ("State, bytes per param", ""),
}
# What fits a terminal of 80 columns.
SHORT = {
    "mean_train_vs_default": "mean vs\ndefault\nAdam",
    "mean_train_vs_tuned": "mean vs\ntuned\nAdam",
    "final_train_vs_tuned": "final vs\ntuned\nAdam",
    "held_out_vs_tuned": "held-out\nvs tuned\nAdam",
    "divergence_rate": "di-\nverged",
    "step_time_vs_adam": "time\nper\nstep",
}
KINDS = {
    "contender": "judged here",
    "tuned": "best of its grid, per task",
    "default": "not tuned",
    "oracle": "not an optimizer: best of the grid at every step",
}
CRITERIA = {
    "mean": "its validation loss averaged over training",
    "final": "its validation loss at the end",
    "train": "its training loss averaged over training",
}
TASKS_ABREAST = 6  # columns of a table that a page has room for
STYLESHEET = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;max-width:1150px;
margin:2rem auto;padding:0 1rem}
h1{margin-bottom:.2rem} h2{margin-top:2.2rem} p{max-width:75ch}
table{border-collapse:collapse;font-size:13.5px} .wide{overflow-x:auto;margin-bottom:1.5rem}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #ddd;vertical-align:top}
th:first-child,td:first-child{text-align:left}
thead th{border-bottom:2px solid #555;vertical-align:bottom}
small{color:#666;display:block;white-space:nowrap} tr.contender td{background:#fff6ef}
tr.oracle td,tr.default td{color:#666}
.win{color:#005a8c;font-weight:600} .loss{color:#a33b00;font-weight:600}
.note{color:#444} svg{max-width:100%;height:auto}
"""


def render(
    results: Results,
    path: str | Path,
    *,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    truncation: int | None = None,
) -> None:
    """Writes the report to `path`: one HTML file without scripts, needing no network.

    Args:
      metrics: records of metrics.jsonl with `step` and `loss`, and what else there is, see
        `training_plots`.
      truncation: inner steps of a window of `loss_by_window`, which is left out without it.
    """
    sections = [
        _header(results),
        "<h2>Scores</h2>",
        _table(results),
        _reading(results),
        "<h2>Task by task</h2>",
        _per_task(results),
        "<p class=note>Mean training loss of tuned Adam divided by that of the row (interquartile "
        "mean over seeds). In small the same for Adam at its default learning rate, where 2x or "
        "more means at most half of its loss; and for rows that were tuned the "
        "learning rate and schedule that tuning chose there: * marks the edge of a grid, beyond "
        "which a better one may lie.</p>",
        "<h2>Loss curves</h2>",
        plots.svg(plots.loss_curves(results)),
        "<p class=note>Training loss, smoothed, lower is better: the line is the mean over seeds, "
        f"the shade their range; the frame ends at twice the highest starting loss.</p>"
        f"{_left_out(results)}",
        "<h2>Performance profile</h2>",
        plots.svg(plots.profile(results)),
        "<p class=note>Further right and higher is better: the height at 2x is the share of all "
        "runs (every task weighing the same) whose mean training loss is at most half of tuned "
        "Adam's; the height at 1x is the share that equal or beat it.</p>",
    ]
    if metrics:
        sections += [
            "<h2>Meta-training</h2>",
            plots.svg(training_plots.meta_training(metrics, truncation)),
            f"<p class=note>{_reading_training(metrics, truncation)}</p>",
        ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Optimizer evaluation</title>'
        f"<style>{STYLESHEET}</style><body>{''.join(sections)}</body></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode())


def plot_curves(results: Results, path: str | Path) -> None:
    """Writes the loss curves as a PNG."""
    plots.save_png(plots.loss_curves(results), path)


def table(results: Results) -> rich.table.Table:
    """The scores for a terminal: estimates with 95% intervals, best first."""
    about = results.about
    view = rich.table.Table(
        title=f"{len(about['tasks'])} tasks, {about['steps']} steps, {about['seeds']} seeds",
        caption="Mean and final training loss and held-out loss as ratios to Adam's: above 1 is "
        "better. Time per step over Adam's: below 1 is better. 95% intervals over seeds.",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    view.add_column("optimizer", min_width=15)
    for heading in SHORT.values():
        view.add_column(heading, justify="right", no_wrap=True)
    for name in ranked(results):
        cells = []
        for column in SHORT:
            estimate, interval, _ = _cell(results.summary[name].get(column), column, digits=2)
            # what is not a ratio to win has no room for its range here
            shown = interval if COLUMNS[column][1] == "x" else ""
            cells.append(f"{estimate}\n[dim]{shown}[/dim]")
        bold = "bold" if results.rows[name]["kind"] == "contender" else None
        view.add_row(name, *cells, style=bold)
    return view


def _cell(values: Sequence[float] | None, column: str, digits: int = 3) -> tuple[str, str, str]:
    """Text of the estimate, text of the interval, and the CSS class of a clear win or loss."""
    if values is None:
        return "-", "", ""
    unit = COLUMNS[column][1]
    scale, suffix = (100, "%") if unit == "%" else (1, "x" if unit else "")
    estimate, low, high = (_short(scale * value, digits) for value in values)
    verdict = ""
    if unit == "x":  # decided only when the whole interval is on one side
        verdict = "win" if values[1] > 1 else "loss" if values[2] < 1 else ""
    interval = "" if estimate == low == high else f"{low}\N{EN DASH}{high}"
    return estimate + suffix, interval, verdict


def _short(value: float, digits: int) -> str:
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _left_out(results: Results) -> str:
    if len(plots.drawn(results)) == len(results.rows):
        return ""
    return (
        f"<p class=note>Figures show Adam and, of the other tuned baselines, the "
        f"{plots.MOST_TUNED - 1} that are best in the table above; and ranges of Adam and of what "
        "is judged here alone.</p>"
    )


def _header(results: Results) -> str:
    about = results.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    sizes = sorted({*about["grids"].values()})
    grids = "; ".join(
        f"{size} {', '.join(name for name, own in about['grids'].items() if own == size)}"
        for size in sizes
    )
    contenders = [name for name, row in results.rows.items() if row["kind"] == "contender"]
    named = ", ".join(contenders) or "baselines only"
    multiplied = ""
    if contenders and about.get("learning_rates"):
        rates = ", ".join(f"{rate:g}" for rate in about["learning_rates"])
        multiplied = (
            " What is judged here was tuned in the same way: its updates times a learning rate "
            f"({rates}) that falls to zero by a cosine."
        )
    return (
        f"<h1>Optimizer evaluation</h1><p><b>{html.escape(named)}</b> on "
        f"{html.escape(', '.join(about['tasks']))}: {about['steps']} training steps from each of "
        f"{about['seeds']} seeds, with the same initial parameters and batches for every optimizer."
        f"</p><p class=note>Each baseline was tuned for each task on "
        f"{CRITERIA[about['criterion']]} with {about['tuning_seeds']} other seeds; sizes of "
        f"the grids: {html.escape(grids)}.{multiplied}<br>Run on {about['date']} in "
        f"{about['seconds']:g} s: {html.escape(about['device'])}, {about['cpus']} cores, "
        f"{html.escape(about['machine'])}; {html.escape(versions)}.</p>"
    )


def _table(results: Results) -> str:
    head = "".join(f"<th>{heading}</th>" for heading, _ in COLUMNS.values())
    body = []
    for name in ranked(results):
        kind = results.rows[name]["kind"]
        told = KINDS[kind]
        if kind == "contender" and results.rows[name]["chosen"]:
            told += ", learning rate tuned per task"
        cells = [f"<td>{html.escape(name)}<small>{told}</small></td>"]
        for column in COLUMNS:
            estimate, interval, verdict = _cell(results.summary[name].get(column), column)
            cells.append(
                f'<td><span class="{verdict}">{estimate}</span><small>{interval}</small></td>'
            )
        body.append(f"<tr class={kind}>{''.join(cells)}</tr>")
    return _wide(head, body)


def _reading(results: Results) -> str:
    return (
        "<p class=note>Losses are ratios, the reference's loss over the row's: <b>2x means half "
        "the loss, below 1x means worse than the reference</b>. They are interquartile means over "
        "all tasks and seeds; small figures are 95% bootstrap intervals over seeds. "
        "<span class=win>Blue</span>: better with the whole interval; "
        "<span class=loss>red</span>: worse with the whole interval.</p>"
        "<p class=note>Speedup: how many steps Adam needs for the loss that the row reaches in "
        "one, where Adam is at every step the best of its grid of learning rates and schedules; "
        "so even tuned Adam is below 1x. Time to tuned Adam's best loss: the time in which tuned "
        "Adam reached its best smoothed training loss over the time that the row takes to reach "
        "it, time per step included; 0x where it never does. Held-out: test loss at the best "
        "validation loss. Diverged: a training loss that was not finite, or above its first value "
        "at the end. Time per step: whole training steps on this machine in alternation with Adam, "
        "mean and range over tasks, above 1x is slower.</p>"
    )


def _reading_training(metrics: Sequence[Mapping[str, Any]], truncation: int | None) -> str:
    explained = {
        "loss": "Meta-loss: what meta-training lowers, on its training tasks; lower is better.",
        "loss_by_window": "Loss by inner step: where in an episode it is lowered; each point is "
        "the mean over the window that ends there, and late steps are of long episodes alone.",
        "gradient_snr": "Signal to noise: the squared norm of the meta-gradient by the variance of "
        "its estimate; about 1 is noise alone, and more particles help.",
        "effective_sample_size": "Effective sample size: how many particles count, when a few "
        "large loss differences dwarf the others.",
        "diverged": "Diverged: the share of particles whose inner run was lost.",
    }
    if truncation is None:
        del explained["loss_by_window"]
    told = [text for key, text in explained.items() if any(r.get(key) is not None for r in metrics)]
    return " ".join(told)


def _per_task(results: Results) -> str:
    tasks = results.about["tasks"]
    count = -(-len(tasks) // TASKS_ABREAST)  # of tables, about as wide as each other
    bounds = [index * len(tasks) // count for index in range(count + 1)]
    return "".join(_of_tasks(results, tasks[a:b]) for a, b in itertools.pairwise(bounds))


def _of_tasks(results: Results, tasks: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(task)}</th>" for task in tasks)
    body = []
    for name in ranked(results):
        row = results.rows[name]
        cells = [f"<td>{html.escape(name)}</td>"]
        for task in tasks:
            score = float(iqm(results.scores["tuned"][name][task]["mean_train_loss"]))
            chosen = row["chosen"].get(task)
            default = float(iqm(results.scores["default"][name][task]["mean_train_loss"]))
            note = f"<small>{_short(default, 3)}x default Adam</small>"
            if chosen:
                schedule = "cosine" if chosen["cosine"] else "constant"
                edge = "*" if chosen["at_edge"] else ""
                note += f"<small>lr {chosen['learning_rate']:g}{edge}, {schedule}</small>"
            verdict = "win" if score > 1 else "loss" if score < 1 else ""
            cells.append(f'<td><span class="{verdict}">{_short(score, 3)}x</span>{note}</td>')
        body.append(f"<tr class={row['kind']}>{''.join(cells)}</tr>")
    return _wide(head, body)


def _wide(head: str, body: list[str]) -> str:
    return (
        f"<div class=wide><table><thead><tr><th>Optimizer</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
