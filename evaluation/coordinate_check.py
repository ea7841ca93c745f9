"""The coordinate check of mu-parametrization (arXiv:2203.03466, appendix D.1): trained for
some steps at several widths, activations may move neither more nor less in wide networks than in
narrow ones.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import rich.box
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from evaluation.plots import STYLE
from tasks.base import Key, TaskFamily, behind, train_step


class Coordinates(NamedTuple):
    """What was measured, by name of layer and of tensor, each [widths, steps], means over seeds."""

    widths: tuple[int, ...]
    changes: dict[str, np.ndarray]  # mean |activation after the step - initial|, on one valid batch
    hidden: dict[str, bool]  # whether the layer has more units in a wider network
    updates: dict[str, np.ndarray]  # root mean square of the step's update of a tensor
    losses: np.ndarray  # [widths, steps] on the training batch before the step


def measure(
    families: Mapping[int, TaskFamily],
    make_optimizer: Callable[[int], optax.GradientTransformation],
    *,
    steps: int,
    seeds: int,
    key: Key,
    progress: Callable[[str], None] = lambda what: None,
) -> Coordinates:
    """Trains every family, at its width, from the same seeds and on the same batches.

    Args:
      families: by width, of networks that tell their activations (`NetworkTask.activations`).
      make_optimizer: of a width.

    Raises:
      ValueError: fewer than two widths, or networks of different layers.
    """
    if len(families) < 2:
        raise ValueError(f"`widths` must be at least two, got {[*families]}")
    keys = jax.vmap(lambda seed: jax.random.fold_in(key, seed))(jnp.arange(seeds))
    measured, sizes = [], []
    for width, family in families.items():
        # a jit of its own, see `tasks.base.classes`
        train = functools.partial(_train, make_optimizer(width))
        program = jax.jit(train, static_argnames="steps")
        found, units = program(family, keys, steps=steps)
        measured.append(jax.tree.map(lambda x: np.mean(np.asarray(x, np.float64), axis=0), found))
        sizes.append(jax.tree.map(int, units))
        progress(f"width {width}")
    if len({tuple(size) for size in sizes}) > 1:
        raise ValueError("`families` must have the same layers at every width")
    changes, updates, losses = jax.tree.map(lambda *widths: np.stack(widths), *measured)
    hidden = {name: len({size[name] for size in sizes}) > 1 for name in changes}
    if not any(hidden.values()):
        raise ValueError("`families` must have layers that grow with the width, got none")
    return Coordinates(tuple(families), changes, hidden, updates, losses)


def _train(optimizer, family, keys, *, steps):
    """(changes, updates, losses), each [seeds, steps], and the units of every layer."""
    probe_key, first = jax.random.key(0), family(keys[0])
    shapes = jax.eval_shape(
        lambda: first.activations(first.init(probe_key), first.batch(probe_key, "valid"))
    )
    units = {name: shape.shape[-1] for name, shape in shapes.items()}

    def run(key: Key):
        task_key, init_key, batch_key, probe_key = jax.random.split(key, 4)
        task = family(task_key)
        trained_by, params = behind(task, optimizer), task.init(init_key)
        probe = task.batch(probe_key, "valid")
        initial = task.activations(params, probe)

        def step(carry, key):
            before, opt_state = carry
            batch = task.batch(key, "train")
            params, opt_state, loss = train_step(task, trained_by, before, opt_state, batch)
            now = task.activations(params, probe)
            changes = jax.tree.map(lambda x, y: jnp.mean(jnp.abs(x - y)), now, initial)
            updates = jax.tree.map(
                lambda x, y: jnp.sqrt(jnp.mean(jnp.square(x - y))), params, before
            )
            return (params, opt_state), (changes, _named(updates), loss)

        carry = (params, trained_by.init(params))
        return jax.lax.scan(step, carry, jax.random.split(batch_key, steps))[1]

    return jax.lax.map(run, keys), units


def _named(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def slopes(widths: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    """[steps] of values [widths, steps]: the least-squares slope of log2 value over log2 width; NaN
    where a value is 0, infinite or NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log2(values)
    x = np.log2(np.asarray(widths, np.float64))
    x = x - x.mean()
    logs = np.where(np.isfinite(logs).all(axis=0), logs, np.nan)
    return x @ logs / (x @ x)


class Verdict(NamedTuple):
    passed: bool
    layer: str  # of the hidden layers that with the steepest slope
    slope: float


def judge(found: Coordinates, tolerance: float) -> Verdict:
    """Passes where after the last step the slope of every hidden layer is within plus or minus
    `tolerance`; one that has not moved, or is not finite, fails.
    """
    last = {
        name: slopes(found.widths, values)[-1]
        for name, values in found.changes.items()
        if found.hidden[name]
    }
    steepest = max(last, key=lambda name: np.nan_to_num(abs(last[name]), nan=np.inf))
    slope = float(last[steepest])
    return Verdict(bool(abs(slope) <= tolerance), steepest, slope)


def table(found: Coordinates, tolerance: float, title: str) -> Table:
    """Slopes by layer and by tensor after some of the steps."""
    steps = len(found.losses[0])
    shown = sorted({0, *(steps * i // 4 for i in (1, 2, 3)), steps - 1})
    widths = ", ".join(map(str, found.widths))
    view = Table(
        title=escape(title),
        caption=f"Slopes of log2 over log2 of the width ({widths}): of the mean change of "
        f"activations since the start, which must be within {tolerance:g} of 0 at the last step "
        "in hidden layers (bold), and of the root mean square of updates.",
        box=rich.box.SIMPLE_HEAD,
    )
    view.add_column("activations of", overflow="fold")
    for step in shown:
        view.add_column(f"step {step + 1}", justify="right")

    def row(name: str, values: np.ndarray, style: str | None = None) -> None:
        slope = slopes(found.widths, values)
        cells = ["-" if np.isnan(slope[step]) else f"{slope[step]:+.2f}" for step in shown]
        view.add_row(escape(name), *cells, style=style)

    for name, values in found.changes.items():
        row(name, values, "bold" if found.hidden[name] else None)
    view.add_section()
    view.add_row("updates of")
    for name, values in found.updates.items():
        row(name, values)
    return view


def figure(found: Coordinates, title: str) -> Figure:
    """Change of activations over width, a line per layer, first to last step from left to right."""
    steps = found.losses.shape[1]
    shown = sorted({0, steps // 2, steps - 1})
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(3.6 * len(shown) + 2.4, 3.8), layout="constrained")
        panels = drawing.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(found.changes)))
        for panel, step in zip(panels, shown, strict=True):
            for colour, (name, values) in zip(colours, found.changes.items(), strict=True):
                line = {"linestyle": "-" if found.hidden[name] else "--", "color": colour}
                moved = np.where(values[:, step] > 0, values[:, step], np.nan)
                panel.plot(found.widths, moved, marker=".", label=name, **line)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(found.widths, [str(width) for width in found.widths])
            panel.set_title(f"after step {step + 1}", loc="left")
            panel.set_xlabel("width")
        panels[0].set_ylabel("mean change of activations")
        handles, labels = panels[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
        drawing.suptitle(title)
    return drawing
