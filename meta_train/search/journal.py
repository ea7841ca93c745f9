"""What a search leaves behind while it runs: a line for every program that joined the population,
from which the way from the first program to any other can be told.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from learned_opt.symbolic.program import Program, parse
from meta_train.search.evolution import Born
from meta_train.search.mutation import Mutation, apply


class Entry(NamedTuple):
    """A line of the journal."""

    number: int
    parent: int | None
    change: list[Any] | None  # of the parent: what, where, and the statement's text
    how: str  # start, evaluated, structural, functional, restart
    fitness: float
    losses: list[float] | None
    program: str | None  # of those that were tried, or are no change of their parent


class Journal:
    """Appends. `size` bytes of an existing file are kept, what follows will be written again."""

    def __init__(self, path: Path, size: int = 0):
        path.touch()
        if path.stat().st_size < size:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes and had {size} when it was checkpointed: "
                "it was changed, or lost in a crash. Start a new run"
            )
        self._file: BinaryIO = path.open("r+b")
        self._file.truncate(size)
        self._file.seek(size)

    def write(self, born: Born) -> None:
        individual, mutation = born.individual, born.mutation
        tried = born.losses is not None
        entry = Entry(
            individual.number,
            individual.parent,
            _plain(mutation),
            born.how,
            individual.fitness,
            [round(x, 6) for x in born.losses] if born.losses is not None else None,
            str(individual.program) if tried or mutation is None else None,
        )
        self._file.write(json.dumps(entry).encode() + b"\n")

    def flush(self) -> int:
        """Bytes that are safely written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def _plain(mutation: Mutation | None) -> list[Any] | None:
    if mutation is None:
        return None
    text = None if mutation.statement is None else str(mutation.statement)
    return [mutation.change, mutation.index, text]


def read(path: Path) -> Iterator[Entry]:
    """Entries in order; a last line that is not whole is left out."""
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield Entry(*json.loads(line))


def lineage(entries: list[Entry], number: int) -> list[tuple[Entry, Program]]:
    """From the program that `number` descends from to itself."""
    known = {entry.number: entry for entry in entries}
    line = [known[number]]
    while (parent := line[-1].parent) is not None:
        line.append(known[parent])
    found: list[tuple[Entry, Program]] = []
    for entry in reversed(line):
        if entry.change is None:
            assert entry.program is not None
            program = parse(entry.program)
        else:
            program = apply(found[-1][1], _mutation(*entry.change))
        found.append((entry, program))
    return found


def _mutation(change: Any, index: int, text: str | None) -> Mutation:
    if text is None:
        return Mutation(change, index, None)
    (statement,) = parse(
        f"def train(w, g, m, v, lr):\n    {text}\n    return update, m, v\n"
    ).statements
    return Mutation(change, index, statement)
