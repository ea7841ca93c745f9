"""Every estimator against exact meta-gradients: the contract. Nothing here trains a network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_system import LinearSystem

import meta_train.estimators
from learned_opt import discovery
from meta_train.estimators.base import Estimate, combine, diagnostics, partition
from meta_train.estimators.full_es import FullES
from meta_train.estimators.gpes import GPES
from meta_train.estimators.guided_es import GuidedES
from meta_train.estimators.nres import NRES
from meta_train.estimators.pes import PES
from meta_train.estimators.truncated_es import TruncatedES

# those that want more of a problem than every problem has are tested where that is
ESTIMATORS = [
    example
    for example in discovery.examples(meta_train.estimators)
    if isinstance(LinearSystem(1, 1), getattr(example, "requires", object))
]
IDS = [discovery.name_of(type(e)) for e in ESTIMATORS]


# one function for each class: jax (0.10) takes dataclasses of equal fields for equal, and jits of
# one function share what was traced for equal arguments
@functools.cache
def program(function, cls, static=()):
    return jax.jit(functools.partial(function), static_argnames=static)


def estimate(estimator, theta, state, key):
    return estimator.estimate(theta, state, key)


def run(estimator, *args):
    return program(estimate, type(estimator))(estimator, *args)


PROBLEM, THETA, KEY = LinearSystem(12, 4, size=2), jnp.array([0.5, -1.0]), jax.random.key(7)


def follow(estimator, steps):
    """The estimate of every step, and the state after it."""
    state = estimator.init(THETA, KEY)
    for i in range(steps):
        estimate, state = run(estimator, THETA, state, jax.random.fold_in(KEY, i))
        yield estimate, state


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


def mean_gradient(estimator, theta, blocks=48, total=100_000):
    """Mean and standard error of the gradient over `blocks` episodes' worth of estimates, of at
    least `total` particles in all.
    """
    windows = estimator.problem.windows
    particles = -(-total // (blocks * windows))
    estimator = dataclasses.replace(estimator, particles=particles)
    run_all = program(gradients, type(estimator), "count")
    grads = run_all(estimator, theta, jax.random.key(0), count=blocks * windows)
    means = np.asarray(grads).reshape(blocks, windows, -1).mean(axis=1)
    return means.mean(axis=0), means.std(axis=0, ddof=1) / np.sqrt(blocks)


def declared(estimator, theta):
    """The mean gradient that the estimator promises."""
    problem = estimator.problem
    if isinstance(estimator, GuidedES):
        guide = problem.gradient(truncated=True, theta=theta)
        guide /= np.linalg.norm(guide)
        covariance = estimator.alpha / problem.size * np.eye(problem.size)
        covariance += (1 - estimator.alpha) * np.outer(guide, guide)
        return estimator.beta * covariance @ problem.gradient(truncated=False, theta=theta)
    return problem.gradient(estimator.truncated, theta)


@pytest.mark.parametrize("example", ESTIMATORS, ids=IDS)
@pytest.mark.parametrize(
    "problem",
    [
        LinearSystem(20, 5, terminal=True, size=2, angle=0.0),
        LinearSystem(20, 5, decay=0.9, size=2),
        LinearSystem(20, 5, decay=0.9, size=2, curvature=1.0),
        LinearSystem(20, 5, decay=0.9, size=2, curvature=1.0, cut=3),
    ],
    ids=["terminal", "rotation", "quadratic", "one-window"],
)
def test_gradient_is_exact_or_has_its_declared_bias(example, problem):
    estimator = dataclasses.replace(example, problem=problem)
    theta = jnp.linspace(0.5, -1.0, problem.size)
    mean, error = mean_gradient(estimator, theta)
    expected = declared(estimator, theta)
    assert np.all(np.abs(mean - expected) <= 4 * error + 1e-4 * np.abs(expected)), (
        mean,
        expected,
        error,
    )
    assert np.all(error <= 0.2 * np.abs(expected).max()), "too noisy to tell anything"


def test_the_terminal_loss_that_the_published_rule_gets_wrong():
    """Whole gradient 20 (times 1/20 for the mean); a truncated estimate, and the published PES,
    give 5.
    """
    problem = LinearSystem(20, 5, terminal=True, size=2, angle=0.0)
    assert problem.gradient(truncated=False)[0] * 20 == pytest.approx(20)
    assert problem.gradient(truncated=True)[0] * 20 == pytest.approx(5)
    pes, error = mean_gradient(PES(problem), jnp.ones(2))
    assert abs(20 * pes[0] - 20) < 4 * 20 * error[0] < 2
    tes, error = mean_gradient(TruncatedES(problem), jnp.ones(2))
    assert abs(20 * tes[0] - 5) < 4 * 20 * error[0] < 1


def test_all_antithetic_estimators_agree_when_an_episode_is_one_window():
    """Equal up to rounding: they draw the same noise from the same key."""
    problem, grads = dataclasses.replace(PROBLEM, cut=2), []
    for cls in (PES, TruncatedES, NRES, GPES, FullES):
        example = next(example for example in ESTIMATORS if type(example) is cls)
        steps = follow(dataclasses.replace(example, problem=problem, particles=6), 3)
        grads.append([estimate.grad for estimate, _ in steps])
    for other in grads[1:]:
        np.testing.assert_allclose(other, grads[0], rtol=2e-4, atol=1e-3)
    assert np.all(np.abs(np.diff(grads[0], axis=0)) > 0.01)


@pytest.mark.parametrize("example", ESTIMATORS, ids=IDS)
def test_a_partition_of_the_particles_gives_the_same_estimates(example):
    """In one process; tests/test_remote.py does it over Ray."""
    whole = dataclasses.replace(example, problem=PROBLEM, particles=6)
    parts = partition(whole, 2)
    assert [part.particles for part in parts] == [3, 3]
    steps = zip(follow(whole, 5), *(follow(part, 5) for part in parts), strict=True)
    for (expected, state), *of_parts in steps:
        estimates, states = zip(*of_parts, strict=True)
        got = combine(estimates, [part.particles for part in parts])
        # differences of losses at sigma 0.01: what they are rounded by does not shrink with them
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()),
            got,
            expected,
        )
        jax.tree.map(
            lambda w, *ps: np.testing.assert_allclose(w, np.concatenate(ps), rtol=1e-5),
            state,
            *states,
        )


def test_parts_are_as_equal_as_can_be_and_count_by_their_particles():
    parts = partition(NRES(PROBLEM, particles=7), 3)
    assert [(part.particles, part.first_particle) for part in parts] == [(2, 0), (2, 2), (3, 4)]
    grads = jnp.array([[1.0], [2.0], [4.0]])
    estimates = [Estimate(g, g[0], {"squared_norm": 2 * g[0]}) for g in grads]
    combined = combine(estimates, [part.particles for part in parts])
    mean = (2 * 1 + 2 * 2 + 3 * 4) / 7
    np.testing.assert_allclose(combined.grad, [mean])
    np.testing.assert_allclose([combined.loss, combined.info["squared_norm"]], [mean, 2 * mean])


@pytest.mark.parametrize("example", ESTIMATORS, ids=IDS)
def test_the_problem_is_told_the_number_of_the_episode_and_the_diagnostics_who_is_lost(example):
    """Of each particle: losses grow with the number, and from the second episode on runs are
    lost.
    """
    problem = dataclasses.replace(PROBLEM, lost=1)
    estimator = dataclasses.replace(example, problem=problem, particles=6)
    drifting = dataclasses.replace(problem, drift=1.0)
    steps = zip(
        follow(estimator, 5),
        follow(dataclasses.replace(estimator, problem=drifting), 5),
        strict=True,
    )
    for (estimate, state), (drifted, _) in steps:
        episode = np.asarray(getattr(state, "episodes", state)) - 1
        assert np.isclose(drifted.loss - estimate.loss, np.mean(episode), atol=1e-5)
        assert np.isclose(estimate.info["diverged"], np.mean(episode >= 1))
        assert estimate.info["squared_norm"] >= np.sum(np.square(estimate.grad)) * (1 - 1e-5)
    assert np.all(episode >= 1)


@pytest.mark.parametrize("example", ESTIMATORS, ids=IDS)
def test_what_is_random_in_a_run_is_shared_by_all_that_an_estimate_compares(example):
    """On a linear system a disturbance of both halves of a pair leaves their difference as it
    is.
    """
    estimator = dataclasses.replace(example, problem=PROBLEM, particles=6)
    noisy = dataclasses.replace(estimator, problem=dataclasses.replace(PROBLEM, noise=1.0))
    for (calm, _), (disturbed, _) in zip(follow(estimator, 5), follow(noisy, 5), strict=True):
        assert abs(calm.loss - disturbed.loss) > 0.01
        scale = np.abs(calm.grad).max()
        np.testing.assert_allclose(disturbed.grad, calm.grad, atol=3e-3 * scale)


@pytest.mark.parametrize("example", ESTIMATORS, ids=IDS)
def test_losses_by_window_are_those_of_the_windows(example):
    """Exact for pairs, too: the mean of theirs is the loss of theta."""
    expected = PROBLEM.losses(THETA).reshape(3, 4).mean(axis=1)
    steps = list(follow(dataclasses.replace(example, problem=PROBLEM, particles=6), 5))
    for i, (estimate, _) in enumerate(steps):
        if "loss_by_window" not in estimate.info:
            return
        got = diagnostics(estimate, 6)["loss_by_window"]
        shares = estimate.info["share_by_window"]
        assert [loss is None for loss in got] == [share == 0 for share in shares]
        assert np.sum(shares) == pytest.approx(1)
        assert shares[0] == 1 or i > 0, "all begin at once"
        seen = [(g, e) for g, e in zip(got, expected, strict=True) if g is not None]
        np.testing.assert_allclose(*zip(*seen, strict=True), rtol=1e-4)
    assert np.count_nonzero(shares) > 1, "and get out of phase"


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
            share = float(jnp.mean(state.window == 0))
            assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


@pytest.mark.parametrize("cls", [PES, NRES, GPES, TruncatedES, FullES, GuidedES])
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
