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
