"""How far optimizers are from the least F of composite convex tasks: (F - F*) / F*, iteration by
iteration and in float64, as float32 ends at about 1e-7 (the published curves of arXiv:2305.18577
flatten there).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from tasks.base import TaskFamily, behind, classes, train_step
from tasks.composite import Composite
from tasks.optimum import optima

Make = Callable[[Any], optax.GradientTransformation]

BLOCK_BYTES = 8 << 20  # of tasks that are solved together: about what caches hold
THRESHOLDS = tuple(10.0**-digits for digits in range(2, 9))
MOST_POINTS = 150  # of a summary's curve, most of them early
RESAMPLES = 1000


class Instances(NamedTuple):
    """Tasks in float64, their leaves stacked along a first axis [count], and the least F of each,
    of the very same numbers.
    """

    tasks: Composite
    optima: np.ndarray  # float64 [count]


class Curves(NamedTuple):
    """float64 [..., count, iterations + 1], infinite where F is not finite: of the params, and of
    the last proximal point (a field `x` of the optimizer's state) where that was wanted and is.
    """

    params: np.ndarray
    x: np.ndarray | None


def generate(family: TaskFamily, count: int, seed: int) -> Composite:
    """The tasks of the keys fold_in(key(seed), i), drawn in float32, as float64 arrays
    [count, ...].
    """
    if count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}")
    with jax.enable_x64(False):
        shapes = jax.eval_shape(lambda: family(jax.random.key(0)))
        if not isinstance(shapes, Composite):
            raise TypeError(f"`family` must make composite tasks, got {type(shapes).__name__}")
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(
            np.arange(count, dtype=np.uint32)
        )
        # the lambda is new every time: jax tells families apart by their fields alone
        tasks = jax.jit(jax.vmap(lambda family, key: family(key), (None, 0)))(family, keys)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tasks)


def instances(family: TaskFamily, count: int, seed: int) -> Instances:
    """`generate`, solved.

    Raises:
      ValueError: the least F of one is 0, or as good as: nothing is relative to that.
      RuntimeError, TypeError: as `tasks.optimum.optimum`.
    """
    tasks = generate(family, count, seed)
    return Instances(tasks, solved(tasks))


def solved(tasks: Composite) -> np.ndarray:
    """`tasks.optimum.optima`, refused where they are no measure; see `instances`."""
    found = optima(tasks)
    with jax.enable_x64(True):
        starts = np.asarray(jax.vmap(lambda task: task.loss(task.init(None), ()))(tasks))
    if (none := found <= 1e-14 * starts).any():
        raise ValueError(
            f"`family` has instances whose least F is 0 ({none.sum()} of {none.size}): nothing is "
            "relative to that; add noise or a penalty"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Only:
    """A `Make` of one optimizer."""

    optimizer: optax.GradientTransformation

    def __call__(self, nothing: Any) -> optax.GradientTransformation:
        return self.optimizer


def run(
    optimizer: optax.GradientTransformation,
    problems: Instances,
    iterations: int,
    both: bool = False,
) -> Curves:
    """The curves [count, iterations + 1] of one optimizer, from 0; entry k is of what k updates
    made.

    Rounding may put F below F*; such entries are 0. F* itself is certified, see `tasks.optimum`.

    Args:
      both: `Curves.x`, too.
    """
    params, x = run_all(Only(optimizer), np.zeros(1), problems, iterations, both)
    return Curves(params[0], None if x is None else x[0])


def run_all(
    make: Make, hypers: Any, problems: Instances, iterations: int, both: bool = False
) -> Curves:
    """The curves [S, count, iterations + 1] of the optimizers `make(hyper)`: of S settings or seeds
    whose leaves are stacked along the first axis of `hypers`. See `run`.

    All share one program, which is kept for an equal `make` and tasks of the same shapes.
    """
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}")
    # what cannot be made is told here, outside of any trace
    make(jax.tree.map(lambda leaf: leaf[0], hypers))
    tasks, least = problems
    count = len(least)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(tasks)) // count
    block = min(count, max(1, BLOCK_BYTES // size))
    found = []
    with jax.enable_x64(True):
        for start in range(0, count, block):
            rows = np.arange(start, start + block) % count  # the last block is filled up
            some = jax.tree.map(lambda leaf, rows=rows: leaf[rows], tasks)
            values = _values(make, hypers, some, iterations, both, classes(tasks))
            found.append([np.moveaxis(np.asarray(each), 0, 1) for each in values])
    curves = (np.concatenate(blocks, axis=1)[:, :count] for blocks in zip(*found, strict=True))
    params, *x = (_relative(values, least) for values in curves)
    return Curves(params, x[0] if x else None)


def _relative(values: np.ndarray, least: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = (values - least[:, None]) / least[:, None]
    return np.where(np.isfinite(ratio), np.maximum(ratio, 0), np.inf)


@functools.partial(jax.jit, static_argnames=("make", "iterations", "both", "kinds"))
def _values(
    make: Make, hypers: Any, tasks: Composite, iterations: int, both: bool, kinds: tuple
) -> tuple[jax.Array, ...]:
    """F [B, S, iterations + 1] of the params and, if wanted, of x. One task's matrix is multiplied
    with all settings at once.
    """
    del kinds  # see `tasks.base.classes`

    def one(task: Composite, hyper: Any) -> tuple[jax.Array, ...]:
        optimizer, key = behind(task, make(hyper)), jax.random.key(0)
        batch, params = task.batch(key, "train"), task.init(key)

        def told(value: jax.Array, state: Any) -> tuple[jax.Array, ...]:
            x = proximal_point(state, params) if both else None
            return (value,) if x is None else (value, task.loss(x, batch))

        def step(carry: Any, nothing: None) -> tuple[Any, tuple[jax.Array, ...]]:
            params, state = carry
            params, after, value = train_step(task, optimizer, params, state, batch)
            return (params, after), told(value, state)

        (params, state), values = jax.lax.scan(
            step, (params, optimizer.init(params)), length=iterations
        )
        last = told(task.loss(params, batch), state)
        return jax.tree.map(jnp.append, values, last)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(tasks, hypers)


def proximal_point(state: Any, params: Any) -> Any:
    """The outermost field `x` of an optimizer's state that is like the params, or None."""
    found = [
        (len(path), x)
        for path, x in optax.tree_utils.tree_get_all_with_path(state, "x")
        if jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, params)
    ]
    return min(found, key=lambda each: each[0])[1] if found else None


