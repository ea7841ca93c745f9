"""Adapters: the task is the model, nothing more; models that a task cannot hold are refused."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from tasks.adapters import from_flax, from_haiku
from tasks.data import synthetic
from tasks.haiku_mlp import HaikuMLP

KEY = jax.random.key(7)


class Linen(linen.Module):
    hidden: int = 5

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(self.hidden)(x.reshape(len(x), -1)))
        return linen.Dense(3)(x)


class LinenWithState(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=False)(x.reshape(len(x), -1))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(16, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jax.nn.relu(self.layers[0](x.reshape(len(x), -1))))


class NnxWithState(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        return self.norm(x.reshape(len(x), -1))


def haiku_model(x):
    return hk.nets.MLP([5, 3])(x.reshape(len(x), -1))


def per_example(logits, targets):
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def scalar(logits, targets):
    return per_example(logits, targets).mean()


def linen_case():
    variables = Linen().init(KEY, jnp.zeros((1, 4, 4)))
    task = from_flax(Linen(), per_example, synthetic(), batch_size=8)
    return task, variables["params"], lambda x: Linen().apply(variables, x)


def nnx_case():
    model = Nnx(nnx.Rngs(KEY))
    task = from_flax(Nnx, scalar, "synthetic", batch_size=8)
    return task, nnx.to_pure_dict(nnx.state(model)), model


def haiku_case():
    transformed = hk.transform(haiku_model)
    params = transformed.init(KEY, jnp.zeros((1, 4, 4)))
    task = from_haiku(transformed, scalar, synthetic(), batch_size=8)
    return task, params, lambda x: transformed.apply(params, None, x)


@pytest.mark.parametrize("case", [linen_case, nnx_case, haiku_case])
def test_init_and_loss_are_those_of_the_model(case):
    task, expected_params, model = case()
    params = task.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    batch = task(KEY).batch(jax.random.key(1), "train")
    logits = np.asarray(model(batch.inputs), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_probabilities[np.arange(8), batch.targets].mean()
    np.testing.assert_allclose(task.loss(params, batch), expected, rtol=1e-5)
    entropy = task.data.statistics.target
    np.testing.assert_allclose(task.normalize(entropy), 1, rtol=1e-6)
    assert 1.05 < entropy < np.log(3)


@pytest.mark.parametrize("case", [linen_case, nnx_case, haiku_case])
def test_vmapped_gradients_are_those_of_each_key(case):
    task = case()[0]

    def gradient(task, key):
        return jax.grad(task.loss)(task.init(key), task.batch(key, "train"))

    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(gradient, (None, 0)))(task, keys)
    alone = gradient(task, keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-6), together, alone)


@pytest.mark.parametrize("model", [LinenWithState(), NnxWithState])
def test_flax_models_with_state_are_refused(model):
    with pytest.raises(ValueError, match="state besides its parameters"):
        from_flax(model, scalar, synthetic())


def test_haiku_models_with_state_are_refused():
    def model(x):
        return hk.BatchNorm(True, True, 0.9)(x, is_training=True)

    with pytest.raises(ValueError, match="state"):
        from_haiku(hk.transform_with_state(model), scalar, synthetic())
    with pytest.raises(ValueError, match="state"):
        from_haiku(hk.transform(model), scalar, synthetic())


def test_an_nnx_instance_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"`module` must be .* lambda rngs"):
        from_flax(Nnx(nnx.Rngs(0)), scalar, synthetic())


def test_haiku_without_apply_rng_and_untrained():
    transformed = hk.without_apply_rng(hk.transform(haiku_model))
    task = from_haiku(transformed, scalar, synthetic(), batch_size=8, untrained=4.0)
    loss = task.loss(task.init(KEY), task.batch(KEY, "train"))
    np.testing.assert_allclose(task.normalize(loss), loss / 4, rtol=1e-6)


def test_equal_families_share_one_compiled_program():
    compiled = jax.jit(lambda task, key: task.loss(task.init(key), task.batch(key, "train")))
    for seed in range(2):
        task = HaikuMLP(data=synthetic(), batch_size=8)(jax.random.key(seed))
        compiled(task, KEY)
    assert compiled._cache_size() == 1
