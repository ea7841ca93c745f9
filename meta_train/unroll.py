"""The inner problem: training a sampled task with the rule, a truncation at a time."""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from learned_opt.base import LearnedOptimizer, Theta
from tasks.base import TaskFamily, train_step

Key = jax.Array
State = Any


class Rollout(NamedTuple):
    """What an unroll shows: `losses` [K] by inner step, `done` (bool) if the episode ended with the
    last of them.
    """

    losses: jax.Array
    done: jax.Array


class InnerProblem(Protocol):
    """A dynamical system that theta steers: all that an estimator ever sees. A pytree, vmappable
    over keys and states.

    `windows` is the largest number of unrolls in an episode.
    """

    @property
    def windows(self) -> int: ...

    def reset(self, theta: Theta, key: Key, first: bool | jax.Array = False) -> State:
        """The start of an episode. A `first` episode may be cut short, so that particles get out of
        phase.
        """
        ...

    def unroll(self, theta: Theta, state: State, key: Key) -> tuple[Rollout, State]:
        """The next K steps. What it returns for a state whose episode is done is discarded."""
        ...


class TrainingState(NamedTuple):
    """One run of a task: the key that rebuilds the task, its params, the optimizer's state, and
    where the run stands.

    The episode ends at step `end`, of a run planned for `horizon` steps.
    """

    task: jax.Array
    params: Any
    opt_state: Any
    step: jax.Array
    end: jax.Array
    horizon: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Training:
    """Trains tasks of `family` with `rule`, `truncation` steps at a time; losses are normalised
    training losses.

    `horizon` is the number of steps of an episode, or a range (low, high) from which it is drawn
    log-uniformly; always a multiple of `truncation`, so that episodes end between truncations.
    """

    family: TaskFamily
    rule: LearnedOptimizer = dataclasses.field(metadata={"static": True})
    horizon: int | tuple[int, int] = dataclasses.field(metadata={"static": True})
    truncation: int = dataclasses.field(metadata={"static": True})
    remat: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        if self.truncation < 1:
            raise ValueError(f"`truncation` must be at least 1, got {self.truncation}")
        low, high = self.range
        for horizon in (low, high):
            if horizon < self.truncation or horizon % self.truncation:
                raise ValueError(
                    "`horizon` must be a multiple of `truncation`, "
                    f"got {horizon} and {self.truncation}"
                )
        if low > high:
            raise ValueError(f"`horizon` must be a range (low, high), got {self.horizon}")

    @property
    def range(self) -> tuple[int, int]:
        return self.horizon if isinstance(self.horizon, tuple) else (self.horizon, self.horizon)

    @property
    def windows(self) -> int:
        """Truncations in the longest episode."""
        return self.range[1] // self.truncation

    def reset(self, theta: Theta, key: Key, first: bool | jax.Array = False) -> TrainingState:
        task_key, init_key, horizon_key, phase_key = jax.random.split(key, 4)
        low, high = (n // self.truncation for n in self.range)
        # floor of a log-uniform variable on [low, high + 1): every multiple has its share
        log = jax.random.uniform(horizon_key, minval=np.log(low), maxval=np.log(high + 1))
        windows = jnp.clip(jnp.exp(log).astype(jnp.int32), low, high)
        end = jnp.where(first, jax.random.randint(phase_key, (), 1, windows + 1), windows)
        horizon = windows * self.truncation
        params = self.family(task_key).init(init_key)
        return TrainingState(
            task=jax.random.key_data(task_key),
            params=params,
            opt_state=self.rule.optimizer(theta, horizon).init(params),
            step=jnp.zeros((), jnp.int32),
            end=end * self.truncation,
            horizon=horizon,
        )

    def unroll(self, theta: Theta, state: TrainingState, key: Key) -> tuple[Rollout, TrainingState]:
        task = self.family(jax.random.wrap_key_data(state.task))
        optimizer = self.rule.optimizer(theta, state.horizon)

        def step(carry, key):
            batch = task.batch(key, "train")
            params, opt_state, loss = train_step(task, optimizer, carry[0], carry[1], batch)
            return (params, opt_state), task.normalize(loss)

        body = jax.checkpoint(step) if self.remat else step
        (params, opt_state), losses = lax.scan(
            body, (state.params, state.opt_state), jax.random.split(key, self.truncation)
        )
        count = state.step + self.truncation
        state = state._replace(params=params, opt_state=opt_state, step=count)
        return Rollout(losses, count >= state.end), state


def episode_loss(
    problem: InnerProblem, theta: Theta, key: Key, objective: Literal["mean", "final"] = "mean"
) -> jax.Array:
    """Loss of one whole episode from its reset: the mean over its steps, or the last step's.

    Each window is rematerialised when differentiated, so memory holds one state per window and one
    window's steps.
    """
    reset_key, unroll_key = jax.random.split(key)

    @jax.checkpoint
    def window(carry, key):
        state, done, loss = carry
        rollout, new = problem.unroll(theta, state, key)
        seen = jnp.sum(rollout.losses) if objective == "mean" else rollout.losses[-1]
        loss = jnp.where(done, loss, loss + seen if objective == "mean" else seen)
        steps = jnp.where(done, 0, len(rollout.losses))
        state = jax.tree.map(lambda old, fresh: jnp.where(done, old, fresh), state, new)
        return (state, done | rollout.done, loss), steps

    start = (problem.reset(theta, reset_key), jnp.zeros((), bool), jnp.zeros(()))
    (_, _, loss), steps = lax.scan(window, start, jax.random.split(unroll_key, problem.windows))
    return loss / jnp.sum(steps) if objective == "mean" else loss
