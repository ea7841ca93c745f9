"""The tree of windows: the gradient of the plain loop, in memory that grows with its logarithm."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_system import LinearSystem

from learned_opt.hyperparams import Hyperparams
from meta_train.estimators.bptt import FullBPTT
from meta_train.estimators.replay import Replay, levels, tree
from meta_train.unroll import Rollout, Training, episode_loss
from tasks.quadratic import Quadratic

KEY = jax.random.key(0)
run = jax.jit(lambda e, theta, state, key: e.estimate(theta, state, key))


@jax.jit
def plain(problem, theta, key, episodes):
    """Loss and gradient of particles 0, 1, ... by the loop that keeps a state per window."""

    def mean(theta):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(episodes)))
        losses = jax.vmap(lambda k, n: episode_loss(problem, theta, k, n)[0])(keys, episodes)
        return jnp.mean(losses)

    return jax.value_and_grad(mean)(theta)


LINEAR = LinearSystem(30, 2, decay=0.9, size=2)  # 15 windows: a slot is left over
TRAINING = Training(Quadratic(3, noise=0.1), Hyperparams(2, 0.1), (2, 14), 2, curriculum=4)


@pytest.mark.parametrize(
    ("problem", "arity"),
    [
        pytest.param(LINEAR, 2, id="linear-2"),
        pytest.param(LINEAR, 4, id="linear-4"),
        pytest.param(TRAINING, 2, id="training-2", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_that_of_the_plain_loop(problem, arity):
    """Where episodes end early, and a curriculum looks at their number, too."""
    theta = jnp.ones(2)
    if isinstance(problem, Training):
        theta = problem.rule.init(KEY)
    estimator = Replay(problem, particles=3, arity=arity)
    state = jnp.array([0, 2, 9], jnp.int32)
    estimate, state = run(estimator, theta, state, KEY)
    loss, grad = plain(problem, theta, KEY, jnp.array([0, 2, 9], jnp.int32))
    np.testing.assert_array_equal(state, [1, 3, 10])
    np.testing.assert_allclose(estimate.loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), estimate.grad, grad)
    assert np.any(np.abs(jax.tree.leaves(grad)[0]) > 1e-3)
    assert estimate.info["diverged"] == 0


def test_it_is_full_backpropagation():
    theta, grads = jnp.ones(2), []
    for estimator in (Replay(LINEAR, particles=3, arity=2), FullBPTT(LINEAR, particles=3)):
        grads.append(run(estimator, theta, estimator.init(theta, KEY), KEY)[0].grad)
    np.testing.assert_allclose(*grads, rtol=1e-5)
    np.testing.assert_allclose(grads[0], LINEAR.gradient(truncated=False), rtol=1e-5)


SIZE = 1 << 14  # of the inner state; everything else is a few words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fat:
    windows: int = dataclasses.field(metadata={"static": True})

    def reset(self, theta, key, episode=0, stagger=False):
        return jnp.ones(SIZE), jnp.zeros((), jnp.int32)

    def unroll(self, theta, state, key):
        x, count = jnp.tanh(theta * state[0]), state[1] + 1
        return Rollout(jnp.mean(x)[None], count >= self.windows), (x, count)


def states_held(estimator):
    """The program's temporary memory, in inner states."""
    theta, state = jnp.ones(()), estimator.init(jnp.ones(()), KEY)
    memory = run.lower(estimator, theta, state, KEY).compile().memory_analysis()
    return memory.temp_size_in_bytes / (4 * SIZE)


@pytest.mark.parametrize("arity", [2, 4])
def test_memory_grows_with_the_logarithm_of_the_episode(arity):
    held = [states_held(Replay(Fat(w), particles=1, arity=arity)) for w in (16, 64, 256, 1024)]
    assert np.all(np.abs(np.diff(held) - 4) < 1), held  # a level of 4 children, or two of 2
    assert held[-1] < 32


def test_memory_of_full_backpropagation_grows_with_the_episode():
    """What the test above would see otherwise."""
    held = [states_held(FullBPTT(Fat(w), particles=1)) for w in (16, 64, 256)]
    assert np.all(np.abs(np.diff(held) - [48, 192]) < 5), held


def test_slots_to_spare_are_not_computed():
    """Not even where particles are vmapped, which turns other branches into selections."""
    calls = []

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Seen(LinearSystem):
        def unroll(self, theta, state, key):
            jax.debug.callback(calls.append, theta)  # not vmapped
            return super().unroll(theta, state, key)

    problem = Seen(18, 2)
    assert math.prod(levels(problem.windows, 2)) == 16
    both = jax.jit(jax.vmap(lambda key: episode_loss(problem, jnp.ones(1), key, 0, tree(2))[0]))
    jax.block_until_ready(both(jax.random.split(KEY, 3)))
    jax.effects_barrier()
    assert len(calls) == problem.windows


def test_trees_have_the_fewest_levels_that_hold_all_windows():
    for arity in (2, 3, 4, 7):
        for windows in (*range(1, 130), 1000):
            shape = levels(windows, arity)
            assert math.prod(shape) >= windows
            assert max(shape) <= arity or windows == 1
            assert len(shape) == 1 or arity ** (len(shape) - 1) < windows
    assert levels(256, 4) == (4, 4, 4, 4)
    assert levels(20, 4) == (3, 3, 3)


@pytest.mark.parametrize("arity", [1, 0, 2.0])
def test_impossible_arities_are_refused(arity):
    with pytest.raises(ValueError, match=r"`arity` must be an integer of at least 2, got"):
        Replay(arity=arity)
