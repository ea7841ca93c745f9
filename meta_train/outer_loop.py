"""The outer loop: estimate a meta-gradient, take an optax step on theta, log, checkpoint; a
for-loop to read and to copy.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt.base import LearnedOptimizer, Theta
from meta_train import interrupts
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.base import Estimate, GradientEstimator

Key = jax.Array


class MetaState(NamedTuple):
    """Everything a run is: the whole checkpoint, one pytree."""

    theta: Theta
    opt_state: optax.OptState
    estimator_state: Any
    key: Key
    step: int


def outer_optimizer(
    learning_rate: float, steps: int, clip: float = 1.0, warmup: int = 0
) -> optax.GradientTransformation:
    """Adam behind global-norm clipping; linear warm-up, then cosine decay to a tenth over
    `steps`.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=0.1 * learning_rate,
    )
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))


def start(
    rule: LearnedOptimizer,
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    seed: int,
    theta: Theta | None = None,
) -> MetaState:
    """The state before the first step: from `theta`, or from the rule's own start."""
    init_key, particle_key, key = jax.random.split(jax.random.key(seed), 3)
    # strongly typed, as after a step: otherwise the second step would be another program
    given = rule.init(init_key) if theta is None else theta
    first = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), given)
    return MetaState(first, optimizer.init(first), estimator.init(first, particle_key), key, 0)


def burn_in(
    estimator: GradientEstimator,
    state: MetaState,
    estimates: int,
    on_estimate: Callable[[], None] = lambda: None,
) -> MetaState:
    """The state before the first step after `estimates` estimates that are thrown away.

    Theta stays as it is; the particles go on. About horizon / truncation estimates bring all of
    them into running episodes, out of phase. `on_estimate()` is called after each, for progress.
    """
    particles = state.estimator_state
    for i in range(estimates):
        # numbers that no outer step has: their keys count up from 0
        key = jax.random.fold_in(state.key, 2**32 - 1 - i)
        _, particles = estimator.estimate(state.theta, particles, key)
        on_estimate()
    return state._replace(estimator_state=particles)


@functools.partial(jax.jit, static_argnums=0)
def outer_step(
    optimizer: optax.GradientTransformation, theta: Theta, opt_state: Any, grad: Theta
) -> tuple[Theta, Any, jax.Array]:
    """Theta after one step, with non-finite gradient entries taken as zero; and the gradient's
    norm.
    """
    grad = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), grad)
    updates, opt_state = optimizer.update(grad, opt_state, theta)
    return optax.apply_updates(theta, updates), opt_state, optax.tree.norm(grad)


def meta_train(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    state: MetaState,
    steps: int,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 100,
    on_step: Callable[[int, Estimate, jax.Array, Theta], None] = lambda *_: None,
) -> MetaState:
    """Runs until `steps` outer steps are done and returns the final state, checkpointed.

    The randomness of a step depends on the step alone, so a run that is resumed from a checkpoint
    ends bit-equal to one that was never stopped. `on_step(step, estimate, gradient_norm, theta)` is
    called after each step with the theta that it led to, for logs, progress and snapshots. On
    KeyboardInterrupt the last complete step is checkpointed before the interrupt goes on.
    """
    try:
        for step in range(int(state.step), steps):
            estimate, estimator_state = estimator.estimate(
                state.theta, state.estimator_state, jax.random.fold_in(state.key, step)
            )
            theta, opt_state, norm = outer_step(
                optimizer, state.theta, state.opt_state, estimate.grad
            )
            # before the step counts: what is checkpointed has been logged
            on_step(step, estimate, norm, theta)
            state = MetaState(theta, opt_state, estimator_state, state.key, step + 1)
            if checkpoints and (step + 1) % checkpoint_every == 0:
                with interrupts.deferred():
                    checkpoints.save(step + 1, state)
    finally:
        if checkpoints:
            with interrupts.deferred():
                checkpoints.save(int(state.step), state)
    return state
