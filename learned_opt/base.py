"""What a learned optimizer is: a function from meta-parameters theta to an optax transformation."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

Key = jax.Array
Theta = Any
Params = Any
Horizon = int | jax.Array | None


@runtime_checkable
class LearnedOptimizer(Protocol):
    """An update rule: a frozen dataclass whose fields are its hyperparameters.

    `optimizer` returns a plain optax transformation: updates are added to the params, the loss
    arrives as optax's keyword `value=`, unknown keywords are accepted. `horizon`, the number of
    steps the training run will take, may be traced; a rule that does not need it ignores it, a rule
    that does calls `require_horizon`.
    """

    def init(self, key: Key) -> Theta: ...

    def optimizer(
        self, theta: Theta, horizon: Horizon = None
    ) -> optax.GradientTransformationExtraArgs: ...


def require_horizon(rule: LearnedOptimizer, horizon: Horizon) -> int | jax.Array:
    """`horizon` as it was given, a numpy integer as an int.

    Raises:
      ValueError: it is None or a concrete number below 1.
      TypeError: it is neither a number nor an array, or not a scalar.
    """
    name = type(rule).__name__
    horizon = int(horizon) if isinstance(horizon, np.integer) else horizon
    if horizon is None:
        raise ValueError(f"`horizon` is required by {name}: pass the number of training steps")
    if isinstance(horizon, bool) or not isinstance(horizon, (int, jax.Array)) or jnp.ndim(horizon):
        raise TypeError(
            f"`horizon` of {name} must be an integer or a scalar array, got {horizon!r}"
        )
    if not isinstance(horizon, Tracer) and horizon < 1:
        raise ValueError(f"`horizon` of {name} must be at least 1, got {horizon}")
    return horizon


def require_value(rule: LearnedOptimizer, extra_args: dict[str, Any]) -> jax.Array:
    """The loss, which arrives as optax's keyword `value=`, as a float32 scalar.

    Raises:
      ValueError: it was not passed, or is not a scalar.
    """
    name, value = type(rule).__name__, extra_args.get("value")
    if value is None:
        raise ValueError(
            f"`value` is required by {name}: pass the loss, "
            "optimizer.update(grads, state, params, value=loss)"
        )
    if jnp.ndim(value):
        raise ValueError(f"`value` of {name} must be the scalar loss, got shape {jnp.shape(value)}")
    return jnp.asarray(value, jnp.float32)


def check_params(params: Params) -> None:
    """Refuses what no rule can train.

    Raises:
      TypeError: a leaf is not a floating-point array; the message names it.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            where = jax.tree_util.keystr(path) or "params"
            raise TypeError(
                f"`params` must hold floating-point arrays, got {dtype} at {where}; "
                "leave it out with optax.masked or optax.multi_transform"
            )


def float32(tree: Any) -> Any:
    """The leaves as float32 arrays, whatever floats they were: what rules accumulate in."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def check_update(rule: LearnedOptimizer, params: Params | None) -> None:
    """Refuses an `update` call without params, which every rule here reads or sizes its step by.

    Raises:
      ValueError: `params` is None.
    """
    if params is None:
        raise ValueError(
            f"`params` must be passed to {type(rule).__name__}'s update: "
            "call optimizer.update(grads, state, params)"
        )
