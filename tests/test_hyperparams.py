"""Adam with a learned schedule is optax's Adam with that schedule, one of optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.hyperparams import Hyperparams

PARAMS = {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.asarray(-0.7)}


def loss(params):
    return jnp.sum(jnp.cos(params["w"]) ** 2) + params["b"] ** 4


def trajectory(optimizer, steps):
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (PARAMS, optimizer.init(PARAMS)), length=steps)[1]


def assert_equal_runs(ours, theirs, steps):
    ours, theirs = trajectory(ours, steps), trajectory(theirs, steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7), ours, theirs)


def test_initial_theta_is_adam():
    rule = Hyperparams(knots=8, learning_rate=0.05, b1=0.8, b2=0.95)
    ours = rule.optimizer(rule.init(jax.random.key(0)), horizon=5)
    assert_equal_runs(ours, optax.adam(0.05, b1=0.8, b2=0.95), 5)


@pytest.mark.parametrize("horizon", [10, np.int64(10), jnp.asarray(10), jnp.asarray(10.0)])
def test_two_knots_are_an_exponential_decay_that_ends_at_the_horizon(horizon):
    """Linear in the logarithm from 0.1 to 0.001; the 4 steps after the horizon stay at 0.001."""
    theta = {"log_learning_rate": jnp.log(jnp.asarray([0.1, 0.001]))}
    schedule = optax.exponential_decay(0.1, 10, decay_rate=0.01, end_value=0.001)
    assert_equal_runs(Hyperparams(knots=2).optimizer(theta, horizon), optax.adam(schedule), 14)


def test_knots_are_equally_spaced():
    theta = {"log_learning_rate": jnp.log(jnp.asarray([0.01, 0.08, 0.02]))}
    schedule = optax.join_schedules(
        [optax.exponential_decay(0.01, 4, 8.0), optax.exponential_decay(0.08, 4, 0.25)], [4]
    )
    assert_equal_runs(Hyperparams(knots=3).optimizer(theta, horizon=8), optax.adam(schedule), 8)


def test_too_few_knots():
    with pytest.raises(ValueError, match="`knots` must be at least 2, got 1"):
        Hyperparams(knots=1)
