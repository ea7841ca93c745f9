"""Variance of the meta-gradient against the number of windows per episode: which estimator to take
for long episodes and short truncations.

The inner problem is linear and contracting, x_t = decay * x_{t-1} + theta with the loss data . x_t,
so its gradient is known and smoothing changes nothing. The data are drawn for an episode and shared
by its windows, whose gradients therefore agree: correlated windows, as in arXiv 2304.12180. The
horizon stays, the truncation is the horizon by the number of windows. All variances are traces of
the covariance, by the squared norm of the exact gradient:
  one estimate of one particle (a pair of trajectories), its window drawn at random;
  the mean of as many particles as make 2 * horizon inner steps with one estimate each;
  the mean of one particle's estimates in all windows of an episode, as many inner steps again.
Truncated ES runs three trajectories, and is charged for them where inner steps are to be equal.
`--plot FILE` draws the table.
"""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from evaluation.plots import STYLE, save_png
from meta_train.estimators.full_es import FullES
from meta_train.estimators.gpes import GPES
from meta_train.estimators.nres import NRES
from meta_train.estimators.pes import PES
from meta_train.estimators.truncated_es import TruncatedES
from meta_train.unroll import Rollout

DIMENSION, HORIZON, MOST = 8, 128, 64
WINDOWS = [1, 2, 4, 8, 16, 32, 64]
ESTIMATORS = {
    "PES": PES(particles=1, sigma=1.0),
    "GPES, reuse 4": GPES(particles=1, sigma=1.0, reuse=4),
    "GPES, reuse 16": GPES(particles=1, sigma=1.0, reuse=16),
    "NRES": NRES(particles=1, sigma=1.0),
    "full ES": FullES(particles=1, sigma=1.0),
    "truncated ES (biased)": TruncatedES(particles=1, sigma=1.0),
}
LOOKS: dict[str, dict[str, Any]] = {
    "PES": {"color": "#D55E00", "marker": "o"},
    "GPES, reuse 4": {"color": "#E69F00", "marker": "s", "markersize": 5},
    "GPES, reuse 16": {"color": "#56B4E9", "marker": "^"},
    "NRES": {"color": "#0072B2", "marker": "D", "markersize": 5},
    "full ES": {"color": "#000000", "linestyle": "--"},
    "truncated ES (biased)": {"color": "#999999", "marker": "x", "linestyle": ":"},
}
BLOCKS = 16  # for standard errors


class State(NamedTuple):
    x: jax.Array
    data: jax.Array
    window: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedData:
    """A window shows the mean of its losses as its only one, so that its length is no shape: one
    program serves all truncations. Particles stay in phase, so that episodes can be told apart.
    """

    truncation: int | jax.Array
    windows: int = dataclasses.field(default=MOST, metadata={"static": True})
    decay: float = 0.8

    def reset(self, theta, key, episode=0, stagger=False):
        data = 1.0 + jax.random.normal(key, theta.shape)
        return State(jnp.zeros_like(theta), data, jnp.zeros((), jnp.int32))

    def unroll(self, theta, state, key):
        def step(_, carry):
            x, total = carry
            x = self.decay * x + theta
            return x, total + state.data @ x

        x, total = lax.fori_loop(0, self.truncation, step, (state.x, jnp.zeros(())))
        window = state.window + 1
        done = window * self.truncation >= HORIZON
        return Rollout(total[None] / self.truncation, done), State(x, state.data, window)

    def gradient(self) -> np.ndarray:
        """d mean loss / d theta of the mean episode."""
        sensitivity = np.cumsum(self.decay ** np.arange(HORIZON))
        return np.full(DIMENSION, sensitivity.mean())


@functools.partial(jax.jit, static_argnums=0)
def gradients(cls: type, estimator: Any, keys: jax.Array) -> jax.Array:
    """[keys, MOST, DIMENSION]: consecutive estimates of a particle for each key.

    `cls` tells the estimators apart: jax (0.10) holds the tree structures of different dataclasses
    with equal fields for equal, and may run the program of the other.
    """
    del cls
    theta = jnp.zeros(DIMENSION)

    def particle(key):
        def step(state, key):
            estimate, state = estimator.estimate(theta, state, key)
            return state, estimate.grad

        return lax.scan(step, estimator.init(theta, key), jax.random.split(key, MOST))[1]

    return jax.vmap(particle)(keys)


class Measured(NamedTuple):
    """Relative to the exact gradient; the largest relative standard error of the variances."""

    one: float
    equal_steps: float
    episode: float
    mean: float
    error: float


def measure(estimator: Any, windows: int, particles: int) -> Measured:
    problem = SharedData(HORIZON // windows)
    if isinstance(estimator, FullES):  # an episode per estimate, whatever its windows are
        problem, windows = SharedData(HORIZON // MOST), 1
    estimator = dataclasses.replace(estimator, problem=problem)
    # short episodes are many in one run, long ones need more runs
    runs = jax.random.split(jax.random.key(0), (-(-windows // 4), particles))
    grads = np.concatenate([gradients(type(estimator), estimator, keys) for keys in runs])
    exact = problem.gradient()
    scaled = grads.astype(np.float64) / np.linalg.norm(exact)
    episodes = scaled.reshape(BLOCKS, -1, windows, DIMENSION)
    mean = scaled.mean(axis=(0, 1))
    each = np.sum((episodes - mean) ** 2, axis=-1).mean(axis=(1, 2))
    of_episode = np.sum((episodes.mean(axis=2) - mean) ** 2, axis=-1).mean(axis=1)
    errors = [x.std(ddof=1) / np.sqrt(BLOCKS) / x.mean() for x in (each, of_episode)]
    steps = estimator.unrolls * problem.truncation / (2 * HORIZON)
    return Measured(
        one=each.mean(),
        equal_steps=each.mean() * steps,
        episode=of_episode.mean() * steps * windows,
        mean=float(mean @ exact / np.linalg.norm(exact)),
        error=max(errors),
    )


PANELS = {
    "one": "one particle, one estimate",
    "equal_steps": "equal inner steps: many particles, one estimate",
    "episode": "equal inner steps: one particle, all of an episode",
}


def draw(found: dict[str, list[Measured]]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for panel, (quantity, title) in zip(panels, PANELS.items(), strict=True):
            for name, row in found.items():
                values = [getattr(measured, quantity) for measured in row]
                panel.loglog(WINDOWS, values, label=name, **LOOKS[name])
            panel.set_title(title.replace(": ", "\n"), fontsize=10)
            panel.set_xlabel("windows per episode")
            panel.set_xticks(WINDOWS, [str(n) for n in WINDOWS])
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panels[0].set_ylabel("variance / squared norm of the gradient")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=6, frameon=False, columnspacing=1.4
        )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=int, default=256, help="a multiple of 16")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    found = {
        name: [measure(estimator, windows, arguments.particles) for windows in WINDOWS]
        for name, estimator in ESTIMATORS.items()
    }
    table = Table("windows per episode", *map(str, WINDOWS))
    for quantity, title in {**PANELS, "mean": "mean by exact gradient"}.items():
        table.add_row(f"[bold]{title}")
        for name, row in found.items():
            cells = [f"{getattr(measured, quantity):.3g}" for measured in row]
            table.add_row(name, *cells, end_section=name == [*found][-1])
    console = Console(width=115)
    console.print(table)
    error = max(measured.error for row in found.values() for measured in row)
    console.print(f"standard errors of the variances: {error:.1%} or less")
    if arguments.plot:
        save_png(draw(found), arguments.plot)


if __name__ == "__main__":
    main()
