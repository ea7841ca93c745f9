"""Losses that are smoothed by Gaussian noise, with gradients from evolution strategies: what an
optimizer meets that trains something else than by backpropagation.

An augmentation of VeLO (arXiv:2211.09760).
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
    Loss,
    at_least_float32,
    check_counts,
    check_range,
    log_uniform_count,
    normal_like,
)
from tasks.base import Batch, Key, Params, TaskFamily
from tasks.data import synthetic
from tasks.dynamic import log_uniform
from tasks.image_mlp import ImageMLP


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Smoothing:
    """`std` and `pairs` (scalars) of a task, and `most`, the number of pairs that are computed."""

    std: jax.Array
    pairs: jax.Array
    most: int = dataclasses.field(metadata={"static": True})


class NoisyBatch(NamedTuple):
    """A training batch, and the key of the noise: all randomness of a loss rides in its batch."""

    batch: Batch
    key: Key


def smoothed(
    loss: Callable[[Params], jax.Array], smoothing: Smoothing, key: Key
) -> Callable[[Params], jax.Array]:
    """`loss` averaged over antithetic pairs, (L(p + s e) + L(p - s e)) / 2 with e standard normal.

    Its derivative is the estimate of evolution strategies, the mean of (L(p + s e) - L(p - s e)) /
    (2 s) e, for which `loss` is only evaluated. The derivative of that, as in meta-gradients, is
    its true one, for which it is differentiated once.
    """

    def estimate(params: Params) -> tuple[jax.Array, Params]:
        def add(total: tuple[jax.Array, Params], i: jax.Array):
            value, gradient = total
            noise = normal_like(jax.random.fold_in(key, i), params)
            # a pair that does not count stays where it is, and so has a slope of 0
            share = jnp.where(i < smoothing.pairs, 1.0 / smoothing.pairs, 0.0)
            std = jnp.where(i < smoothing.pairs, smoothing.std, 0.0)
            along = lambda step: loss(optax.tree.add_scale(params, step, noise))  # noqa: E731
            plus, minus = jax.vmap(along)(jnp.stack([std, -std]))
            slope = share * (plus - minus) / (2 * smoothing.std)
            gradient = optax.tree.add_scale(gradient, slope, noise)
            return (value + share * (plus + minus) / 2, gradient), None

        start = (jnp.zeros(()), optax.tree.zeros_like(params))
        return jax.lax.scan(add, start, jnp.arange(smoothing.most))[0]

    @jax.custom_jvp
    def mean(params: Params) -> jax.Array:
        return estimate(at_least_float32(params))[0]

    @mean.defjvp
    def _(primals: tuple[Params], tangents: tuple[Params]) -> tuple[jax.Array, Any]:
        value, gradient = estimate(at_least_float32(primals[0]))
        return value, optax.tree.vdot(gradient, at_least_float32(tangents[0]))

    return mean


def _batch(smoothing: Smoothing, draw: Callable[[Key], Batch], key: Key) -> NoisyBatch:
    key_batch, key_noise = jax.random.split(key)
    return NoisyBatch(draw(key_batch), key_noise)


def _loss(smoothing: Smoothing, loss: Loss, params: Params, batch: Batch) -> jax.Array:
    if not isinstance(batch, NoisyBatch):
        return loss(params, batch)
    return smoothed(lambda p: loss(p, batch.batch), smoothing, batch.key)(params)


def _wrapped_batch(batch: Batch) -> Batch:
    return batch.batch if isinstance(batch, NoisyBatch) else batch


SMOOTHED = Change(batch=_batch, loss=_loss, wrapped_batch=_wrapped_batch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ESLoss:
    """Family -> family. Training losses are `smoothed`, those of the other splits are not.

    Args:
      std: range of the deviation of the noise, which is log-uniform.
      pairs: range of the number of antithetic pairs, which is log-uniform; the largest is what is
        computed.
    """

    family: TaskFamily
    std: tuple[float, float] = dataclasses.field(default=(1e-3, 0.1), metadata={"static": True})
    pairs: tuple[int, int] = dataclasses.field(default=(1, 16), metadata={"static": True})

    def __post_init__(self) -> None:
        check_range("std", self.std)
        check_counts("pairs", self.pairs)

    def __call__(self, key: Key) -> AugmentedTask:
        key_task, key_std, key_pairs = jax.random.split(key, 3)
        std, pairs = log_uniform(key_std, self.std), log_uniform_count(key_pairs, self.pairs)
        drawn = Smoothing(jnp.asarray(std), pairs, self.pairs[1])
        return AugmentedTask(self.family(key_task), drawn, SMOOTHED)


EXAMPLES = (
    ESLoss(ImageMLP(data=synthetic(), hidden=(4,), batch_size=16), std=(0.01, 0.1), pairs=(8, 16)),
)
