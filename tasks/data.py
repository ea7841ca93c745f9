"""Datasets as pytrees: two arrays, passed to jitted functions, and a name that loads them again."""

import dataclasses
import difflib
import functools
import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Key, Split

SPLITS = ("train", "valid", "test")
PARTS = ("meta_train", "held_out")
EMBEDDED = ("digits", "breast_cancer", "wine", "iris", "synthetic")


def cache_directory() -> Path:
    """$LEARNED_OPT_CACHE, or ~/.cache/learned-opt."""
    return Path(os.environ.get("LEARNED_OPT_CACHE") or "~/.cache/learned-opt").expanduser()


class Batch(NamedTuple):
    inputs: jax.Array  # [size, ...] float32
    targets: jax.Array  # [size] int32


class Rows(NamedTuple):
    """What a source yields, before rows are permuted and split."""

    inputs: np.ndarray  # [N, ...]
    targets: np.ndarray  # [N] integers
    classes: int


# Compared by identity: `load` returns the same object for the same name, and arrays have no cheap
# equality.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Dataset:
    """Labelled rows, permuted once; each split is a range of them, and no two splits share a row.

    Images are [N, H, W] or [N, H, W, C], uint8 or float32 in [0, 1]. Tabular rows are [N, features]
    float32, standardised with the mean and deviation of the train split. Its `repr` is that of its
    name, which `load` turns back into the same rows.
    """

    inputs: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array  # [N] int32
    name: str = dataclasses.field(metadata={"static": True})
    splits: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})
    classes: int = dataclasses.field(metadata={"static": True})

    def batch(self, key: Key, split: Split, size: int) -> Batch:
        """`size` rows of `split`, drawn with replacement; uint8 becomes float32 in [0, 1]."""
        if split not in SPLITS:
            raise ValueError(unknown_name("split", split, SPLITS))
        start, stop = self.splits[SPLITS.index(split)]
        # the remainder's bias is below rows / 2**32
        rows = (random_words(key, size) % np.uint32(stop - start)).astype(jnp.int32) + start
        inputs = jnp.asarray(self.inputs).at[rows].get(mode="promise_in_bounds")
        targets = jnp.asarray(self.targets).at[rows].get(mode="promise_in_bounds")
        if inputs.dtype == jnp.uint8:
            inputs = inputs.astype(jnp.float32) / 255
        return Batch(inputs, targets)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of rows, splits and number of classes: a key for caches."""
        return sha256(
            np.asarray(self.inputs), np.asarray(self.targets), (self.splits, self.classes)
        )

    def __repr__(self) -> str:
        return repr(self.name)


def random_words(key: Key, size: int) -> jax.Array:
    """[size] uint32 from a key: its words and the index, hashed by the finaliser of MurmurHash3.

    A step of training draws its rows in one small loop. Threefry, five rounds of loops on CPUs,
    takes a tenth of the time of a small network's step; keys still come from it.
    """
    words = jax.random.key_data(key).reshape(-1)
    hashed = jnp.arange(size, dtype=jnp.uint32)
    for i in range(len(words)):
        hashed ^= words[i]
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            hashed = (hashed ^ (hashed >> shift)) * np.uint32(factor)
        hashed ^= hashed >> 16
    return hashed


def sha256(inputs: np.ndarray, targets: np.ndarray, rest: object) -> str:
    digest = hashlib.sha256()
    for array in (inputs, targets):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    digest.update(repr(rest).encode())
    return digest.hexdigest()


def unknown_name(argument: str, got: object, known: Iterable[str]) -> str:
    """The sentence for a name that is not among `known`, with the nearest one suggested."""
    known = list(known)
    near = difflib.get_close_matches(str(got), known, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown `{argument}` {got!r}.{hint} Known: {', '.join(known)}."


@functools.lru_cache(maxsize=32)
def load(name: str) -> Dataset:
    """The dataset called `SOURCE[@HxW][/PART]`; a name always gives the same object.

    SOURCE is digits [N, 8, 8], breast_cancer [N, 30], wine [N, 13], iris [N, 4], synthetic [N, 4,
    4], or tfds:NAME (see tasks/tfds_source.py). @HxW resizes images. PART is meta_train or
    held_out: two fixed halves that share no row, each with its own train, valid and test split (70,
    15, 15 %); without PART all rows are used.

    Raises:
      ValueError: no such dataset, or one that cannot be resized; the message lists what exists.
      ConnectionError: a TFDS dataset that is not on this machine, and no network.
    """
    body, _, part = name.rpartition("/")
    if part not in PARTS:
        # What follows the slash of tfds:NAME/CONFIG is TFDS's to understand.
        if body and not name.startswith("tfds:"):
            raise ValueError(unknown_name("name", name, [f"{body}/{known}" for known in PARTS]))
        body, part = name, ""
    matched = re.fullmatch(r"(?P<source>[^@]+)(?:@(?P<height>[1-9]\d*)x(?P<width>[1-9]\d*))?", body)
    if matched is None:
        raise ValueError(f"`name` {name!r} is not of the form SOURCE[@HxW][/PART], as digits@4x4")
    source = matched["source"]
    size = (int(matched["height"]), int(matched["width"])) if matched["height"] else None
    if source == "synthetic" and not size and not part:
        return synthetic()
    return _split(name, _rows(source, size), part)


def _rows(source: str, size: tuple[int, int] | None) -> Rows:
    if source.startswith("tfds:") and source != "tfds:":
        from tasks.tfds_source import read

        return read(source.removeprefix("tfds:"), size)
    if source not in EMBEDDED:
        raise ValueError(unknown_name("name", source, (*EMBEDDED, "tfds:NAME")))
    rows = _synthetic_rows(3, (4, 4), 120, 0) if source == "synthetic" else _sklearn_rows(source)
    return rows if size is None else rows._replace(inputs=resized(rows.inputs, size))


def _sklearn_rows(source: str) -> Rows:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{source}")()
    inputs = bunch.images / 16 if source == "digits" else bunch.data
    return Rows(inputs.astype(np.float32), bunch.target, len(bunch.target_names))


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


def _split(name: str, rows: Rows, part: str) -> Dataset:
    order = np.random.default_rng(0).permutation(len(rows.inputs))
    half = len(order) // 2
    order = {"": order, "meta_train": order[:half], "held_out": order[half:]}[part]
    count, train, valid = len(order), int(0.7 * len(order)), int(0.85 * len(order))
    if not 0 < train < valid < count:
        raise ValueError(f"`name` {name!r} has only {count} rows, too few for three splits")
    inputs = np.asarray(rows.inputs)[order]
    if inputs.ndim == 2:
        mean, deviation = inputs[:train].mean(axis=0), inputs[:train].std(axis=0)
        inputs = (inputs - mean[None]) / np.where(deviation > 0, deviation, 1)[None]
    if inputs.dtype != np.uint8:
        inputs = inputs.astype(np.float32)
    splits = ((0, train), (train, valid), (valid, count))
    return Dataset(inputs, rows.targets[order].astype(np.int32), name, splits, rows.classes)


@functools.lru_cache(maxsize=32)
def synthetic(
    classes: int = 3, shape: tuple[int, ...] = (4, 4), rows: int = 120, seed: int = 0
) -> Dataset:
    """A tiny procedural dataset for tests and examples: a random image in [0, 1] per class, and
    noise.

    With the default sizes its name is 'synthetic', which `load` knows; others cannot be loaded by
    name.
    """
    sizes = (classes, shape, rows, seed)
    default = sizes == (3, (4, 4), 120, 0)
    return _split("synthetic" if default else f"synthetic{sizes}", _synthetic_rows(*sizes), "")


def _synthetic_rows(classes: int, shape: tuple[int, ...], rows: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    prototypes = random.uniform(size=(classes, math.prod(shape)))
    targets = random.integers(classes, size=rows)
    noisy = prototypes[targets] + 0.2 * random.standard_normal((rows, math.prod(shape)))
    return Rows(np.clip(noisy, 0, 1).astype(np.float32).reshape(rows, *shape), targets, classes)
