"""A safeguard around any structured rule, in the manner of Safe-L2O (arXiv 2003.01880): where the
rule does not get on, an accelerated proximal method does its work for a while. What comes out
converges, whatever the rule does.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, fields
from learned_opt.bounded import BoundedLSTM
from learned_opt.proximal import RESTARTED, at_least_float32, following, like, owned, told
from learned_opt.structured import StructuredLSTM

ROUNDING = 16.0  # units of it, in which sums of a loss may differ


class SafeguardState(NamedTuple):
    """`x`, like the params, is the proximal step from the best point so far, the solution;
    `residual` the length of that step, `value` F at that point, if it is told, and `forced` whether
    the next point is the new best one whatever it is. `inner` is the rule's state, which acts while
    `left`, of `lent` steps that are not its own, is 0. `waited` counts the steps since the best
    point was visited. `previous` and `clock` are FISTA's.
    """

    x: Any
    residual: jax.Array
    value: jax.Array
    forced: jax.Array
    inner: Any
    left: jax.Array
    lent: jax.Array
    waited: jax.Array
    previous: Any
    clock: jax.Array


@dataclasses.dataclass(frozen=True)
class Safeguarded:
    """`rule`, watched. Let T(y) = prox(y - g(y) / L, 1 / L), with a step of 0.9999 / L, and
    R(y) = |y - T(y)|, which costs no gradient more than the rule's own. A point y that was visited
    becomes the best one, w, if

        R(y) <= (1 - decrease) R(w)

    and, where the loss is told as `value`, F(y) <= F(w) but for rounding.

    After `patience` steps of the rule without one, or when a residual is not finite or above
    `blow_up` R(w), or when the next point would be further from T(w) than `reach` R(w), the next
    point is T(w), which is accepted whatever it is; and the following steps are FISTA's, restarted
    where they go uphill: `first_loan` of them the first time, then twice as many as before. Points
    that these visit are judged alike.

    What is proved, for every rule, theta and input, f convex with an L-Lipschitz gradient, r closed
    and convex, F with a minimiser, in exact arithmetic: w converges to a minimiser. T is an
    averaged operator whose fixed points are the minimisers, so R(T(w)) <= R(w), and residuals of
    best points do not increase. After each best point there is another, after finitely many steps.
    If infinitely many pass the test, R(w) -> 0 geometrically in their number; else all but finitely
    many are T(w), the iteration of an averaged operator, for which R(w) -> 0, too. From a point
    that passes to the one before it is at most (reach + 1) R(w), which is a summable sequence, and
    T(w) is no further from any minimiser than w; so w is quasi-Fejer monotone, thus bounded, and as
    R is continuous it converges to a fixed point of T. No rate is proved but that of the averaged
    iteration when the test passes no more.

    Where `value` is F itself at the params (of a penalty that is finite everywhere), F(x) is never
    above F at the start; the params, which are extrapolated, may be. That it is faster than FISTA
    is only measured.

    For one problem, `lipschitz` one number; under vmap for more. Needs `prox` and `lipschitz`, and
    what the rule needs. theta is the rule's.

    Args:
      rule: one that takes `prox` and `lipschitz`, such as `bounded_lstm`.
    """

    rule: base.LearnedOptimizer
    patience: int = 40
    decrease: float = 0.01
    reach: float = 1e4
    blow_up: float = 1e3
    first_loan: int = 20

    def __post_init__(self):
        if not isinstance(self.rule, base.LearnedOptimizer) or isinstance(self.rule, type):
            raise TypeError(f"`rule` must be a learned optimizer, got {self.rule!r}")
        for name in ("patience", "first_loan"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"`{name}` must be an integer of at least 1, got {getattr(self, name)!r}"
                )
        fields.positive(self, "reach", "blow_up")
        if not self.reach < math.inf:
            raise ValueError("`reach` must be finite, or nothing is proved, got inf")
        if not 0 < self.decrease < 1:
            raise ValueError(f"`decrease` must be between 0 and 1, got {self.decrease}")

    def init(self, key: base.Key) -> base.Theta:
        return self.rule.init(key)

    def _value(self, extra_args: dict[str, Any], before: jax.Array) -> jax.Array:
        """The loss if it is told, else that of before, which is not above itself."""
        if extra_args.get("value") is None:
            return before
        base.require_value(self, extra_args)  # which checks it; the params may have more digits
        value = jnp.asarray(extra_args["value"], before.dtype)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        base.check_theta(self, theta)
        rule = optax.with_extra_args_support(self.rule.optimizer(theta, horizon))

        def init(params: base.Params) -> SafeguardState:
            inner = rule.init(params)  # which checks them
            dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
            none = functools.partial(jnp.zeros, (), jnp.int32)
            return SafeguardState(
                x=owned(params),
                residual=jnp.asarray(jnp.inf, jnp.float32),
                value=jnp.asarray(jnp.inf, dtype),
                forced=jnp.asarray(True),
                inner=inner,
                left=none(),
                lent=none(),
                waited=none(),
                previous=owned(params),
                clock=jnp.ones((), jnp.float32),
            )

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            problem = told(self, extra_args)
            if problem.step.size > 1:
                raise ValueError(
                    "`lipschitz` of Safeguarded must be one number, got shape "
                    f"{problem.step.shape}: it watches one problem; use jax.vmap for several"
                )
            y, grads = at_least_float32(params), at_least_float32(updates)
            target = problem.prox(
                optax.tree.add_scale(y, -problem.step, grads), like(problem.step, y)
            )
            residual = optax.tree.norm(optax.tree.sub(target, y))
            passed = residual <= (1 - self.decrease) * state.residual
            value = self._value(extra_args, state.value)
            slack = ROUNDING * jnp.finfo(value.dtype).eps * jnp.abs(state.value)
            lower = (value <= state.value) | (value - state.value <= slack)
            best = (passed & lower | state.forced) & jnp.isfinite(residual)
            x, record, value = select(
                best, (target, residual, value), (state.x, state.residual, state.value)
            )
            waited = jnp.where(best, 0, state.waited + 1)

            lending = state.left > 0
            moved, inner = rule.update(updates, state.inner, params, **extra_args)
            learned = optax.tree.add(y, at_least_float32(moved))
            accelerated, previous, clock = _fista(y, target, state.previous, state.clock)
            new = select(lending, accelerated, learned)
            # also false for nan, from which no update would lead back
            near = optax.tree.norm(optax.tree.sub(new, x)) <= self.reach * record
            lost = ~(residual <= self.blow_up * record) | ~near
            failed = lost | (~lending & (waited >= self.patience))
            # a loan that fails begins again at the best point; the rule's failures double it
            lent = jnp.where(
                failed & ~lending, jnp.maximum(2 * state.lent, self.first_loan), state.lent
            )
            left = jnp.where(failed, lent, jnp.maximum(state.left - 1, 0))
            new = select(failed, x, new)
            # who takes over begins afresh: FISTA at T(w), the rule where FISTA ended
            previous = select(failed, x, select(lending, previous, target))
            clock = jnp.where(failed | ~lending, jnp.ones_like(clock), clock)
            fresh = rule.init(base.like_params(new, params))
            after = SafeguardState(
                x,
                record,
                value,
                failed,
                select(lending | failed, fresh, inner),
                left,
                lent,
                # the rule is not to wait for what FISTA has not found
                jnp.where(failed | lending, 0, waited),
                previous,
                clock,
            )
            return base.like_params(optax.tree.sub(new, y), params), after

        return optax.GradientTransformationExtraArgs(init, update)


def select(condition: jax.Array, yes: Any, no: Any) -> Any:
    """Leafwise `where` for a scalar condition, in the dtypes of `no`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b).astype(b.dtype), yes, no)


def _fista(y: Any, x: Any, previous: Any, clock: jax.Array) -> tuple[Any, Any, jax.Array]:
    """From the proximal point x of y and the one before it: the next y, x, and FISTA's t."""
    ahead = following(clock)
    moved = optax.tree.sub(x, previous)
    # not optax's vdot, which flattens: arrays may be split over devices
    uphill = jnp.asarray(optax.tree.sum(optax.tree.mul(optax.tree.sub(y, x), moved))) > 0
    momentum = jnp.where(uphill, 0.0, (clock - 1) / ahead)
    clock = jnp.where(uphill, RESTARTED, ahead).astype(clock.dtype)
    return optax.tree.add_scale(x, momentum, moved), x, clock


EXAMPLES = (Safeguarded(BoundedLSTM(hidden=4)),)
CONFIGURATIONS = {
    "l2o_safe": Safeguarded(BoundedLSTM()),
    "l2o_pa_safe": Safeguarded(StructuredLSTM()),
}
