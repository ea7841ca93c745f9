"""Bootstrapped meta-gradients: against a derivative on paper, and that following them helps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_system import LinearSystem

from learned_opt.hyperparams import Hyperparams
from meta_train.estimators.base import combine, partition
from meta_train.estimators.bmg import BMG
from meta_train.outer_loop import meta_train, outer_optimizer, start
from meta_train.unroll import Training, episode_loss
from tasks.quadratic import Quadratic

KEY = jax.random.key(0)
run = jax.jit(lambda e, theta, state, key: e.estimate(theta, state, key))


@dataclasses.dataclass(frozen=True)
class Descent:
    """theta is the learning rate."""

    def init(self, key):
        return jnp.array(0.3)

    def optimizer(self, theta, horizon=None):
        return optax.sgd(theta)


@pytest.mark.parametrize(
    "bootstrap", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 2))]
)
def test_two_steps_on_a_parabola_by_hand(bootstrap):
    """The loss e^2 / 2 of the error e = x - optimum, from e at the window's start:

      after the window (K = 2)              e_2 = (1 - theta)^2 e
      after 2 b more steps, plain descent   e~  = (1 - eta) (1 - theta)^(2 + 2 b) e
      d e_2 / d theta                           = -2 (1 - theta) e
      gradient, e~ being fixed                  = 2 (e_2 - e~) d e_2 / d theta

    with b windows of bootstrap, or as many of them as are left of the episode.
    """
    eta, theta, horizon = 0.1, 0.3, 8
    with jax.enable_x64(True):
        key = jax.random.key(0)
        problem = Training(Quadratic(dimension=1), Descent(), horizon, truncation=2)
        estimator = BMG(problem, particles=1, bootstrap=bootstrap, learning_rate=eta)
        state, checked = estimator.init(jnp.array(theta), key), []
        for i in range(8):
            before = jax.tree.map(lambda x: x[0], state)
            step_key = jax.random.fold_in(key, i)
            estimate, state = run(estimator, jnp.array(theta), state, step_key)
            if before.window == 0:
                continue
            optimum = problem.family(jax.random.wrap_key_data(before.inner.task)).optimum
            e = float((before.inner.params - optimum)[0])
            left = int(before.inner.end - before.inner.step) // 2 - 1
            b = min(bootstrap, left)
            e_2, target = (1 - theta) ** 2 * e, (1 - eta) * (1 - theta) ** (2 + 2 * b) * e
            expected = 2 * (e_2 - target) * (-2 * (1 - theta) * e)
            np.testing.assert_allclose(estimate.grad, expected, rtol=1e-6)
            np.testing.assert_allclose(estimate.info["distance"], (e_2 - target) ** 2, rtol=1e-6)
            np.testing.assert_allclose(estimate.info["squared_norm"], expected**2, rtol=1e-6)
            # the trajectory goes on from the window's end, not from the target
            np.testing.assert_allclose(state.inner.params[0], optimum + e_2, rtol=1e-6)
            checked.append(left)
        assert {0, 1, 2} <= set(checked)


def test_without_bootstrap_it_is_the_gradient_of_the_loss_at_the_windows_end():
    problem = Training(Quadratic(dimension=3), Hyperparams(2, 0.1), 6, 3)
    theta = problem.rule.init(KEY)
    estimator = BMG(problem, particles=1, bootstrap=0, learning_rate=0.5)
    _, state = run(estimator, theta, estimator.init(theta, KEY), KEY)
    start = jax.tree.map(lambda x: x[0], state.inner)
    task = problem.family(jax.random.wrap_key_data(start.task))

    def loss(theta):
        _, end = problem.unroll(theta, start, KEY)
        return task.loss(end.params, jnp.zeros(3))

    goes_on = state._replace(window=jnp.ones(1, jnp.int32))
    estimate, _ = run(estimator, theta, goes_on, KEY)
    exact = jax.grad(loss)(theta)["log_learning_rate"]
    np.testing.assert_allclose(estimate.grad["log_learning_rate"], exact, rtol=1e-4)


@pytest.mark.slow
def test_following_it_makes_training_faster():
    problem = Training(Quadratic(dimension=3, condition=(1.0, 10.0)), Hyperparams(2, 0.01), 20, 5)
    estimator, optimizer = BMG(problem, particles=8), outer_optimizer(0.2, 40)

    class Jitted:
        init = staticmethod(estimator.init)
        estimate = staticmethod(jax.jit(estimator.estimate))

    begun = start(problem.rule, Jitted, optimizer, seed=1)
    theta = meta_train(Jitted, optimizer, begun, 40).theta
    keys = jax.random.split(jax.random.key(9), 64)
    mean = jax.jit(lambda t: jnp.mean(jax.vmap(lambda k: episode_loss(problem, t, k)[0])(keys)))
    before, after = float(mean(begun.theta)), float(mean(theta))
    assert after < 0.7 * before


def test_a_partition_of_the_particles_gives_the_same_estimates():
    """As in tests/test_estimators.py, whose problem has no params."""
    problem = Training(Quadratic(dimension=2, noise=0.1), Descent(), (2, 6), 2)
    theta, whole = jnp.array(0.3), BMG(problem, particles=4)
    parts = partition(whole, 2)
    states, state = [part.init(theta, KEY) for part in parts], whole.init(theta, KEY)
    for i in range(4):
        key = jax.random.fold_in(KEY, i)
        expected, state = run(whole, theta, state, key)
        pairs = [run(p, theta, s, key) for p, s in zip(parts, states, strict=True)]
        got = combine([estimate for estimate, _ in pairs], [part.particles for part in parts])
        states = [state for _, state in pairs]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), got, expected)


def test_a_problem_without_a_target_is_refused():
    with pytest.raises(TypeError, match="`problem` must have methods `descend` and `distance`"):
        BMG(LinearSystem(4, 2))


@pytest.mark.parametrize(("field", "value"), [("bootstrap", -1), ("learning_rate", 0.0)])
def test_impossible_fields_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        BMG(**{field: value})
