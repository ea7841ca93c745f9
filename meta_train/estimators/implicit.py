"""Implicit differentiation of an optimum: by the implicit function theorem the gradient needs the
optimum alone, not the way to it. With conjugate gradients: arXiv 1602.02355; with the Neumann
series: arXiv 1911.02590.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
from jax import lax

from learned_opt.base import Theta
from meta_train.estimators import base
from meta_train.stationary import Stationary

SOLVERS = ("cg", "neumann")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImplicitDifferentiation:
    """Exact gradient of the validation loss V at the optimum x of the training loss L:

      dV/dtheta - (dV/dx) (d2L/dx2 + damping)^-1 d2L/dx dtheta

    For hyperparameters that move the optimum, such as penalties and the weights of losses. The
    theta of an update rule does not: there this gradient is zero, and such a problem is refused.

    `info` tells what exactness hangs on: `slope`, the norm of dL/dx where the problem's solver
    stopped, and `residual`, that of the linear solve relative to its right side.

    Args:
      solver: "cg", conjugate gradients, for a positive definite Hessian; or "neumann", the series
        step * sum_i (1 - step * Hessian)^i, whose cut at `iterations` regularises.
      iterations: Hessian-vector products of the solver, at most.
      damping: added to the Hessian's diagonal, where it is singular or not positive.
      step: of the Neumann series; it diverges unless below 2 / the Hessian's largest eigenvalue.

    Raises:
      TypeError: the problem is not `Stationary`.
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = False
    requires: ClassVar[type] = Stationary
    problem: Any = base.UNBOUND
    particles: int = base.static(16)
    solver: Literal["cg", "neumann"] = base.static("cg")
    iterations: int = base.static(100)
    damping: float = base.static(0.0)
    step: float = base.static(0.1)
    first_particle: int | jax.Array = 0

    def __post_init__(self):
        base.check_particles(self)
        if self.solver not in SOLVERS:
            raise ValueError(f"`solver` must be one of {SOLVERS}, got {self.solver!r}")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"`iterations` must be an integer from 1 up, got {self.iterations!r}")
        if not self.damping >= 0:
            raise ValueError(f"`damping` must be at least 0, got {self.damping}")
        if not self.step > 0:
            raise ValueError(f"`step` must be positive, got {self.step}")
        # jax rebuilds pytrees with placeholders, which have no methods at all
        if hasattr(self.problem, "unroll") and not isinstance(self.problem, Stationary):
            raise TypeError(
                "`problem` must be `Stationary` (solve, train_loss, valid_loss), got "
                f"{type(self.problem).__name__}: the optimum does not depend on the optimizer that "
                "finds it, so the implicit gradient of an update rule is zero; choose an estimator "
                "that unrolls, such as NRES or FullBPTT"
            )

    @property
    def unrolls(self) -> int:
        return 0

    def init(self, theta: Theta, key: base.Key) -> None:
        return None

    def estimate(self, theta: Theta, state: None, key: base.Key) -> tuple[base.Estimate, None]:
        problem: Stationary = self.problem

        def particle(key):
            x = lax.stop_gradient(problem.solve(theta, key))
            value, (direct, pull) = jax.value_and_grad(problem.valid_loss, argnums=(0, 1))(
                theta, x, key
            )

            def derivative(theta, x):
                return jax.grad(problem.train_loss, argnums=1)(theta, x, key)

            slope, product = jax.linearize(lambda x: derivative(theta, x), x)

            def hessian(v):
                return base.add_scaled(product(v), self.damping, v)

            inverse = self.invert(hessian, pull)
            (moved,) = jax.vjp(lambda theta: derivative(theta, x), theta)[1](inverse)
            grad = base.add_scaled(direct, -1.0, moved)
            missed = norm(base.add_scaled(hessian(inverse), -1.0, pull))
            info = {
                "diverged": 1.0 - jnp.isfinite(norm(x)),
                "slope": norm(slope),
                "residual": missed / jnp.maximum(norm(pull), jnp.finfo(missed.dtype).tiny),
            }
            return base.Estimate(grad, value, info)

        return base.mean_estimate(base.over_particles(self, particle, key)), state

    def invert(self, hessian: Callable, pull: Any) -> Any:
        """hessian^-1 pull, a tree like the params."""
        if self.solver == "cg":
            precision = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(pull))).eps)
            solve = jax.scipy.sparse.linalg.cg
            return solve(hessian, pull, tol=precision, maxiter=self.iterations)[0]

        def term(_, sum_so_far):
            rest = base.add_scaled(pull, -1.0, hessian(sum_so_far))
            return base.add_scaled(sum_so_far, self.step, rest)

        return lax.fori_loop(0, self.iterations, term, jax.tree.map(jnp.zeros_like, pull))


def norm(tree: Any) -> jax.Array:
    """Euclidean, over all leaves."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


EXAMPLES = (ImplicitDifferentiation(particles=4),)
