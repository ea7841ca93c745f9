"""What a job tells while it runs: lines, and how far it is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(soft_wrap=True)  # paths stay whole where the output is not a terminal


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Any]:
    """A progress bar with ETA; where output is no terminal, a line at every tenth of the way."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")
            yield lambda note="": bar.update(task, advance=1, note=note)
        return
    began, first = time.perf_counter(), done

    def advance(note: str = "") -> None:
        nonlocal done
        done += 1
        if done * 10 // total != (done - 1) * 10 // total:
            elapsed = time.perf_counter() - began
            left = elapsed / (done - first) * (total - done)
            console.print(f"{what} {done}/{total} {note} {elapsed:.0f} s, ETA {left:.0f} s")

    yield advance
