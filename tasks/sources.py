"""Rows that need no network: of installed packages, and drawn by stated generators."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Rows(NamedTuple):
    """What a source yields, before rows are permuted and split."""

    inputs: np.ndarray  # [N, ...]
    targets: np.ndarray  # [N] integers, or real numbers where `classes` is 0
    classes: int


class Source(NamedTuple):
    read: Callable[[], Rows]
    about: str
    licence: str


def prototypes(classes: int, shape: tuple[int, ...], rows: int, seed: int) -> Rows:
    """A random image in [0, 1] per class, and noise."""
    random = np.random.default_rng(seed)
    images = random.uniform(size=(classes, math.prod(shape)))
    targets = random.integers(classes, size=rows)
    noisy = images[targets] + 0.2 * random.standard_normal((rows, math.prod(shape)))
    return Rows(np.clip(noisy, 0, 1).astype(np.float32).reshape(rows, *shape), targets, classes)


def _sklearn(name: str) -> Rows:
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    if name == "diabetes":
        return Rows(bunch.data.astype(np.float32), bunch.target, 0)
    inputs = bunch.images / 16 if name == "digits" else bunch.data
    return Rows(inputs.astype(np.float32), bunch.target, len(bunch.target_names))


BSD = "BSD-3-Clause (scikit-learn)"
OWN = "Apache-2.0 (generated)"
SOURCES: dict[str, Source] = {
    "digits": Source(
        functools.partial(_sklearn, "digits"), "handwritten digits, 1,797 x 8 x 8, 10 classes", BSD
    ),
    "breast_cancer": Source(
        functools.partial(_sklearn, "breast_cancer"), "569 x 30, 2 classes", BSD
    ),
    "wine": Source(functools.partial(_sklearn, "wine"), "178 x 13, 3 classes", BSD),
    "iris": Source(functools.partial(_sklearn, "iris"), "150 x 4, 3 classes", BSD),
    "diabetes": Source(functools.partial(_sklearn, "diabetes"), "442 x 10, a real target", BSD),
    "synthetic": Source(
        functools.partial(prototypes, 3, (4, 4), 120, 0),
        "noisy images, 120 x 4 x 4, 3 classes",
        OWN,
    ),
}
