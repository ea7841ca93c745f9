"""Classical optimizers of composite losses F = f + r as optax transformations: what learned ones
are compared with.

`update` takes the gradients of f at the params y, and as keywords

    prox(v, step): argmin_x r(x) + sum_i (x_i - v_i)^2 / (2 step_i), both like the params,
    lipschitz: the Lipschitz constant of the gradients, or an array that broadcasts to the params:
      [P, 1] for P problems as rows,
    penalty(params): r, of which those without a prox take a subgradient.

They compute in the dtypes of the params, or in float32 where those are shorter.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluation import suboptimality

Params = Any
# the share of 1/L that published steps are: 1/L itself is not safe from rounding
MARGIN = 0.9999
FLOOR = 1e-16  # relative suboptimality below this is rounding


class ProximalState(NamedTuple):
    """`x`, like the params, is the last proximal point, from which they are extrapolated; `t`, like
    the params too (only `update` knows what a problem is), is FISTA's sequence.
    """

    x: Params
    t: Params


class ProxAdamState(NamedTuple):
    """`x` are the params, `mu` and `nu` Adam's moments, all of them like the params."""

    x: Params
    mu: Params
    nu: Params
    count: jax.Array


def ista() -> optax.GradientTransformationExtraArgs:
    """Proximal gradient steps of 0.9999 / L."""
    return constant(1.0, 0.0)


def constant(p: Any, a: Any) -> optax.GradientTransformationExtraArgs:
    """Steps of `p` times ISTA's, x' = prox(y - s g, s), and momentum y' = x' + a (x' - x)."""

    def momentum(state: ProximalState, y: Params, x: Params, lipschitz: jax.Array) -> Any:
        return jax.tree.map(lambda x: jnp.full_like(x, a), x), state.t

    return _accelerated("constant", p, momentum)


def fista(restart: bool = False) -> optax.GradientTransformationExtraArgs:
    """Beck and Teboulle's accelerated proximal gradient: a_k = (t_k - 1) / t_(k+1) with t_1 = 1 and
    t_(k+1) = (1 + sqrt(1 + 4 t_k^2)) / 2.

    Args:
      restart: set t_k = 1, which is y' = x', where (y - x') . (x' - x) > 0: the gradient scheme of
        arXiv:1204.3982. Where `lipschitz` has axes of size 1, the sum is over these and every
        problem has its own; otherwise all params are one problem.
    """

    def momentum(state: ProximalState, y: Params, x: Params, lipschitz: jax.Array) -> Any:
        t = state.t
        if restart:
            products = jax.tree.map(lambda y, x, old: (y - x) * (x - old), y, x, state.x)
            again = _problem_sum(products, lipschitz) > 0
            t = jax.tree.map(lambda t: jnp.where(jnp.broadcast_to(again, t.shape), 1, t), t)
        following = jax.tree.map(lambda t: (1 + jnp.sqrt(1 + 4 * t * t)) / 2, t)
        return jax.tree.map(lambda t, after: (t - 1) / after, t, following), following

    return _accelerated("fista", 1.0, momentum)


class CurvatureState(NamedTuple):
    """`x` and `t` as those of `ProximalState`; `y` and `grads` of the last step, and the curvature
    as far as steps have told it, 0 before they have; all like the params.
    """

    x: Params
    t: Params
    y: Params
    grads: Params
    curvature: Params


