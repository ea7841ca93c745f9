"""Composite problems stacked as one task: what each sees is what it would see alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.convex import BoxQuadratic, Lasso
from tasks.optimum import optima
from tasks.side_by_side import SideBySide

FAMILY = SideBySide(Lasso(rows=10, columns=16, density=0.3), count=3)


@pytest.fixture(scope="module")
def stacked():
    task = FAMILY(jax.random.key(0))
    alone = [jax.tree.map(lambda x, i=i: x[i], task.stacked) for i in range(3)]
    params = jax.random.normal(jax.random.key(1), (3, 16))
    return task, alone, params


def test_gradients_proximal_points_and_bounds_are_those_of_each_alone(stacked):
    task, alone, params = stacked
    keywords, grads = task.extra_args(()), jax.grad(task.smooth)(params, ())
    step = jnp.full(params.shape, 0.3)
    for i, one in enumerate(alone):
        own = one.extra_args(())
        np.testing.assert_allclose(grads[i], jax.grad(one.smooth)(params[i], ()), rtol=2e-6)
        np.testing.assert_allclose(
            keywords["prox"](params, step)[i], own["prox"](params[i], step[i]), rtol=1e-6
        )
        np.testing.assert_allclose(
            jax.grad(keywords["penalty"])(params)[i], jax.grad(own["penalty"])(params[i])
        )
        np.testing.assert_allclose(keywords["lipschitz"][i, 0], own["lipschitz"], rtol=1e-6)
    np.testing.assert_allclose(keywords["gradient"](params), grads, rtol=1e-6)


def test_the_loss_is_the_mean_of_values_relative_to_those_at_zero(stacked):
    task, alone, params = stacked
    small = 0.1 * params
    each = [
        float(one.loss(x, ()) / one.loss(0 * x, ())) for one, x in zip(alone, small, strict=True)
    ]
    assert max(each) < 2
    np.testing.assert_allclose(task.loss(small, ()), np.mean(each), rtol=1e-6)
    np.testing.assert_allclose(task.loss(task.init(jax.random.key(0)), ()), 1.0, rtol=1e-6)


@pytest.mark.parametrize("inner", [FAMILY.family, BoxQuadratic(columns=8, condition=10.0)])
def test_the_gap_is_measured_from_the_least_value(inner):
    """That of an independent solver; to what float32 tells."""
    task = SideBySide(inner, count=4, merit="gap")(jax.random.key(3))
    want = optima(task.stacked)
    starts = np.asarray(jax.vmap(lambda one: one.loss(one.init(None), ()))(task.stacked))
    assert np.abs(np.asarray(task.least) - want).max() <= 2e-6 * starts.max()
    x = task.init(jax.random.key(0)) + 0.05
    values = np.asarray(jax.vmap(lambda one, x: one.loss(x, ()))(task.stacked, x))
    digits = np.log10((values - want) / starts + 1e-6)
    np.testing.assert_allclose(task.loss(x, ()), 1 + digits.mean() / 6, rtol=1e-4)


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match="`count` must be a positive integer, got 0"):
        SideBySide(FAMILY.family, count=0)
    with pytest.raises(ValueError, match="unknown `merit` 'values'"):
        SideBySide(FAMILY.family, merit="values")  # pyright: ignore
