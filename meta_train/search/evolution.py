"""Regularised evolution of programs (arXiv 1802.01548, as arXiv 2302.06675 uses it): the best of a
few becomes a parent, its changed copy the youngest, and the oldest dies.

What a program does is known before it is tried: one whose dataflow, or whose updates on fixed
probes, were seen already takes over the fitness of that.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from learned_opt.symbolic.analysis import dataflow, live, redundant, simplified, structural_hash
from learned_opt.symbolic.functional import functional_hash
from learned_opt.symbolic.program import Program, ProgramError, parse
from meta_train.search.evaluator import Evaluator, try_all
from meta_train.search.mutation import Mutation, apply, random_program
from meta_train.search.proxies import score
from meta_train.search.recipe import SearchRecipe

FACTORS = tuple(10.0 ** (i / 4) for i in range(-6, 11))  # 0.03 to 300
BETTER = 1e-4  # log loss by which a program must be better to be the best
PROGRESS = 1e-2  # and by which a search must get on to go on
COUNTS = (
    "generated", "invalid", "not_finite", "structural_hits", "functional_hits", "evaluated",
)  # fmt: skip


class Individual(NamedTuple):
    """A program that has lived.

    `fitness` is its log loss relative to the first program's: lower is better.
    """

    number: int
    parent: int | None
    program: Program
    fitness: float
    statements: int  # that matter


class Born(NamedTuple):
    """What the journal has of a program."""

    individual: Individual
    mutation: Mutation | None
    how: str  # "evaluated", "structural", "functional", "start" or "restart"
    losses: list[float] | None


@dataclasses.dataclass
class Child:
    """A program that was made. `functional` is empty where its dataflow was seen before."""

    parent: int | None
    program: Program
    mutation: Mutation | None
    structural: bytes
    functional: bytes = b""


class Search:
    """The state of a search. `state` and `restore` make it a thing that JSON holds.

    Args:
      on_birth: called with every program that joins the population, in order.
    """

    def __init__(self, recipe: SearchRecipe, on_birth: Callable[[Born], None] = lambda born: None):
        self.recipe, self.on_birth = recipe, on_birth
        self.mutator, self.proxies = recipe.mutator(), recipe.proxies()
        self.random = np.random.default_rng(recipe.seed)
        self.counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        self.population: deque[Individual] = deque()
        self.born = 0
        self.reference: np.ndarray | None = None
        self.first: Individual | None = None
        self.best: Individual | None = None
        self.milestone = np.inf  # fitness when the search last made progress
        self.improved_at = 0  # evaluated programs then
        self.restarts = 0
        self.asynchronous = False  # whether any part of it was
        self.structural: dict[bytes, float] = {}
        self.functional: dict[bytes, float] = {}

    def begin(self, evaluator: Evaluator) -> None:
        """Tries the first program, and fills the population with it.

        Raises:
          ProgramError: its updates are not finite, or it does not train.
        """
        program, losses = self._with_tuned_rate(self.recipe.program(), evaluator)
        if not np.any(losses < 1.0):
            raise ProgramError(
                f"`start` {self.recipe.name} trains none of {self.recipe.tasks}: "
                "start from a program that does"
            )
        self.reference = losses
        self.structural[structural_hash(program)] = 0.0
        if functional := functional_hash(program):
            self.functional[functional] = 0.0
        self.first = self._birth(None, program, 0.0, None, "start", losses.tolist())
        self._fill(self.first)

    def _with_tuned_rate(
        self, program: Program, evaluator: Evaluator
    ) -> tuple[Program, np.ndarray]:
        """With the best of `FACTORS` times the constant of lr, and its losses: what is worth
        finding is more than a learning rate.
        """
        candidates = [scaled_rate(program, factor) for factor in FACTORS]
        candidates = list(dict.fromkeys(candidates if self.recipe.tune else [program]))
        losses = try_all(evaluator, candidates, self.proxies)
        best = min(range(len(losses)), key=lambda i: score(losses[i], losses[0]))
        return candidates[best], losses[best]

    @property
    def done(self) -> bool:
        return any(
            self.counts[name] >= getattr(self.recipe, name) for name in ("evaluated", "generated")
        )

    def round(self, evaluator: Evaluator) -> None:
        """Makes children until `batch` of them must be tried, tries these, and lets them join in
        the order in which they were made.
        """
        new, waiting = self._children(self.recipe.batch)
        found = try_all(evaluator, [child.program for child in new], self.proxies)
        for child, losses in zip(new, found, strict=True):
            self._tried(child, losses)
        for child in waiting:
            self._join(child, self.functional[child.functional], "functional")
        self._restart_if_stuck()

    def run_asynchronously(self, evaluator: Evaluator, until: Callable[[], bool]) -> None:
        """Keeps the evaluator busy: whoever is done joins, and a child of the population of that
        moment takes its place. Not deterministic. Ends with nothing under way.
        """
        under_way: dict[int, Child] = {}
        waiting: list[Child] = []
        ticket = 0
        while under_way or not (self.done or until()):
            while len(under_way) < 2 * evaluator.slots and not (self.done or until()):
                busy = {child.functional for child in under_way.values()}
                new, same = self._children(1, busy)
                waiting += same
                if not new:
                    break
                for child in new:
                    evaluator.submit(ticket, child.program, self.proxies)
                    under_way[ticket] = child
                    ticket += 1
            for found, losses in evaluator.collect() if under_way else ():
                self._tried(under_way.pop(found), losses)
            for child in waiting:
                if child.functional in self.functional:
                    self._join(child, self.functional[child.functional], "functional")
            waiting = [child for child in waiting if child.functional not in self.functional]
            self._restart_if_stuck()

    def _children(self, wanted: int, busy: Iterable[bytes] = ()) -> tuple[list[Child], list[Child]]:
        """Up to `wanted` children that must be tried, and those that do what one of these or of the
        `busy` does. Others have joined the population already.
        """
        new: list[Child] = []
        waiting: list[Child] = []
        under_way = set(busy)
        left = self.recipe.evaluated - self.counts["evaluated"] - len(under_way)
        wanted = min(wanted, left)
        while len(new) < wanted and self.counts["generated"] < self.recipe.generated:
            child = self._child()
            if child.structural in self.structural:
                self.counts["structural_hits"] += 1
                self._join(child, self.structural[child.structural], "structural")
                continue
            functional = functional_hash(child.program)
            if functional is None:
                self.counts["not_finite"] += 1
                continue
            child.functional = functional
            if functional in self.functional:
                self.counts["functional_hits"] += 1
                self._join(child, self.functional[functional], "functional")
            elif functional in under_way:
                self.counts["functional_hits"] += 1
                waiting.append(child)
            else:
                under_way.add(functional)
                new.append(child)
        return new, waiting

    def _child(self) -> Child:
        self.counts["generated"] += 1
        parent, mutation = None, None
        if self.recipe.mode == "random":
            program, failed = random_program(self.mutator, self.random)
        else:
            parent = self._parent()
            mutation, failed = self.mutator(parent.program, self.random)
            program = apply(parent.program, mutation)
        self.counts["invalid"] += failed
        number = None if parent is None else parent.number
        return Child(number, program, mutation, structural_hash(program))

    def _parent(self) -> Individual:
        count = 1 if self.recipe.mode == "walk" else self.recipe.tournament
        drawn = [self.population[i] for i in self.random.integers(len(self.population), size=count)]
        return min(drawn, key=lambda x: x.fitness + self.recipe.parsimony * x.statements)

    def _tried(self, child: Child, losses: np.ndarray) -> None:
        assert self.reference is not None
        self.counts["evaluated"] += 1
        fitness = self.functional[child.functional] = score(losses, self.reference)
        self._join(child, fitness, "evaluated", losses.tolist())

    def _join(
        self, child: Child, fitness: float, how: str, losses: list[float] | None = None
    ) -> None:
        self.structural[child.structural] = fitness
        self._birth(child.parent, child.program, fitness, child.mutation, how, losses)

    def _birth(
        self,
        parent: int | None,
        program: Program,
        fitness: float,
        mutation: Mutation | None,
        how: str,
        losses: list[float] | None,
    ) -> Individual:
        statements = len(live(dataflow(program))[0])
        individual = Individual(self.born, parent, program, fitness, statements)
        self.born += 1
        self.population.append(individual)
        if len(self.population) > self.recipe.population:
            self.population.popleft()
        if fitness < self.milestone - PROGRESS:
            self.milestone, self.improved_at = fitness, self.counts["evaluated"]
        if self.best is None or fitness < self.best.fitness - BETTER:
            self.best = individual
        self.on_birth(Born(individual, mutation, how, losses))
        return individual

    def _fill(self, individual: Individual) -> None:
        self.population.clear()
        self.population.extend([individual] * self.recipe.population)
        self.milestone, self.improved_at = individual.fitness, self.counts["evaluated"]

    def _restart_if_stuck(self) -> None:
        stuck = self.counts["evaluated"] - self.improved_at >= self.recipe.patience
        if not stuck or self.recipe.mode in ("random", "walk"):
            return
        assert self.best is not None
        assert self.first is not None
        self.restarts += 1
        again = self.recipe.restart == "alternate" and self.restarts % 2 == 1
        if self.recipe.restart == "start" or again:
            self._fill(self.first)
        else:  # without what grew around it, which leaves no room to insert anything
            best = self.best
            short = simplified(best.program)
            self._fill(self._birth(best.number, short, best.fitness, None, "restart", None))

    def summary(self) -> dict[str, Any]:
        """How far the search is: counts, fitness and diversity."""
        assert self.best is not None
        fitness = [individual.fitness for individual in self.population]
        lengths = [len(individual.program.statements) for individual in self.population]
        unused = [redundant(individual.program) for individual in self.population]
        total = max(1, sum(lengths))
        return {
            **self.counts,
            "restarts": self.restarts,
            "best": self.best.fitness,
            "best_number": self.best.number,
            "median": float(np.median(fitness)),
            "distinct": len({structural_hash(x.program) for x in self.population}),
            "redundant": sum(outputs for outputs, _ in unused) / total,
            "redundant_for_updates": sum(updates for _, updates in unused) / total,
        }

    def state(self) -> dict[str, Any]:
        """All of it, for JSON."""
        assert self.reference is not None
        assert self.first is not None
        assert self.best is not None
        return {
            "random": self.random.bit_generator.state,
            "counts": self.counts,
            "population": [_plain(individual) for individual in self.population],
            "born": self.born,
            "reference": self.reference.tolist(),
            "first": _plain(self.first),
            "best": _plain(self.best),
            "milestone": self.milestone,
            "improved_at": self.improved_at,
            "restarts": self.restarts,
            "asynchronous": self.asynchronous,
            "structural": {key.hex(): value for key, value in self.structural.items()},
            "functional": {key.hex(): value for key, value in self.functional.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        self.random.bit_generator.state = state["random"]
        self.counts = dict(state["counts"])
        self.population = deque(_individual(plain) for plain in state["population"])
        self.born, self.restarts = state["born"], state["restarts"]
        self.asynchronous = state["asynchronous"]
        self.reference = np.array(state["reference"])
        self.first, self.best = _individual(state["first"]), _individual(state["best"])
        self.milestone, self.improved_at = state["milestone"], state["improved_at"]
        for name in ("structural", "functional"):
            setattr(self, name, {bytes.fromhex(key): x for key, x in state[name].items()})


def scaled_rate(program: Program, factor: float) -> Program:
    """With the last constant that matters, of those by which lr is multiplied, times `factor`;
    itself if there is none.
    """
    for index in sorted(live(dataflow(program))[0], reverse=True):
        statement = program.statements[index]
        arguments = statement.arguments
        numbers = [a for a in arguments if isinstance(a, float)]
        if statement.operator == "multiply" and "lr" in arguments and numbers:
            moved = tuple(a * factor if isinstance(a, float) else a for a in arguments)
            new = dataclasses.replace(statement, arguments=moved)
            return apply(program, Mutation("modify", index, new))
    return program


def _plain(individual: Individual) -> list[Any]:
    return [*individual._replace(program=str(individual.program))]  # pyright: ignore[reportArgumentType]


def _individual(plain: list[Any]) -> Individual:
    number, parent, text, fitness, statements = plain
    return Individual(number, parent, parse(text), fitness, statements)
