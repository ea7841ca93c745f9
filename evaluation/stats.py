"""Aggregates over tasks and seeds that a few runs can bear, after rliable (arXiv:2108.13264)."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Scores = Mapping[str, npt.ArrayLike] | Sequence[npt.ArrayLike] | np.ndarray  # [seeds] for each task


def iqm(scores: npt.ArrayLike, axis: int | None = None) -> np.ndarray:
    """Interquartile mean: the mean of what remains when the lowest and highest 25% are dropped.

    Like `scipy.stats.trim_mean(scores, 0.25, axis)`: the number dropped per end is rounded down.
    """
    ordered = np.sort(np.asarray(scores, np.float64), axis=axis)
    axis = -1 if axis is None else axis
    cut = ordered.shape[axis] // 4
    kept = np.take(ordered, np.arange(cut, ordered.shape[axis] - cut), axis=axis)
    return kept.mean(axis=axis)


def by_task(scores: Scores) -> list[np.ndarray]:
    """One [seeds] array per task; tasks may differ in their number of seeds."""
    tasks = list(scores.values()) if isinstance(scores, Mapping) else list(scores)
    tasks = [np.asarray(task, np.float64) for task in tasks]
    if not tasks or any(task.ndim != 1 or not len(task) for task in tasks):
        shapes = [task.shape for task in tasks]
        raise ValueError(f"`scores` must hold one [seeds] array per task, got shapes {shapes}")
    return tasks


def stratified_bootstrap(
    scores: Scores,
    statistic: Callable[..., np.ndarray] = iqm,
    *,
    reps: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """A statistic of all task x seed scores with its 95% percentile bootstrap interval.

    Seeds are drawn with replacement within each task, tasks are kept: the interval is about other
    seeds on these tasks, not about other tasks.

    Args:
      statistic: called with [n] -> scalar, and with [reps, n] and `axis=1` -> [reps].

    Returns:
      (estimate, low, high).
    """
    tasks = by_task(scores)
    rng = np.random.default_rng(seed)
    resampled = [task[rng.integers(len(task), size=(reps, len(task)))] for task in tasks]
    draws = statistic(np.concatenate(resampled, axis=1), axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(statistic(np.concatenate(tasks))), float(low), float(high)


def performance_profile(scores: Scores, taus: np.ndarray) -> np.ndarray:
    """[taus] share of task x seed runs that score at least tau; every task weighs the same."""
    shares = [(task[:, None] >= np.asarray(taus)[None, :]).mean(axis=0) for task in by_task(scores)]
    return np.mean(shares, axis=0)
