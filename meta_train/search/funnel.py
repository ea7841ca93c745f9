"""From many programs to one: tasks that grow from stage to stage, not seen by the search.

What a search finds is the best of thousands on a few tasks, and partly luck. Here it meets other
initial params and batches, then other tasks, then longer runs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from learned_opt.symbolic.program import Program
from meta_train.search.proxies import Proxies, score

Try = Callable[[Sequence[Program], Proxies], list[np.ndarray]]  # normalised losses
FIRST_SEED = 1000  # of what no search has used


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where programs are compared; the best `keep` of them that beat the first program stay in the
    race. `everyone`: the others are tried, too, to know how well stages foretell one another.
    """

    name: str
    proxies: Proxies
    keep: int
    everyone: bool = False


def stages(search: Proxies, metaval: str, steps: int) -> tuple[Stage, ...]:
    """Other seeds; the tasks of meta-validation; these for four times as long.

    Args:
      metaval: a suite, or one task family with its fields.
      steps: of a run on it.
    """
    fresh = dataclasses.replace(search, seeds=3, first_seed=FIRST_SEED)
    return (
        Stage("other seeds", fresh, 24, everyone=True),
        Stage("meta-validation", Proxies(metaval, steps, 1, FIRST_SEED), 4, everyone=True),
        Stage("longer", Proxies(metaval, 4 * steps, 1, FIRST_SEED + 1), 1),
    )


def last(chosen: Sequence[Stage]) -> Stage:
    """Where the winner alone is judged: meta-validation from other seeds, which decides nothing and
    so is not flattered.
    """
    proxies = chosen[1].proxies
    again = dataclasses.replace(proxies, first_seed=proxies.first_seed + 2, seeds=2)
    return Stage("meta-validation, other seeds", again, 1)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Log losses relative to the first program's, of every program that was tried, by stage; and
    the best in the last stage of those that beat the first program in every one, None if none did.
    """

    scores: dict[str, dict[int, float]]
    winner: int | None


def select(
    programs: Sequence[Program], first: Program, chosen: Sequence[Stage], try_all: Try
) -> Ranking:
    """Sends programs through the stages."""
    alive = list(range(len(programs)))
    scores: dict[str, dict[int, float]] = {}
    for stage in chosen:
        tried = range(len(programs)) if stage.everyone else alive
        reference, *losses = try_all([first, *(programs[i] for i in tried)], stage.proxies)
        found = {i: score(x, reference) for i, x in zip(tried, losses, strict=True)}
        scores[stage.name] = found
        better = [i for i in alive if found[i] < 0.0]
        alive = sorted(better, key=lambda i: found[i])[: stage.keep]
    return Ranking(scores, alive[0] if alive else None)


def rank_correlation(
    before: dict[int, float], after: dict[int, float], top: int = 10
) -> tuple[float, float, int]:
    """Of two stages over the programs that saw both: Spearman's, the share of the `top` of the
    second that were among the `top` of the first, and how many programs that were.
    """
    both = [i for i in before if i in after]
    if len(both) < 3:
        return math.nan, math.nan, len(both)
    values = [[stage[i] for i in both] for stage in (before, after)]
    correlation = math.nan
    if all(np.ptp(x) > 0 for x in values):
        ranks = stats.spearmanr(values[0], values[1])
        correlation = float(np.asarray(ranks.statistic))  # pyright: ignore[reportAttributeAccessIssue]
    first, second = (set(sorted(both, key=x.__getitem__)[:top]) for x in (before, after))
    return correlation, len(first & second) / len(second), len(both)


def stratified(fitness: Sequence[float], count: int) -> list[int]:
    """Indices of programs that a funnel takes: half of them the best, half spread evenly over the
    ranks of the others that are no worse than twice the first program's loss.
    """
    ranked = sorted((i for i, x in enumerate(fitness) if x < np.log(2.0)), key=fitness.__getitem__)
    best, rest = ranked[: count // 2], ranked[count // 2 :]
    spread = min(len(rest), count - len(best))
    return best + [rest[round(i * (len(rest) - 1) / max(1, spread - 1))] for i in range(spread)]
