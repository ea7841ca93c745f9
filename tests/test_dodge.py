"""Directional derivatives carried over windows, against the exact derivative of the episode."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from linear_system import LinearSystem

from learned_opt.hyperparams import Hyperparams
from meta_train.estimators.bptt import FullBPTT
from meta_train.estimators.dodge import DODGE, merge, separate
from meta_train.unroll import Rollout, Training
from tasks.quadratic import Quadratic

run = jax.jit(lambda e, theta, state, key: e.estimate(theta, state, key))


class WalkState(NamedTuple):
    x: jax.Array
    noise: jax.Array  # a typed key: it has no derivative, nor has the count
    count: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walk:
    """A nonlinear system of 3 windows whose start depends on theta [2] and whose noise is in its
    state.
    """

    windows = 3

    def reset(self, theta, key, episode=0, stagger=False):
        return WalkState(theta[0] * jnp.ones(2), jax.random.key(7), jnp.zeros((), jnp.int32))

    def unroll(self, theta, state, key):
        def step(x, i):
            key = jax.random.fold_in(state.noise, state.count + i)
            x = jnp.sin(theta[1] * x + jax.random.normal(key, (2,)))
            return x, jnp.sum(x**2)

        x, losses = jax.lax.scan(step, state.x, jnp.arange(2))
        count = state.count + 2
        return Rollout(losses, count >= 6), WalkState(x, state.noise, count)


def test_an_episodes_slopes_add_up_to_its_derivative_along_one_direction():
    """Through a start that depends on theta, a key and an integer in the state."""
    walk, theta, key = Walk(), jnp.array([0.3, 1.7]), jax.random.key(0)

    def loss(theta):
        state, total = walk.reset(theta, key), 0.0
        for _ in range(3):
            rollout, state = walk.unroll(theta, state, key)
            total += jnp.mean(rollout.losses)
        return total

    exact = jax.grad(loss)(theta)
    estimator = DODGE(walk, particles=5)
    state = estimator.init(theta, key)
    assert state.tangent.x.shape == (5, 2)
    assert state.tangent.noise is None
    assert state.tangent.count is None
    previous = None
    for episode in range(2):
        total = 0.0
        for i in range(3):
            step_key = jax.random.fold_in(key, 3 * episode + i)
            # one particle at a time, or only the mean over particles would be seen
            alone = jax.tree.map(lambda x: x[2:3], state)
            one = dataclasses.replace(estimator, particles=1, first_particle=2)
            estimate, alone = run(one, theta, alone, step_key)
            _, state = run(estimator, theta, state, step_key)
            np.testing.assert_array_equal(alone.direction[0], state.direction[2])
            total += estimate.grad
        direction = state.direction[2]
        np.testing.assert_allclose(total, (exact @ direction) * direction, rtol=1e-4)
        assert previous is None or np.all(previous != direction), "drawn again at a reset"
        previous = direction
    np.testing.assert_array_equal(state.episodes, 2)


def test_on_training_the_mean_is_the_gradient_of_whole_episodes():
    problem = Training(Quadratic(dimension=2, condition=(1.0, 4.0)), Hyperparams(2, 0.1), 4, 2)
    theta, key, count = problem.rule.init(jax.random.key(0)), jax.random.key(1), 20

    @jax.jit
    def gradients(estimator):
        def step(state, key):
            estimate, state = estimator.estimate(theta, state, key)
            return state, estimate.grad["log_learning_rate"]

        keys = jax.random.split(key, 2 + 2 * count)
        return jax.lax.scan(step, estimator.init(theta, key), keys)[1][2:]

    got = np.asarray(gradients(DODGE(problem, particles=100))).reshape(count, 2, 2).mean(axis=1)
    exact = np.asarray(gradients(FullBPTT(problem, particles=30)))
    error = np.hypot(*(x.std(axis=0, ddof=1) / np.sqrt(len(x)) for x in (got, exact)))
    difference = np.abs(got.mean(axis=0) - exact.mean(axis=0))
    assert np.all(difference < 4.5 * error)
    assert np.all(error < 0.1 * np.abs(exact.mean(axis=0)).max()), "too noisy to tell anything"


def test_what_is_reported():
    problem, theta = LinearSystem(4, 4, size=2), jnp.ones(2)
    estimator = DODGE(problem, particles=1)
    estimate, _ = run(estimator, theta, estimator.init(theta, jax.random.key(0)), jax.random.key(0))
    np.testing.assert_allclose(estimate.info["squared_norm"], np.sum(estimate.grad**2), rtol=1e-5)
    assert estimate.info["diverged"] == 0


def test_a_tree_is_separated_and_merged_again():
    tree = {"a": jnp.ones(2), "b": (jnp.arange(3), None), "c": jax.random.key(0)}
    floats, others = separate(tree)
    assert len(jax.tree.leaves(floats)) == 1
    merged = merge(floats, others)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    np.testing.assert_array_equal(merged["b"][0], tree["b"][0])
