"""Jobs of an evaluation: lines of them side by side, each line one after another."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.task_cost import known
from tasks.base import TaskFamily

Progress = Callable[[str, float], None]  # what was just done, share of the work done


@dataclass(frozen=True)
class Job:
    """What gives the outcomes of some rows of a task; `runs` is how many runs it takes."""

    task: str
    name: str
    runs: int
    work: Callable[[], Mapping[str, Any]]


def longest_first(lines: list[list[Job]], suite: Mapping[str, TaskFamily]) -> list[list[Job]]:
    """The lines in an order in which none is left for the end that takes long, as far as it is
    known what their tasks cost. It changes no result.
    """
    costs = {task: known(family) for task, family in suite.items()}
    seconds = {task: c.step_seconds_together for task, c in costs.items() if c is not None}
    typical = float(np.median(list(seconds.values()))) if seconds else 1.0

    def length(line: list[Job]) -> float:
        return sum(job.runs * seconds.get(job.task, typical) for job in line)

    return sorted(lines, key=length, reverse=True)


def run(
    lines: list[list[Job]], workers: int, progress: Progress | None
) -> dict[tuple[str, str], Any]:
    """(row, task) -> outcome: lines side by side, the jobs of a line one after another."""
    lock, total, done, ended = threading.Lock(), sum(map(len, lines)), [], threading.Event()

    def run_line(line: list[Job]) -> dict[tuple[str, str], Any]:
        outcomes = {}
        for job in line:
            if ended.is_set():
                break
            outcomes |= {(row, job.task): outcome for row, outcome in job.work().items()}
            with lock:
                done.append(job)
                if progress and not ended.is_set():
                    progress(f"{job.task}: {job.name}", len(done) / total)
        return outcomes

    pool = ThreadPoolExecutor(max_workers=workers)
    wait = True
    try:
        futures = [pool.submit(run_line, line) for line in lines]
        outcomes = {}
        for future in as_completed(futures):  # an error is raised at once
            outcomes |= future.result()
        return outcomes
    except KeyboardInterrupt:
        wait = False  # a compiled program cannot be ended, but who interrupts wants to be answered
        raise
    finally:  # after an error or Ctrl-C, what has not begun is dropped
        ended.set()
        pool.shutdown(wait, cancel_futures=True)
