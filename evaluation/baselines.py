"""Hand-designed optimizers and the grids over which each is tuned, task by task."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

Hyper = dict[str, jax.Array]  # learning_rate, cosine (0 or 1), weight_decay


def half_decades(low: float, high: float) -> tuple[float, ...]:
    """Learning rates from `low` to `high`, both included, two per decade."""
    count = round(2 * np.log10(high / low)) + 1
    return tuple(float(f"{rate:.3g}") for rate in np.geomspace(low, high, count))


@dataclass(frozen=True)
class Baseline:
    """An optimizer and its grid: every learning rate with every schedule and weight decay.

    `make(learning_rate, weight_decay)` gets a schedule and a scalar, both possibly traced.
    Baselines with the same `make` and the same size of grid share one compiled program per task.
    """

    name: str
    make: Callable[[optax.Schedule, jax.Array | float], optax.GradientTransformation]
    learning_rates: tuple[float, ...]
    schedules: tuple[Literal["constant", "cosine"], ...] = ("constant", "cosine")
    weight_decays: tuple[float, ...] = (0.0,)

    def grid(self) -> dict[str, np.ndarray]:
        """Hyperparameters of the whole grid, each [G] float32."""
        product = itertools.product(self.learning_rates, self.schedules, self.weight_decays)
        rates, schedules, decays = zip(*product, strict=True)
        return {
            "learning_rate": np.array(rates, np.float32),
            "cosine": np.array([s == "cosine" for s in schedules], np.float32),
            "weight_decay": np.array(decays, np.float32),
        }


@dataclass(frozen=True)
class Scheduled:
    """`hyper -> optax` for a run of `steps`. Hashable by value, so equal ones compile once."""

    make: Callable[[optax.Schedule, jax.Array | float], optax.GradientTransformation]
    steps: int

    def __call__(self, hyper: Hyper) -> optax.GradientTransformation:
        def schedule(count):
            # The choice of schedule is a number, so that one program covers the whole grid.
            cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * count / self.steps))
            return hyper["learning_rate"] * (1.0 + hyper["cosine"] * (cosine - 1.0))

        return self.make(schedule, hyper["weight_decay"])


def adam_with_decay(learning_rate, weight_decay):
    """AdamW; with a weight decay of zero it is Adam, which thereby shares its compiled program."""
    return optax.adamw(learning_rate, weight_decay=weight_decay)


def sgd_momentum(learning_rate, weight_decay):
    del weight_decay
    return optax.sgd(learning_rate, momentum=0.9)


def lion(learning_rate, weight_decay):
    return optax.lion(learning_rate, weight_decay=weight_decay)


BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("adam", adam_with_decay, half_decades(1e-4, 1.0)),
        Baseline("adamw", adam_with_decay, half_decades(1e-4, 1.0), weight_decays=(1e-2,)),
        Baseline("sgd_momentum", sgd_momentum, half_decades(1e-3, 10.0)),
        Baseline("lion", lion, half_decades(1e-5, 1e-1), weight_decays=(1e-3,)),
    )
}

GROUPS: dict[str, tuple[str, ...]] = {
    "baselines/quick": ("adam", "adamw", "sgd_momentum", "lion"),
}


def find(names: str | Iterable[str]) -> list[Baseline]:
    """Baselines by name or group name, each once, in order. ValueError lists what exists."""
    found: dict[str, Baseline] = {}
    for name in [names] if isinstance(names, str) else names:
        for member in GROUPS.get(name, (name,)):
            if member not in BASELINES:
                raise ValueError(
                    f"`baselines` has no {member!r}; there are {', '.join([*BASELINES, *GROUPS])}"
                )
            found[member] = BASELINES[member]
    return list(found.values())
