"""What can be known to fail before any work starts: a task and a rule that do not fit, a rule that
the estimator cannot differentiate, too little memory. All is traced; nothing is compiled or run.
"""

import jax

from learned_opt.base import LearnedOptimizer, Theta
from learned_opt.discovery import name_of
from meta_train import memory
from meta_train.estimators.base import ParticleEstimator

GIB = 2**30


def check(
    estimator: ParticleEstimator, rule: LearnedOptimizer, available: int | None = None
) -> None:
    """Traces an estimate, with `available` bytes of memory for all particles; None is
    no limit.

    Raises:
      ValueError: the estimator differentiates through the rule, which is not differentiable; or
        the particles need more memory than is available.
      Exception: whatever a task or a rule raise that do not fit.
    """
    theta = jax.eval_shape(rule.init, jax.random.key(0))
    if differentiates(estimator):
        needed = _predicted_if_differentiable(estimator, rule, theta)
    else:
        needed = predicted_bytes(estimator, theta)
    if available is not None and needed > available:
        raise ValueError(_too_large(estimator, needed, available))


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


def _too_large(estimator: ParticleEstimator, needed: int, available: int) -> str:
    fields, advice = f"`particles` {estimator.particles}", "fewer `particles`"
    truncation = getattr(estimator.problem, "truncation", None)
    if estimator.backpropagates and truncation:
        fields += f" with `truncation` {truncation}"
        advice += ", a shorter `truncation`, or an estimator such as nres, which stores no steps"
    return (
        f"{fields} need about {needed / GIB:.3g} GiB of memory, {available / GIB:.3g} GiB are "
        f"available: choose {advice}"
    )
