"""Inner problems whose answer is an optimum, whatever found it: theta are hyperparameters that move
it. Here the strengths of the penalties on a task's params.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from learned_opt.base import Theta
from tasks.base import Params, Task, TaskFamily

Key = jax.Array


@runtime_checkable
class Stationary(Protocol):
    """A loss to be minimised in x under theta, and another on which the minimum is judged. A
    pytree, vmappable over keys; the same key draws the same task and the same data in all three.
    """

    def solve(self, theta: Theta, key: Key) -> Params:
        """An x at which the derivative of `train_loss` in x is zero; never differentiated."""
        ...

    def train_loss(self, theta: Theta, x: Params, key: Key) -> jax.Array:
        """Scalar, twice differentiable in x."""
        ...

    def valid_loss(self, theta: Theta, x: Params, key: Key) -> jax.Array:
        """Scalar."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regularised:
    """Params that minimise the loss on one batch of the train split plus exp(theta_i) / 2 |p_i|^2
    for every leaf p_i, judged by the normalised loss on one batch of the validation split.

    The batch size is the family's; a large one is what it takes to be worth regularising for.

    Args:
      strength: exp(theta_i) to start from.
      iterations: of L-BFGS, at most.
      tolerance: norm of the gradient at which it stops. In float32 a tenth of the default may never
        be reached.
    """

    family: TaskFamily
    strength: float = dataclasses.field(default=1e-2, metadata={"static": True})
    iterations: int = dataclasses.field(default=200, metadata={"static": True})
    tolerance: float = dataclasses.field(default=1e-5, metadata={"static": True})

    def __post_init__(self):
        if self.iterations < 1:
            raise ValueError(f"`iterations` must be at least 1, got {self.iterations}")
        for name in ("strength", "tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")

    def init(self, key: Key) -> Theta:
        """A tree like the params, with the logarithm of `strength` for every leaf."""
        params = jax.eval_shape(lambda key: self.family(key).init(key), key)
        return jax.tree.map(lambda _: jnp.log(self.strength), params)

    def solve(self, theta: Theta, key: Key) -> Params:
        task, init_key, train_key, _ = self._draw(key)
        batch, optimizer = task.batch(train_key, "train"), optax.lbfgs()

        def loss(params):
            return _penalised(task, theta, params, batch)

        def unfinished(carry):
            count, norm = carry[2:]
            return (count < self.iterations) & (norm > self.tolerance)

        def step(carry):
            params, state, count, _ = carry
            value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
            updates, state = optimizer.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            norm = optax.tree.norm(optax.tree.get(state, "grad"))
            return optax.apply_updates(params, updates), state, count + 1, norm

        params = task.init(init_key)
        zero, far = jnp.zeros((), jnp.int32), jnp.full_like(loss(params), jnp.inf)
        return lax.while_loop(unfinished, step, (params, optimizer.init(params), zero, far))[0]

    def train_loss(self, theta: Theta, x: Params, key: Key) -> jax.Array:
        task, _, train_key, _ = self._draw(key)
        return _penalised(task, theta, x, task.batch(train_key, "train"))

    def valid_loss(self, theta: Theta, x: Params, key: Key) -> jax.Array:
        del theta  # the penalty is for training alone
        task, _, _, valid_key = self._draw(key)
        return task.normalize(task.loss(x, task.batch(valid_key, "valid")))

    def _draw(self, key: Key) -> tuple[Task, Key, Key, Key]:
        task_key, *keys = jax.random.split(key, 4)
        return self.family(task_key), *keys


def _penalised(task: Task, theta: Theta, params: Params, batch: Any) -> jax.Array:
    penalties = jax.tree.map(lambda t, p: jnp.exp(t) / 2 * jnp.sum(jnp.square(p)), theta, params)
    return task.loss(params, batch) + sum(jax.tree.leaves(penalties))
