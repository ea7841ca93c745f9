import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.celo2 import orthogonalise
from learned_opt.steered import INPUTS, MOMENTA, OF_TENSOR, OUTPUTS, Steered

RULE = Steered()
SHAPES = {"b": (5,), "kernel": (4, 5), "scalar": (), "stack": (2, 3, 4)}


def theta(scale: float = 0.1):
    """The start with noise on everything, as meta-training would leave it."""
    start = RULE.init(jax.random.key(0))
    leaves, treedef = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return treedef.unflatten(noisy)


def tree(seed: int, scale: float = 1.0):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: scale * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def run(theta, steps=12, horizon=40, gradient=1.0, loss=1.0, rule=RULE, change=lambda g: g):
    """Updates of every step, on gradients and losses that do not depend on the params."""
    optimizer = rule.optimizer(theta, horizon)
    params = tree(0, 0.5)
    state, found = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for t in range(steps):
        grads = change(tree(t + 1, gradient))
        updates, state = update(grads, state, params, value=jnp.asarray(loss * (2.0 - 0.1 * t)))
        params = jax.tree.map(jnp.add, params, updates)
        found.append(updates)
    return jax.tree.map(lambda *x: np.stack(x), *found), state


def test_first_step_of_the_start_by_hand():
    """All averages are the gradient itself: its signs, which matrices orthogonalise in part."""
    updates, _ = run(RULE.init(jax.random.key(0)), steps=1)
    params, grads = tree(0, 0.5), tree(1)
    share, warm_up = 1.0 / (1.0 + np.exp(-2.0)), 0.1
    for name, shape in SHAPES.items():
        p = np.asarray(params[name], np.float64)
        matrix = len(shape) > 1
        usual = 0.3 / np.sqrt(shape[-2]) if matrix else 0.3
        size = np.sqrt(np.mean(p * p) + usual**2) * (0.01 if matrix else 0.03)
        d = np.sign(grads[name])
        if matrix:
            o = np.asarray(orthogonalise(jnp.asarray(d)))
            d = (1 - share) * d + share * o / np.sqrt(np.mean(o * o, (-2, -1), keepdims=True))
        np.testing.assert_allclose(updates[name][0], -warm_up * size * d, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("gradient", "loss"), [(1e-6, 1.0), (1e6, 1.0), (1.0, 1e4)])
def test_units_of_gradients_and_losses_do_not_matter(gradient, loss):
    mine, _ = run(theta())
    other, _ = run(theta(), gradient=gradient, loss=loss)
    for name in SHAPES:
        np.testing.assert_allclose(other[name], mine[name], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_gradients_that_are_not_finite_count_as_zero(value):
    def with_(value):
        return lambda g: g | {"kernel": g["kernel"].at[0].set(value)}

    lost, _ = run(theta(), change=with_(value))
    zero, _ = run(theta(), change=with_(0.0))
    jax.tree.map(np.testing.assert_array_equal, lost, zero)


def test_a_lost_tensor_leaves_the_others_alone():
    optimizer = RULE.optimizer(theta(), 40)
    params = tree(0, 0.5)
    state = optimizer.init(params)
    lost = params | {"b": jnp.full((5,), 1e25)}
    for _ in range(2):
        updates, state = optimizer.update(tree(1), state, lost, value=jnp.ones(()))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


def test_a_horizon_beyond_float32():
    updates, _ = run(theta(), steps=3, horizon=10**9)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


def test_order_of_tensors_does_not_matter():
    optimizer = RULE.optimizer(theta(), 40)
    params, grads = tree(0, 0.5), tree(1)
    renamed = dict(zip("dcba", SHAPES, strict=True))  # the other way round in jax.tree.leaves
    state = optimizer.init(params)
    other = optimizer.init({new: params[old] for new, old in renamed.items()})
    for _ in range(3):
        updates, state = optimizer.update(grads, state, params, value=jnp.ones(()))
        swapped, other = optimizer.update(
            {new: grads[old] for new, old in renamed.items()},
            other,
            {new: params[old] for new, old in renamed.items()},
            value=jnp.ones(()),
        )
    for new, old in renamed.items():
        np.testing.assert_allclose(swapped[new], updates[old], rtol=1e-5, atol=1e-8)


def test_steps_end_at_the_horizon():
    updates, _ = run(RULE.init(jax.random.key(0)), steps=60, horizon=40)
    sizes = np.abs(updates["b"]).max(axis=1)
    assert sizes[:12].max() == sizes.max()
    # after 39 of 40 steps 1/40 of the anneal is left, later a thousandth
    assert sizes[39] < 0.05 * sizes.max()
    assert sizes[41:].max() < 0.01 * sizes.max()


def test_drift_follows_agreement_of_gradients():
    signs = itertools.cycle([1.0, -1.0])
    changes = {
        "same": lambda _: tree(1),
        "opposite": lambda _: optax.tree.scale(next(signs), tree(1)),
    }
    drifts = {
        name: np.asarray(run(RULE.init(jax.random.key(0)), change=change)[1].watched.log_step)
        for name, change in changes.items()
    }
    assert np.all(drifts["same"] > 0.5)
    assert np.all(drifts["opposite"] < 0.0)


def test_without_orthogonalisation_the_share_is_zero():
    none = theta()
    w = none["steer"]["w"].at[:, 2].set(0.0)
    none = none | {"steer": {"w": w, "b": none["steer"]["b"].at[2].set(-100.0)}}
    mine, _ = run(none)
    other, _ = run(theta(), rule=Steered(orthogonalise=False))
    for name in SHAPES:
        np.testing.assert_allclose(other[name], mine[name], rtol=1e-4, atol=1e-7)


def test_sizes_of_the_map():
    """As the card's 338 numbers: 47 inputs, of which 14 are of a tensor and 14 of all."""
    assert (INPUTS, OF_TENSOR, OUTPUTS, MOMENTA) == (47, 14, 7, 3)
    assert sum(x.size for x in jax.tree.leaves(RULE.init(jax.random.key(0)))) == 338
