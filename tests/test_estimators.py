"""Every estimator against exact meta-gradients; nothing here trains a network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_system import LinearSystem

import meta_train.estimators
from learned_opt import discovery
from meta_train.estimators.base import combine, partition
from meta_train.estimators.full_es import FullES
from meta_train.estimators.nres import NRES
from meta_train.estimators.pes import PES
from meta_train.estimators.truncated_es import TruncatedES

ESTIMATORS = discovery.examples(meta_train.estimators)
IDS = [discovery.name_of(type(e)) for e in ESTIMATORS]
run = jax.jit(lambda e, theta, state, key: e.estimate(theta, state, key))


@functools.partial(jax.jit, static_argnums=3)
def gradients(estimator, theta, key, count):
    """Gradients [count, d] of consecutive estimates, after one episode in which particles get out
    of phase.
    """

    def step(state, key):
        estimate, state = estimator.estimate(theta, state, key)
        return state, estimate.grad

    keys = jax.random.split(key, estimator.problem.windows + count)
    _, grads = jax.lax.scan(step, estimator.init(theta, key), keys)
    return grads[estimator.problem.windows :]


def mean_gradient(estimator, theta, blocks=24):
    """Mean and standard error of the gradient over `blocks` episodes' worth of estimates."""
    windows = estimator.problem.windows
    grads = gradients(estimator, theta, jax.random.key(0), blocks * windows)
    means = np.asarray(grads).reshape(blocks, windows, -1).mean(axis=1)
    return means.mean(axis=0), means.std(axis=0, ddof=1) / np.sqrt(blocks)


@pytest.mark.parametrize("example", ESTIMATORS, ids=IDS)
@pytest.mark.parametrize(
    "problem",
    [
        LinearSystem(20, 5, terminal=True),
        LinearSystem(12, 4, decay=0.9, size=2),
        LinearSystem(8, 8, size=2),
    ],
    ids=["terminal", "rotation", "one-window"],
)
def test_gradient_is_exact_or_has_its_declared_bias(example, problem):
    estimator = dataclasses.replace(example, problem=problem, particles=1000)
    theta = jnp.linspace(0.5, -1.0, problem.size)
    mean, error = mean_gradient(estimator, theta)
    expected = problem.gradient(truncated=estimator.truncated)
    assert np.all(np.abs(mean - expected) <= 4.5 * error + 1e-4 * np.abs(expected)), (
        mean,
        expected,
        error,
    )
    assert np.all(error <= 0.2 * np.abs(expected).max()), "too noisy to tell anything"


def test_the_terminal_loss_that_the_published_rule_gets_wrong():
    """Whole gradient 20 (times 1/20 for the mean); a truncated estimate, and the published PES,
    give 5.
    """
    problem = LinearSystem(20, 5, terminal=True)
    assert problem.gradient(truncated=False) * 20 == pytest.approx(20)
    assert problem.gradient(truncated=True) * 20 == pytest.approx(5)
    pes, error = mean_gradient(PES(problem, particles=4000), jnp.ones(1))
    assert abs(20 * pes[0] - 20) < 4 * 20 * error[0] < 2
    tes, error = mean_gradient(TruncatedES(problem, particles=4000), jnp.ones(1))
    assert abs(20 * tes[0] - 5) < 4 * 20 * error[0] < 1


def test_pes_is_truncated_es_when_an_episode_is_one_window():
    problem, theta, key = LinearSystem(6, 6, size=2), jnp.ones(2), jax.random.key(3)
    grads = []
    for estimator in (PES(problem, particles=8), TruncatedES(problem, particles=8)):
        state = estimator.init(theta, key)
        for i in range(3):
            estimate, state = run(estimator, theta, state, jax.random.fold_in(key, i))
        grads.append(estimate.grad)
    np.testing.assert_allclose(*grads, rtol=2e-4)  # differences of losses of ~100 at sigma 0.01


@pytest.mark.parametrize("example", ESTIMATORS, ids=IDS)
def test_a_partition_of_the_particles_gives_the_same_estimates(example):
    """In one process; tests/test_remote.py does it over Ray."""
    problem, theta, key = LinearSystem(12, 4, size=2), jnp.ones(2), jax.random.key(7)
    whole = dataclasses.replace(example, problem=problem, particles=7)
    parts = partition(whole, 3)
    assert [part.particles for part in parts] == [2, 2, 3]
    states = [part.init(theta, key) for part in parts]
    state = whole.init(theta, key)
    for i in range(5):
        step_key = jax.random.fold_in(key, i)
        expected, state = run(whole, theta, state, step_key)
        estimates, states = zip(
            *(run(p, theta, s, step_key) for p, s in zip(parts, states, strict=True)), strict=True
        )
        got = combine(estimates, [part.particles for part in parts])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), got, expected)
    jax.tree.map(
        lambda w, *ps: np.testing.assert_allclose(w, np.concatenate(ps), rtol=1e-6), state, *states
    )


def test_particles_get_out_of_phase():
    """After one episode about one in `windows` particles ends with each estimate, instead of all at
    once.
    """
    problem, theta, key = LinearSystem(20, 5), jnp.ones(1), jax.random.key(0)
    estimator = NRES(problem, particles=4000)
    state = estimator.init(theta, key)
    for i in range(12):
        _, state = run(estimator, theta, state, jax.random.fold_in(key, i))
        if i >= 4:
            share = float(jnp.mean(state.fresh))
            assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("cls", [PES, NRES, TruncatedES, FullES])
@pytest.mark.parametrize("field", ["particles", "sigma"])
def test_impossible_fields_are_refused(cls, field):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        cls(**{field: 0})


def test_fractions_of_particles_are_refused():
    with pytest.raises(ValueError, match=r"`particles` must be an integer, got 2.5"):
        NRES(particles=2.5)


def test_impossible_partitions_are_refused():
    with pytest.raises(ValueError, match=r"`parts` must be between 1 and .*\(4\), got 5"):
        partition(NRES(particles=4), 5)
