"""The job that measures what updates of rules and artifacts cost, by name."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.markup import escape

import learned_opt
from cluster import named, run_directory
from cluster.console import console, progress
from evaluation import cost as update_cost
from evaluation.atomic import replacing
from learned_opt import discovery


def run(names: tuple[str, ...], counts: str, seconds: float, path: Path | None) -> None:
    """Measures updates of rules and artifacts by name, of all rules when there is no name; prints
    the table, writes the JSON file `path`: {name: {parameter count: fields of `Cost`}}.

    Raises:
      ValueError, OSError: before any work. Of all rules, one that cannot take a plain step is left
        out and named.
    """
    sizes = _parameter_counts(counts)
    if not 0 < seconds < math.inf:
        raise ValueError(f"`seconds` must be positive, got {seconds}")
    if path is not None:
        run_directory.check_writable("json", path)
    optimizers, left_out = _contestants(names, sizes)
    # Adam against itself shows the noise of the machine
    optimizers = {"optax.adam": optax.adam(1e-3), **optimizers}
    found = {name: {} for name in optimizers}
    with progress("measuring", len(optimizers) * len(sizes)) as advance:
        for size in sizes:
            for name, optimizer in optimizers.items():
                try:
                    found[name][size] = update_cost.measure(optimizer, size, seconds)
                except jax.errors.JaxRuntimeError as error:  # most often there is no memory
                    left_out[f"{name} at {size}"] = _first_line(error)
                advance(name)
    console.print(update_cost.table(found), soft_wrap=False)
    for name, reason in left_out.items():
        console.print(f"not measured: {escape(f'{name}: {reason}')}")
    if path is not None:
        del found["optax.adam"]
        plain = {
            name: {size: measured._asdict() for size, measured in by_size.items()}
            for name, by_size in found.items()
        }
        with replacing(path) as file:
            file.write(json.dumps(plain, allow_nan=False, indent=1).encode())
        console.print(f"wrote {path}")


def _contestants(names: tuple[str, ...], sizes: list[int]) -> tuple[dict[str, Any], dict[str, str]]:
    """Optimizers by name, each of which can be traced at all sizes; and when there is no name and
    all rules are meant, why others cannot.
    """
    optimizers, left_out = {}, {}
    for name in names or discovery.members(learned_opt):
        try:
            optimizer = _optimizer(name)
            for size in sizes:
                update_cost.check(optimizer, size)
            optimizers[name] = optimizer
        except Exception as error:  # whatever a rule raises
            expected = isinstance(error, (ValueError, TypeError, OSError))
            left_out[name] = _first_line(error) if expected else repr(error)
            if names:
                raise ValueError(left_out[name] if expected else f"{name}: {error!r}") from error
    return optimizers, left_out


def _optimizer(name: str) -> optax.GradientTransformation:
    """The optimizer that a rule's spec or an artifact's name or path describes, for 1000 steps."""
    rule, theta = named.find(name)
    # as trained ones, no number is zero: XLA would drop a bias of zeros
    theta = jax.tree.map(
        lambda leaf: leaf + 1e-3 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, theta
    )
    return rule.optimizer(theta, 1000)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _parameter_counts(text: str) -> list[int]:
    """Whole numbers of a list such as "1e6,1e7", each once."""
    counts = []
    for part in text.split(","):
        try:
            count = float(part)
        except ValueError:
            count = math.nan
        if not (4 <= count <= 1e12 and count.is_integer()):
            raise ValueError(
                f"`params` must be whole numbers from 4 to 1e12, such as 1e6,1e7, got '{part}'"
            )
        counts.append(int(count))
    return list(dict.fromkeys(counts))