def fista_curvature(
    share: Any = 0.97, memory: Any = 0.9, least: Any = 0.2
) -> optax.GradientTransformationExtraArgs:
    """Restarted FISTA with longer steps where F is flatter than L says: (2 + 2a) / ((1 + 2a) c L)
    times `share`, for which momentum a is stable on a mode of curvature c L. c is
    |dg|^2 / (L dg.dy) of the last two points and gradients, or `memory` times what it was, if that
    is larger, and at least `least`. What is left of a learned rule (learned_opt.bounded) when its
    network is taken away: the control that tells what learning adds.
    """

    def init(params: Params) -> CurvatureState:
        x, zeros = _owned(params), functools.partial(jax.tree.map, jnp.zeros_like)
        ones = jax.tree.map(jnp.ones_like, x)
        return CurvatureState(x, ones, _owned(params), zeros(x), zeros(x))

    def update(updates, state, params=None, **extra_args):
        prox, lipschitz = _required("fista_curvature", params, extra_args, "prox", "lipschitz")
        y, grads = _at_least_float32(params), _at_least_float32(updates)
        lipschitz = jnp.asarray(lipschitz)
        minus = functools.partial(jax.tree.map, jnp.subtract)
        times = functools.partial(jax.tree.map, jnp.multiply)
        change, way = minus(grads, state.grads), minus(y, state.y)
        product = _problem_sum(times(change, way), lipschitz)
        square = _problem_sum(times(change, change), lipschitz)
        seen = jnp.where(product > 0, square / jnp.where(product > 0, product, 1) / lipschitz, 1)
        curvature = jax.tree.map(
            lambda c: jnp.where(
                c > 0, jnp.clip(jnp.maximum(MARGIN * seen, memory * c), least, 1), 1
            ).astype(c.dtype),
            state.curvature,
        )
        following = jax.tree.map(lambda t: (1 + jnp.sqrt(1 + 4 * t * t)) / 2, state.t)
        a = jax.tree.map(lambda t, after: (t - 1) / after, state.t, following)
        step = jax.tree.map(
            lambda a, c: share * MARGIN * (2 + 2 * a) / (1 + 2 * a) / c / lipschitz.astype(c.dtype),
            a,
            curvature,
        )
        x = prox(minus(y, times(step, grads)), step)
        moved = minus(x, state.x)
        # all coordinates of a problem have one step, so its sign is that of the weighted sum
        uphill = _problem_sum(times(minus(y, x), moved), lipschitz) > 0
        new = jax.tree.map(lambda x, a, d: x + jnp.where(uphill, 0, a) * d, x, a, moved)
        start = (1 + 5**0.5) / 2
        t = jax.tree.map(lambda t: jnp.where(uphill, start, t), following)
        return _moves(new, y, params), CurvatureState(x, t, y, grads, curvature)

    return optax.GradientTransformationExtraArgs(init, update)


