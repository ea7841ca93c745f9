"""Where particles run changes nothing: chunks of a core's cache, the devices of a process."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_system import LinearSystem

from meta_train import chunk
from meta_train.estimators.compiled import Compiled, usable
from meta_train.estimators.nres import NRES

KEY = jax.random.key(0)


def estimates(estimator, theta, state=None, steps=3):
    state = estimator.init(theta, KEY) if state is None else state
    found = []
    for i in range(steps):
        estimate, state = estimator.estimate(theta, state, jax.random.fold_in(KEY, i))
        found.append(estimate)
    return found, state


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_share_the_particles_and_the_result_is_that_of_one(devices):
    estimator, theta = NRES(LinearSystem(12, 4, size=2), particles=8), jnp.ones(2)
    alone, old = estimates(Compiled(estimator, jax.devices()[:1]), theta)
    spread = Compiled(estimator, jax.devices()[:devices])
    shared, new = estimates(spread, theta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), shared, alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), new, old)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(new)} == {devices}
    # a state that was on one device goes on on several, as after a resume
    resumed, _ = estimates(spread, jax.device_put(theta, jax.devices()[3]), old)
    again, _ = estimates(Compiled(estimator, jax.devices()[:1]), theta, old)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), resumed, again)


@pytest.mark.parametrize(("particles", "used"), [(8, 8), (7, 7), (9, 3), (11, 1)])
def test_as_many_devices_are_used_as_divide_the_particles(particles, used):
    estimator = NRES(LinearSystem(4, 4), particles=particles)
    assert usable(estimator, jax.devices()) == jax.devices()[:used]
    ranked = dataclasses.replace(estimator, shaping="rank")  # compares all particles
    assert usable(ranked, jax.devices()) == jax.devices()[:1]


def body(x, empty):
    """Ten times: an array of 4000 bytes from a state of 400; and an array without elements."""

    def step(x, _):
        return jnp.sum(jnp.outer(jnp.ones(10), x), axis=0), None

    return jax.lax.scan(step, x, None, 10)[0], empty


def test_a_working_set_is_a_loops_state_and_twice_its_largest_array():
    x, empty = jnp.ones(100), jnp.zeros((3, 0))
    assert chunk.working_set(body, x, empty) == 400 + 2 * 4000
    assert chunk.working_set(jnp.sin, x) == 1


@pytest.mark.parametrize(("cache", "size"), [(1, 1), (8400, 1), (3 * 8400, 3), (10**9, 12)])
def test_chunks_fit_the_cache_and_change_nothing(monkeypatch, cache, size):
    monkeypatch.setattr(chunk, "CACHE", cache)
    stacked = jax.random.normal(KEY, (12, 100)), jnp.zeros((12, 3, 0))
    jaxpr = str(jax.make_jaxpr(lambda *a: chunk.mapped(body, *a))(*stacked))
    # one at a time has no axis of its own
    assert (f"f32[{size},10,100]" if size > 1 else "f32[10,100]") in jaxpr
    assert f"length={12 // size}" in jaxpr or size == 12
    got = chunk.mapped(body, *stacked)
    expected = jax.vmap(body)(*stacked)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    assert got[1].shape == (12, 3, 0)


def test_estimates_in_chunks_are_those_at_once(monkeypatch):
    estimator, theta = NRES(LinearSystem(12, 4, size=2), particles=6), jnp.ones(2)
    at_once, _ = estimates(estimator, theta)
    monkeypatch.setattr(chunk, "CACHE", 1)
    jax.clear_caches()
    one_by_one, _ = estimates(dataclasses.replace(estimator), theta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), one_by_one, at_once)
