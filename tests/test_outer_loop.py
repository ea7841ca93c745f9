"""The outer loop and its checkpoints: exact optimum reached, poison survived, resume bit-equal."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.hyperparams import Hyperparams
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.base import Estimate
from meta_train.estimators.compiled import Compiled
from meta_train.estimators.nres import NRES
from meta_train.outer_loop import MetaState, burn_in, meta_train, outer_optimizer, start
from meta_train.unroll import Training
from tasks.quadratic import Quadratic

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Bowl:
    """An estimator with the exact gradient of (theta - 3)^2 / 2, poisoned at given steps."""

    def __init__(self, poison=()):
        self.poison, self.count = poison, 0

    def init(self, theta, key):
        return jnp.zeros(())

    def estimate(self, theta, state, key):
        grad = theta - 3.0
        if self.count in self.poison:
            grad = grad.at[0].set(jnp.nan).at[1].set(jnp.inf)
        self.count += 1
        return Estimate(grad, 0.5 * jnp.sum((theta - 3.0) ** 2), {}), state + 1


def state_of(theta, optimizer):
    return MetaState(theta, optimizer.init(theta), jnp.zeros(()), jax.random.key(0), 0)


def test_reaches_the_optimum_and_survives_non_finite_gradients():
    optimizer = outer_optimizer(0.1, steps=300)
    theta = jnp.zeros(3)
    final = meta_train(Bowl(poison=(5, 50)), optimizer, state_of(theta, optimizer), 300)
    np.testing.assert_allclose(final.theta, 3.0, atol=1e-2)
    assert final.step == 300


def test_gradients_are_clipped_by_global_norm():
    """With plain SGD behind the clip, a step is at most the learning rate long."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5))
    final = meta_train(Bowl(), optimizer, state_of(jnp.full(4, 1e6), optimizer), 1)
    assert np.linalg.norm(final.theta - 1e6) <= 0.5 + 0.5 * 4 * 0.0625  # float32 spacing at 1e6


def test_schedule_warms_up_and_decays():
    optimizer = outer_optimizer(1.0, steps=100, clip=1e9, warmup=10)
    state, theta, sizes = optimizer.init(jnp.zeros(())), jnp.zeros(()), []
    for _ in range(100):
        update, state = optimizer.update(jnp.ones(()), state, theta)
        sizes.append(-float(update))  # Adam's step for constant gradients is the learning rate
    assert sizes[0] == 0.0
    assert sizes[10] == pytest.approx(1.0, rel=1e-3)
    assert sizes[5] == pytest.approx(0.5, rel=1e-3)
    assert sizes[99] == pytest.approx(0.1, rel=2e-2)


@pytest.fixture(scope="module")
def problem():
    return Training(Quadratic(dimension=3), Hyperparams(knots=2), (4, 8), 2)


def test_resume_is_bit_equal_and_an_interrupt_is_checkpointed(tmp_path, problem):
    estimator, optimizer = Compiled(NRES(problem, particles=3)), outer_optimizer(0.1, 12)

    def begin():
        return start(problem.rule, estimator, optimizer, seed=4)

    undisturbed = meta_train(estimator, optimizer, begin(), 12)

    def interrupt(step, *_):
        if step == 6:
            raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path / "run", keep=2)
    with pytest.raises(KeyboardInterrupt):
        meta_train(
            estimator, optimizer, begin(), 12, checkpoints, checkpoint_every=5, on_step=interrupt
        )
    assert checkpoints.latest() == 6  # a step counts when it has been logged
    resumed = meta_train(estimator, optimizer, checkpoints.restore(begin()), 12)
    raw = lambda s: s._replace(key=jax.random.key_data(s.key))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, raw(undisturbed), raw(resumed))


