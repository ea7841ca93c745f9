"""Meta-trained at widths up to 256, and then? muLO, its twin under standard parametrization, and
Adam: on wider, deeper and longer runs than either was meta-trained or tuned on, with held-out data.

    python benchmarks/mup_transfer.py runs/mulo_small runs/mulo_small_sp --out docs/mup_transfer

prints the table, and writes it as OUT.md, the figures as OUT.json and the plot as OUT.png. Cells
that OUT.json holds already are not run again.
"""

import argparse
import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import matplotlib
import matplotlib.ticker
import numpy as np
import optax
from matplotlib.figure import Figure

from cluster.coordcheck import relative_multipliers
from evaluation.atomic import replacing
from evaluation.baselines import Baseline, Scheduled
from evaluation.benchmark import Horizon
from evaluation.curve import seed_keys, train_from
from evaluation.plots import STYLE, save_png
from learned_opt import artifact
from learned_opt.mup import mup
from tasks.mlp import MLP
from tasks.transformer_lm import TransformerLM
from tasks.vit import Vit

BASE_WIDTH = 128
SEEDS, TUNING_SEEDS = 3, 1
GRID = Baseline("adam", optax.adam, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), ("constant", "cosine"))
MODELS = {
    "mlp": MLP("runes@8x8", depth=3),
    "transformer": TransformerLM("python_code", depth=2, heads=4, length=16),
    "vit": Vit("runes@8x8", depth=2, heads=4, batch_size=32),
}
MULO, SP, ADAM, MUADAM, ONCE = (
    "muLO", "SP LO", "Adam, tuned here", "muAdam, tuned here", "muAdam, tuned once",
)  # fmt: skip
ROWS = (MULO, SP, ADAM, MUADAM, ONCE)


@dataclass(frozen=True)
class Cell:
    """A family at one size, trained for so many steps."""

    part: str
    model: str
    width: int
    depth: int
    steps: int

    def family(self, width: int, base_width: int | None) -> Any:
        return replace(MODELS[self.model], width=width, depth=self.depth, base_width=base_width)


WIDTHS = (64, 128, 256, 512, 1024, 2048)
CELLS = (
    *(Cell("width", "mlp", width, 3, 200) for width in WIDTHS),
    *(Cell("depth", "mlp", 128, depth, 300) for depth in (12, 24)),
    *(Cell("horizon", "mlp", width, 3, 1000) for width in (64, 256)),
    *(Cell("horizon", "mlp", width, 3, 5000) for width in (64, 256)),
    Cell("horizon", "mlp", 64, 3, 25000),
    *(Cell("width", "transformer", width, 2, 200) for width in (64, 128, 256)),
    Cell("depth", "transformer", 64, 8, 200),
    *(Cell("width", "vit", width, 2, 200) for width in (64, 128, 256)),
    Cell("depth", "vit", 64, 8, 200),
)


def train(cell: Cell, base_width: int | None, make: Any, hypers: Any, keys: jax.Array) -> Any:
    small = cell.width <= 128
    return train_from(
        cell.family(cell.width, base_width), make, hypers, keys,
        steps=cell.steps, evals=1, eval_batches=4, parallel=8 if small else 1,
    )  # fmt: skip


def score(losses: np.ndarray) -> dict[str, Any]:
    """Mean training loss of the runs [seeds, steps], that of their last tenth, and how many of them
    diverged: not finite, or worse at the end than at the start.
    """
    last = losses[:, -max(1, losses.shape[1] // 10) :].mean(axis=1)
    diverged = ~np.isfinite(losses).all(axis=1) | (last > losses[:, 0])
    return {
        "mean": [float(x) for x in losses.mean(axis=1)],
        "last": [float(x) for x in last],
        "diverged": int(diverged.sum()),
    }


def learned(cell: Cell, path: Path, base_width: int | None) -> dict[str, Any]:
    rule, theta, _ = artifact.read(path / "theta.safetensors")
    if base_width is not None:
        at = lambda width: cell.family(width, base_width)  # noqa: E731
        rule = replace(rule, multipliers=relative_multipliers(at, cell.width, base_width))  # pyright: ignore
    make = Horizon(functools.partial(rule.optimizer, theta), cell.steps)
    keys = seed_keys(jax.random.key(1), SEEDS)
    return score(train(cell, base_width, make, np.zeros(1), keys).train[0])


def adam(cell: Cell, base_width: int | None, chosen: dict[str, float] | None) -> dict[str, Any]:
    """Adam of the setting that is best on tuning seeds by mean training loss, or of `chosen`."""
    if base_width is not None:
        at = lambda width: cell.family(width, base_width)  # noqa: E731
        multipliers = relative_multipliers(at, cell.width, base_width)
        make = lambda rate, _: mup(optax.adam(rate), multipliers)  # noqa: E731
    else:
        make = lambda rate, _: optax.adam(rate)  # noqa: E731
    scheduled = Scheduled(make, cell.steps)
    if chosen is None:
        hypers, keys = GRID.grid(), seed_keys(jax.random.key(2), TUNING_SEEDS)
        losses = train(cell, base_width, scheduled, hypers, keys).train.mean(axis=(1, 2))
        best = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))
        chosen = {name: float(values[best]) for name, values in hypers.items()}
    hypers = {name: np.full(1, value, np.float32) for name, value in chosen.items()}
    keys = seed_keys(jax.random.key(1), SEEDS)
    found = score(train(cell, base_width, scheduled, hypers, keys).train[0])
    return found | {"chosen": chosen}


