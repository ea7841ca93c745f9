"""The inner problem: training a sampled task with the rule, a truncation at a time."""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax

from learned_opt.base import LearnedOptimizer, Theta
from tasks.base import TaskFamily, behind, scan_steps, train_step

Key = jax.Array
State = Any
Objective = Literal["mean", "late", "final", "mean_valid", "final_valid"]


class Rollout(NamedTuple):
    """What an unroll shows: `losses` [K] by inner step, whose mean over an episode is its loss;
    `done` (bool) if the episode ended with the last of them; `diverged` (bool) if the run was lost.
    """

    losses: jax.Array
    done: jax.Array
    diverged: bool | jax.Array = False


class InnerProblem(Protocol):
    """A dynamical system that theta steers: all that an estimator ever sees. A pytree, vmappable
    over keys and states.

    `windows` is the largest number of unrolls in an episode.
    """

    @property
    def windows(self) -> int: ...

    def reset(
        self, theta: Theta, key: Key, episode: int | jax.Array = 0, stagger: bool = False
    ) -> State:
        """The start of an episode, the `episode`-th of its particle, which a curriculum may look
        at. If `stagger`, episode 0 may be cut short, so that particles get out of phase.
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
    """Trains tasks of `family` with `rule`, `truncation` steps at a time; losses are normalised.

    Args:
      horizon: the number of steps of an episode, or a range (low, high) from which it is drawn
        log-uniformly; always a multiple of `truncation`, so that episodes end between truncations.
      remat: keep only the inner state of every step for backpropagation.
      objective: what an episode's loss is: the "mean" over its steps of the training loss, on the
        batch of the step and before it; this mean with weights that grow from 0 to 2, "late"; the
        "final" one of these, at the horizon; or of the loss on a batch of the validation split
        after the step, "mean_valid" and "final_valid".
      curriculum: number of a particle's episodes over which the upper end of the horizon's range
        grows, geometrically, from low to high.
    """

    family: TaskFamily
    rule: LearnedOptimizer = dataclasses.field(metadata={"static": True})
    horizon: int | tuple[int, int] = dataclasses.field(metadata={"static": True})
    truncation: int = dataclasses.field(metadata={"static": True})
    remat: bool = dataclasses.field(default=False, metadata={"static": True})
    objective: Objective = dataclasses.field(default="mean", metadata={"static": True})
    curriculum: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self):
        if self.objective not in typing.get_args(Objective):
            known = ", ".join(map(repr, typing.get_args(Objective)))
            raise ValueError(f"`objective` must be one of {known}, got {self.objective!r}")
        if self.curriculum < 0:
            raise ValueError(f"`curriculum` must be at least 0, got {self.curriculum}")
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

    def reset(
        self, theta: Theta, key: Key, episode: int | jax.Array = 0, stagger: bool = False
    ) -> TrainingState:
        task_key, init_key, horizon_key = jax.random.split(key, 3)
        low, high = (n // self.truncation for n in self.range)
        if self.curriculum:
            grown = jnp.minimum(episode / self.curriculum, 1.0)
            high = jnp.floor(low * (high / low) ** grown + 1e-4)
        length, phase = jax.random.uniform(horizon_key, (2,))
        # floor of a log-uniform variable on [low, high + 1): every multiple has its share
        windows = jnp.floor(low * ((high + 1) / low) ** length)
        windows = jnp.clip(windows, low, high).astype(jnp.int32)
        end = windows
        if stagger:
            cut = 1 + jnp.floor(windows * phase).astype(jnp.int32)
            end = jnp.where(jnp.equal(episode, 0), cut, windows)
        horizon = windows * self.truncation
        task = self.family(task_key)
        params = task.init(init_key)
        return TrainingState(
            task=jax.random.key_data(task_key),
            params=params,
            opt_state=behind(task, self.rule.optimizer(theta, horizon)).init(params),
            step=jnp.zeros((), jnp.int32),
            end=end * self.truncation,
            horizon=horizon,
        )

    def unroll(self, theta: Theta, state: TrainingState, key: Key) -> tuple[Rollout, TrainingState]:
        task = self.family(jax.random.wrap_key_data(state.task))
        optimizer = behind(task, self.rule.optimizer(theta, state.horizon))

        def draw(task, key):
            valid = self.objective == "mean_valid"
            held_out = task.batch(jax.random.fold_in(key, 1), "valid") if valid else None
            return task.batch(key, "train"), held_out

        def step(carry, batches):
            batch, held_out = batches
            params, opt_state, loss = train_step(task, optimizer, carry[0], carry[1], batch)
            if held_out is not None:
                loss = task.loss(params, held_out)
            return (params, opt_state), task.normalize(loss)

        keys = jax.random.split(key, self.truncation)
        carry = state.params, state.opt_state
        (params, opt_state), losses = scan_steps(step, carry, task, draw, keys, self.remat)
        count, last = state.step + self.truncation, losses[-1]
        if self.objective == "late":
            done = state.step + jnp.arange(self.truncation) + 0.5
            losses = losses * (2.0 * done / state.horizon)
        if self.objective in ("final", "final_valid"):
            if self.objective == "final_valid":
                batch = task.batch(jax.random.fold_in(keys[-1], 1), "valid")
                last = task.normalize(task.loss(params, batch))
            # the mean over the episode is the last loss; one that is cut short has none
            final = jnp.where(count == state.horizon, state.horizon * last, 0.0)
            losses = jnp.zeros_like(losses).at[-1].set(final)
        state = state._replace(params=params, opt_state=opt_state, step=count)
        # normalised losses are 2 for what is lost
        return Rollout(losses, count >= state.end, last >= 2.0), state

    def descend(
        self, theta: Theta, state: TrainingState, key: Key, learning_rate: float
    ) -> TrainingState:
        """The state after one step of plain gradient descent on the task's training loss, whatever
        the rule: the last step to a target of `estimators.bmg`.
        """
        del theta  # the loss of a task does not depend on it
        task = self.family(jax.random.wrap_key_data(state.task))
        optimizer = optax.sgd(learning_rate)
        batch = task.batch(key, "train")
        opt_state = optimizer.init(state.params)
        params, _, _ = train_step(task, optimizer, state.params, opt_state, batch)
        return state._replace(params=params)

    def distance(self, target: TrainingState, state: TrainingState) -> jax.Array:
        """Squared Euclidean distance of the params (scalar): where `estimators.bmg` descends."""
        difference = optax.tree.sub(target.params, state.params)
        return optax.tree.norm(difference, squared=True)


# (step, carry, keys [windows]) -> the carry after step(carry, key) for each key
Walk = Callable[[Callable[[Any, Key], Any], Any, jax.Array], Any]


def in_a_row(step: Callable[[Any, Key], Any], carry: Any, keys: jax.Array) -> Any:
    """Each window is rematerialised when differentiated, so memory holds one state per window and
    one window's steps.
    """
    body = jax.checkpoint(lambda carry, key: (step(carry, key), None))
    return lax.scan(body, carry, keys)[0]


def episode_loss(
    problem: InnerProblem,
    theta: Theta,
    key: Key,
    episode: int | jax.Array = 0,
    walk: Walk = in_a_row,
) -> tuple[jax.Array, jax.Array]:
    """Mean loss of one whole episode from its reset, and whether the run was lost in any window."""
    reset_key, unroll_key = jax.random.split(key)

    def window(carry, key):
        state, done, diverged, loss, steps = carry
        rollout, new = problem.unroll(theta, state, key)
        return (
            jax.tree.map(lambda old, fresh: jnp.where(done, old, fresh), state, new),
            done | rollout.done,
            diverged | (~done & rollout.diverged),
            jnp.where(done, loss, loss + jnp.sum(rollout.losses)),
            jnp.where(done, steps, steps + len(rollout.losses)),
        )

    no = jnp.zeros((), bool)
    state = problem.reset(theta, reset_key, episode)
    start = (state, no, no, jnp.zeros(()), jnp.zeros((), jnp.int32))
    _, _, diverged, loss, steps = walk(window, start, jax.random.split(unroll_key, problem.windows))
    return loss / steps, diverged