def test_an_interrupt_inside_the_estimate_loses_nothing(tmp_path, problem):
    """It comes after the estimate was computed and before its result is bound."""
    compiled, optimizer = Compiled(NRES(problem, particles=3)), outer_optimizer(0.1, 12)

    class Interrupted:
        calls = 0
        init = staticmethod(compiled.init)

        def estimate(self, theta, state, key):
            result = compiled.estimate(theta, state, key)
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return result

    estimator = Interrupted()
    state, checkpoints = start(problem.rule, estimator, optimizer, seed=4), Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        meta_train(estimator, optimizer, state, 12, checkpoints)
    assert checkpoints.latest() == 2
    assert np.all(np.isfinite(checkpoints.restore(state).theta["log_learning_rate"]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_checkpoint_that_is_being_written(tmp_path, number):
    """Orbax, interrupted, leaves threads at work that the same step's next save collides with."""
    handlers = {n: signal.signal(n, signal.default_int_handler) for n in HANDLED}
    written = []

    class Interrupted(Checkpoints):
        def save(self, step, state):
            written.append(("begun", step))
            if len(written) == 1:
                signal.raise_signal(number)
                signal.raise_signal(signal.SIGINT)  # somebody is impatient
            super().save(step, state)
            written.append(("done", step))

    optimizer = outer_optimizer(0.1, 12)
    try:
        with pytest.raises(KeyboardInterrupt):
            meta_train(
                Bowl(), optimizer, state_of(jnp.zeros(3), optimizer), 12, Interrupted(tmp_path), 5
            )
        assert [signal.getsignal(n) for n in HANDLED] == [signal.default_int_handler] * 2
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert written == [(what, 5) for what in ("begun", "done") * 2]
    assert Checkpoints(tmp_path).latest() == 5


def test_one_program_for_all_steps(problem):
    """Hyperparams' theta is made of Python numbers: were it weakly typed, step 2 would compile."""
    estimator, optimizer = Compiled(NRES(problem, particles=3)), outer_optimizer(0.1, 4)
    state = start(problem.rule, estimator, optimizer, seed=0)
    types = [(x.dtype, x.weak_type) for x in jax.tree.leaves(state.theta)]
    final = meta_train(estimator, optimizer, state, 2)
    assert types == [(x.dtype, x.weak_type) for x in jax.tree.leaves(final.theta)]


def test_burn_in_moves_the_particles_alone(problem):
    """From one episode's start to different steps of running episodes, the same each time."""
    estimator, optimizer = Compiled(NRES(problem, particles=3)), outer_optimizer(0.1, 12)
    begin, calls = start(problem.rule, estimator, optimizer, seed=4), []
    after, again = (
        burn_in(estimator, begin, 8, on_estimate=lambda: calls.append(1)) for _ in range(2)
    )
    assert len(calls) == 16
    for name in ("theta", "opt_state", "key", "step"):
        assert getattr(after, name) is getattr(begin, name)
    jax.tree.map(np.testing.assert_array_equal, after.estimator_state, again.estimator_state)
    assert set(np.ravel(begin.estimator_state.inner.step)) == {0}
    assert len(set(np.ravel(after.estimator_state.inner.step))) > 1
    assert np.all(after.estimator_state.episodes >= 2)
    assert burn_in(estimator, begin, 0).estimator_state is begin.estimator_state


def test_burn_in_shares_no_randomness_with_the_steps():
    keys = []

    class Recording(Bowl):
        def estimate(self, theta, state, key):
            keys.append(tuple(np.asarray(jax.random.key_data(key))))
            return super().estimate(theta, state, key)

    optimizer = outer_optimizer(0.1, 5)
    state = burn_in(Recording(), state_of(jnp.zeros(3), optimizer), 5)
    assert state.estimator_state == 5
    meta_train(Recording(), optimizer, state, 5)
    assert len(set(keys)) == 10


def test_checkpoints_keep_the_newest_and_refuse_others(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoints.restore({"a": jnp.zeros(2)})
    for step in (1, 2, 3):
        checkpoints.save(step, {"a": jnp.full(2, step), "empty": jnp.zeros((3, 0))})
    np.testing.assert_array_equal(
        checkpoints.restore({"a": jnp.zeros(2, int), "empty": jnp.zeros((3, 0))})["a"], 3
    )
    with pytest.raises(FileNotFoundError, match="step 1"):
        checkpoints.restore({"a": jnp.zeros(2, int)}, step=1)
    with pytest.raises(ValueError, match="another rule, task or estimator"):
        checkpoints.restore({"a": jnp.zeros(3, int), "empty": jnp.zeros((3, 0))})
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()  # what a kill during a save leaves
    assert Checkpoints(tmp_path).latest() == 3
