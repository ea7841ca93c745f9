"""A recipe: everything that decides a meta-training run's result, as plain values that a JSON file
and a command line can hold.
"""

import dataclasses
import json
import math
from typing import Any

import optax

import learned_opt
import meta_train.estimators
import meta_train.recipes
import tasks
from learned_opt import artifact, base, discovery
from learned_opt.base import LearnedOptimizer, Theta
from meta_train.estimators.base import ParticleEstimator
from meta_train.estimators.mixture import Mixture
from meta_train.outer_loop import outer_optimizer
from meta_train.unroll import Objective, Training
from tasks import suites
from tasks.base import TaskFamily


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to meta-train, on what, and how."""

    rule: str = "small_fc"
    """Update rule with its fields, e.g. "small_fc(hidden=8)". `learned-opt show` lists all."""
    task: str = "image_mlp(data='digits/meta_train')"
    """Task family with its fields; augmentations nest: "reparam(image_mlp(), level='tensor')". Or a
    suite, such as "train/quick", for all of its tasks in each outer step."""
    weights: tuple[float, ...] = ()
    """How much the loss of each of a suite's tasks counts, in their order; without any, all count
    the same."""
    without: tuple[str, ...] = ()
    """Tasks of the suite to leave out."""
    estimator: str = "nres(particles=32)"
    """Meta-gradient estimator with its fields, e.g. "pes(particles=64, sigma=0.02)"; every task of
    a suite gets one."""
    horizon: tuple[int, int] = (500, 500)
    """Inner steps of an episode: the range from which it is drawn log-uniformly."""
    truncation: int = 50
    """Inner steps per estimate; horizons are multiples of it."""
    objective: Objective = "mean"
    """Loss of an episode: mean, late, final, mean_valid or final_valid."""
    curriculum: int = 0
    """Episodes of a particle over which the upper end of `horizon` grows from the lower one."""
    burn_in: int = 0
    """Estimates that are thrown away before the first outer step, so that the particles are out of
    phase and their states are those of running episodes: about horizon / truncation."""
    outer_steps: int = 1000
    """Steps on theta."""
    learning_rate: float = 3e-3
    """Peak learning rate of the outer Adam; decays to a tenth along a cosine."""
    warmup: int = 0
    """Outer steps of linear warm-up."""
    clip: float = 1.0
    """Global norm to which a meta-gradient is clipped."""
    seed: int = 0
    """Seed of everything random."""
    start: str = ""
    """Where theta starts: an artifact (file or name of a pretrained optimizer) of the same rule, or
    the name of a recipe whose run comes first; without any, the rule's own start."""
    select_on: str = ""
    """Suite, or one task family with its fields, by which the exported theta is chosen among
    snapshots of the run; without any, the last theta is exported."""
    select_steps: int = 2000
    """Training steps of the runs by which a snapshot is judged."""
    select_seeds: int = 3
    """Runs of every snapshot on every task."""
    select_among: int = 8
    """Snapshots, evenly spaced over the outer steps, the last after the last step."""
    exported_rule: str = ""
    """Rule that the artifact states, where its fields in use differ from those of meta-training,
    e.g. "celo2(step_size=1.0)"; its theta must have the same leaves."""

    def __post_init__(self):
        least_of = {"outer_steps": 1, "burn_in": 0, "warmup": 0}
        least_of |= {"select_steps": 1, "select_seeds": 1, "select_among": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}")
        if self.select_on and self.select_among > self.outer_steps:
            raise ValueError(
                f"`select_among` must be at most `outer_steps` {self.outer_steps}, "
                f"got {self.select_among}"
            )
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be at least 0 and below 2**63, got {self.seed}")

    def build_rule(self) -> LearnedOptimizer:
        return discovery.build("rule", self.rule, discovery.members(learned_opt))

    def build_exported_rule(self) -> LearnedOptimizer:
        """The rule that the artifact states.

        Raises:
          ValueError: it does not exist, or its theta has other leaves than that of `rule`.
        """
        if not self.exported_rule:
            return self.build_rule()
        members = discovery.members(learned_opt)
        exported = discovery.build("exported_rule", self.exported_rule, members)
        template = base.theta_template(self.build_rule())
        base.check_leaves(exported, template, f"`exported_rule`: theta of {self.rule}")
        return exported

    def build_estimator(self) -> ParticleEstimator | Mixture:
        """The estimator over the training of the family's tasks with the rule; for a suite, a
        mixture of these.

        Raises:
          ValueError: a name or field is unknown or a value impossible.
        """
        members = discovery.members(meta_train.estimators)
        estimator = discovery.build("estimator", self.estimator, members)
        rule, remat = self.build_rule(), estimator.backpropagates

        def over(family: TaskFamily) -> ParticleEstimator:
            problem = Training(
                family, rule, self.horizon, self.truncation, remat, self.objective, self.curriculum
            )
            return dataclasses.replace(estimator, problem=problem)

        chosen = families(self.task)
        if self.task not in suites.SUITES:
            for name in ("weights", "without"):
                if given := getattr(self, name):
                    raise ValueError(f"`{name}` is for suites; `task` {self.task} got {given}")
            return over(chosen[self.task])
        for name in self.without:
            if name not in chosen:
                raise ValueError(discovery.unknown(f"task of {self.task}", name, list(chosen)))
        names = tuple(name for name in chosen if name not in self.without)
        if not names:
            raise ValueError(f"`without` leaves no task of {self.task}")
        if self.weights and len(self.weights) != len(names):
            raise ValueError(
                f"`weights` must be one for each of {', '.join(names)}, got {len(self.weights)}"
            )
        weights = self.weights or (1.0,) * len(names)
        return Mixture(tuple(over(chosen[name]) for name in names), weights, names)

    def build_optimizer(self) -> optax.GradientTransformation:
        return outer_optimizer(self.learning_rate, self.outer_steps, self.clip, self.warmup)

    def first(self) -> "Recipe | None":
        """The recipe that `start` names. A name that a pretrained optimizer has, too, is the
        recipe's.
        """
        return known().get(self.start)

    def start_theta(self) -> Theta | None:
        """Theta of the artifact that `start` names; None where it names a recipe or nothing.

        Raises:
          ValueError: it is neither, or the artifact states another rule.
        """
        if not self.start or self.first() is not None:
            return None
        try:
            stated, theta, _ = artifact.read(self.start)
        except FileNotFoundError as error:
            raise ValueError(
                f"`start`: {error}. Or a recipe: {', '.join(sorted(known()))}"
            ) from None
        self._check_start([stated])
        return theta

    def _check_start(self, rules: list[LearnedOptimizer]) -> None:
        own = [self.build_rule(), self.build_exported_rule()]
        if not any(rule in own for rule in rules):
            raise ValueError(
                f"`start` {self.start} must have the rule {discovery.spec_of(own[0])}, "
                f"got {discovery.spec_of(rules[0])}"
            )

    def snapshot_steps(self) -> list[int]:
        """Numbers of outer steps done after which theta is a snapshot; none without `select_on`."""
        among = self.select_among if self.select_on else 0
        return [round((i + 1) * self.outer_steps / among) for i in range(among)]

    def check(self) -> None:
        """Refuses a `start`, `select_on` or `exported_rule` that cannot be used, before any work.

        Raises:
          ValueError: one of them is unknown or does not suit the rule, or the recipes that `start`
            leads to lead back.
        """
        self.build_exported_rule()
        if self.select_on:
            try:
                families(self.select_on)
            except ValueError as error:
                raise ValueError(f"`select_on`: {error}") from None
        self.start_theta()
        names, at = [], self
        while (first := at.first()) is not None:
            if at.start in names:
                raise ValueError(f"`start` leads back: {' -> '.join([*names, at.start])}")
            at._check_start([first.build_exported_rule(), first.build_rule()])
            names.append(at.start)
            at = first

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        found = {**json.loads(text)}
        fields: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in found.items()
        }
        return cls(**fields)


def known() -> dict[str, Recipe]:
    """Recipes by name: of every module in meta_train.recipes that has a `RECIPE`."""
    modules = discovery.modules(meta_train.recipes)
    return {m.__name__.rpartition(".")[2]: m.RECIPE for m in modules if hasattr(m, "RECIPE")}


def families(task: str) -> dict[str, TaskFamily]:
    """Those of the suite of that name; or the one that is described, under its description.

    Raises:
      ValueError: there is no such suite or task; the message lists those that exist.
    """
    if task in suites.SUITES:
        return suites.suite(task)
    members = discovery.members(tasks)
    name = task.partition("(")[0].strip()
    if name not in members:
        raise ValueError(discovery.unknown("suite or task", name, [*suites.SUITES, *members]))
    return {task: discovery.build("task", task, members)}
