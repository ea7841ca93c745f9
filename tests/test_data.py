"""Datasets: splits, halves, names, and the TFDS route without TensorFlow and without network."""

import functools
import os
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tasks import data, tfds_source

NO_STATISTICS = data.Statistics(0.0, 0.0, 0.0)


class TinyImages(tfds.core.GeneratorBasedBuilder):
    """40 constant 6x6 images of brightness 5 * row, labelled row % 4."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Tensor(shape=(6, 6, 1), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=4),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        with open(os.environ["TFDS_DATA_DIR"] + "/prepared.log", "a") as log:
            log.write("once\n")
        for row in range(40):
            image = np.full((6, 6, 1), 5 * row, np.uint8)
            yield row, {"image": image, "label": row % 4}


class TinyNumbers(TinyImages):
    """40 rows (row, row ** 2) with the real target 3 * row + 1."""

    def _info(self):
        features = {
            "numbers": tfds.features.Tensor(shape=(2,), dtype=np.float64),
            "value": tfds.features.Scalar(np.float32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("numbers", "value"),
        )

    def _generate_examples(self):
        for row in range(40):
            yield row, {"numbers": np.array([row, row**2], np.float64), "value": 3 * row + 1}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders for TFDS and for our cache; no dataset is remembered."""
    (tmp_path / "tfds").mkdir()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("LEARNED_OPT_CACHE", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    # a memory of its own: other tests hold what the process has loaded
    monkeypatch.setattr(data, "load", functools.cache(data.load.__wrapped__))
    return tmp_path


def row_set(dataset, split):
    start, stop = dataset.splits[data.SPLITS.index(split)]
    return {row.tobytes() for row in np.asarray(dataset.inputs[start:stop])}


def test_halves_and_splits_share_no_row():
    whole, *halves = (data.load(f"synthetic{part}") for part in ("", "/meta_train", "/held_out"))
    groups = [row_set(half, split) for half in halves for split in data.SPLITS]
    assert [len(group) for group in groups] == [42, 9, 9, 42, 9, 9]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 120
    assert set.union(*groups) == set.union(*(row_set(whole, split) for split in data.SPLITS))


def test_batches_are_rows_of_their_split_with_their_targets():
    dataset = data.synthetic()
    target_of = {x.tobytes(): y for x, y in zip(dataset.inputs, dataset.targets, strict=True)}
    draw = jax.jit(lambda d, keys: jax.vmap(lambda k: d.batch(k, "valid", 50))(keys))
    batch = draw(dataset, jax.random.split(jax.random.key(0), 8))
    assert batch.inputs.shape == (8, 50, 4, 4)
    rows = np.asarray(batch.inputs).reshape(400, 4, 4)
    assert {row.tobytes() for row in rows} == row_set(dataset, "valid")  # all 18 rows are drawn
    expected = [target_of[row.tobytes()] for row in rows]
    np.testing.assert_array_equal(batch.targets.ravel(), expected)


def test_uint8_rows_become_floats_in_the_unit_interval():
    inputs = np.arange(256, dtype=np.uint8).reshape(256, 1, 1)
    dataset = data.Dataset(
        inputs, np.zeros(256, np.int32), "bytes", ((0, 256),) * 3, 2, NO_STATISTICS
    )
    batch = dataset.batch(jax.random.key(0), "train", 2000)
    assert batch.inputs.dtype == np.float32
    assert float(batch.inputs.min()) == 0
    assert float(batch.inputs.max()) == 1


def test_tabular_rows_are_standardised_by_the_train_split():
    dataset = data.load("wine/held_out")
    train = dataset.inputs[slice(*dataset.splits[0])]
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-5)
    assert abs(dataset.inputs.mean(axis=0)).max() > 1e-3


def test_digits_are_those_of_sklearn():
    from sklearn.datasets import load_digits

    dataset, digits = data.load("digits"), load_digits()
    ours = sorted((x.tobytes(), y) for x, y in zip(dataset.inputs, dataset.targets, strict=True))
    images = (digits.images / 16).astype(np.float32)
    assert ours == sorted((x.tobytes(), y) for x, y in zip(images, digits.target, strict=True))
    assert data.load("digits@4x6/held_out").inputs.shape == (899, 4, 6)
    assert data.load("digits") is dataset


def test_repr_is_the_name_and_the_fingerprint_follows_the_content():
    assert repr(data.load("synthetic/held_out")) == "'synthetic/held_out'"
    assert data.load("synthetic") is data.synthetic()
    changed = data.synthetic(seed=1)
    assert data.synthetic().fingerprint != changed.fingerprint
    copy = jax.tree.map(np.array, data.synthetic())
    assert copy.fingerprint == data.synthetic().fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "`name` 'digit'. Did you mean 'digits'.*breast_cancer.*tfds:NAME"),
        ("digits/heldout", "Did you mean 'digits/held_out'"),
        ("stream:digit", "Did you mean 'digits'"),
        ("digits@4", r"\[stream:\]SOURCE\[@HxW\]"),
        ("wine@4x4", "only images have a size"),
        ("tfds:no_such_dataset", "`name` 'tfds:no_such_dataset'.*list_builders.*digits"),
    ],
)
def test_wrong_names_say_what_exists(folders, name, message):
    with pytest.raises(ValueError, match=message):
        data.load(name)


def test_wrong_split():
    with pytest.raises(ValueError, match=r"`split` 'training'. Did you mean 'train'"):
        data.synthetic().batch(jax.random.key(0), "training", 2)


