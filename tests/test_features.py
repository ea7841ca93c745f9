"""What rules see of a tensor, against dense numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt import features

SHAPES = [(), (1,), (7,), (4, 3), (3, 4), (3, 3), (1, 6), (3, 3, 2, 4), (2, 5, 5), (2, 1, 3, 1, 2)]
DECAYS = jnp.asarray([0.5, 0.9, 0.999])


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def two_largest(shape):
    """(second largest, largest) axis, found by looking: of equal axes the later is the larger."""
    largest = max(range(len(shape)), key=lambda i: (shape[i], i))
    rest = [i for i in range(len(shape)) if i != largest]
    return max(rest, key=lambda i: (shape[i], i)), largest


@pytest.mark.parametrize("shape", SHAPES)
def test_factored_moments_are_averages_of_dense_squares(shape):
    grads = [10.0**i * draw(shape, i) for i in range(3)]
    state = features.factored_init(jnp.zeros(shape), len(DECAYS))
    for grad in grads:
        state = features.factored_update(DECAYS, state, jnp.asarray(grad))
    row_scale, col_scale = features.factored_scales(state, shape)

    for channel, decay in enumerate(np.asarray(DECAYS, np.float64)):
        dense = sum(
            (1 - decay) * decay ** (len(grads) - 1 - i) * (g.astype(np.float64) ** 2 + 1e-30)
            for i, g in enumerate(grads)
        )
        if len(shape) < 2:
            assert state.col.size == 0
            np.testing.assert_allclose(state.row[channel], dense, rtol=1e-5)
            scale = dense**-0.5
        else:
            d1, d0 = two_largest(shape)
            row = dense.mean(axis=d0, keepdims=True)
            col = dense.mean(axis=d1, keepdims=True)
            np.testing.assert_allclose(state.row[channel], row, rtol=1e-5)
            np.testing.assert_allclose(state.col[channel], col, rtol=1e-5)
            # Adafactor's estimate of the second moment is row * col / mean(row)
            scale = (row * col / row.mean(axis=d1, keepdims=True)) ** -0.5
        # the published epsilon of 1e-9 beside squares of this size
        got = np.broadcast_to(row_scale[channel] * col_scale[channel], shape)
        np.testing.assert_allclose(got, np.broadcast_to(scale, shape), rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_factored_estimate_is_exact_for_squares_of_rank_one(shape):
    """Where g * g is an outer product over its axes, the factored estimate loses nothing."""
    grad = np.ones(shape)
    for axis, size in enumerate(shape):
        line = 1.0 + np.arange(size) / 2
        grad = grad * line.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    decays = jnp.zeros((1,))
    grad = jnp.asarray(grad, jnp.float32)
    state = features.factored_update(decays, features.factored_init(grad, 1), grad)
    row_scale, col_scale = features.factored_scales(state, shape)
    np.testing.assert_allclose((grad[None] * row_scale * col_scale)[0], np.ones(shape), rtol=1e-5)


def test_zero_gradients_have_finite_scales():
    for shape in SHAPES:
        state = features.factored_init(jnp.zeros(shape), 3)
        state = features.factored_update(DECAYS, state, jnp.zeros(shape))
        for scale in features.factored_scales(state, shape):
            # rsqrt is cut at 1e-9
            assert np.all(np.asarray(scale) <= 1e-9**-0.5 * 1.001)


def test_learned_decays():
    initial = (0.9, 0.99, 0.999)
    zero = features.learned_decays(initial, jnp.zeros(3))
    np.testing.assert_allclose(zero, initial, rtol=1e-6)
    # delta = log(2) / 10 doubles 1 - b, delta = -log(10) / 10 appends a nine
    doubled = features.learned_decays(initial, jnp.full(3, np.log(2.0) / 10))
    np.testing.assert_allclose(doubled, (0.8, 0.98, 0.998), rtol=1e-6)
    nines = features.learned_decays(initial, jnp.full(3, -np.log(10.0) / 10))
    np.testing.assert_allclose(nines, (0.99, 0.999, 0.9999), rtol=1e-6)
    gradient = jax.jacobian(lambda delta: features.learned_decays(initial, delta))(jnp.zeros(3))
    np.testing.assert_allclose(gradient, np.diag([-1.0, -0.1, -0.01]), rtol=1e-4)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_ema_of_a_constant(shape):
    """After n equal gradients an average without bias correction is (1 - b^n) of them."""
    grad = draw(shape)
    average = features.moments_init(jnp.zeros(shape, jnp.bfloat16), len(DECAYS))
    assert average.dtype == jnp.float32
    for n in range(1, 8):
        average = features.ema(DECAYS, average, jnp.asarray(grad))
        share = 1 - np.asarray(DECAYS, np.float64) ** n
        want = share.reshape(-1, *(1,) * len(shape)) * grad
        np.testing.assert_allclose(average, want, rtol=1e-4)


def test_time_embedding():
    taus = [1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000]
    for count in (0, 1, 17, 100_000):
        want = [np.tanh(count / tau - 1) for tau in taus]
        got = features.time_embedding(jnp.asarray(count))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


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
    theta = features.mlp_init(jax.random.key(0), (6 + 5, *hidden, 3))
    # biases that matter
    theta = {k: v + 0.1 * draw(v.shape, 5) for k, v in theta.items()}
    got = features.mlp_per_parameter(
        theta, [jnp.asarray(a) for a in arrays], jnp.asarray(shared), shape, epsilon=1e-5
    )
    want = dense_mlp(theta, [c for a in arrays for c in a], shared, shape, 1e-5)
    assert len(got) == 3
    for ours, dense in zip(got, want, strict=True):
        assert ours.shape == shape
        np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-5)


def test_mlp_init_is_truncated_normal():
    theta = features.mlp_init(jax.random.key(0), (400, 100, 3))
    assert {k: v.shape for k, v in theta.items()} == {
        "w0": (400, 100), "b0": (100,), "w1": (100, 3), "b1": (3,),
    }  # fmt: skip
    # cut at two standard deviations of a normal of standard deviation 1/sqrt(fan-in): 0.8796 of it
    # remain
    assert np.max(np.abs(theta["w0"])) <= 2 / np.sqrt(400)
    np.testing.assert_allclose(np.std(theta["w0"]), 0.8796 / np.sqrt(400), rtol=0.02)
    assert not np.any(theta["b0"])


def test_pass_through_makes_an_input_the_output():
    theta = features.mlp_init(jax.random.key(0), (5, 4, 4, 2))
    theta["w2"] = jnp.zeros((4, 2))  # of what is there, a tenth stays
    x = jax.random.normal(jax.random.key(1), (5, 7))
    outputs = features.mlp_per_parameter(
        features.pass_through(theta, channel=2), [x], jnp.zeros(0), (7,), epsilon=0.0
    )
    normalised = x[2] / jnp.sqrt(jnp.mean(x[2] ** 2))
    np.testing.assert_allclose(outputs[0], normalised, rtol=1e-5)
    np.testing.assert_array_equal(outputs[1], 0.0)
