"""What can be known to fail before any work starts: a task and a rule that do not fit, a rule that
the estimator cannot differentiate, too little memory. All is traced; nothing is compiled or run.
"""

from typing import Any

import jax

from learned_opt.base import LearnedOptimizer, Theta
from learned_opt.discovery import name_of
from meta_train import memory
from meta_train.estimators.base import ParticleEstimator
from meta_train.estimators.mixture import Mixture, members

GIB = 2**30


def check(
    estimator: ParticleEstimator | Mixture, rule: LearnedOptimizer, available: int | None = None
) -> None:
    """Traces an estimate (a mixture's: each member's), with `available` bytes of memory for all
    particles; None is no limit.

    Raises:
      ValueError: the estimator differentiates through the rule, which is not differentiable; or
        the particles need more memory than is available.
      Exception: whatever a task or a rule raise that do not fit.
    """
    theta = jax.eval_shape(rule.init, jax.random.key(0))
    needs = []
    for i, member in enumerate(members(estimator)):
        try:
            needs.append(_needed(member, rule, theta))
        except Exception as error:
            if isinstance(estimator, Mixture):
                error.add_note(f"This is of the task {estimator.names[i]}.")
            raise
    needed = _together(members(estimator), needs, theta)
    if available is not None and needed > available:
        raise ValueError(_too_large(estimator, needs, needed, available))


def _needed(estimator: ParticleEstimator, rule: LearnedOptimizer, theta: Theta) -> int:
    if differentiates(estimator):
        return _predicted_if_differentiable(estimator, rule, theta)
    return predicted_bytes(estimator, theta)


def _together(estimators: tuple[ParticleEstimator, ...], needs: list[int], theta: Theta) -> int:
    """Memory for estimates one after another: all data, each array once, and all states, before
    and after; and beside these the most that one estimate stores.
    """
    if len(needs) == 1:
        return needs[0]
    states = [2 * _bytes(jax.eval_shape(e.init, theta, jax.random.key(0))) for e in estimators]
    beside = [
        need - state - _bytes(e) for need, state, e in zip(needs, states, estimators, strict=True)
    ]
    arrays = {id(leaf): leaf for leaf in jax.tree.leaves(estimators)}
    return _bytes(list(arrays.values())) + sum(states) + max(beside)


def _bytes(tree: Any) -> int:
    """Of its arrays, or their shapes."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def differentiates(estimator: ParticleEstimator) -> bool:
    """Whether the estimator differentiates through the rule: in reverse mode, or as it says."""
    return getattr(estimator, "differentiates", estimator.backpropagates)


def predicted_bytes(estimator: ParticleEstimator, theta: Theta) -> int:
    """Memory for an estimate: the problem's data, the particles' states before and after it, and
    the most that is stored between, as `meta_train.memory` counts. `theta`: arrays or shapes.
    """
    key = jax.random.key(0)
    state = jax.eval_shape(estimator.init, theta, key)

    def estimate(estimator, theta, state, key):
        return estimator.estimate(theta, state, key)

    return memory.predicted_bytes(estimate, estimator, theta, state, key)


def _predicted_if_differentiable(
    estimator: ParticleEstimator, rule: LearnedOptimizer, theta: Theta
) -> int:
    key = jax.random.key(0)

    def unroll(problem, theta):
        return problem.unroll(theta, problem.reset(theta, key), key)

    # what fails without a derivative has another reason
    jax.eval_shape(unroll, estimator.problem, theta)
    reason = "it declares that its gradients vanish"
    if getattr(rule, "differentiable", True):
        try:
            return predicted_bytes(estimator, theta)
        except Exception as error:  # whatever an operation without a derivative raises
            reason = str(error).partition("\n")[0] or repr(error)
    raise ValueError(
        f"`estimator` {name_of(type(estimator))} differentiates through the rule, and "
        f"{name_of(type(rule))} is not differentiable ({reason}): use an evolution-strategies "
        "estimator such as nres"
    )


def _too_large(
    estimator: ParticleEstimator | Mixture, needs: list[int], needed: int, available: int
) -> str:
    largest = members(estimator)[needs.index(max(needs))]
    fields, advice = f"`particles` {largest.particles}", "fewer `particles`"
    truncation = getattr(largest.problem, "truncation", None)
    if len(needs) > 1:
        fields += f" for each of {len(needs)} tasks"
        advice += ", fewer tasks"
    if largest.backpropagates and truncation:
        fields += f" with `truncation` {truncation}"
        advice += ", a shorter `truncation`, or an estimator such as nres, which stores no steps"
    return (
        f"{fields} need about {needed / GIB:.3g} GiB of memory, {available / GIB:.3g} GiB are "
        f"available: choose {advice}"
    )
