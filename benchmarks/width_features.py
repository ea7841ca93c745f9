"""Where constants leak the width: root mean squares of small_fc's features of a hidden matrix, as
its MLP sees them, after some steps under mu-parametrization at several widths. They are 1 where the
epsilon of the normalisation does not count. Once with the gradients as they are, as muLO was
published, once with those of `MuP`, which are multiplied by the growth of the width.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.coordcheck import relative_multipliers
from evaluation.coordinate_check import slopes
from learned_opt import features
from learned_opt.mup import Multipliers, MuP
from learned_opt.small_fc import INPUTS, SmallFC
from tasks.base import train_step
from tasks.mlp import MLP

EPSILON = 1e-5  # of `mlp_per_parameter` in small_fc, added to the mean square
CLIP = 0.1  # of the gradients in VeLO's `clipped_g`


def measure(family: MLP, width: int, base_width: int, scaled: bool, steps: int) -> dict[str, float]:
    """Root mean squares of the normalised features of hidden/0/kernel; the share of its gradients
    that VeLO would clip.
    """
    at = lambda width: dataclasses.replace(family, width=width, base_width=base_width)  # noqa: E731
    multipliers = relative_multipliers(at, width, base_width)
    rule = MuP(SmallFC(hidden=4), multipliers if scaled else Multipliers(multipliers.step))
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    task = at(width)(jax.random.key(0))

    @jax.jit
    def run(task):
        params = task.init(jax.random.key(1))

        def step(carry, key):
            params, state, _ = carry
            batch = task.batch(key, "train")
            grads = jax.grad(task.loss)(params, batch)
            params, state, _ = train_step(task, optimizer, params, state, batch)
            return (params, state, grads), None

        carry = (params, optimizer.init(params), params)
        keys = jax.random.split(jax.random.key(2), steps)
        params, state, grads = jax.lax.scan(step, carry, keys)[0]
        p, g, *averages = (
            tree["hidden"][0]["kernel"] for tree in (params, grads, *state.accumulators)
        )
        g = g * (multipliers.gradient["hidden"][0]["kernel"] if scaled else 1.0)
        known = features.tensor_features(g, p, *averages, vector_epsilon=1e-6)
        squares = {}
        for name in INPUTS:
            value = jnp.ones(())
            for factor in known[name]:
                value = value * (factor() if callable(factor) else factor)
            square = jnp.mean(jnp.square(value[0]))  # of the fastest decay
            squares[name] = jnp.sqrt(square / (square + EPSILON))
        return squares | {"share clipped at 0.1": jnp.mean(jnp.abs(g) > CLIP)}

    return {name: float(value) for name, value in run(task).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    widths, family = arguments.widths, MLP("glyphs@8x8")
    for scaled in (False, True):
        how = "times the growth of the width" if scaled else "as they are"
        table = Table(*("feature", *map(str, widths), "slope"), title=f"gradients {how}")
        found = [measure(family, w, widths[0], scaled, arguments.steps) for w in widths]
        for name in found[0]:
            values = np.array([[at[name]] for at in found])
            slope = slopes(tuple(widths), values)[0]
            table.add_row(name, *(f"{v[0]:.3g}" for v in values), f"{slope:+.2f}")
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
