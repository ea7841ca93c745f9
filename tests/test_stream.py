"""Data that stay on the host: the same batches and losses as on the device, fetched in time."""

import dataclasses
import functools
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from evaluation import cache
from evaluation.baselines import Baseline
from evaluation.curve import train_curves
from learned_opt.hyperparams import Hyperparams
from meta_train.estimators.nres import NRES
from meta_train.unroll import Training
from tasks import data, stream
from tasks.dynamic import Dynamic
from tasks.image_mlp import ImageMLP

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, (2, 3))


def draws(dataset, keys):
    """[2, 3, 8] rows, by a scan of vmaps."""

    def step(count, keys):
        return count + 1, jax.vmap(lambda key: dataset.batch(key, "train", 8))(keys)

    return jax.lax.scan(step, 0, keys)[1]


def family(name):
    """With all that a draw may do to rows."""
    dynamic = Dynamic(batch_fraction=(0.3, 1.0), subset=(0.5, 1.0), label_noise=(0.2, 0.2))
    # no unit can be dead, whose gradient of zero would make that through Adam's root NaN
    return ImageMLP(data=name, hidden=(), batch_size=8, dynamic=dynamic)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("name", ["synthetic", "wine/held_out"])
def test_batches_are_those_of_the_resident_dataset(name, backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # decides how it calls back
    resident, streamed = data.load(name), data.load(f"stream:{name}")
    assert not any(leaf.ndim > 1 for leaf in jax.tree.leaves(streamed))
    calls, read = [], stream.HostArray._read
    monkeypatch.setattr(
        stream.HostArray, "_read", lambda *args: calls.append(args[1][0].shape) or read(*args)
    )
    got = jax.jit(lambda keys: draws(streamed, keys))(KEYS)  # traced anew for each backend
    expected = jax.jit(draws)(resident, KEYS)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert calls == [(3, 8)] * 2  # under vmap one call for all


def test_every_device_gets_its_own_rows():
    dataset, keys = data.load("stream:synthetic"), jax.random.split(KEY, 4)
    mesh, split = Mesh(np.array(jax.devices()[:4]), ("keys",)), PartitionSpec("keys")
    # 120 kB of row numbers: as operands of jax.pure_callback, they make CPU devices wait forever
    batch = jax.vmap(lambda key: dataset.take(dataset.rows(key, "train", 30_000)))
    batches = jax.jit(jax.shard_map(batch, mesh=mesh, in_specs=split, out_specs=split))(keys)
    for key, inputs in zip(keys, np.asarray(batches.inputs), strict=True):
        rows = data.synthetic().rows(key, "train", 30_000)
        np.testing.assert_array_equal(inputs, data.synthetic().inputs[rows])


def test_meta_training_computes_the_same_and_fetches_ahead():
    """In two truncations of four blocks each, the first block of a truncation is waited for."""
    found = []
    for name in ("synthetic", "stream:synthetic"):
        problem = Training(family(name), Hyperparams(knots=2), 16, 8, objective="mean_valid")
        estimator, theta = NRES(problem, particles=2), problem.rule.init(KEY)
        state, step, ahead = estimator.init(theta, KEY), jax.jit(estimator.estimate), []
        for i in range(2):
            ahead.append(getattr(problem.family.data.inputs, "fetched_ahead", 0))
            estimate, state = step(theta, state, jax.random.fold_in(KEY, i))
            found.append((estimate, state))
        ahead.append(getattr(problem.family.data.inputs, "fetched_ahead", 0))
        assert list(np.diff(ahead)) == ([3, 3] if name.startswith("stream:") else [0, 0])
    for resident, streamed in zip(found[:2], found[2:], strict=True):
        np.testing.assert_allclose(resident[0].loss, streamed[0].loss, rtol=1e-6)
        # a difference of losses, hence their rounding, over the size of a perturbation
        error = 10 * np.finfo(np.float32).eps / estimator.sigma
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=error)
        jax.tree.map(close, resident, streamed)


def losses(problem, theta):
    return problem.unroll(theta, problem.reset(theta, KEY), KEY)[0].losses


@pytest.mark.parametrize("remat", [False, True])
def test_steps_on_what_streams_are_differentiable(remat):
    problem = Training(family("stream:synthetic"), Hyperparams(knots=2), 6, 6, remat)
    theta, run = problem.rule.init(KEY), functools.partial(losses, problem)
    jax.eval_shape(lambda t: jax.jvp(run, (t,), (t,)), theta)
    jax.eval_shape(lambda t: jax.vjp(run, t)[1](jnp.ones(6)), theta)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_through_steps_are_the_same(remat):
    gradients = []
    for name in ("synthetic", "stream:synthetic"):
        problem = Training(family(name), Hyperparams(knots=2), 6, 6, remat)
        gradient = jax.jit(jax.grad(lambda t, p=problem: jnp.sum(losses(p, t))))
        gradients.append(gradient(problem.rule.init(KEY))["log_learning_rate"])
    assert np.all(np.isfinite(gradients[0]) & (gradients[0] != 0))
    np.testing.assert_allclose(*gradients, rtol=1e-4)


