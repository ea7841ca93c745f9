"""What can be trained. A task is an initialiser, a stream of batches and a loss; a family is a
distribution over tasks.

Tasks are pytrees (`jax.tree_util.register_dataclass`): arrays such as datasets are leaves and
travel to jitted functions as arguments, everything that decides a shape is a static field.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from tasks import stream

Key = jax.Array
Params = Any
Batch = Any
Split = Literal["train", "valid", "test"]


@runtime_checkable
class Task(Protocol):
    """One thing to train. All randomness of the loss rides in the batch, so `loss` is
    deterministic.

    A task whose optimizer needs more than the loss gradient may also define `smooth(params,
    batch)`, the part of the loss that is differentiated, and `extra_args(batch)`, keywords merged
    into the optimizer's `update`. One that alters its gradients has `gradients`, the optax
    transformation that stands before every optimizer, see `behind`. Other tasks define none.
    """

    def init(self, key: Key) -> Params: ...

    def batch(self, key: Key, split: Split) -> Batch: ...

    def loss(self, params: Params, batch: Batch) -> jax.Array: ...

    def normalize(self, loss: jax.Array) -> jax.Array:
        """Loss on a scale shared by all tasks: 1 untrained, 0 perfect, in [0, 2], 2 for NaN and
        infinity.
        """
        ...


TaskFamily = Callable[[Key], Task]


def classes(tree: Any) -> tuple:
    """The classes of a dataclass and of all dataclasses in it, hashable.

    jax (0.10) takes registered dataclasses of equal fields for equal, whatever their classes, and
    may run one's program for the other: what is jitted for any family must be told apart by this.
    """
    if not dataclasses.is_dataclass(tree):
        return ()
    inner = [classes(getattr(tree, field.name)) for field in dataclasses.fields(tree)]
    return type(tree), *inner


def streams(task: Any) -> bool:
    """Whether data of the task stay on the host, see `tasks.stream`."""
    return bool(stream.host_arrays(task))


def scan_steps(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    task: Task,
    draw: Callable[[Task, Key], Any],
    keys: Key,
    remat: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `step(carry, draw(task, key))` over keys [K]: `draw` gives the batches of a
    step. Those of a task that streams come to the device many steps at a time.

    Args:
      remat: keep only the carries for backpropagation (and of a task that streams, its rows).
    """
    if streams(task):
        return stream.scan_blocks(step, carry, task, draw, keys, remat)

    def body(carry: Any, key: Key) -> tuple[Any, Any]:
        return step(carry, draw(task, key))

    return jax.lax.scan(jax.checkpoint(body) if remat else body, carry, keys)


def relative_loss(loss: jax.Array, untrained: float | jax.Array) -> jax.Array:
    """`loss / untrained` clipped to [0, 2], with 2 for NaN and infinity: the usual
    `Task.normalize`.

    `untrained` is the positive loss that a model knows how to reach without training, e.g.
    log(classes).
    """
    ratio = loss / untrained
    return jnp.clip(jnp.where(jnp.isfinite(ratio), ratio, 2.0), 0.0, 2.0)


def behind(task: Task, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, given what the task makes of its gradients: what trains a task in all places."""
    gradients = getattr(task, "gradients", None)
    return optimizer if gradients is None else optax.chain(gradients, optimizer)


def train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: optax.OptState,
    batch: Batch,
) -> tuple[Params, optax.OptState, jax.Array]:
    """One inner training step, the only one: meta-training, evaluation and the examples share it.
    `optimizer` is `behind` the task.

    Returns:
      The new params, the new optimizer state, and the loss (scalar) on `batch` before the step,
      which the optimizer also receives as optax's keyword `value=`.
    """
    smooth = getattr(task, "smooth", None)
    if smooth is None:
        value, grads = jax.value_and_grad(task.loss)(params, batch)
    else:
        value, grads = task.loss(params, batch), jax.grad(smooth)(params, batch)
    extra_args = getattr(task, "extra_args", lambda batch: {})(batch)
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(grads, opt_state, params, value=value, **extra_args)
    return optax.apply_updates(params, updates), opt_state, value
