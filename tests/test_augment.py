"""Augmentations: what each must leave unchanged, what it changes, and that they compose."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tasks import bfloat16, es_loss, gradient_augment, reduced_batch, reparam
from tasks.augment import AugmentedTask, Change, log_uniform_count
from tasks.base import behind, train_step
from tasks.bfloat16 import Bfloat16
from tasks.data import Batch, synthetic
from tasks.es_loss import SMOOTHED, ESLoss, NoisyBatch, Smoothing, smoothed
from tasks.gradient_augment import (
    Delay,
    DelayedGradients,
    Directions,
    GradientNoise,
    Noise,
    NormalizedGradients,
    RandomDirections,
    ScaledGradients,
    along_directions,
    delayed,
    normalized,
    with_noise,
)
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic
from tasks.reduced_batch import ReducedBatch, repeated_rows
from tasks.reparam import LEVELS, RESCALED, Reparam, model_params

FAMILY = ImageMLP(data=synthetic(), hidden=(4,), batch_size=16)
SMOOTH = ImageMLP(data=synthetic(), hidden=(), batch_size=16)  # no kinks
KEY = jax.random.key(0)
MODULES = (reparam, gradient_augment, es_loss, reduced_batch, bfloat16)
AUGMENTED = {type(e).__name__: e for module in MODULES for e in module.EXAMPLES}
GRADS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array(-0.25)}


def flat(tree, axes=0):
    """Leaves side by side, in float64; their first `axes` axes are kept."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*x.shape[:axes], -1) for x in leaves], axis=-1)


def stream(transformation, grads, steps):
    """The updates [steps, ...] of one run of `transformation` on always the same gradient."""

    @jax.jit
    def run(grads):
        step = lambda state, _: transformation.update(grads, state)[::-1]  # noqa: E731
        return jax.lax.scan(step, transformation.init(grads), length=steps)[1]

    return run(grads)


def within_four_errors(draws, expected):
    """The mean over the first axis is as expected, by four of its standard errors."""
    error = draws.std(axis=0) / np.sqrt(len(draws))
    np.testing.assert_array_less(np.abs(draws.mean(axis=0) - expected), 4 * error + 1e-7)


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


def composite(key):
    return Composite()


# what all have in common


@pytest.mark.parametrize("name", AUGMENTED)
def test_the_loss_at_init_validation_batches_and_normalize_are_unchanged(name):
    task = AUGMENTED[name](KEY)
    rtol = 2**-7 if name == "Bfloat16" else 1e-5  # of the params' last bit
    for seed in range(2):
        key = jax.random.key(seed)
        for split in ("valid", "test"):
            batch = task.task.batch(key, split)
            jax.tree.map(np.testing.assert_array_equal, task.batch(key, split), batch)
            expected = task.task.loss(task.task.init(key), batch)
            np.testing.assert_allclose(task.loss(task.init(key), batch), expected, rtol=rtol)
        np.testing.assert_array_equal(task.normalize(expected), task.task.normalize(expected))


