"""A learned optimizer among others: which leaves it trains, and the learning rate, weight decay and
clipping around it. Everything here is an optax transformation made of optax's own.

Updates of learned rules are negative already, as those of `optax.sgd` are: they are added.
"""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from learned_opt.base import Params, like_params

By = str | Sequence[str] | Callable[[str, jax.ShapeDtypeStruct], bool] | None
SHOWN = 20


def mask(by: By = None) -> Callable[[Params], Any]:
    """A mask as optax takes them: from params to a tree of bools, true at the leaves of `by`.

    Args:
      by: None: leaves of rank 0 and 1. A regular expression, or several of which one must match:
        searched for in the leaf's path, e.g. "decoder/layer_0/bias". Or a function of the path and
        the leaf's shape.

    Raises (here and when the mask is applied):
      TypeError: `by` is none of these.
      ValueError: a regular expression is malformed or matches no leaf; then the paths are listed.
    """
    if by is None:
        return _where(lambda path, leaf: len(leaf.shape) < 2)
    if callable(by):
        return _where(by)
    patterns = [by] if isinstance(by, str) else by
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            f"`by` must be a regular expression, several, or a function of path and leaf, "
            f"got {by!r}"
        )
    found = compiled("by", patterns)

    def named(params: Params) -> Any:
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if paths:
            check_found("by", found, paths)
        return _where(lambda path, leaf: any(p.search(path) for p in found))(params)

    return named


def compiled(argument: str, patterns: Iterable[str]) -> list[re.Pattern]:
    """Raises ValueError, which names the argument, for what is no regular expression."""
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(
            f"`{argument}` {error.pattern!r} is no regular expression: {error}"
        ) from None


def check_found(argument: str, patterns: Iterable[re.Pattern], paths: Iterable[str]) -> None:
    """Raises ValueError, which names the argument, for a pattern that matches none of the paths."""
    paths = list(paths)
    for pattern in patterns:
        if not any(map(pattern.search, paths)):
            more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
            raise ValueError(
                f"`{argument}` {pattern.pattern!r} matches none of the paths "
                f"{', '.join(paths[:SHOWN])}{more}"
            )


def path_name(path: jax.tree_util.KeyPath) -> str:
    """Of a leaf, e.g. "decoder/layer_0/bias"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _where(predicate: Callable[[str, jax.ShapeDtypeStruct], bool]) -> Callable[[Params], Any]:
    def leaf(path, x) -> bool:
        # no values: gradients are asked, too, and traced
        return bool(
            predicate(path_name(path), jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)))
        )

    return lambda params: jax.tree_util.tree_map_with_path(leaf, params)


def split(
    learned: optax.GradientTransformation, other: optax.GradientTransformation, by: By = None
) -> optax.GradientTransformationExtraArgs:
    """`other` trains the leaves of `by` (see `mask`; vectors and scalars if None), `learned` the
    rest. Keywords such as `value=` reach both.

    Raises (at init):
      ValueError: as `mask`, or every leaf goes to `other`.
    """
    of_other = mask(by)

    def labels(params: Params) -> Any:
        routed = of_other(params)
        flags = jax.tree.leaves(routed)
        if flags and all(flags):
            raise ValueError(
                f"`by` {'(leaves of rank 0 and 1)' if by is None else repr(by)} gives every leaf "
                "to `other` and none to `learned`"
            )
        return jax.tree.map(lambda flag: "other" if flag else "learned", routed)

    return optax.partition({"learned": learned, "other": other}, labels)


def finish(
    optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    clip: float | None = None,
    exempt: By = None,
) -> optax.GradientTransformationExtraArgs:
    """`optimizer` with what a training run puts around it: the update is learning_rate * (u -
    weight_decay * p), where `u` is the optimizer's update (negative) and `p` the parameter.

    Both rates stand in the state and may be changed between steps, in
    `state.hyperparams["learning_rate"]` and "weight_decay"; of schedules the value in force is read
    there.

    Args:
      optimizer: of learning rate 1.
      learning_rate, weight_decay: a number or an optax schedule.
      clip: the gradients' largest global norm; None: they are not clipped.
      exempt: leaves that do not decay (see `mask`; vectors and scalars if None, none if empty).

    Raises (here and at init):
      ValueError: `clip` is not positive; as `mask`.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"`clip` must be positive or None, got {clip}")
    before = [] if clip is None else [optax.clip_by_global_norm(clip)]
    is_exempt = mask(exempt)
    decays = lambda params: jax.tree.map(operator.not_, is_exempt(params))  # noqa: E731

    def chain(learning_rate, weight_decay) -> optax.GradientTransformationExtraArgs:
        return optax.chain(
            *before,
            optimizer,
            optax.add_decayed_weights(-weight_decay, decays),
            optax.scale(learning_rate),
            optax.stateless(like_params),
        )

    # in float32 even for params of half precision, which hold a rate to three digits only
    inject = optax.inject_hyperparams(chain, hyperparam_dtype=jnp.float32)
    return inject(learning_rate=learning_rate, weight_decay=weight_decay)
