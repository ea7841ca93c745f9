"""The contract of every task family, whatever it is, and the closed forms of the quadratic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tasks
from learned_opt import discovery
from tasks.base import behind, train_step
from tasks.data import SPLITS, Batch, synthetic
from tasks.dynamic import Dynamic
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic
from tasks.suites import suite

EXAMPLES = discovery.examples(tasks)
IDS = [discovery.spec_of(example) for example in EXAMPLES]
STEPS = 60
for_each_family = pytest.mark.parametrize("index", range(len(EXAMPLES)), ids=IDS)


def _train(family, key):
    """The losses of `STEPS` steps of Adam, and those normalised."""
    task = family(key)
    optimizer = behind(task, optax.adam(0.03))
    params = task.init(jax.random.fold_in(key, 1))

    def step(state, key):
        *state, loss = train_step(task, optimizer, *state, task.batch(key, "train"))
        return tuple(state), (loss, task.normalize(loss))

    keys = jax.random.split(jax.random.fold_in(key, 2), STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]


@functools.cache
def trained(index):
    """Compiled once for all tests of a family: equal keys first and second, another third."""
    keys = jax.vmap(jax.random.key)(jnp.array([0, 0, 1]))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(_train, (None, 0)))(EXAMPLES[index], keys))


@for_each_family
def test_vmapped_training_is_finite_deterministic_and_progresses(index):
    losses, normalised = trained(index)
    assert losses.shape == (3, STEPS)
    assert np.isfinite(losses).all()
    np.testing.assert_array_equal(losses[0], losses[1])
    # the first may be equal: that of a start at zero, where no data are seen
    assert (losses[0, 1:] != losses[2, 1:]).all()
    assert (losses[:, -10:].mean(axis=1) < 0.8 * losses[:, :5].mean(axis=1)).all()
    assert ((normalised >= 0) & (normalised <= 2)).all()
    assert (normalised[:, -10:].mean(axis=1) < normalised[:, :5].mean(axis=1)).all()


@for_each_family
def test_normalize_is_bounded_whatever_the_loss(index):
    task = EXAMPLES[index](jax.random.key(0))
    loss = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e30, 0.0, -1.0])
    np.testing.assert_array_equal(task.normalize(loss), [2, 2, 2, 2, 0, 0])


@for_each_family
def test_the_spec_of_a_family_builds_it(index):
    family, members = EXAMPLES[index], discovery.members(tasks)
    built = discovery.build("task", discovery.spec_of(family), members)
    assert built == family
    assert jax.tree.structure(built) == jax.tree.structure(family)


@for_each_family
def test_splits_share_no_row(index):
    task = EXAMPLES[index](jax.random.key(0))
    if not isinstance(task.batch(jax.random.key(0), "train"), Batch):
        pytest.skip("an endless stream, not a dataset")
    keys = jax.random.split(jax.random.key(0), 20)
    seen = []
    for split in SPLITS:
        batches = jax.vmap(lambda key, split=split: task.batch(key, split))(keys)
        inputs = jax.tree.leaves(batches.inputs)[0]  # a VAE's go with noise
        seen.append({row.tobytes() for batch in np.asarray(inputs) for row in batch})
    assert all(len(rows) > 5 for rows in seen)
    assert len(set.union(*seen)) == sum(map(len, seen))


@for_each_family
def test_families_and_tasks_are_pytrees(index):
    family = EXAMPLES[index]
    task = family(jax.random.key(0))
    for tree in (family, task):
        leaves, structure = jax.tree.flatten(tree)
        assert all(isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves)
        jax.tree.unflatten(structure, [object()] * len(leaves))  # as jax does with placeholders
        hash(structure)
    assert jax.tree.structure(family(jax.random.key(1))) == jax.tree.structure(task)


def test_datasets_are_arguments_not_constants():
    data = synthetic(shape=(16, 16), rows=4000)  # 4 MB
    family = ImageMLP(data=data, hidden=(8,), batch_size=16)

    def loss(family, key):
        task = family(key)
        return task.loss(task.init(key), task.batch(key, "train"))

    text = jax.jit(loss).lower(family, jax.random.key(0)).as_text()
    assert len(text) < 100_000


def test_mlp_by_hand():
    family = ImageMLP(
        data=synthetic(), hidden=(5,), batch_size=16, dynamic=Dynamic(init_scale=(0.3, 0.3))
    )
    task = family(jax.random.key(0))
    params = task.init(jax.random.key(1))
    batch = task.batch(jax.random.key(2), "train")
    (w0, b0), (w1, b1) = ((np.asarray(p["w"]), np.asarray(p["b"])) for p in params.values())
    x = np.asarray(batch.inputs).reshape(16, 16)
    logits = np.maximum(x @ w0 + b0[None], 0) @ w1 + b1[None]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(probabilities[np.arange(16), batch.targets]).mean()
    np.testing.assert_allclose(task.loss(params, batch), expected, rtol=1e-5)
    shares = np.bincount(family.data.targets[slice(*family.data.splits[0])]) / 84
    entropy = -np.sum(shares * np.log(shares))
    np.testing.assert_allclose(task.normalize(entropy), 1, rtol=1e-6)
    assert w0.std() == pytest.approx(0.3 / 4, rel=0.3)


def test_quadratic_against_its_closed_form():
    family = Quadratic(dimension=6, condition=(50.0, 50.0), noise=0.1)
    task = family(jax.random.key(0))
    hessian = np.asarray(task.hessian, np.float64)
    spectrum = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-6)
    np.testing.assert_allclose(spectrum[[0, -1]], [1 / 50, 1], rtol=1e-4)
    x, noise = task.init(jax.random.key(1)), task.batch(jax.random.key(2), "train")
    gradient = jax.grad(task.loss)(x, noise)
    np.testing.assert_allclose(gradient, hessian @ (x - task.optimum) + noise, atol=1e-5)
    np.testing.assert_allclose(jax.hessian(task.loss)(x, noise), hessian, atol=1e-5)
    assert float(task.loss(task.optimum, noise)) == 0


def test_quadratic_is_normalised_by_its_expected_initial_loss():
    task = Quadratic(dimension=6, noise=0.1)(jax.random.key(3))
    keys = jax.random.split(jax.random.key(4), 20_000)
    losses = jax.vmap(lambda k: task.loss(task.init(k), jnp.zeros(6)))(keys)
    np.testing.assert_allclose(task.normalize(losses.mean()), 1, rtol=0.03)
    assert float(jax.vmap(lambda k: task.batch(k, "test"))(keys).std()) == pytest.approx(
        0.1, rel=0.02
    )


def test_suites():
    train, heldout = suite("train/quick"), suite("heldout/quick")
    assert list(train) == ["digits_mlp"]
    assert list(heldout) == ["digits_conv", "digits_mlp", "breast_cancer_mlp"]
    trained_on = {row.tobytes() for row in train["digits_mlp"].data.inputs}
    for family in heldout.values():
        shared = {row.tobytes() for row in family.data.inputs} & trained_on
        assert not shared
        assert type(family) is not type(train["digits_mlp"])
    with pytest.raises(ValueError, match=r"`suite` 'heldout/quik'. Did you mean 'heldout/quick'"):
        suite("heldout/quik")