def run(
    cell: Cell, mulo: Path, twin: Path, path: Path, results: dict[str, Any], rows: tuple[str, ...]
) -> None:
    """Adds the cell's missing rows, and writes the file after each."""
    found = results.setdefault(key_of(cell), {})
    base = next(c for c in CELLS if (c.part, c.model, c.width) == ("width", cell.model, BASE_WIDTH))
    work = {
        MUADAM: lambda: adam(cell, BASE_WIDTH, None),
        ADAM: lambda: adam(cell, None, None),
        ONCE: lambda: adam(cell, BASE_WIDTH, results[key_of(base)][MUADAM]["chosen"]),
        MULO: lambda: learned(cell, mulo, BASE_WIDTH),
        SP: lambda: learned(cell, twin, None),
    }
    for row in rows:
        if row not in found:
            found[row] = work[row]()
            with replacing(path) as file:
                file.write(json.dumps(results, indent=1).encode())
            print(key_of(cell), row, flush=True)


def key_of(cell: Cell) -> str:
    return f"{cell.part} {cell.model} width {cell.width} depth {cell.depth} steps {cell.steps}"


def table(results: dict[str, Any]) -> str:
    """Markdown: the mean over seeds, its standard error, in brackets the mean loss of the last
    tenth, and how many of the runs diverged.
    """
    lines = [f"| network | width | depth | steps | {' | '.join(ROWS)} |"]
    lines.append("|" + "---|" * (4 + len(ROWS)))
    for cell in CELLS:
        if not (found := results.get(key_of(cell))):
            continue
        cells = [cell.model, cell.width, cell.depth, f"{cell.steps:,}"]
        for row in ROWS:
            if row not in found:
                cells.append("-")
                continue
            values = np.array(found[row]["mean"])
            error = values.std(ddof=1) / math.sqrt(len(values))
            lost = f", {found[row]['diverged']} diverged" if found[row]["diverged"] else ""
            last = np.mean(found[row]["last"])
            cells.append(f"{values.mean():.3f} ± {error:.3f} ({last:.3f}{lost})")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _widths(results: dict[str, Any], model: str) -> list[Cell]:
    """The cells of a model's sweep over the width that have results."""
    cells = [c for c in CELLS if c.part == "width" and c.model == model]
    return [c for c in cells if results.get(key_of(c))]


def plot(results: dict[str, Any]) -> Figure:
    """Mean training loss over the width, a panel per model."""
    styles = dict(zip(ROWS, ("#D55E00", "#0072B2", "#777777", "#009E73", "#000000"), strict=True))
    with matplotlib.rc_context(STYLE):
        swept = {model: _widths(results, model) for model in MODELS}
        swept = {model: cells for model, cells in swept.items() if len(cells) > 1}
        figure = Figure(figsize=(max(8.0, 4.0 * len(swept)), 3.8), layout="constrained")
        panels = figure.subplots(1, len(swept), squeeze=False)[0]
        for panel, (model, cells) in zip(panels, swept.items(), strict=True):
            for row, colour in styles.items():
                known = [c for c in cells if row in results.get(key_of(c), {})]
                losses = np.array([results[key_of(c)][row]["mean"] for c in known])
                if not known:
                    continue
                widths = [c.width for c in known]
                line = {"color": colour, "linestyle": "-" if row in (MULO, SP) else "--"}
                panel.plot(widths, losses.mean(axis=1), marker="o", label=row, **line)
                panel.fill_between(
                    widths, losses.min(axis=1), losses.max(axis=1), color=colour, alpha=0.15
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            panel.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            panel.set_xticks([c.width for c in cells], [str(c.width) for c in cells])
            panel.axvspan(cells[0].width / 1.2, 256, color="#000000", alpha=0.05, linewidth=0)
            panel.set_title(f"{model}, {cells[0].steps} steps", loc="left")
            panel.set_xlabel("width (shaded: widths of meta-training)")
        figure.axes[0].set_ylabel("mean training loss")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        columns = 5 if len(swept) > 2 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mulo", type=Path, help="run directory of mulo_small")
    parser.add_argument("twin", type=Path, help="run directory of mulo_small_sp")
    parser.add_argument("--out", type=Path, default=Path("runs/mup_transfer"))
    parser.add_argument("--rows", nargs="*", default=ROWS, help="only these rows")
    arguments = parser.parse_args()
    path = arguments.out.with_suffix(".json")
    results = json.loads(path.read_text()) if path.is_file() else {}
    # those that others take their hyperparameters from come first, and what takes long at the end
    first = lambda c: c.part == "width" and c.width == BASE_WIDTH  # noqa: E731
    for cell in sorted(CELLS, key=lambda c: (not first(c), c.model != "mlp", c.part != "width")):
        rows = tuple(row for row in (MUADAM, ADAM, ONCE, MULO, SP) if row in arguments.rows)
        run(cell, arguments.mulo, arguments.twin, path, results, rows)
    text = table(results)
    print(text)
    arguments.out.with_suffix(".md").write_text(text + "\n")
    save_png(plot(results), arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
