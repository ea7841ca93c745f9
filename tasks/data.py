"""Datasets as pytrees: two arrays, passed to jitted functions, and a name that loads them again."""

import dataclasses
import difflib
import functools
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Key, Split
from tasks.sources import SOURCES, Rows, prototypes
from tasks.stream import CHUNK, HostArray, hash_rows

SPLITS = ("train", "valid", "test")
PARTS = ("meta_train", "held_out")
STREAM = "stream:"
LARGE = 2**28  # bytes; what is smaller fits every device


def cache_directory() -> Path:
    """$LEARNED_OPT_CACHE, or ~/.cache/learned-opt."""
    return Path(os.environ.get("LEARNED_OPT_CACHE") or "~/.cache/learned-opt").expanduser()


class Batch(NamedTuple):
    inputs: jax.Array  # [size, ...] float32
    targets: jax.Array  # [size] int32


class Statistics(NamedTuple):
    """Of the training split: what predictions that look at no input cost, for `Task.normalize`."""

    target: float  # entropy of the labels in nats, or the variance of real targets (1)
    variance: float  # of the inputs (uint8 taken as [0, 1]), mean over their entries
    entropy: float  # of pixels taken as chances, each at its mean, mean over pixels; 0 for tables


# Compared by identity: `load` returns the same object for the same name, and arrays have no cheap
# equality.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """Labelled rows, permuted once; each split is a range of them, and no two splits share a row.

    Images are [N, H, W] or [N, H, W, C], uint8 or float32 in [0, 1]. Tabular rows are [N, features]
    float32, standardised with the mean and deviation of the train split, as are real targets. Its
    `repr` is that of its name, which `load` turns back into the same rows.

    Inputs that are a `HostArray` stay on the host; the targets, four bytes a row, never do.
    """

    inputs: np.ndarray | jax.Array | HostArray
    targets: np.ndarray | jax.Array  # [N] int32, or float32 where `classes` is 0
    name: str = dataclasses.field(metadata={"static": True})
    splits: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    classes: int = dataclasses.field(metadata={"static": True})
    statistics: Statistics = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of one row's inputs."""
        return tuple(self.inputs.shape[1:])

    def example(self) -> jax.Array:
        """[1, *shape] zeros."""
        return jnp.zeros((1, *self.shape))

    def batch(self, key: Key, split: Split, size: int) -> Batch:
        """`size` rows of `split`, drawn with replacement; uint8 becomes float32 in [0, 1]."""
        return self.take(self.rows(key, split, size))

    def rows(self, key: Key, split: Split, size: int, subset: float | jax.Array = 1.0) -> jax.Array:
        """int32 [size] numbers of rows of the first `subset` of `split`, drawn with replacement."""
        return random_rows(key, self.splits, split, size, subset)

    def take(self, rows: jax.Array) -> Batch:
        inputs, targets = self.inputs, jnp.asarray(self.targets)
        if isinstance(inputs, np.ndarray | jax.Array):
            inputs = jnp.asarray(inputs).at[rows].get(mode="promise_in_bounds")
        else:
            inputs = inputs.take(rows)
        targets = targets.at[rows].get(mode="promise_in_bounds")
        if inputs.dtype == jnp.uint8:
            inputs = inputs.astype(jnp.float32) / 255
        return Batch(inputs, targets)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of rows, splits and number of classes: a key for caches. It does not
        depend on where the rows are.
        """
        inputs = self.inputs
        inputs = inputs if isinstance(inputs, HostArray) else np.asarray(inputs)
        return sha256(inputs, np.asarray(self.targets), (self.splits, self.classes))

    def __repr__(self) -> str:
        return repr(self.name)


def random_rows(
    key: Key,
    splits: tuple[tuple[int, int], ...],
    split: Split,
    size: int,
    subset: float | jax.Array = 1.0,
) -> jax.Array:
    """int32 [size] uniform on the first `subset` of the range of `split`."""
    if split not in SPLITS:
        raise ValueError(unknown_name("split", split, SPLITS))
    start, stop = splits[SPLITS.index(split)]
    count = np.uint32(stop - start)
    if not isinstance(subset, float) or subset != 1.0:
        count = jnp.ceil(subset * (stop - start)).astype(jnp.uint32)
    # the remainder's bias is below rows / 2**32
    return (random_words(key, size) % count).astype(jnp.int32) + start


def random_words(key: Key, size: int) -> jax.Array:
    """[size] uint32 from a key: its words and the index, hashed.

    A step of training draws its rows in one small loop. Threefry, five rounds of loops on CPUs,
    takes a tenth of the time of a small network's step; keys still come from it.
    """
    words = jax.random.key_data(key).reshape(-1)
    return hash_words([words[i] for i in range(len(words))], jnp.arange(size, dtype=jnp.uint32))


def hash_words(words: Iterable[jax.Array | np.uint32], values: jax.Array) -> jax.Array:
    """uint32 like `values`, hashed with every one of `words` by the finaliser of MurmurHash3."""
    hashed = values
    for word in words:
        hashed ^= word
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            hashed = (hashed ^ (hashed >> shift)) * np.uint32(factor)
        hashed ^= hashed >> 16
    return hashed


def sha256(inputs: np.ndarray | HostArray, targets: np.ndarray, rest: object) -> str:
    digest = hash_rows(hash_rows(hashlib.sha256(), inputs), targets)
    digest.update(repr(rest).encode())
    return digest.hexdigest()


def unknown_name(argument: str, got: object, known: Iterable[str]) -> str:
    """The sentence for a name that is not among `known`, with the nearest one suggested."""
    known = list(known)
    near = difflib.get_close_matches(str(got), known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown `{argument}` {got!r}.{hint} Known: {', '.join(known)}."


def load_field(family: Any) -> None:
    """For a family's `__post_init__`: what is named in its field `data` is loaded, and its
    `batch_size` checked.
    """
    # jax rebuilds pytrees with placeholders for `data`, so only a name is looked at
    if isinstance(family.data, str):
        object.__setattr__(family, "data", load(family.data))
    if not isinstance(family.batch_size, int) or family.batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive integer, got {family.batch_size!r}")


@functools.cache
def load(name: str) -> Dataset:
    """The dataset called `[stream:]SOURCE[@HxW][/PART]`; a name always gives the same object.

    SOURCE is one of `tasks.sources.SOURCES`, or tfds:NAME (see tasks/tfds_source.py). @HxW resizes
    images. PART is meta_train or held_out: two fixed halves that share no row, each with its own
    train, valid and test split (70, 15, 15 %); without PART all rows are used.

    With stream: come the same rows, splits and batches, for data that are larger than the device:
    inputs stay in the host's memory, those of TFDS in the file of the cache (but rows that are
    tables are standardised in memory), and go to the device when they are needed. Meta-training
    fetches those of many steps at a time, in the background; elsewhere each step waits for its own.
    What fits the device is faster without.

    Raises:
      ValueError: no such dataset, or one that cannot be resized; the message lists what exists. Or
        it has more bytes than the device has memory.
      ConnectionError: a TFDS dataset that is not on this machine, and no network.
    """
    rest = name.removeprefix(STREAM)
    body, _, part = rest.rpartition("/")
    if part not in PARTS:
        # What follows the slash of tfds:NAME/CONFIG is TFDS's to understand.
        if body and not rest.startswith("tfds:"):
            raise ValueError(unknown_name("name", rest, [f"{body}/{known}" for known in PARTS]))
        body, part = rest, ""
    matched = re.fullmatch(r"(?P<source>[^@]+)(?:@(?P<height>[1-9]\d*)x(?P<width>[1-9]\d*))?", body)
    if matched is None:
        raise ValueError(
            f"`name` {name!r} is not of the form [{STREAM}]SOURCE[@HxW][/PART], as digits@4x4"
        )
    source = matched["source"]
    size = (int(matched["height"]), int(matched["width"])) if matched["height"] else None
    if source == "synthetic" and not size and rest == name == source:
        return synthetic()
    return split(name, _rows(source, size), part)


def _inputs(name: str) -> Any:
    return load(name).inputs


def _rows(source: str, size: tuple[int, int] | None) -> Rows:
    if source.startswith("tfds:") and source != "tfds:":
        from tasks.tfds_source import read

        return read(source.removeprefix("tfds:"), size)
    if source not in SOURCES:
        raise ValueError(unknown_name("name", source, (*SOURCES, "tfds:NAME", "stream:NAME")))
    rows = SOURCES[source].read()
    return rows if size is None else rows._replace(inputs=resized(rows.inputs, size))


def resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[N, H, W] or [N, H, W, C] images at another size, same layout and dtype (uint8 or float32),
    antialiased.
    """
    from PIL import Image

    if images.ndim not in (3, 4):
        raise ValueError(
            f"`name`: only images have a size, these rows have shape {images.shape[1:]}; drop @HxW"
        )
    height, width = size
    planes = np.moveaxis(images.reshape(*images.shape[:3], -1), -1, 1).reshape(
        -1, *images.shape[1:3]
    )
    small = [
        np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BILINEAR))
        for p in planes
    ]
    stacked = np.stack(small).reshape(len(images), -1, height, width)
    return np.moveaxis(stacked, 1, -1).reshape(len(images), height, width, *images.shape[3:])


