"""Hand-designed optimizers and the grids over which each is tuned, task by task."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from evaluation import optimizers as of
from evaluation.optimizers import Make, Params, decayed, plain

Hyper = dict[str, jax.Array]  # learning_rate, cosine (0 or 1), weight_decay
Evaluated = Callable[[Any, Params], Params]  # optimizer state, what trains -> what is evaluated


def half_decades(low: float, high: float) -> tuple[float, ...]:
    """Learning rates from `low` to `high`, both included, two per decade."""
    count = round(2 * np.log10(high / low)) + 1
    return tuple(float(f"{low * 10 ** (index / 2):.3g}") for index in range(count))


@dataclass(frozen=True)
class Baseline:
    """An optimizer and its grid: every learning rate with every schedule and weight decay.

    `make(learning_rate, weight_decay)` gets a schedule and a scalar, both possibly traced.
    Baselines with the same `make` and as many learning rates share one compiled program per task,
    if they run from as many seeds.
    `evaluated(opt_state, params)` is where valid and test losses are taken, None for the params.
    """

    name: str
    make: Make
    learning_rates: tuple[float, ...]
    schedules: tuple[Literal["constant", "cosine"], ...] = ("constant", "cosine")
    weight_decays: tuple[float, ...] = (0.0,)
    evaluated: Evaluated | None = None

    def grid(self) -> dict[str, np.ndarray]:
        """Hyperparameters of the whole grid, each [G] float32; weight decay changes last."""
        product = itertools.product(self.weight_decays, self.learning_rates, self.schedules)
        decays, rates, schedules = zip(*product, strict=True)
        return {
            "learning_rate": np.array(rates, np.float32),
            "cosine": np.array([s == "cosine" for s in schedules], np.float32),
            "weight_decay": np.array(decays, np.float32),
        }


@dataclass(frozen=True)
class Scheduled:
    """`hyper -> optax` for a run of `steps`. Hashable by value, so equal ones compile once."""

    make: Make
    steps: int
    evaluated: Evaluated | None = None

    def __call__(self, hyper: Hyper) -> optax.GradientTransformation:
        def schedule(count):
            # The choice of schedule is a number, so that one program covers the whole grid.
            cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * count / self.steps))
            return hyper["learning_rate"] * (1.0 + hyper["cosine"] * (cosine - 1.0))

        return self.make(schedule, hyper["weight_decay"])


# With a weight decay of zero it is Adam.
ADAM = decayed(optax.adamw)
ADAMAX = decayed(optax.adamaxw)
NADAM = decayed(optax.adamw, nesterov=True)
OPTIMISTIC = plain(optax.optimistic_gradient_descent)

# Where good rates of small tasks lie: steps that are normalised, signs, steps that shrink, plain
# gradients, whose size is each task's own, and multipliers of what an optimizer finds by itself.
NORMALIZED = half_decades(1e-4, 1.0)
SIGNS = half_decades(1e-5, 0.316)
SHRINKING = half_decades(1e-3, 10.0)
GRADIENTS = half_decades(1e-5, 31.6)
MULTIPLIERS = half_decades(1e-2, 1e2)
DECAYS = (0.0, 1e-2, 1e-1)  # times the learning rate, per step

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("adam", ADAM, NORMALIZED),
        # no decay is Adam's own grid
        Baseline("adamw", ADAM, NORMALIZED, weight_decays=DECAYS[1:]),
        Baseline("sgd_momentum", plain(optax.sgd, momentum=0.9), GRADIENTS),
        Baseline("lion", decayed(optax.lion), SIGNS, weight_decays=DECAYS[:2]),
        # optax
        Baseline("adabelief", plain(optax.adabelief), NORMALIZED),
        Baseline("adadelta", plain(optax.adadelta), MULTIPLIERS),
        Baseline("adafactor", plain(optax.adafactor), NORMALIZED),
        Baseline("adagrad", plain(optax.adagrad), SHRINKING),
        Baseline("adamax", ADAMAX, NORMALIZED),
        Baseline("adamaxw", ADAMAX, NORMALIZED, weight_decays=DECAYS[1:]),
        Baseline("adan", decayed(optax.adan), NORMALIZED, weight_decays=DECAYS),
        Baseline("amsgrad", plain(optax.amsgrad), NORMALIZED),
        Baseline("fromage", plain(optax.fromage), NORMALIZED),
        Baseline("lamb", decayed(optax.lamb), NORMALIZED, weight_decays=DECAYS),
        Baseline("lars", decayed(optax.lars), MULTIPLIERS),
        Baseline("nadam", NADAM, NORMALIZED),
        Baseline("nadamw", NADAM, NORMALIZED, weight_decays=DECAYS[1:]),
        Baseline("noisy_sgd", plain(optax.noisy_sgd, key=0), GRADIENTS),
        Baseline("novograd", decayed(optax.novograd), NORMALIZED, weight_decays=DECAYS[:2]),
        Baseline("optimistic_adam_v2", plain(optax.optimistic_adam_v2), NORMALIZED),
        Baseline("optimistic_gradient_descent", OPTIMISTIC, GRADIENTS),
        Baseline("polyak_sgd", of.polyak_sgd, MULTIPLIERS),
        Baseline("radam", plain(optax.radam), SHRINKING),
        Baseline("rmsprop", plain(optax.rmsprop), NORMALIZED),
        Baseline("rmsprop_momentum", plain(optax.rmsprop, momentum=0.9), NORMALIZED),
        Baseline("rprop", of.rprop, SIGNS),
        Baseline("sgd", plain(optax.sgd), GRADIENTS),
        Baseline("sgd_nesterov", plain(optax.sgd, momentum=0.9, nesterov=True), GRADIENTS),
        Baseline("sign_sgd", plain(optax.sign_sgd), SIGNS),
        Baseline("signum", plain(optax.signum), SIGNS),
        Baseline("sm3", of.sm3, SHRINKING),
        Baseline("yogi", plain(optax.yogi), NORMALIZED),
        # optax.contrib
        Baseline("acprop", decayed(contrib.acprop), NORMALIZED, weight_decays=DECAYS[:2]),
        Baseline("ademamix", decayed(contrib.ademamix), NORMALIZED, weight_decays=DECAYS),
        Baseline("adopt", plain(contrib.adopt), NORMALIZED),
        Baseline("cocob", of.cocob, MULTIPLIERS),
        Baseline("dadapt_adamw", decayed(contrib.dadapt_adamw), MULTIPLIERS, weight_decays=DECAYS),
        Baseline("dog", decayed(contrib.dog), MULTIPLIERS),
        Baseline("dowg", decayed(contrib.dowg), MULTIPLIERS),
        Baseline("galore", decayed(contrib.galore), NORMALIZED, weight_decays=DECAYS[:2]),
        Baseline("madgrad", decayed(contrib.madgrad), NORMALIZED),
        # it starts from a millionth of its learning rate
        Baseline("mechanize", of.mechanize, half_decades(1e2, 1e6), weight_decays=DECAYS[:2]),
        Baseline("momo", decayed(contrib.momo), MULTIPLIERS),
        Baseline("momo_adam", decayed(contrib.momo_adam), SHRINKING),
        Baseline("muon", decayed(contrib.muon), NORMALIZED, weight_decays=DECAYS),
        Baseline("prodigy", decayed(contrib.prodigy), MULTIPLIERS, weight_decays=DECAYS),
        Baseline("sam", of.sam, GRADIENTS, evaluated=of.synchronized),
        Baseline(
            "schedule_free_adamw", decayed(contrib.schedule_free_adamw), NORMALIZED,
            schedules=("constant",), weight_decays=DECAYS, evaluated=of.averaged,
        ),
        Baseline(
            "schedule_free_sgd", decayed(contrib.schedule_free_sgd), GRADIENTS,
            schedules=("constant",), evaluated=of.averaged,
        ),
        # its sum of gradients is 100 times their mean
        Baseline(
            "simplified_ademamix", decayed(contrib.simplified_ademamix), SIGNS,
            weight_decays=DECAYS,
        ),
    )
}  # fmt: skip

# What optax has beside them, and why it is not tuned here.
EXCLUDED: dict[str, str] = {
    "dpsgd": "needs a gradient per example",
    "lbfgs": "needs the loss as a function, for its line search; diverges on batches without one",
    "lookahead": "trains a pair of parameters, not the task's",
    "optimistic_adam": "deprecated; optimistic_adam_v2 takes the same steps, and schedules",
    "schedule_free": "a wrapper: schedule_free_adamw and schedule_free_sgd are tuned",
    "selective_transform": "a mask around an optimizer",
    "sophia": "needs the loss as a function, for its curvature",
}

GROUPS: dict[str, tuple[str, ...]] = {
    "baselines/quick": ("adam", "adamw", "sgd_momentum", "lion"),
    "baselines/full": tuple(BASELINES),
}


def find(names: str | Iterable[str], argument: str = "baselines") -> list[Baseline]:
    """Baselines by name or group name, each once, in order. ValueError lists what exists, and says
    which `argument` they came from.
    """
    found: dict[str, Baseline] = {}
    for name in [names] if isinstance(names, str) else names:
        for member in GROUPS.get(name, (name,)):
            if member not in BASELINES:
                raise ValueError(
                    f"`{argument}` has no {member!r}; there are {', '.join([*BASELINES, *GROUPS])}"
                )
            found[member] = BASELINES[member]
    return list(found.values())


def cosine_only(names: str | Iterable[str], learning_rates: Sequence[float]) -> list[Baseline]:
    """Baselines by name over other learning rates, with the cosine schedule and the first weight
    decay of their own grid alone: as hard to tune as an optimizer that has a learning rate only.

    Raises:
      ValueError: for unknown names, baselines that take no schedule, and learning rates that are
        none, twice there, or missing.
    """
    rates = tuple(learning_rates)
    if len(set(rates)) < len(rates) or not all(0 < rate < math.inf for rate in rates):
        told = ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(f"`learning_rates` must be positive, finite and all different, got {told}")
    found = find(names, "cosine_baselines")
    if found and not rates:
        told = ", ".join(baseline.name for baseline in found)
        raise ValueError(f"`cosine_baselines` needs `learning_rates` to tune over, got only {told}")
    for baseline in found:
        if "cosine" not in baseline.schedules:
            raise ValueError(
                f"`cosine_baselines` has {baseline.name}, which goes without a schedule: leave it "
                "to `baselines`"
            )
    return [
        replace(
            baseline,
            learning_rates=rates,
            schedules=("cosine",),
            weight_decays=baseline.weight_decays[:1],
        )
        for baseline in found
    ]
