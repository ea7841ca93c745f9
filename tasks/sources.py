"""Rows that need no network: of installed packages, and drawn by stated generators."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tasks import glyphs, shapes, tables

PATCH, REGIONS = 8, 3


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


def photograph(name: str) -> Rows:
    """A photograph of scikit-learn's cut into patches of 8x8 pixels, none of which is in two; the
    target is in which of 3x3 equal parts of the picture a patch lies.
    """
    from sklearn.datasets import load_sample_image

    image = load_sample_image(f"{name}.jpg")
    height, width = (size // PATCH for size in image.shape[:2])
    image = image[: height * PATCH, : width * PATCH]
    patches = image.reshape(height, PATCH, width, PATCH, 3).swapaxes(1, 2)
    row, column = np.arange(height) * REGIONS // height, np.arange(width) * REGIONS // width
    targets = (REGIONS * row[:, None] + column[None]).reshape(-1)
    return Rows(patches.reshape(-1, PATCH, PATCH, 3), targets, REGIONS**2)


def _drawn(classes: int, draw: Callable[..., tuple[np.ndarray, np.ndarray]], *args: Any) -> Rows:
    return Rows(*draw(*args), classes)


BSD = "BSD-3-Clause (scikit-learn)"
BY = "CC BY 2.0, flickr.com/photos/{} (in scikit-learn)"
OWN = "Apache-2.0 (generated)"


def _generated(about: str, classes: int, draw: Callable, *args: Any) -> Source:
    return Source(functools.partial(_drawn, classes, draw, *args), about, OWN)


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
    "china": Source(
        functools.partial(photograph, "china"),
        "patches of a photograph of a temple, 4,240 x 8 x 8 x 3, 9 classes",
        BY.format("danielbuechele"),
    ),
    "flower": Source(
        functools.partial(photograph, "flower"),
        "patches of a photograph of a flower, 4,240 x 8 x 8 x 3, 9 classes",
        BY.format("vultilion"),
    ),
    "glyphs": _generated(
        "letters of an invented alphabet, 4,800 x 16 x 16, 24 classes",
        24, glyphs.draw, glyphs.GLYPHS,
    ),
    "runes": _generated(
        "letters of straight strokes, drawn softly, 4,000 x 12 x 12, 20 classes",
        20, glyphs.draw, glyphs.RUNES,
    ),
    "shapes": _generated(
        "bright geometric shapes among specks, 4,200 x 16 x 16 x 3, 6 classes",
        6, shapes.draw, shapes.SHAPES,
    ),
    "petals": _generated(
        "striped dark blossoms of 2 to 7 petals, 4,200 x 16 x 16 x 3, 6 classes",
        6, shapes.draw, shapes.PETALS,
    ),
    "teacher": _generated(
        "labels of a random tanh network, 4,000 x 24, 8 classes", 8, tables.teacher, 5
    ),
    "friedman": _generated(
        "Friedman's first function, 3,000 x 10, a real target", 0, tables.friedman, 6
    ),
    "spirals": _generated(
        "arms of a spiral in eight noisy directions, 3,000 x 8, 3 classes", 3, tables.spirals, 7
    ),
    "waveform": _generated(
        "Breiman's mixtures of waves, 4,000 x 21, 3 classes", 3, tables.waveform, 8
    ),
    "synthetic": Source(
        functools.partial(prototypes, 3, (4, 4), 120, 0),
        "noisy images, 120 x 4 x 4, 3 classes",
        OWN,
    ),
    "synthetic_table": Source(
        functools.partial(prototypes, 3, (6,), 120, 0),
        "noisy rows, 120 x 6, 3 classes",
        OWN,
    ),
}  # fmt: skip
