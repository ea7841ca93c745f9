"""The job that checks whether an optimizer trains wide networks as it trains narrow ones."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from rich.markup import escape

from cluster import named, run_directory
from cluster.console import console, progress
from evaluation import coordinate_check
from evaluation.atomic import replacing
from evaluation.baselines import BASELINES
from evaluation.plots import save_png
from learned_opt.mup import Multipliers, MuP, mup, mup_multipliers
from meta_train.recipes.base import families
from tasks.base import TaskFamily

MODELS = {"transformer": "transformer_lm(depth=2)"}  # other names are those of families
JSON, PLOT = "coordcheck.json", "coordcheck.png"


def run(
    name: str,
    model: str,
    widths: str,
    base_width: int | None,
    standard: bool,
    steps: int,
    seeds: int,
    tolerance: float,
    learning_rate: float,
    directory: Path,
) -> bool:
    """Measures, prints the table and the verdict, writes coordcheck.json and coordcheck.png.

    Raises:
      ValueError, OSError: before any work, for unknown names and impossible numbers.
    """
    # at the first step a readout of zeros lets nothing through, and nothing moves
    for option, value, least in (("steps", steps, 2), ("seeds", seeds, 1)):
        if value < least:
            raise ValueError(f"`{option}` must be at least {least}, got {value}")
    for option, value in (("tolerance", tolerance), ("learning_rate", learning_rate)):
        if not 0 < value < math.inf:
            raise ValueError(f"`{option}` must be positive, got {value}")
    sizes = parse_widths(widths)
    if standard and base_width is not None:
        raise ValueError("`base_width` is for mu-parametrization: leave it out with --standard")
    base = sizes[0] if base_width is None else base_width
    base = None if standard else base
    at = _families(model, base)
    make = _optimizers(name, at, base, steps, learning_rate)
    suite = {width: at(width) for width in sizes}
    smallest = [] if base is None else [at(base)]
    for family in (*smallest, *suite.values()):  # what cannot be built is told before any work
        jax.eval_shape(lambda family=family: family(jax.random.key(0)).init(jax.random.key(0)))
    run_directory.check_writable("out_dir", directory / JSON)
    how = "standard parametrization" if standard else f"mu-parametrization from width {base}"
    title = f"{name} on {model}, {how}"
    with progress("checking", len(suite)) as advance:
        found = coordinate_check.measure(
            suite, make, steps=steps, seeds=seeds, key=jax.random.key(0), progress=advance
        )
    verdict = coordinate_check.judge(found, tolerance)
    directory.mkdir(parents=True, exist_ok=True)
    with replacing(directory / JSON) as file:
        about = {"title": title, "tolerance": tolerance, "seeds": seeds}
        file.write(json.dumps(about | _plain(found, verdict), indent=1).encode())
    save_png(coordinate_check.figure(found, title), directory / PLOT)
    console.print(coordinate_check.table(found, tolerance, title), soft_wrap=False)
    word = "[green]pass[/green]" if verdict.passed else "[red]fail[/red]"
    console.print(
        f"{word}: of the hidden layers {escape(verdict.layer)} has the steepest slope, "
        f"{verdict.slope:+.3f} after step {steps} (tolerance {tolerance:g}, {seeds} seeds); "
        f"{escape(str(directory / PLOT))}"
    )
    return verdict.passed


def parse_widths(text: str) -> list[int]:
    """Of "64,128,256"; "64,128,...,2048" goes on as it began.

    Raises:
      ValueError: not at least two growing positive numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    hint = f"`widths` must be at least two growing numbers, such as 64,128,...,2048, got '{text}'"
    try:
        if "..." in parts:
            at = parts.index("...")
            before, (last,) = [int(part) for part in parts[:at]], map(int, parts[at + 1 :])
            ratio = before[-1] / before[-2] if before[-2] > 0 else 0.0
            while ratio > 1 and before[-1] < last:
                before.append(round(before[-1] * ratio))
            widths = before if before[-1] == last else []
        else:
            widths = [int(part) for part in parts]
    except (ValueError, IndexError):
        raise ValueError(hint) from None
    if len(widths) < 2 or widths[0] < 1 or sorted({*widths}) != widths:
        raise ValueError(hint)
    return widths


def _families(model: str, base_width: int | None) -> Callable[[int], TaskFamily]:
    family, *others = families(MODELS.get(model, model)).values()
    fields = {} if others else getattr(family, "__dataclass_fields__", {})
    if not {"width", "base_width"} <= {*fields}:
        raise ValueError(
            f"`model` {model} has no `width` and `base_width`; "
            "take mlp, transformer, vit or resnet, with or without fields"
        )
    replace: Callable[..., Any] = dataclasses.replace
    return lambda width: replace(family, width=width, base_width=base_width)


def relative_multipliers(
    at: Callable[[int], TaskFamily], width: int, base_width: int
) -> Multipliers:
    """Those of a family's networks of `width`, relative to `base_width`."""

    def shapes(width: int) -> Any:
        return jax.eval_shape(lambda: at(width)(jax.random.key(0)).init(jax.random.key(0)))

    return mup_multipliers(shapes(width), shapes(base_width))


def _optimizers(
    name: str,
    at: Callable[[int], TaskFamily],
    base_width: int | None,
    steps: int,
    learning_rate: float,
) -> Callable[[int], optax.GradientTransformation]:
    """The optimizer of every width, under mu-parametrization relative to `base_width`."""

    if name in BASELINES:
        plain = BASELINES[name].make(lambda count: learning_rate, 0.0)
        if base_width is None:
            return lambda width: plain
        return lambda width: mup(plain, relative_multipliers(at, width, base_width))
    rule, theta = named.find(name, [*BASELINES])
    if base_width is None:
        plain = rule.rule if isinstance(rule, MuP) else rule
        return lambda width: plain.optimizer(theta, steps)
    wrapped = rule if isinstance(rule, MuP) else MuP(rule)

    def under_mup(width: int) -> optax.GradientTransformation:
        scales = relative_multipliers(at, width, base_width)
        return dataclasses.replace(wrapped, multipliers=scales).optimizer(theta, steps)

    return under_mup


def _plain(
    found: coordinate_check.Coordinates, verdict: coordinate_check.Verdict
) -> dict[str, Any]:
    """Lists by step; of what was measured, lists by width of these. None for what is not finite."""

    def plain(values: Any) -> list[Any]:
        if values.ndim > 1:
            return [plain(row) for row in values]
        return [float(x) if math.isfinite(x) else None for x in values]

    def slopes(values: Any) -> list[Any]:
        return plain(coordinate_check.slopes(found.widths, values))

    return {
        "widths": found.widths,
        "hidden": [name for name, hidden in found.hidden.items() if hidden],
        "losses": plain(found.losses),
        "changes": {name: plain(values) for name, values in found.changes.items()},
        "updates": {name: plain(values) for name, values in found.updates.items()},
        "slopes_of_changes": {name: slopes(values) for name, values in found.changes.items()},
        "slopes_of_updates": {name: slopes(values) for name, values in found.updates.items()},
        "steepest": verdict.layer,
        "passed": verdict.passed,
    }
