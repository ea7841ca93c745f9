"""Everything that decides a search, as plain values for a JSON file and a command line."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np

from learned_opt.symbolic.analysis import read
from learned_opt.symbolic.functional import functional_hash
from learned_opt.symbolic.machine import encode
from learned_opt.symbolic.program import Program, ProgramError
from learned_opt.symbolic.programs import PROGRAMS
from meta_train.search import funnel
from meta_train.search.mutation import Mutator
from meta_train.search.proxies import CAPACITY, Proxies


@dataclasses.dataclass(frozen=True)
class SearchRecipe:
    """What to search, from where, on what, and how long."""

    start: str = "adamw"
    """Where the search starts: adamw, lion, lion_as_found, sgd_momentum, or a file with a program.
    Its losses are what all others are compared with."""
    tune: bool = True
    """Try some learning rates of the first program, and start from the best."""
    mode: Literal["evolution", "constants", "random", "walk"] = "evolution"
    """evolution; of the constants alone; or as controls programs drawn at random, and mutations
    without selection."""
    tasks: str = "train/proxies"
    """The tasks that programs are tried on: a suite, or one family with its fields."""
    steps: int = 200
    """Training steps of a trial."""
    seeds: int = 1
    """Trials of a program on every task."""
    evaluated: int = 10_000
    """Programs to try, at most, besides learning rates of the first."""
    generated: int = 1_000_000
    """Programs to make, at most: most of them are known already by what they do."""
    population: int = 100
    """Programs alive; the oldest dies."""
    tournament: int = 5
    """Of so many drawn the best becomes a parent."""
    batch: int = 32
    """Programs tried between two selections. The result does not depend on the workers, but on
    this."""
    constants: float = 0.3
    """Share of the mutations that move a constant."""
    most_statements: int = 30
    """With so many statements none is inserted; at most 40."""
    parsimony: float = 2e-4
    """Log loss that a statement must be worth in selection."""
    patience: int = 1_000
    """Programs tried without 1% less loss until the search restarts."""
    restart: Literal["best", "start", "alternate"] = "alternate"
    """With what a restart fills the population: the best program, the first, or in turn, beginning
    with the first."""
    metaval: str = "metaval/small"
    """Tasks of the funnel at the end, by which the program is chosen: a suite, or one family."""
    metaval_steps: int = 500
    """Training steps of a run on these; the last stage takes four times as many."""
    seed: int = 0
    """Seed of everything random but the tasks, which are the same for every search."""

    def __post_init__(self):
        least = {"evaluated": 1, "generated": 1, "population": 2, "tournament": 1, "batch": 1}
        least |= {"patience": 1, "seed": 0, "most_statements": 1, "metaval_steps": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {getattr(self, name)}")
        if self.most_statements > CAPACITY:
            raise ValueError(
                f"`most_statements` must be at most {CAPACITY}, got {self.most_statements}"
            )
        if not 0.0 <= self.constants <= 1.0:
            raise ValueError(f"`constants` must be in [0, 1], got {self.constants}")
        if not 0.0 <= self.parsimony < 1.0:
            raise ValueError(f"`parsimony` must be in [0, 1), got {self.parsimony}")

    def proxies(self) -> Proxies:
        return Proxies(self.tasks, self.steps, self.seeds)

    def stages(self) -> tuple[funnel.Stage, ...]:
        return funnel.stages(self.proxies(), self.metaval, self.metaval_steps)

    @property
    def name(self) -> str:
        """What to call `start`."""
        return self.start if self.start in PROGRAMS else "a program"

    def with_text(self) -> "SearchRecipe":
        """With the text of a file that `start` names in its place, so that the file may change.

        Raises:
          FileNotFoundError: there is neither a known program nor a file of this name.
        """
        if self.start in PROGRAMS or "\n" in self.start:
            return self
        if not Path(self.start).is_file():
            raise FileNotFoundError(
                f"`start` {self.start} is neither a file nor one of {', '.join(PROGRAMS)}: "
                "a search needs a program to start from"
            )
        read(text := Path(self.start).read_text(), self.start)
        return dataclasses.replace(self, start=text)

    def program(self) -> Program:
        """That the search starts from.

        Raises:
          ProgramError: it is malformed or ill-typed; the message names the line.
        """
        start = self.with_text().start
        return PROGRAMS.get(start) or read(start, "`start`")

    def check(self) -> None:
        """Refuses what cannot be searched, before any work.

        Raises:
          ProgramError: the first program is malformed, gives updates that are not finite, has too
            many statements, or nothing of it can be changed.
          ValueError: tasks are unknown, or there are none.
        """
        program = self.program()
        if functional_hash(program) is None:
            raise ProgramError(f"`start`: {self.name} gives updates that are not finite")
        encode(program, CAPACITY)
        if self.mode != "random":
            self.mutator()(program, np.random.default_rng(0))
        self.stages()

    def mutator(self) -> Mutator:
        return Mutator(self.most_statements, self.constants, self.mode == "constants")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "SearchRecipe":
        return cls(**json.loads(text))
