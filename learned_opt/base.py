"""What a learned optimizer is: a function from meta-parameters theta to an optax transformation."""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from learned_opt import discovery

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


def flatten(theta: Theta) -> dict[str, jax.Array]:
    """Leaves of a nested dict by their dotted path.

    Raises:
      ValueError: two leaves have the same dotted path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    if len(set(names)) < len(names):
        raise ValueError(f"`theta` has leaves of equal dotted path: {', '.join(sorted(names))}")
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


@functools.lru_cache(maxsize=64)
def theta_template(rule: LearnedOptimizer) -> dict[str, Any]:
    """Shape and dtype of every leaf of the rule's theta, by dotted path; those without x64."""
    with jax.enable_x64(False):
        return flatten(jax.eval_shape(rule.init, jax.random.key(0)))


def check_leaves(rule: LearnedOptimizer, leaves: dict[str, Any], source: str) -> None:
    """Refuses leaves (by dotted path) that are not those of a theta of the rule.

    Raises:
      ValueError: leaves are missing, unknown, or of another shape or dtype; the message names each.
    """
    expected = theta_template(rule)
    wrong = [f"missing {name}" for name in expected if name not in leaves]
    wrong += [f"unknown {name}" for name in leaves if name not in expected]
    for name in expected.keys() & leaves.keys():
        want, got = expected[name], leaves[name]
        shape, dtype = jnp.shape(got), jnp.result_type(got)
        # with jax_enable_x64 on, `init` draws in float64; artifacts hold float32
        either = {dtype, want.dtype} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)}
        if shape != want.shape or not (either or dtype == want.dtype):
            wrong.append(f"{name} is {dtype}{list(shape)}, not {want.dtype}{list(want.shape)}")
    if wrong:
        raise ValueError(
            f"{source} does not fit the rule {discovery.spec_of(rule)}: {'; '.join(sorted(wrong))}"
        )


def check_theta(rule: LearnedOptimizer, theta: Theta) -> None:
    """Refuses a theta of another rule or of other sizes.

    Raises:
      ValueError: as `check_leaves`.
    """
    check_leaves(rule, flatten(theta), "`theta`")


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
      ValueError: a leaf has no elements, so no statistics.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype, where = jnp.result_type(leaf), jax.tree_util.keystr(path) or "params"
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`params` must hold floating-point arrays, got {dtype} at {where}; "
                "leave it out with optax.masked or optax.multi_transform"
            )
        if not np.size(leaf):
            raise ValueError(
                f"`params` must not be empty, got shape {jnp.shape(leaf)} at {where}; "
                "leave it out with optax.masked or optax.multi_transform"
            )


def float32(tree: Any) -> Any:
    """The leaves as float32 arrays, whatever floats they were: what rules accumulate in."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def like_params(updates: Any, params: Params) -> Any:
    """The updates in the dtypes of the params, as optax wants them."""
    return jax.tree.map(lambda u, p: u.astype(jnp.result_type(p)), updates, params)


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
