"""Gradients that are noisy, late, without length or known along random directions only: every one
an optax transformation that stands before the optimizer.

Augmentations of VeLO (arXiv:2211.09760), but for the noise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tasks.augment import (
    AugmentedTask,
    Change,
    at_least_float32,
    check_counts,
    check_range,
    log_uniform_count,
    normal_like,
)
from tasks.base import Key, TaskFamily
from tasks.data import synthetic
from tasks.dynamic import log_uniform
from tasks.image_mlp import ImageMLP

Gradients = Any


def _transformation(
    init: optax.TransformInitFn, update: Callable[[Gradients, Any], tuple[Gradients, Any]]
) -> optax.GradientTransformation:
    """With `update` given at least float32, and its result brought back to the dtypes it had."""

    def cast_update(updates: Gradients, state: Any, params: Any = None) -> tuple[Gradients, Any]:
        del params
        changed, state = update(at_least_float32(updates), state)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), changed, updates), state

    return optax.GradientTransformation(init, cast_update)


def _random(
    key: Key, change: Callable[[Key, Gradients], Gradients]
) -> optax.GradientTransformation:
    """`change` with another key in every step; the state is the data of the next key to split."""

    def update(grads: Gradients, state: jax.Array) -> tuple[Gradients, jax.Array]:
        state_key, step_key = jax.random.split(jax.random.wrap_key_data(state))
        return change(step_key, grads), jax.random.key_data(state_key)

    return _transformation(lambda params: jax.random.key_data(key), update)


def scaled(scale: jax.Array) -> optax.GradientTransformation:
    """Multiplies every leaf."""
    return _transformation(
        lambda params: optax.EmptyState(),
        lambda grads, state: (jax.tree.map(lambda g: scale * g, grads), state),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledGradients:
    """Family -> family whose gradients are those of a loss `scale` times as large, log-uniform."""

    family: TaskFamily
    scale: tuple[float, float] = dataclasses.field(default=(0.01, 100.0), metadata={"static": True})

    def __post_init__(self) -> None:
        check_range("scale", self.scale)

    def __call__(self, key: Key) -> AugmentedTask:
        key_task, key_scale = jax.random.split(key)
        drawn = jnp.asarray(log_uniform(key_scale, self.scale))
        return AugmentedTask(self.family(key_task), drawn, Change(gradients=scaled))


class Noise(NamedTuple):
    key: Key
    scale: jax.Array


def with_noise(noise: Noise) -> optax.GradientTransformation:
    """Adds to every leaf normal noise of the deviation `scale` * the leaf's root mean square."""

    def change(key: Key, grads: Gradients) -> Gradients:
        normal = normal_like(key, grads)
        rms = jax.tree.map(lambda g: optax.safe_root_mean_squares(g, 0.0), grads)
        return jax.tree.map(lambda g, r, n: g + noise.scale * r * n, grads, rms, normal)

    return _random(noise.key, change)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GradientNoise:
    """Family -> family, see `with_noise`; the scale is log-uniform in `scale`."""

    family: TaskFamily
    scale: tuple[float, float] = dataclasses.field(default=(0.01, 1.0), metadata={"static": True})

    def __post_init__(self) -> None:
        check_range("scale", self.scale)

    def __call__(self, key: Key) -> AugmentedTask:
        key_task, key_scale, key_noise = jax.random.split(key, 3)
        noise = Noise(key_noise, jnp.asarray(log_uniform(key_scale, self.scale)))
        return AugmentedTask(self.family(key_task), noise, Change(gradients=with_noise))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delay:
    steps: jax.Array  # 1..longest
    longest: int = dataclasses.field(metadata={"static": True})


class DelayState(NamedTuple):
    slot: jax.Array  # int32, of the oldest gradient
    buffer: Gradients  # every leaf [longest, ...], of which `steps` are in use


