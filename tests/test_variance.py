"""How noisy the estimators by evolution strategies are: measured, against what Isserlis' theorem
says of a linear system, and in the order of arXiv 2304.12180.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_system import LinearSystem

from meta_train.estimators.full_es import FullES
from meta_train.estimators.gpes import GPES
from meta_train.estimators.nres import NRES
from meta_train.estimators.pes import PES
from meta_train.estimators.truncated_es import TruncatedES

LANES, BLOCKS = 6400, 16
ESTIMATORS = {
    "pes": PES(particles=1, sigma=1.0),
    "gpes": GPES(particles=1, sigma=1.0, reuse=3),
    "nres": NRES(particles=1, sigma=1.0),
    "full_es": FullES(particles=1, sigma=1.0),
    "truncated_es": TruncatedES(particles=1, sigma=1.0),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InPhase(LinearSystem):
    """All windows have the same loss, so their gradients agree; all particles begin and end their
    episodes together, so that each of the windows has its estimate.
    """

    def reset(self, theta, key, episode=0, stagger=False):
        return super().reset(theta, key, episode)


PROBLEM = InPhase(24, 4, decay=0.8, size=2)


QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def gradients(cls, estimator, keys):
    """[keys, windows, 2] of one episode per key; full ES takes but one estimate for it.

    `cls` tells the estimators apart: jax (0.10) holds the tree structures of different dataclasses
    with equal fields for equal, and may run the program of the other.
    """
    theta = jnp.zeros(2)
    count = 1 if cls is FullES else PROBLEM.windows

    def particle(key):
        def step(state, key):
            estimate, state = estimator.estimate(theta, state, key)
            return state, estimate.grad

        return jax.lax.scan(step, estimator.init(theta, key), jax.random.split(key, count))[1]

    return jax.vmap(particle)(keys)


@functools.cache
def measured(name):
    """Variance of an estimate in a window drawn at random, and that of the mean over an episode:
    each with its standard error.
    """
    estimator = dataclasses.replace(ESTIMATORS[name], problem=PROBLEM)
    keys = jax.random.split(jax.random.key(0), LANES)
    grads = np.asarray(gradients(type(estimator), estimator, keys), np.float64)
    errors = grads - PROBLEM.gradient(estimator.truncated)
    one = np.sum(errors**2, axis=-1).mean(axis=1)
    episode = np.sum(errors.mean(axis=1) ** 2, axis=-1)
    blocks = np.stack([one, episode], axis=1).reshape(BLOCKS, -1, 2).mean(axis=1)
    return blocks.mean(axis=0), blocks.std(axis=0, ddof=1) / np.sqrt(BLOCKS)


def sensitivities():
    """[windows, windows, 2]: the gradient of a window's mean loss by the theta of each window."""
    a, windows, length = np.asarray(PROBLEM.matrix()), PROBLEM.windows, PROBLEM.truncation
    found = np.zeros((windows, windows, 2))
    for t in range(PROBLEM.horizon):
        for s in range(t + 1):
            slope = PROBLEM.weights() @ np.linalg.matrix_power(a, t - s)
            found[t // length, s // length] += slope / length
    return found


def expected(name):
    """The two variances of an estimate credit * (loss difference) / 2 whose credit is the sum of m
    independent normal noises e_i and whose difference is 2 sum_i g_i . e_i.
    """
    g, windows = sensitivities(), PROBLEM.windows
    mean = PROBLEM.gradient(truncated=name == "truncated_es")
    if name == "full_es":
        return 2 * (3 * mean @ mean,)
    if name == "truncated_es":
        own = np.array([g[w, w] for w in range(windows)])
        each = 4 * np.sum(own**2, axis=1)  # E |e|^2 (g.e)^2 = (d + 2) |g|^2
        independent = each - np.sum(own**2, axis=1)
        return each.mean() - mean @ mean, independent.sum() / windows**2
    reuse = {"pes": 1, "gpes": 3, "nres": windows}[name]
    noises = np.arange(windows) // reuse  # the index of the noise that serves a window
    by_noise = np.stack([g[:, noises == n].sum(axis=1) for n in range(noises[-1] + 1)], axis=1)
    product = np.zeros((windows, windows))  # E of the scalar product of two windows' estimates
    for v, w in np.ndindex(windows, windows):
        m = min(noises[v], noises[w]) + 1
        product[v, w] = (
            2 * m * np.sum(by_noise[v] * by_noise[w])
            + by_noise[v].sum(axis=0) @ by_noise[w].sum(axis=0)
            + by_noise[v, : noises[w] + 1].sum(axis=0) @ by_noise[w, : noises[v] + 1].sum(axis=0)
        )
    return np.trace(product) / windows - mean @ mean, product.mean() - mean @ mean


@pytest.mark.parametrize("name", ESTIMATORS)
def test_variances_are_those_of_the_theory(name):
    got, error = measured(name)
    assert np.all(np.abs(got - expected(name)) < 4 * error), (got, expected(name), error)
    assert np.all(error < 0.06 * got), "too noisy to tell anything"


def assert_falls(names, quantity):
    found = [[value[quantity] for value in measured(name)] for name in names]
    for (more, its_error), (less, other_error) in itertools.pairwise(found):
        assert more - less > 4 * np.hypot(its_error, other_error), (names, found)


def test_one_estimate_is_the_less_noisy_the_longer_the_noise_is_reused():
    assert_falls(["pes", "gpes", "nres"], 0)


def test_over_an_episode_fresh_noise_is_less_noisy():
    """The estimates of an episode that reuse its noise repeat their error: their mean is full
    ES's.
    """
    assert_falls(["nres", "gpes", "pes"], 1)
    np.testing.assert_allclose(expected("nres")[1], expected("full_es")[1])


def test_at_equal_inner_steps_an_estimate_of_nres_is_less_noisy_than_full_es():
    """Windows agree, and as many particles as an episode has windows share the steps out."""
    (nres, error), (full, its_error) = (
        [x[0] / n for x in measured(name)]
        for name, n in (("nres", PROBLEM.windows), ("full_es", 1))
    )
    assert full / 2 - nres > 4 * np.hypot(its_error / 2, error)