def prox_adam(
    learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Adam on f, and the prox in the metric of its steps s = learning_rate / (sqrt(vhat) + eps):
    y' = prox(y - s mhat, s), of which the minimisers of F are fixed points (arXiv:1910.10094).
    """

    def init(params: Params) -> ProxAdamState:
        x, zeros = _owned(params), functools.partial(jax.tree.map, jnp.zeros_like)
        return ProxAdamState(x, zeros(x), zeros(x), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        (prox,) = _required("prox_adam", params, extra_args, "prox")
        y, grads = _at_least_float32(params), _at_least_float32(updates)
        count = state.count + 1
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, grads, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, grads, state.nu)
        c1, c2 = 1 - jnp.asarray(b1) ** count, 1 - jnp.asarray(b2) ** count
        step = jax.tree.map(lambda v: learning_rate / (jnp.sqrt(v / c2.astype(v.dtype)) + eps), nu)
        v = jax.tree.map(lambda y, s, m: y - s * m / c1.astype(m.dtype), y, step, mu)
        x = prox(v, step)
        return _moves(x, y, params), ProxAdamState(x, mu, nu, count)

    return optax.GradientTransformationExtraArgs(init, update)


def subgradient_adam(
    learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999
) -> optax.GradientTransformationExtraArgs:
    """Adam on a subgradient of F, without a prox: what arXiv:2305.18577 compares with, there with
    b1 = b2 = 0.1 and a learning rate of 0.01. It knows nothing of constraints.
    """
    adam = optax.adam(learning_rate, b1, b2)

    def init(params: Params) -> optax.OptState:
        return adam.init(_at_least_float32(params))

    def update(updates, state, params=None, **extra_args):
        (penalty,) = _required("subgradient_adam", params, extra_args, "penalty")
        y, grads = _at_least_float32(params), _at_least_float32(updates)
        grads = jax.tree.map(jnp.add, grads, jax.grad(penalty)(y))
        updates, state = adam.update(grads, state, y)
        return jax.tree.map(lambda u, p: u.astype(jnp.result_type(p)), updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _accelerated(name: str, p: Any, momentum: Callable) -> optax.GradientTransformationExtraArgs:
    """`momentum(state, y, x', lipschitz)` gives a, like the params, and the next t."""

    def init(params: Params) -> ProximalState:
        x = _owned(params)
        return ProximalState(x, jax.tree.map(jnp.ones_like, x))

    def update(updates, state, params=None, **extra_args):
        prox, lipschitz = _required(name, params, extra_args, "prox", "lipschitz")
        y, grads = _at_least_float32(params), _at_least_float32(updates)
        lipschitz = jnp.asarray(lipschitz)
        step = jax.tree.map(
            lambda y: jnp.broadcast_to(p * MARGIN / lipschitz.astype(y.dtype), y.shape), y
        )
        x = prox(jax.tree.map(lambda y, s, g: y - s * g, y, step, grads), step)
        a, t = momentum(state, y, x, lipschitz)
        new = jax.tree.map(lambda x, old, a: x + a * (x - old), x, state.x, a)
        return _moves(new, y, params), ProximalState(x, t)

    return optax.GradientTransformationExtraArgs(init, update)


def _problem_sum(products: Params, lipschitz: jax.Array) -> jax.Array:
    """Over the axes in which `lipschitz` has size 1, which remain with size 1; if there are none,
    over all.
    """
    axes = tuple(axis for axis, size in enumerate(lipschitz.shape) if size == 1)
    leaves = jax.tree.leaves(products)
    if not axes:
        return sum(map(jnp.sum, leaves[1:]), jnp.sum(leaves[0]))
    sums = [jnp.sum(leaf, axes, keepdims=True) for leaf in leaves]
    return sum(sums[1:], sums[0])


def _required(
    name: str, params: Params | None, extra_args: Mapping[str, Any], *keywords: str
) -> list[Any]:
    if params is None:
        raise ValueError(f"`params` must be passed to the update of {name}")
    for keyword in keywords:
        if extra_args.get(keyword) is None:
            raise ValueError(
                f"`{keyword}` is required by {name}: call "
                f"optimizer.update(grads, state, params, {keyword}=...), see evaluation.proximal"
            )
    return [extra_args[keyword] for keyword in keywords]


def _at_least_float32(tree: Any) -> Any:
    def leaf(x: Any) -> jax.Array:
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))

    return jax.tree.map(leaf, tree)


def _owned(params: Params) -> Params:
    """A copy: a state that is donated may not share buffers with params donated beside it."""
    return jax.tree.map(jnp.array, _at_least_float32(params))


def _moves(new: Params, y: Params, params: Params) -> Params:
    """The updates, in the dtypes of the params."""
    return jax.tree.map(lambda n, y, p: (n - y).astype(jnp.result_type(p)), new, y, params)


REFERENCES: dict[str, Callable[[], optax.GradientTransformationExtraArgs]] = {
    "ista": ista,
    "fista": fista,
    "fista_restart": functools.partial(fista, restart=True),
    "fista_curvature": fista_curvature,
}


@dataclasses.dataclass(frozen=True)
class Keywords:
    """A `suboptimality.Make` of what takes keywords."""

    function: Callable[..., optax.GradientTransformationExtraArgs]

    def __call__(self, hyper: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        return self.function(**hyper)


ADAM_GRID = {
    "learning_rate": 10.0 ** np.arange(-4, 1.25, 0.5),
    "b1": np.array([0.1, 0.9]),
    "b2": np.array([0.1, 0.999]),
}
GRIDS: dict[str, tuple[Callable[..., Any], dict[str, np.ndarray]]] = {
    "constant": (constant, {"p": np.linspace(0.25, 2.0, 8), "a": np.linspace(0.0, 1.0, 11)}),
    "prox_adam": (prox_adam, ADAM_GRID),
    "subgradient_adam": (subgradient_adam, ADAM_GRID),
}


class Tuned(NamedTuple):
    """The best of a grid, and its geometric mean of relative suboptimality. `at_edge` names what is
    at an end of its range: beyond it, there may be better.
    """

    optimizer: optax.GradientTransformationExtraArgs
    chosen: dict[str, float]
    score: float
    at_edge: tuple[str, ...]


def points(name: str) -> tuple[Keywords, dict[str, np.ndarray]]:
    """Of one of `GRIDS`: what makes an optimizer of a point, and all points, [S] by keyword."""
    function, grid = GRIDS[name]
    axes = np.meshgrid(*grid.values(), indexing="ij")
    return Keywords(function), {key: axis.ravel() for key, axis in zip(grid, axes, strict=True)}


def tuned(name: str, problems: suboptimality.Instances, at: int) -> Tuned:
    """One of `GRIDS`, with the values of the smallest geometric mean, over instances, of the
    relative suboptimality after `at` iterations.

    Args:
      problems: for tuning alone: of other keys than those that are judged.
    """
    make, hypers = points(name)
    curves = suboptimality.run_all(make, hypers, problems, at).params
    # a start at the solution has no logarithm
    scores = np.exp(np.log(np.maximum(curves[..., -1], FLOOR)).mean(axis=1))
    best = int(np.argmin(scores))
    chosen = {key: float(values[best]) for key, values in hypers.items()}
    ends = {key: values[[0, -1]] for key, values in GRIDS[name][1].items() if len(values) > 2}
    edge = tuple(key for key, both in ends.items() if chosen[key] in both)
    return Tuned(make(chosen), chosen, float(scores[best]), edge)