def test_evaluation_computes_the_same():
    curves = [
        train_curves(
            family(name), optax.sgd, jnp.array([0.1, 0.3]), steps=5, seeds=2, key=KEY, evals=2,
            eval_batches=2,
        )
        for name in ("synthetic", "stream:synthetic")
    ]  # fmt: skip
    for loss in ("train", "valid", "test"):
        np.testing.assert_allclose(*(getattr(c, loss) for c in curves), rtol=1e-6)


@pytest.fixture
def counted():
    """An array of 50 rows [row, row], and the rows that were fetched one after the other."""
    array = stream.HostArray(np.repeat(np.arange(50, dtype=np.uint8)[::-1, None], 2, axis=1),
                             order=np.arange(50)[::-1])  # fmt: skip
    fetched, fetch = [], array._fetch
    array._fetch = lambda rows, out=None: fetched.append(list(rows[0])) or fetch(rows, out)
    return array, fetched


def test_what_was_announced_is_used_only_if_it_is_asked_for(counted):
    array, fetched = counted
    gather = jax.jit(lambda *rows: array.gather([rows[0]], rows[1:])[0])
    none, rows = jnp.full(3, -1), [jnp.array([i, i + 1, 49 - i]) for i in range(4)]
    asked = [(0, rows[1]), (1, rows[3]), (2, rows[3]), (3, none), (3, none)]
    for i, following in asked:
        got = np.asarray(gather(rows[i], following))
        np.testing.assert_array_equal(got, np.repeat(rows[i][:, None], 2, axis=1))
    assert array.fetched_ahead == 2  # of 1 and of 3, though 2 came between
    assert sorted(fetched) == sorted(list(map(int, rows[i])) for i in (0, 1, 2, 3, 3))


def test_no_more_blocks_are_kept_than_there_are_devices(counted, monkeypatch):
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    array, _ = counted
    before = threading.active_count()
    for i in range(6):
        array._read([np.array([9])], [np.array([i])])
    assert len(array._fetched) == 2
    for i in (5, 4, 3):
        np.testing.assert_array_equal(array._read([np.array([i])], [])[0], [[i, i]])
    assert array.fetched_ahead == 2
    assert threading.active_count() <= before
    assert not array._fetched


def test_an_error_in_the_background_is_raised_where_the_block_is_asked_for(counted):
    array, _ = counted
    fetch, array._fetch = array._fetch, None
    array._begin([np.array([1])])
    array._fetch = fetch
    with pytest.raises(TypeError, match="not callable"):
        array._read([np.array([1])], [])
    np.testing.assert_array_equal(array._read([np.array([1])], [])[0], [[1, 1]])


def test_a_name_gives_the_same_object_also_after_a_journey():
    dataset = data.load("stream:synthetic/meta_train")
    assert repr(dataset) == "'stream:synthetic/meta_train'"
    assert dataset.fingerprint == data.load("synthetic/meta_train").fingerprint
    assert dataset.statistics == data.load("synthetic/meta_train").statistics
    pickled = pickle.dumps(dataset)
    assert pickle.loads(pickled).inputs is dataset.inputs
    assert len(pickled) < dataset.inputs[:].nbytes + 1000
    other = stream.HostArray(np.ones((2, 3), np.float32))
    assert pickle.loads(pickle.dumps(other)).fingerprint == other.fingerprint


def test_cached_results_are_told_apart_by_the_content_of_what_streams():
    baseline = Baseline("sgd", lambda learning_rate, weight_decay: optax.sgd(learning_rate), (0.1,))
    rows = np.asarray(data.synthetic().inputs)

    def digest(content):
        inputs = stream.HostArray(content)
        dataset = dataclasses.replace(data.load("stream:synthetic"), inputs=inputs)
        return cache.content_hash(ImageMLP(data=dataset, hidden=(2,), batch_size=4), baseline)

    assert digest(rows) == digest(rows.copy())
    assert digest(rows) != digest(1 - rows)


def test_what_does_not_fit_the_device_is_refused_with_the_way_out(monkeypatch):
    device = dataclasses.make_dataclass("Device", ["memory_stats"])
    monkeypatch.setattr(data, "LARGE", 1000)
    monkeypatch.setattr(jax, "local_devices", lambda: [device(lambda: {"bytes_limit": 2**21})])
    rows = data.Rows(np.zeros((1000, 64, 64), np.uint8), np.arange(1000) % 2, 2)
    with pytest.raises(ValueError, match=r"`name` 'big'.*GiB of rows.*'stream:big' leaves"):
        data.split("big", rows)
    assert data.split("big", rows, "held_out").shape == (64, 64)  # half of them fit
    assert isinstance(data.split("stream:big", rows).inputs, stream.HostArray)
    monkeypatch.setattr(jax, "local_devices", lambda: [device(lambda: None)])  # as CPUs do
    data.split("big", rows)


def test_the_memory_of_a_program_does_not_hold_the_data():
    def loss(family, key):
        task = family(key)
        return task.loss(task.init(key), task.batch(key, "train"))

    rows = data.Rows(np.zeros((4000, 16, 16), np.uint8), np.arange(4000) % 2, 2)
    task = ImageMLP(data=data.split("stream:zeros", rows), hidden=(2,), batch_size=4)
    lowered = jax.jit(loss).lower(task, KEY)
    assert len(lowered.as_text()) < 100_000
    inputs = jax.tree.leaves(lowered.in_avals)
    assert sum(a.size for a in inputs) <= 4001  # targets and a key