def test_importing_tasks_loads_no_data_library_and_no_backend():
    program = (
        "import sys, tasks, jax._src.xla_bridge as bridge; from learned_opt import discovery;"
        "discovery.examples(tasks); assert not bridge.backends_are_initialized();"
        "unread = {'sklearn', 'tensorflow_datasets', 'PIL', 'pydoc_data.topics'};"
        "assert not unread & set(sys.modules)"
    )
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def test_tfds_without_tensorflow(folders, monkeypatch):
    dataset = data.load("tfds:tiny_images@3x2/meta_train")
    assert "tensorflow" not in sys.modules
    assert dataset.inputs.shape == (20, 3, 2, 1)
    assert dataset.inputs.dtype == np.uint8
    assert dataset.classes == 4
    rows = dataset.inputs[:, 0, 0, 0] // 5
    np.testing.assert_array_equal(dataset.targets, rows % 4)
    others = data.load("tfds:tiny_images@3x2/held_out").inputs[:, 0, 0, 0] // 5
    assert sorted([*rows, *others]) == list(range(40))
    np.testing.assert_array_equal(
        dataset.inputs, np.broadcast_to(dataset.inputs[:, :1, :1], (20, 3, 2, 1))
    )
    monkeypatch.setattr(tfds_source, "_prepared", None)  # the cache alone must do
    data.load.cache_clear()
    assert data.load("tfds:tiny_images@3x2/meta_train").fingerprint == dataset.fingerprint


def test_tfds_streams_from_the_file_of_the_cache(folders):
    resident, streamed = (data.load(f"{p}tfds:tiny_images@3x2") for p in ("", "stream:"))
    (path,) = (folders / "cache").glob("*.npz")
    mapped = streamed.inputs._array
    assert isinstance(mapped, np.memmap)
    assert str(mapped.filename) == str(path)
    assert streamed.statistics == resident.statistics
    pixel = np.arange(40) * 5 / 255
    train = np.sort(resident.inputs[: resident.splits[0][1], 0, 0, 0]) / 255
    assert streamed.statistics.variance == pytest.approx(train.var())
    assert set(train) <= set(pixel)
    batches = [jax.jit(lambda d: d.batch(jax.random.key(0), "train", 30))(d)
               for d in (jax.device_put(resident), streamed)]  # fmt: skip
    assert jax.device_put(resident).inputs.dtype == np.uint8
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_real_labels_of_tfds_are_regression_and_others_are_refused(folders):
    dataset = data.load("tfds:tiny_numbers")
    assert dataset.classes == 0
    assert dataset.statistics.target == pytest.approx(1)
    np.testing.assert_allclose(  # both are linear in the row, and standardised alike
        dataset.targets, dataset.inputs[:, 0], atol=1e-5
    )
    features = {"image": tfds.features.Tensor(shape=(2,), dtype=np.uint8)}
    for label in (tfds.features.Text(), tfds.features.Tensor(shape=(3,), dtype=np.float32)):
        info = types.SimpleNamespace(
            features=features | {"label": label}, supervised_keys=("image", "label")
        )
        with pytest.raises(ValueError, match=r"has the label .*one real number"):
            tfds_source._in_memory(types.SimpleNamespace(info=info), "x", None)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "other rows", "empty"])
def test_a_damaged_cache_is_rebuilt(folders, damage):
    expected = data.load("tfds:tiny_images").fingerprint
    (path,) = (folders / "cache").glob("*.npz")
    whole = path.read_bytes()
    if damage == "other rows":
        with np.load(path) as file:
            fields = dict(file)
        np.savez(path, **fields | {"targets": fields["targets"][::-1]})
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes(
            {"truncated": whole[:middle], "bit flipped": flipped, "empty": b""}[damage]
        )
    data.load.cache_clear()
    assert data.load("tfds:tiny_images").fingerprint == expected
    assert tfds_source._cached(path) is not None
    assert not list((folders / "cache").glob("*.tmp"))


def test_two_processes_prepare_once(folders):
    program = (
        "import test_data; from tasks.data import load; print(load('tfds:tiny_images').fingerprint)"
    )
    tests = Path(__file__).parent
    env = os.environ | {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    command = [sys.executable, "-c", program]
    started = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    prints = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    first, second = (text.split()[-1] for text in prints)  # TFDS prints its progress before
    assert first == second
    assert (folders / "tfds" / "prepared.log").read_text() == "once\n"


@pytest.mark.parametrize("network", ["no such host", "no answer"])
def test_offline_is_said_within_five_seconds(folders, monkeypatch, network):
    never = threading.Event()

    def getaddrinfo(*args, **kwargs):
        never.wait(30 if network == "no answer" else 0)
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    began = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"`name` 'tfds:mnist'.*TFDS_DATA_DIR.*digits, breast"
    ):
        data.load("tfds:mnist")
    assert time.monotonic() - began < 5
    never.set()


def test_random_words_are_uniform_and_independent():
    """Of consecutive keys, as the steps of a training run have them: counts by row, and by pairs of
    neighbouring draws, rows and keys, against the chi-squared distribution.
    """
    keys = jax.random.split(jax.random.key(0), 500)
    words = np.asarray(jax.vmap(lambda key: data.random_words(key, 64))(keys))
    for shift in (0, 28):  # the lowest and the highest bits
        draws = (words >> shift) % 16
        for pairs in (draws, 16 * draws[:, 1:] + draws[:, :-1], 16 * draws[1:] + draws[:-1]):
            bins = 16 if pairs is draws else 256
            counts = np.bincount(pairs.ravel(), minlength=bins)
            chi = np.sum((counts - pairs.size / bins) ** 2) * bins / pairs.size
            assert abs(chi - (bins - 1)) < 4.5 * np.sqrt(2 * (bins - 1))