def split(name: str, rows: Rows, part: str = "") -> Dataset:
    """The rows as a dataset: permuted by a fixed seed, and cut into its splits.

    Raises:
      ValueError: there are too few rows, or too many bytes for the device.
    """
    order = np.random.default_rng(0).permutation(len(rows.inputs))
    half = len(order) // 2
    order = {"": order, "meta_train": order[:half], "held_out": order[half:]}[part]
    count, train, valid = len(order), int(0.7 * len(order)), int(0.85 * len(order))
    if not 0 < train < valid < count:
        raise ValueError(f"`name` {name!r} has only {count} rows, too few for three splits")
    inputs, targets = rows.inputs, np.asarray(rows.targets)[order]
    if inputs.dtype != np.uint8:
        inputs = inputs.astype(np.float32, copy=False)
    if inputs.ndim == 2:
        inputs, order = _standardised(inputs[order], train).astype(np.float32), np.arange(count)
    if name.startswith(STREAM):
        inputs = HostArray(inputs, order, origin=(_inputs, (name,)))
    else:
        _check_fits(name, inputs.nbytes // len(inputs) * count)
        inputs = np.asarray(inputs[order])
    targets = targets.astype(np.int32) if rows.classes else _standardised(targets, train)
    splits = ((0, train), (train, valid), (valid, count))
    return Dataset(
        inputs,
        targets.astype(np.int32 if rows.classes else np.float32),
        name,
        splits,
        rows.classes,
        _statistics(inputs, targets, train, rows.classes),
    )


def _check_fits(name: str, size: int) -> None:
    if size < LARGE:  # no backend is started for these
        return
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and size > limit:
        raise ValueError(
            f"`name` {name!r} has {size / 2**30:.3g} GiB of rows, and the device has "
            f"{limit / 2**30:.3g} GiB of memory: {STREAM + name!r} leaves them on the host"
        )


def _standardised(values: np.ndarray, train: int) -> np.ndarray:
    mean, deviation = values[:train].mean(axis=0), values[:train].std(axis=0)
    return (values - mean[None]) / np.where(deviation > 0, deviation, 1)[None]


def _statistics(
    inputs: np.ndarray | HostArray, targets: np.ndarray, train: int, classes: int
) -> Statistics:
    total, squares = np.zeros(inputs.shape[1:]), np.zeros(inputs.shape[1:])
    for start in range(0, train, CHUNK):
        part = inputs[start : min(start + CHUNK, train)].astype(np.float64)
        part /= 255 if inputs.dtype == np.uint8 else 1
        total += part.sum(axis=0)
        squares += np.square(part).sum(axis=0)
    mean = total / train
    if classes:
        target = entropy(np.bincount(targets[:train], minlength=classes))
    else:
        target = float(targets[:train].var(dtype=np.float64))
    pixels = entropy(np.stack([mean, 1 - mean])) if len(inputs.shape) > 2 else 0.0
    return Statistics(target, float((squares / train - np.square(mean)).mean()), pixels)


def entropy(counts: np.ndarray) -> float:
    """In nats, of the distribution over the first axis that is proportional to `counts`; the mean
    over the others.
    """
    chances = counts / counts.sum(axis=0, keepdims=True)
    logs = np.log(chances, out=np.zeros_like(chances), where=chances > 0)
    return float(-(chances * logs).sum(axis=0).mean())


@functools.cache
def synthetic(
    classes: int = 3, shape: tuple[int, ...] = (4, 4), rows: int = 120, seed: int = 0
) -> Dataset:
    """A tiny procedural dataset for tests and examples, see `sources.prototypes`.

    With the default sizes its name is 'synthetic', which `load` knows; others cannot be loaded by
    name.
    """
    sizes = (classes, shape, rows, seed)
    default = sizes == (3, (4, 4), 120, 0)
    return split("synthetic" if default else f"synthetic{sizes}", prototypes(*sizes))