class Interval(NamedTuple):
    """An estimate and its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is told of curves.

    Attributes:
      at: iteration -> {median, mean, p90: of the relative suboptimality}.
      to: threshold -> median number of iterations until it is reached, see `iterations_to`.
      diverged: share of runs that end with an F that is not finite, or 1% above that at the start.
      curve: {k, median, p10, p90} by iteration, thinned as these grow, to four
        digits.
    """

    at: dict[int, dict[str, Interval]]
    to: dict[float, Interval]
    diverged: float
    curve: dict[str, list[float]]

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it: None for infinity."""
        return _without_infinity(dataclasses.asdict(self))

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> "Summary":
        def interval(values: Sequence[float | None]) -> Interval:
            return Interval(*map(_number, values))

        return cls(
            {int(k): {n: interval(v) for n, v in at.items()} for k, at in plain["at"].items()},
            {float(threshold): interval(v) for threshold, v in plain["to"].items()},
            plain["diverged"],
            {name: list(map(_number, values)) for name, values in plain["curve"].items()},
        )


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _without_infinity(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_infinity(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(inner) for inner in value]
    return None if value == math.inf else value


def iterations_to(curves: npt.ArrayLike, threshold: float) -> np.ndarray:
    """[...] of curves [..., K + 1]: the first iteration at which `threshold` is reached, infinity
    where it never is.
    """
    reached = np.asarray(curves) <= threshold
    return np.where(reached.any(axis=-1), reached.argmax(axis=-1), np.inf)


def summarize(curves: np.ndarray, at: Sequence[int] = (100, 1000)) -> Summary:
    """Of curves [count, K + 1], or [S, count, K + 1] of several optimizers of a kind, pooled.

    Intervals are over instances: which are drawn with replacement, each with all of its runs.
    """
    curves = curves[None] if curves.ndim == 2 else curves
    wrong = [k for k in at if not 0 <= k < curves.shape[-1]]
    if wrong:
        raise ValueError(
            f"`at` must be below {curves.shape[-1]}, the length of curves, got {wrong}"
        )
    pooled = curves.reshape(-1, curves.shape[-1])
    kept = np.unique(np.geomspace(1, curves.shape[-1], MOST_POINTS).round().astype(int)) - 1
    levels = {"p10": 0.1, "median": 0.5, "p90": 0.9}
    return Summary(
        at={
            k: {"mean": bootstrap(curves[..., k], np.mean)}
            | {
                name: bootstrap(curves[..., k], functools.partial(quantile, level=level))
                for name, level in (("median", 0.5), ("p90", 0.9))
            }
            for k in at
        },
        to={t: bootstrap(iterations_to(curves, t), quantile) for t in THRESHOLDS},
        diverged=float(np.mean(~(pooled[:, -1] + 1 <= 1.01 * (pooled[:, 0] + 1)))),
        curve={"k": kept.tolist()}
        | {n: _rounded(quantile(pooled[:, kept], level, axis=0)) for n, level in levels.items()},
    )


def _rounded(values: np.ndarray) -> list[float]:
    """To four digits."""
    return [float(f"{value:.4g}") for value in values]


def quantile(values: np.ndarray, level: float = 0.5, axis: int | None = None) -> np.ndarray:
    """One of the values, of which `level` are not above it: between infinity and a number there is
    nothing to interpolate.
    """
    return np.quantile(values, level, axis=axis, method="inverted_cdf")


def bootstrap(values: np.ndarray, statistic: Callable[..., np.ndarray] = quantile) -> Interval:
    """A statistic of values [S, count], and what its draws of instances put 95% in between."""
    drawn = np.random.default_rng(0).integers(values.shape[1], size=(RESAMPLES, values.shape[1]))
    draws = np.moveaxis(values[:, drawn], 0, 1).reshape(RESAMPLES, -1)
    found = statistic(draws, axis=1)
    return Interval(
        *map(float, (statistic(values), quantile(found, 0.025), quantile(found, 0.975)))
    )
