"""Several composite tasks of a family solved side by side as one, whose params are theirs stacked:
what a rule does with a coordinate is then one product over the coordinates of all of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from tasks.base import Batch, Key, Split, TaskFamily, relative_loss
from tasks.composite import Composite
from tasks.convex import Lasso
from tasks.data import unknown_name
from tasks.fields import positive_integers

Merit = Literal["value", "gap"]
DIGITS = 6  # to which float32 tells F from F*
RESTARTED = (1 + 5**0.5) / 2  # FISTA's t after its first step
ITERATIONS = 300  # that bring most problems to these digits


def _value(task: Composite, x: jax.Array, least: jax.Array) -> jax.Array:
    return task.normalize(task.loss(x, ()))


def _gap(task: Composite, x: jax.Array, least: jax.Array) -> jax.Array:
    start = task.loss(task.init(jax.random.key(0)), ())
    gap = jnp.maximum(task.loss(x, ()) - least, 0) / start
    return 1 + jnp.log10(gap + 10.0**-DIGITS) / DIGITS


# (task, params [N], F* if it is known) -> scalar, about 1 at 0 and 0 at the minimiser
MERITS: dict[str, Callable[[Composite, jax.Array, jax.Array], jax.Array]] = {
    "value": _value,
    "gap": _gap,
}


def least_value(task: Composite) -> jax.Array:
    """The least F that `ITERATIONS` steps of FISTA come by, restarted where they go uphill."""

    def step(_: Any, carry: tuple) -> tuple:
        x, y, t, least = carry
        size = 1 / task.lipschitz
        new = task.penalty.prox(y - size * jax.grad(task.smooth)(y, ()), size)
        uphill = jnp.sum((y - new) * (new - x)) > 0
        after = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        momentum = jnp.where(uphill, 0, (t - 1) / after)
        least = jnp.minimum(least, task.loss(new, ()))
        return new, new + momentum * (new - x), jnp.where(uphill, RESTARTED, after), least

    x = task.init(jax.random.key(0))
    return jax.lax.fori_loop(0, ITERATIONS, step, (x, x, jnp.ones_like(x[0]), task.loss(x, ())))[3]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problems:
    """Composite tasks of one shape, stacked: params [P, N].

    The loss is the mean of their merits, see `SideBySide`. `smooth` and `penalty` are sums, so that
    the gradient of each is its own, and `lipschitz` is [P, 1]: proximal rules take axes of size 1
    for separate problems.
    """

    stacked: Composite  # a leading axis on every leaf
    least: jax.Array  # [P] F*, where the merit needs it
    merit: Merit = dataclasses.field(default="value", metadata={"static": True})

    def init(self, key: Key) -> jax.Array:
        return jax.vmap(lambda task: task.init(key))(self.stacked)

    def batch(self, key: Key, split: Split) -> tuple[()]:
        return ()

    def smooth(self, params: jax.Array, batch: Batch) -> jax.Array:
        return jnp.sum(jax.vmap(lambda task, x: task.smooth(x, batch))(self.stacked, params))

    def loss(self, params: jax.Array, batch: Batch) -> jax.Array:
        return jnp.mean(jax.vmap(MERITS[self.merit])(self.stacked, params, self.least))

    def extra_args(self, batch: Batch) -> dict[str, Any]:
        def prox(v: jax.Array, step: jax.Array) -> jax.Array:
            step = jnp.broadcast_to(step, v.shape)
            return jax.vmap(lambda penalty, v, s: penalty.prox(v, s))(self.stacked.penalty, v, step)

        def penalty(x: jax.Array) -> jax.Array:
            return jnp.sum(jax.vmap(lambda penalty, x: penalty.value(x))(self.stacked.penalty, x))

        return {
            "prox": prox,
            "penalty": penalty,
            "lipschitz": self.stacked.lipschitz[:, None],
            "gradient": lambda x: jax.grad(self.smooth)(x, batch),
        }

    def normalize(self, loss: jax.Array) -> jax.Array:
        return relative_loss(loss, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SideBySide:
    """`count` tasks of a family of composite ones, such as `lasso`.

    Args:
      merit: what their loss is: "value", F relative to F(0), which is won in the first steps; or
        "gap", log10((F - F*) / F(0) + 1e-6), scaled to 1 at 0 and 0 at the minimiser: each digit
        counts the same. F* is what 300 steps of restarted FISTA find.
    """

    family: TaskFamily
    count: int = dataclasses.field(default=8, metadata={"static": True})
    merit: Merit = dataclasses.field(default="value", metadata={"static": True})

    def __post_init__(self) -> None:
        positive_integers(self, "count")
        if self.merit not in MERITS:
            raise ValueError(unknown_name("merit", self.merit, MERITS))

    def __call__(self, key: Key) -> Problems:
        stacked: Any = jax.vmap(self.family)(jax.random.split(key, self.count))
        if not isinstance(stacked, Composite):
            raise TypeError(f"`family` must make composite tasks, got {type(stacked).__name__}")
        least = jnp.zeros_like(stacked.lipschitz)
        if self.merit == "gap":
            least = jax.vmap(least_value)(stacked)
        return Problems(stacked, least, self.merit)


EXAMPLES = (SideBySide(Lasso(rows=8, columns=12, density=0.3), count=3),)