def delayed(delay: Delay) -> optax.GradientTransformation:
    """Gives the gradient of `steps` updates ago; zeros before there is one."""

    def init(params: Any) -> DelayState:
        buffer = jax.tree.map(
            lambda p: jnp.zeros((delay.longest, *p.shape), p.dtype), at_least_float32(params)
        )
        return DelayState(jnp.zeros((), jnp.int32), buffer)

    def update(grads: Gradients, state: DelayState) -> tuple[Gradients, DelayState]:
        slot = state.slot
        oldest = jax.tree.map(lambda b: b.at[slot].get(mode="promise_in_bounds"), state.buffer)
        buffer = jax.tree.map(lambda b, g: b.at[slot].set(g), state.buffer, grads)
        return oldest, DelayState((slot + 1) % delay.steps, buffer)

    return _transformation(init, update)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DelayedGradients:
    """Family -> family. The optimizer is given the gradient of d steps ago, zeros before there is
    one; d is a uniform integer of `delay`.
    """

    family: TaskFamily
    delay: tuple[int, int] = dataclasses.field(default=(1, 8), metadata={"static": True})

    def __post_init__(self) -> None:
        check_counts("delay", self.delay)

    def __call__(self, key: Key) -> AugmentedTask:
        key_task, key_delay = jax.random.split(key)
        low, high = self.delay
        delay = Delay(jax.random.randint(key_delay, (), low, high + 1), longest=high)
        return AugmentedTask(self.family(key_task), delay, Change(gradients=delayed))


def normalized(drawn: None = None) -> optax.GradientTransformation:
    """Divides the gradient by its norm over all leaves; zero stays zero."""
    del drawn

    def update(grads: Gradients, state: Any) -> tuple[Gradients, Any]:
        # first by the largest entry, so that no square over- or underflows
        largest = jax.lax.stop_gradient(optax.tree.norm(grads, ord=jnp.inf))
        grads = jax.tree.map(lambda g: g / jnp.where(largest > 0, largest, 1.0), grads)
        square = optax.tree.norm(grads, squared=True)
        return optax.tree.scale(jax.lax.rsqrt(jnp.where(largest > 0, square, 1.0)), grads), state

    return _transformation(optax.init_empty_state, update)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormalizedGradients:
    """Family -> family. Gradients have a norm of 1 over all leaves; zero stays zero."""

    family: TaskFamily

    def __call__(self, key: Key) -> AugmentedTask:
        return AugmentedTask(self.family(key), None, Change(gradients=normalized))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Directions:
    key: Key
    count: jax.Array
    sign: bool = dataclasses.field(metadata={"static": True})


def along_directions(directions: Directions) -> optax.GradientTransformation:
    """Replaces g by the mean over `count` standard normal directions v of (g.v) v, whose
    expectation is g, or of sign(g.v) v, whose expectation is sqrt(2 / pi) g / |g|.
    """

    def project(key: Key, grads: Gradients) -> Gradients:
        def add(i: jax.Array, total: Gradients) -> Gradients:
            v = normal_like(jax.random.fold_in(key, i), grads)
            slope = optax.tree.vdot(grads, v)
            slope = jnp.sign(slope) if directions.sign else slope
            return optax.tree.add_scale(total, slope / directions.count, v)

        return jax.lax.fori_loop(0, directions.count, add, optax.tree.zeros_like(grads))

    def change(key: Key, grads: Gradients) -> Gradients:
        if directions.sign:
            return project(key, jax.lax.stop_gradient(grads))
        # The map is linear and its own transpose. Only in a linear solve can that be said such that
        # a loop whose length is drawn is differentiated in reverse, too.
        return jax.lax.custom_linear_solve(
            lambda x: x, grads, lambda _, g: project(key, g), symmetric=True
        )

    return _random(directions.key, change)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomDirections:
    """Family -> family, see `along_directions`; their number is log-uniform in `directions`.

    A step costs as many random numbers as params for every direction.
    """

    family: TaskFamily
    directions: tuple[int, int] = dataclasses.field(default=(1, 1024), metadata={"static": True})
    sign: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        check_counts("directions", self.directions)

    def __call__(self, key: Key) -> AugmentedTask:
        key_task, key_count, key_directions = jax.random.split(key, 3)
        count = log_uniform_count(key_count, self.directions)
        drawn = Directions(key_directions, count, self.sign)
        return AugmentedTask(self.family(key_task), drawn, Change(gradients=along_directions))


_FAMILY = ImageMLP(data=synthetic(), hidden=(4,), batch_size=16)
EXAMPLES = (
    ScaledGradients(_FAMILY),
    GradientNoise(_FAMILY, (0.01, 0.5)),
    DelayedGradients(_FAMILY, (1, 3)),
    NormalizedGradients(_FAMILY),
    RandomDirections(_FAMILY, (16, 32)),
)