def all_but_bfloat16():
    """Every augmentation around the next; rounding has no derivative."""
    family = SMOOTH
    for name in reversed(AUGMENTED):
        family = (
            dataclasses.replace(AUGMENTED[name], family=family) if name != "Bfloat16" else family
        )
    return family(KEY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", *AUGMENTED])
def test_meta_gradients_forward_and_reverse_are_those_of_finite_differences(name):
    """Of the loss after five steps of SGD, in the logarithm of its learning rate."""
    if name == "all":
        task = all_but_bfloat16()
    else:
        task = dataclasses.replace(AUGMENTED[name], family=SMOOTH)(KEY)

    def trained(log_rate):
        optimizer = behind(task, optax.sgd(jnp.exp(log_rate)))
        params = task.init(KEY)

        def step(state, key):
            return train_step(task, optimizer, *state, task.batch(key, "train"))[:2], None

        start = (params, optimizer.init(params))
        params, _ = jax.lax.scan(step, start, jax.random.split(KEY, 5))[0]
        return task.loss(params, task.batch(KEY, "valid"))

    @jax.jit
    def derivatives(x):
        h = 0.03  # an error of a hundredth by the third derivative, and of 1e-7 / h by rounding
        low, high = jax.lax.map(trained, jnp.stack([x - h, x + h]))
        return (high - low) / (2 * h), jax.jvp(trained, (x,), (1.0,))[1], jax.grad(trained)(x)

    difference, forward, reverse = derivatives(jnp.log(1.0))
    np.testing.assert_allclose(forward, reverse, rtol=2**-6 if name == "Bfloat16" else 1e-4)
    # rounding to bfloat16 makes steps of the size of the difference itself
    # two losses rounded to 2^-9 of their params are 0.06 apart
    rtol = 0.1 if name == "Bfloat16" else 0.02
    np.testing.assert_allclose(forward, difference, rtol=rtol)
    assert abs(difference) > 0.1


NESTED = {
    "inside out": Bfloat16(
        DelayedGradients(ReducedBatch(ESLoss(FAMILY, pairs=(8, 8)), (0.5, 1.0)), (2, 2))
    ),
    "outside in": ESLoss(
        ReducedBatch(DelayedGradients(Bfloat16(FAMILY), (2, 2)), (0.5, 1.0)), pairs=(8, 8)
    ),
}


@pytest.mark.parametrize("order", NESTED)
def test_compositions_train_in_either_order(order):
    task = NESTED[order](KEY)
    optimizer = behind(task, optax.adam(0.03))
    params = task.init(KEY)

    def step(state, key):
        *state, loss = train_step(task, optimizer, *state, task.batch(key, "train"))
        return tuple(state), loss

    @jax.jit
    def run(state):
        return jax.lax.scan(step, state, jax.random.split(KEY, 60))

    (params, _), losses = run((params, optimizer.init(params)))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(losses[0], losses[2], rtol=0.3)  # nothing arrives before
    assert losses[-10:].mean() < 0.7 * losses[:3].mean()


def test_smooth_extra_args_and_gradients_exist_exactly_when_the_wrapped_task_has_them():
    plain = Reparam(FAMILY)(KEY)
    for name in ("smooth", "extra_args", "gradients"):
        assert not hasattr(plain, name)
    wrapped = AugmentedTask(Composite(), jnp.array(2.0), RESCALED)
    assert float(wrapped.smooth(jnp.array(3.0), None)) == 36
    assert float(jax.grad(wrapped.smooth)(jnp.array(3.0), None)) == 24
    assert wrapped.extra_args(5) == {"step_size": 5}
    assert not hasattr(wrapped, "gradients")
    assert hasattr(Reparam(NormalizedGradients(FAMILY))(KEY), "gradients")


def test_the_smooth_part_is_smoothed_too_and_extra_args_are_given_the_wrapped_batch():
    drawn = Smoothing(jnp.array(0.5), jnp.array(1), most=1)
    task = AugmentedTask(Composite(), drawn, SMOOTHED)
    batch = task.batch(KEY, "train")
    assert task.extra_args(batch) == {"step_size": batch.batch}
    # the slope of an antithetic pair is that of a parabola, 2 x e, times e
    e = smoothed(lambda x: x, drawn, batch.key)
    squared = jax.grad(e)(jnp.array(0.0))
    np.testing.assert_allclose(jax.grad(task.smooth)(jnp.array(3.0), batch), 6 * squared, rtol=1e-5)


def test_gradients_go_through_the_inner_transformation_first():
    noisy = functools.partial(GradientNoise, scale=(0.5, 0.5))
    norms = []
    for family in (NormalizedGradients(noisy(composite)), noisy(NormalizedGradients(composite))):
        transformation = Reparam(family)(KEY).gradients
        norms.append(np.linalg.norm(flat(stream(transformation, GRADS, 400), axes=1), axis=-1))
    np.testing.assert_allclose(norms[0], 1, rtol=1e-5)
    # as much noise as a quarter of every leaf's squares
    within_four_errors(np.square(norms[1]), 1.25)


def test_scaled_gradients_are_those_of_a_larger_loss():
    task = ScaledGradients(composite, (20.0, 20.0))(KEY)
    state = task.gradients.init(GRADS)
    got, _ = task.gradients.update(GRADS, state)
    jax.tree.map(lambda g, x: np.testing.assert_allclose(g, 20.0 * x, rtol=1e-6), got, GRADS)
    between = ScaledGradients(composite, (0.1, 10.0))
    logs = np.log10([between(key).drawn for key in jax.random.split(KEY, 64)])
    assert -1 <= logs.min() < logs.max() <= 1
    assert abs(logs.mean()) < 4 * (2 / np.sqrt(12)) / 8  # uniform in the logarithm


def test_counts_are_log_uniform():
    keys = jax.random.split(KEY, 4000)
    counts = jax.vmap(lambda key: log_uniform_count(key, (2, 5)))(keys)
    found = np.bincount(counts, minlength=7) / len(keys)
    numbers = np.arange(2, 6)
    expected = np.log((numbers + 1) / numbers) / np.log(6 / 2)
    np.testing.assert_allclose(found, [0, 0, *expected, 0], atol=4 * 0.5 / np.sqrt(len(keys)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reparam(FAMILY, scale=(2.0, 1.0)), r"`scale` must be .*0 < low <= high, got \(2"),
        (lambda: GradientNoise(FAMILY, (0.0, 1.0)), "`scale`"),
        (lambda: DelayedGradients(FAMILY, (0, 3)), r"`delay` must be integers .* got \(0, 3\)"),
        (lambda: RandomDirections(FAMILY, (1, 2.5)), "`directions`"),
        (lambda: ESLoss(FAMILY, std=(0.1, float("inf"))), "`std`"),
        (lambda: ESLoss(FAMILY, pairs=(4, 2)), "`pairs`"),
        (lambda: ReducedBatch(FAMILY, (0.5, 1.5)), "`fraction` .* high <= 1"),
        (lambda: Reparam(FAMILY, "tensors"), r"`level` 'tensors'. Did you mean 'tensor'.*param"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_was(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Reparam


@pytest.mark.parametrize(("level", "distinct"), [("global", 1), ("tensor", 4), ("parameter", 83)])
def test_scales_are_drawn_per_level_within_range(level, distinct):
    scales = jax.tree.leaves(Reparam(FAMILY, level, (1e-2, 10.0))(KEY).drawn)
    values = np.concatenate([np.ravel(scale) for scale in scales])
    assert len(np.unique(values)) == distinct  # 16 * 4 + 4 + 4 * 3 + 3 parameters in 4 tensors
    assert values.min() >= 1e-2
    assert values.max() <= 10.0


def test_scales_are_log_uniform():
    keys = jax.random.split(KEY, 200)
    scales = jax.vmap(lambda key: jax.tree.leaves(Reparam(FAMILY, "tensor")(key).drawn)[0])(keys)
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
        q = jax.tree.map(lambda x, g, c: x - 0.5 / c**2 * g, q, gradient, task.drawn)
    moved = model_params(task.drawn, q)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, p)


# gradients


def test_noise_has_the_gradient_as_its_mean_and_a_share_of_its_size_as_deviation():
    draws = stream(with_noise(Noise(KEY, jnp.array(0.5))), GRADS, 4000)
    values = flat(draws, axes=1)
    within_four_errors(values, flat(GRADS))
    rms = np.sqrt([0.25**2] + 4 * [(1 + 4 + 0.25 + 9) / 4])  # b before w
    noise = (values - flat(GRADS)[None]) / rms[None]
    within_four_errors(noise**2, 0.5**2)
    within_four_errors(noise[1:] * noise[:-1], 0)  # other noise in every step
    within_four_errors(noise[:, 1:] * noise[:, :-1], 0)  # and for every parameter


@jax.jit
def sgd_step(task, params, opt_state, batch):
    return train_step(task, behind(task, optax.sgd(0.4)), params, opt_state, batch)[:2]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sgd_on_delayed_gradients_is_the_delayed_recursion(steps):
    change = Change(gradients=delayed)
    task = AugmentedTask(Quadratic(4)(KEY), Delay(jnp.array(steps), longest=3), change)
    params = task.init(KEY)
    hessian, optimum = (np.asarray(x, np.float64) for x in (task.task.hessian, task.task.optimum))
    opt_state = behind(task, optax.sgd(0.4)).init(params)
    path = [np.asarray(params, np.float64)]
    for t in range(9):
        params, opt_state = sgd_step(task, params, opt_state, jnp.zeros(4))
        late = hessian @ (path[t - steps] - optimum) if t >= steps else np.zeros(4)
        path.append(path[t] - 0.4 * late)
        np.testing.assert_allclose(params, path[-1], rtol=1e-4, atol=1e-5)


def test_delays_are_uniform_integers():
    keys = jax.random.split(KEY, 2000)
    delays = jax.vmap(lambda key: DelayedGradients(composite, (2, 4))(key).drawn.steps)(keys)
    found = np.bincount(delays, minlength=6) / len(keys)
    np.testing.assert_allclose(found, [0, 0, 1 / 3, 1 / 3, 1 / 3, 0], atol=4 * 0.5 / np.sqrt(2000))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_normalized_gradients_have_norm_one_and_their_direction_at_any_size(size):
    grads = jax.tree.map(lambda g: jnp.float32(size) * g, GRADS)
    direction = flat(GRADS) / np.linalg.norm(flat(GRADS))
    np.testing.assert_allclose(flat(stream(normalized(), grads, 1)), direction, rtol=1e-5)


def test_a_gradient_of_zero_stays_zero_with_finite_derivatives():
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    noise, directions = Noise(KEY, jnp.array(0.5)), Directions(KEY, jnp.array(3), sign=True)
    for transformation in (normalized(), with_noise(noise), along_directions(directions)):
        change = lambda grads, t=transformation: t.update(grads, t.init(grads))[0]  # noqa: E731
        updates, tangent = jax.jit(lambda f=change: jax.jvp(f, (zero,), (GRADS,)))()
        assert not flat(updates).any()
        assert np.isfinite(flat(tangent)).all()


def test_random_directions_are_unbiased_and_as_many_as_drawn():
    count, size, g = 2, 5, flat(GRADS)
    directions = Directions(KEY, jnp.array(count), sign=False)
    draws = flat(stream(along_directions(directions), GRADS, 4000), axes=1)
    within_four_errors(draws, g)
    # E |(g.v) v|^2 = (size + 2) |g|^2, and the products of two directions have the mean |g|^2
    expected = (size + 2 + count - 1) / count * (g @ g)
    within_four_errors(np.sum(draws**2, axis=1), expected)

    def project(vector):
        transformation = along_directions(directions)
        return transformation.update(vector, transformation.init(vector))[0]

    for jacobian in (jax.jacfwd(project), jax.jacrev(project)):
        matrix = np.asarray(jax.jit(jacobian)(jnp.zeros(size)))
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
        spectrum = np.linalg.svd(matrix, compute_uv=False)
        assert (spectrum > 1e-5).sum() == count


def test_signs_along_random_directions_keep_the_gradients_direction_but_not_its_size():
    directions = Directions(KEY, jnp.array(2), sign=True)
    draws = flat(stream(along_directions(directions), GRADS, 4000), axes=1)
    g = flat(GRADS)
    within_four_errors(draws, np.sqrt(2 / np.pi) * g / np.linalg.norm(g))
    # each v is kept or turned, so its squares add up to 5; the product of two means is 2 / pi
    within_four_errors(np.sum(draws**2, axis=1), (5 + 2 / np.pi) / 2)


# ESLoss


def test_value_and_gradient_are_those_of_the_antithetic_pairs_that_count():
    std, pairs, most = 0.3, 2, 4
    quartic = lambda x: jnp.sum(x**4) + x[0] * x[1]  # noqa: E731
    x = jnp.array([0.5, -1.0, 2.0])
    smoothing = Smoothing(jnp.array(std), jnp.array(pairs), most)
    value, gradient = jax.jit(jax.value_and_grad(smoothed(quartic, smoothing, KEY)))(x)
    values, gradients = [], []
    for i in range(pairs):
        e = jax.random.normal(jax.random.fold_in(KEY, i), x.shape)
        e, p = np.asarray(e, np.float64), np.asarray(x, np.float64)
        plus, minus = (np.sum(y**4) + y[0] * y[1] for y in (p + std * e, p - std * e))
        values.append((plus + minus) / 2)
        gradients.append((plus - minus) / (2 * std) * e)
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.mean(gradients, axis=0), rtol=1e-4)


def test_the_expected_gradient_on_a_quadratic_is_its_gradient_and_the_loss_is_raised():
    std, x = 0.2, np.array([1.0, -0.5])
    hessian = np.array([[1.0, 0.3], [0.3, 0.2]])
    smoothing = Smoothing(jnp.array(std), jnp.array(2), most=2)

    @jax.jit
    @jax.vmap
    def draw(key):
        loss = smoothed(lambda x: x @ (jnp.array(hessian) @ x) / 2, smoothing, key)
        return jax.value_and_grad(loss)(jnp.array(x))

    values, gradients = (np.asarray(y, np.float64) for y in draw(jax.random.split(KEY, 4000)))
    within_four_errors(gradients, hessian @ x)
    within_four_errors(values, x @ hessian @ x / 2 + std**2 / 2 * np.trace(hessian))


def test_the_estimated_gradient_has_its_true_derivative_forward_and_in_reverse():
    """As meta-gradients need: of a sum of quartics, whose gradient is 4 x^3."""
    std, x = 0.3, jnp.array([0.5, -1.0, 2.0])
    smoothing = Smoothing(jnp.array(std), jnp.array(1), most=2)
    gradient = jax.grad(smoothed(lambda x: jnp.sum(x**4), smoothing, KEY))
    e = jax.random.normal(jax.random.fold_in(KEY, 0), x.shape)
    e, p = np.asarray(e, np.float64), np.asarray(x, np.float64)
    change = 4 * (p + std * e) ** 3 - 4 * (p - std * e) ** 3
    expected = np.outer(e, change / (2 * std))
    for jacobian in (jax.jacfwd(gradient), jax.jacrev(gradient)):
        np.testing.assert_allclose(jax.jit(jacobian)(x), expected, rtol=1e-4)


def test_a_loss_without_a_gradient_gets_that_of_its_smoothing():
    """The mean of a step from 0 to 1 under normal noise rises as the normal density."""
    std, x = 0.5, 0.3
    smoothing = Smoothing(jnp.array(std), jnp.array(4), most=4)

    def draw(key):
        return jax.grad(smoothed(lambda x: jnp.heaviside(x, 0.5), smoothing, key))(jnp.array(x))

    slopes = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000)), np.float64)
    within_four_errors(slopes, np.exp(-((x / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi)))


# ReducedBatch


def test_the_first_rows_are_repeated_and_all_else_is_left():
    rows = Batch(jnp.arange(8.0).reshape(8, 1), jnp.arange(8))
    nested = NoisyBatch(rows, jax.random.key(5))
    reduced = jax.jit(repeated_rows)(nested, 3)
    np.testing.assert_array_equal(reduced.batch.targets, [0, 1, 2, 0, 1, 2, 0, 1])
    np.testing.assert_array_equal(reduced.batch.inputs[:, 0], reduced.batch.targets)
    assert reduced.key == nested.key


@pytest.mark.parametrize(("fraction", "rows"), [(0.01, 1), (0.25, 4), (0.26, 5), (1.0, 16)])
def test_as_many_rows_count_as_the_fraction_rounded_up(fraction, rows):
    task = ReducedBatch(FAMILY, (fraction, fraction))(KEY)
    batch, whole = task.batch(KEY, "train"), task.task.batch(KEY, "train")
    cycle = np.arange(16) % rows
    np.testing.assert_array_equal(batch.inputs, np.asarray(whole.inputs)[cycle])
    np.testing.assert_array_equal(batch.targets, np.asarray(whole.targets)[cycle])


def test_a_family_without_rows_cannot_be_reduced():
    with pytest.raises(ValueError, match=r"`batch` must hold rows.*float32\[4\]"):
        ReducedBatch(Quadratic(4))(KEY).batch(KEY, "train")


# Bfloat16


def test_params_gradients_and_updates_are_bfloat16_and_the_loss_is_not():
    task = Bfloat16(FAMILY)(KEY)
    params, batch = task.init(KEY), task.batch(KEY, "train")
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(params):
        loss, grads = jax.value_and_grad(task.loss)(params, batch)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return loss, grads, updates, optax.apply_updates(params, updates)

    loss, grads, updates, moved = step(params)
    for tree in (params, grads, updates, moved):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
    assert loss.dtype == jnp.float32
    # what the wrapped task computes at the rounded params is not rounded any further
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    np.testing.assert_allclose(loss, task.task.loss(rounded, batch), rtol=1e-6)
    exact = flat(jax.jit(jax.grad(task.task.loss))(rounded, batch))
    np.testing.assert_allclose(flat(grads), exact, rtol=2**-8, atol=1e-8)
