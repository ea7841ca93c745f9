"""The MLP per parameter, against dense numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt import mlp


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def dense_mlp(theta, channels, shared, shape, epsilon):
    """Every channel tiled, [elements, channels], and normalised, then ordinary matrix products."""
    tiled = [np.broadcast_to(c, shape).reshape(-1).astype(np.float64) for c in channels]
    x = np.stack([c / np.sqrt(np.mean(c**2) + epsilon) for c in tiled], axis=1)
    x = np.concatenate([x, np.tile(shared, (len(x), 1))], axis=1)
    layers = len(theta) // 2
    for i in range(layers):
        x = x @ np.asarray(theta[f"w{i}"], np.float64) + np.asarray(theta[f"b{i}"], np.float64)
        x = np.maximum(x, 0.0) if i < layers - 1 else x
    return [x[:, j].reshape(shape) for j in range(x.shape[1])]


@pytest.mark.parametrize("hidden", [(), (4,), (5, 3)])
@pytest.mark.parametrize("shape", [(), (7,), (4, 3), (1, 6), (2, 3, 4)])
def test_mlp_per_parameter(shape, hidden):
    rank = len(shape)
    first = tuple(1 if i == 0 else n for i, n in enumerate(shape))
    last = tuple(1 if i == rank - 1 else n for i, n in enumerate(shape))
    arrays = [100.0 * draw((2, *shape), 1), draw((1, *first), 2), 1e-4 * draw((3, *last), 3)]
    shared = draw((5,), 4)
    theta = mlp.mlp_init(jax.random.key(0), (6 + 5, *hidden, 3))
    # biases that matter
    theta = {k: v + 0.1 * draw(v.shape, 5) for k, v in theta.items()}
    got = mlp.mlp_per_parameter(
        theta, [(jnp.asarray(a),) for a in arrays], jnp.asarray(shared), shape, epsilon=1e-5
    )
    want = dense_mlp(theta, [c for a in arrays for c in a], shared, shape, 1e-5)
    assert len(got) == 3
    for ours, dense in zip(got, want, strict=True):
        assert ours.shape == shape
        np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-5)


def test_mlp_init_is_truncated_normal():
    theta = mlp.mlp_init(jax.random.key(0), (400, 100, 3))
    assert {k: v.shape for k, v in theta.items()} == {
        "w0": (400, 100), "b0": (100,), "w1": (100, 3), "b1": (3,),
    }  # fmt: skip
    # cut at two standard deviations of a normal of standard deviation 1/sqrt(fan-in): 0.8796 of it
    # remain
    assert np.max(np.abs(theta["w0"])) <= 2 / np.sqrt(400)
    np.testing.assert_allclose(np.std(theta["w0"]), 0.8796 / np.sqrt(400), rtol=0.02)
    assert not np.any(theta["b0"])


def test_pass_through_makes_an_input_the_output():
    theta = mlp.mlp_init(jax.random.key(0), (5, 4, 4, 2))
    theta["w2"] = jnp.zeros((4, 2))  # of what is there, a tenth stays
    x = jax.random.normal(jax.random.key(1), (5, 7))
    outputs = mlp.mlp_per_parameter(
        mlp.pass_through(theta, channel=2), [(x,)], jnp.zeros(0), (7,), epsilon=0.0
    )
    normalised = x[2] / jnp.sqrt(jnp.mean(x[2] ** 2))
    np.testing.assert_allclose(outputs[0], normalised, rtol=1e-5)
    np.testing.assert_array_equal(outputs[1], 0.0)
