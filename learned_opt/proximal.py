"""What rules for composite losses F = f + r share: what they are told of the problem, and trees of
arrays in at least float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from learned_opt import base
from learned_opt.recurrent import placed_as

# the share of 1/L that published steps are: 1/L itself is not safe from rounding
MARGIN = 0.9999
RESTARTED = (1 + 5**0.5) / 2  # FISTA's t after its first step


class Proximal(NamedTuple):
    """What an update needs to know of a composite loss: `prox(v, step)` minimises
    r(x) + |x - v|^2 / (2 step), step a positive array like v; `step` is 1/L or a little less, one
    number, or one for each of the problems that are stacked: [P, 1] for params [P, N].
    """

    prox: Callable[[Any, Any], Any]
    step: jax.Array


def told(rule: Any, extra_args: dict[str, Any]) -> Proximal:
    """The keywords `prox` and `lipschitz` of `update`.

    Raises:
      ValueError: one is missing; `prox` is no function; `lipschitz` is a number that is not
        positive and finite.
    """
    name, prox, lipschitz = type(rule).__name__, extra_args.get("prox"), extra_args.get("lipschitz")
    if prox is None:
        raise ValueError(
            f"`prox` is required by {name}: pass the proximal operator of what is not smooth, "
            "optimizer.update(grads, state, params, prox=prox, lipschitz=L), of which "
            "prox=lambda v, step: v is that of nothing"
        )
    if not callable(prox):
        raise ValueError(f"`prox` of {name} must be a function of (v, step), got {prox!r}")
    if lipschitz is None:
        raise ValueError(
            f"`lipschitz` is required by {name}: pass the Lipschitz constant of the gradients, "
            "optimizer.update(grads, state, params, prox=prox, lipschitz=L)"
        )
    if not isinstance(lipschitz, Tracer):
        known = np.asarray(lipschitz)
        if not np.all(np.isfinite(known) & (known > 0)):
            raise ValueError(f"`lipschitz` of {name} must be positive and finite, got {lipschitz}")
    step = jax.lax.stop_gradient(MARGIN / jnp.asarray(lipschitz))
    return Proximal(prox, step.reshape(()) if step.size == 1 else step)


def gradient_at(rule: Any, extra_args: dict[str, Any], x: Any) -> Any:
    """The keyword `gradient` of `update`, the gradient of f as a function of x, at x.

    Raises:
      ValueError: it is missing.
    """
    gradient = extra_args.get("gradient")
    if gradient is None:
        raise ValueError(
            f"`gradient` is required by {type(rule).__name__} with B in `parts`: pass the gradient "
            "of the smooth part as a function of x, which is wanted at a second point"
        )
    return at_least_float32(gradient(x))


def subgradient(updates: Any, params: base.Params, extra_args: dict[str, Any]) -> Any:
    """The gradients and, where there is the keyword `penalty`, a function of the params, its
    derivative. What rules without a proximal operator take for the gradient of a composite loss.
    """
    grads, penalty = at_least_float32(updates), extra_args.get("penalty")
    if penalty is None:
        return grads
    return jax.tree.map(lambda g, s: g + s.astype(g.dtype), grads, jax.grad(penalty)(params))


def like(value: jax.Array, tree: Any) -> Any:
    """`value`, a scalar or one number per problem, for every coordinate of the tree.

    Raises:
      ValueError: it is neither.
    """

    def leaf(x: jax.Array) -> jax.Array:
        if value.ndim not in (0, x.ndim):
            raise ValueError(
                f"`lipschitz` must be one number, or have as many axes as the params, got shape "
                f"{value.shape} for params of shape {x.shape}: [P, 1] for P problems [P, N]"
            )
        return jnp.broadcast_to(value, x.shape).astype(x.dtype)

    return placed_as(jax.tree.map(leaf, tree), tree)


def following(t: jax.Array) -> jax.Array:
    """FISTA's next t; its momentum is (t - 1) / following(t)."""
    return (1 + jnp.sqrt(1 + 4 * t * t)) / 2


def descend(x: Any, step: Any, grads: Any) -> Any:
    """x - step * grads, leaf by leaf."""
    return jax.tree.map(lambda x, s, g: x - s * g, x, step, grads)


def at_least_float32(tree: Any) -> Any:
    """The leaves in float32, or in float64 where they are: iterates of a convex problem are wanted
    to more digits than the outputs of a network.
    """

    def leaf(x: Any) -> jax.Array:
        return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))

    return jax.tree.map(leaf, tree)


def owned(params: base.Params) -> Any:
    """A copy in the dtypes of `at_least_float32`: a state that is donated may not share buffers
    with params that are donated beside it.
    """
    return jax.tree.map(jnp.array, at_least_float32(params))


def over_leaves(results: int, function: Callable[..., tuple], tree: Any, *rest: Any) -> tuple:
    """`jax.tree.map` of a function of several results: a tuple of trees."""
    leaves, treedef = jax.tree.flatten(tree)
    others = [treedef.flatten_up_to(other) for other in rest]
    found = [function(*args) for args in zip(leaves, *others, strict=True)]
    return tuple(treedef.unflatten([each[i] for each in found]) for i in range(results))
