"""Reparametrisation: what it must leave unchanged, at each level."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.augment import LEVELS, Reparam, ReparamTask
from tasks.data import synthetic
from tasks.image_mlp import ImageMLP

FAMILY = ImageMLP(data=synthetic(), hidden=(4,), batch_size=16)
KEY = jax.random.key(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Composite:
    """x^2 + |x|, of which only the square is differentiated."""

    def init(self, key):
        return jnp.array(3.0)

    def batch(self, key, split):
        return jnp.array(1.0)

    def loss(self, params, batch):
        return self.smooth(params, batch) + jnp.abs(params)

    def smooth(self, params, batch):
        return params**2

    def extra_args(self, batch):
        return {"step_size": batch}

    def normalize(self, loss):
        return loss


@pytest.mark.parametrize("level", LEVELS)
def test_the_loss_at_init_is_unchanged(level):
    task = Reparam(FAMILY, level)(KEY)
    for seed in range(3):
        key = jax.random.key(seed)
        batch = task.batch(key, "valid")
        expected = task.task.loss(task.task.init(key), batch)
        np.testing.assert_allclose(task.loss(task.init(key), batch), expected, rtol=1e-5)
        np.testing.assert_array_equal(task.normalize(expected), task.task.normalize(expected))


@pytest.mark.parametrize(("level", "distinct"), [("global", 1), ("tensor", 4), ("parameter", 83)])
def test_scales_are_drawn_per_level_within_range(level, distinct):
    scales = jax.tree.leaves(Reparam(FAMILY, level, (1e-2, 10.0))(KEY).scales)
    values = np.concatenate([np.ravel(scale) for scale in scales])
    assert len(np.unique(values)) == distinct  # 16 * 4 + 4 + 4 * 3 + 3 parameters in 4 tensors
    assert values.min() >= 1e-2
    assert values.max() <= 10.0


def test_scales_are_log_uniform():
    keys = jax.random.split(KEY, 200)
    scales = jax.vmap(lambda key: jax.tree.leaves(Reparam(FAMILY, "tensor")(key).scales)[0])(keys)
    exponents = np.log10(scales)
    assert exponents.mean() == pytest.approx(0, abs=0.4)
    assert exponents.std() == pytest.approx(6 / np.sqrt(12), rel=0.15)


@pytest.mark.parametrize("level", LEVELS)
def test_sgd_with_the_rate_over_the_squared_scale_follows_the_same_path(level):
    task = Reparam(FAMILY, level, (0.1, 10.0))(KEY)
    p, q = task.task.init(KEY), task.init(KEY)
    for step in range(3):
        batch = task.batch(jax.random.key(step), "train")
        p = jax.tree.map(lambda x, g: x - 0.5 * g, p, jax.grad(task.task.loss)(p, batch))
        gradient = jax.grad(task.loss)(q, batch)
        q = jax.tree.map(lambda x, g, c: x - 0.5 / c**2 * g, q, gradient, task.scales)
    moved = task.model_params(q)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, p)


def test_smooth_and_extra_args_exist_exactly_when_the_wrapped_task_has_them():
    plain = Reparam(FAMILY)(KEY)
    assert not hasattr(plain, "smooth")
    assert not hasattr(plain, "extra_args")
    wrapped = ReparamTask(Composite(), jnp.array(2.0))
    assert float(wrapped.smooth(jnp.array(3.0), None)) == 36
    assert float(jax.grad(wrapped.smooth)(jnp.array(3.0), None)) == 24
    assert wrapped.extra_args(5) == {"step_size": 5}


def test_a_wrong_level_lists_what_exists():
    with pytest.raises(ValueError, match=r"`level` 'tensors'. Did you mean 'tensor'.*parameter"):
        Reparam(FAMILY, "tensors")
