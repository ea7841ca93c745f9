"""Dynamic configuration: each drawn condition does what it says, and to training batches alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks.data import synthetic
from tasks.dynamic import ACTIVATIONS, Dynamic
from tasks.image_mlp import ImageMLP

PLAIN = ImageMLP(data=synthetic(), hidden=(5,), batch_size=20, dynamic=Dynamic())
KEY = jax.random.key(3)
ROW = {x.tobytes(): i for i, x in enumerate(synthetic().inputs)}


def family(**ranges):
    return dataclasses.replace(PLAIN, dynamic=Dynamic(**ranges))


def rows(batches):
    inputs = np.asarray(batches.inputs)
    numbers = [ROW[x.tobytes()] for x in inputs.reshape(-1, *inputs.shape[-2:])]
    return np.array(numbers).reshape(inputs.shape[:-2])


def batches(task, split, count=30):
    keys = jax.random.split(jax.random.key(8), count)
    return jax.vmap(lambda key: task.batch(key, split))(keys)


def test_what_has_one_value_is_plain():
    task = PLAIN(KEY)
    for ranges in ({"init_scale": (1.0, 1.0)}, {"activation": ("relu",)}):
        other = family(**ranges)(KEY)
        loss, expected = (t.loss(t.init(KEY), t.batch(KEY, "train")) for t in (other, task))
        assert float(loss) == float(expected)


def test_subset_takes_the_first_rows_of_the_training_split_alone():
    task = family(subset=(0.25, 0.25))(KEY)
    start, stop = synthetic().splits[0]
    assert set(rows(batches(task, "train")).ravel()) == set(
        range(start, start + (stop - start) // 4)
    )
    assert len(set(rows(batches(task, "valid")).ravel())) == 18


def test_batch_fraction_is_the_share_of_distinct_rows():
    task = family(batch_fraction=(0.22, 0.22))(KEY)  # ceil(4.4) = 5 of 20
    drawn = rows(batches(task, "train"))
    np.testing.assert_array_equal(drawn, np.tile(drawn[:, :5], 4))
    whole = rows(batches(PLAIN(KEY), "train"))
    np.testing.assert_array_equal(drawn[:, :5], whole[:, :5])
    np.testing.assert_array_equal(rows(batches(task, "test")), rows(batches(PLAIN(KEY), "test")))


def test_label_noise_is_of_the_stated_share_and_fixed_for_the_episode():
    noise, label = 0.4, synthetic().targets
    noisy = family(label_noise=(noise, noise))
    drawn = jax.vmap(lambda key: batches(noisy(key), "train", 40))(jax.random.split(KEY, 60))
    shares = []
    for numbers, targets in zip(rows(drawn), np.asarray(drawn.targets), strict=True):
        seen = {}
        for row, target in zip(numbers.ravel(), targets.ravel(), strict=True):
            assert seen.setdefault(row, target) == target
        shares.append(np.mean([target != label[row] for row, target in seen.items()]))
    # a random label of three is wrong two times in three; 84 rows
    expected = noise * 2 / 3
    error = np.sqrt(expected * (1 - expected) / 84 / len(shares))
    assert abs(np.mean(shares) - expected) < 4 * error
    held_out = batches(family(label_noise=(1.0, 1.0))(KEY), "valid")
    np.testing.assert_array_equal(held_out.targets, label[rows(held_out)])


def test_init_scale_multiplies_matrices_log_uniformly():
    keys = jax.random.split(KEY, 400)
    scaled = family(init_scale=(0.1, 10.0))
    weights = jax.vmap(lambda key: scaled(key).init(KEY)["linear_0"]["w"])(keys)
    ratios = np.asarray(weights / PLAIN(KEY).init(KEY)["linear_0"]["w"][None])
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[:, :1, :1], ratios.shape), rtol=1e-5)
    exponents = np.log10(ratios[:, 0, 0])
    assert abs(exponents).max() <= 1 + 1e-6
    assert abs(exponents.mean()) < 4 * (2 / np.sqrt(12)) / np.sqrt(400)
    assert exponents.std() == pytest.approx(2 / np.sqrt(12), rel=0.12)


def test_l2_adds_half_the_sum_of_squares_to_the_loss():
    task, batch = family(l2=(0.3, 0.3))(KEY), PLAIN(KEY).batch(KEY, "train")
    params = jax.tree.map(lambda p: p + 0.1, task.init(KEY))
    squares = sum(np.sum(np.asarray(p, np.float64) ** 2) for p in jax.tree.leaves(params))
    difference = task.loss(params, batch) - PLAIN(KEY).loss(params, batch)
    np.testing.assert_allclose(difference, 0.15 * squares, rtol=1e-4)


def test_the_drawn_activation_is_the_one_used():
    names = tuple(ACTIVATIONS)
    mixed = family(activation=names)
    keys = jax.random.split(KEY, 40)
    params, batch = PLAIN(KEY).init(KEY), PLAIN(KEY).batch(KEY, "train")
    losses = jax.vmap(lambda key: mixed(key).loss(params, batch))(keys)
    expected = jnp.stack([family(activation=(name,))(KEY).loss(params, batch) for name in names])
    index = jax.vmap(lambda key: mixed(key).drawn.activation)(keys)
    np.testing.assert_allclose(losses, expected[index], rtol=1e-6)
    assert set(np.asarray(index)) == set(range(len(names)))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"activation": ("rleu",)}, "`activation` 'rleu'. Did you mean 'relu'"),
        ({"init_scale": (0.0, 1.0)}, r"`init_scale` must be \(low, high\) with 0 < low"),
        ({"subset": (0.5, 1.5)}, "`subset`.*<= 1, got"),
        ({"batch_fraction": (0.5, 0.2)}, "`batch_fraction`"),
        ({"label_noise": (0.5, 1.2)}, "`label_noise`"),
        ({"l2": (0.0, 1.0)}, "`l2`"),
    ],
)
def test_impossible_ranges_are_refused(ranges, message):
    with pytest.raises(ValueError, match=message):
        Dynamic(**ranges)


def test_label_noise_needs_labels():
    regression = ImageMLP(data="diabetes", dynamic=Dynamic(label_noise=(0.1, 0.1)))
    with pytest.raises(ValueError, match=r"`label_noise` is for one class per row.*diabetes"):
        regression(KEY).batch(KEY, "train")
