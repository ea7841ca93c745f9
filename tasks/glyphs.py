"""Handwritten characters of alphabets that never were, in the manner of Omniglot (Lake et al.,
Science 350, 2015): a letter is a few strokes, and every row draws them anew.
"""

import dataclasses

import numpy as np

POINTS = 16  # along a stroke
ROWS_AT_ONCE = 64  # of an image; bounds memory


@dataclasses.dataclass(frozen=True)
class Alphabet:
    """A generator of letters and of the hand that writes them. Lengths are in units of the image's
    side; ranges are uniform, deviations those of a normal distribution.

    Args:
      curved: chance that a stroke is a quadratic curve and not a line.
      joined: chance that a stroke begins where the one before it ends.
      rotation: deviation in radians; `slant`: of the shear.
      shift: deviation of both coordinates.
      scale: range.
      wobble: deviation of every point that defines a stroke.
      pen: range of the width of a stroke.
      edge: width of the edge of a stroke in pixels, 1 for antialiasing, more for a soft pen.
      noise: deviation of the pixels' brightness, of 1.
    """

    seed: int
    letters: int
    rows: int  # of each letter
    size: int  # height and width in pixels
    strokes: tuple[int, int] = (2, 4)
    curved: float = 0.6
    joined: float = 0.6
    rotation: float = 0.25
    slant: float = 0.2
    shift: float = 0.08
    scale: tuple[float, float] = (0.6, 1.0)
    wobble: float = 0.03
    pen: tuple[float, float] = (0.05, 0.12)
    edge: float = 1.0
    noise: float = 0.08


GLYPHS = Alphabet(seed=1, letters=24, rows=200, size=16)
RUNES = Alphabet(
    seed=2, letters=20, rows=200, size=12, strokes=(3, 4), curved=0.0, joined=0.8, rotation=0.2,
    slant=0.3, scale=(0.6, 1.1), wobble=0.025, pen=(0.08, 0.12), edge=2.0, noise=0.12,
)  # fmt: skip


def letters(alphabet: Alphabet, random: np.random.Generator) -> np.ndarray:
    """[letters, strokes, 3, 2] the points that define the quadratic curves (Bezier), in the unit
    square. A letter with fewer strokes than others repeats its last.

    Of four times as many, those that look least like one another.
    """
    count, (low, high) = 4 * alphabet.letters, alphabet.strokes
    joined = random.uniform(size=(count, high, 1)) < alphabet.joined
    length, angle = random.uniform(0.3, 0.7, (count, high)), random.uniform(size=(count, high))
    ways = length[..., None] * np.stack([np.cos(np.pi * angle), np.sin(np.pi * angle)], axis=-1)
    starts, bends = random.uniform(size=(2, count, high, 2))
    for stroke in range(1, high):
        end = starts[:, stroke - 1] + ways[:, stroke - 1]
        ways[:, stroke] *= np.where(end[:, :1] > 0.5, -1, 1)  # not out of the square
        starts[:, stroke] = np.where(joined[:, stroke], end, starts[:, stroke])
    curved = random.uniform(size=(count, high, 1)) < alphabet.curved
    middle = starts + ways / 2 + np.where(curved, 0.5 * (bends - 0.5), 0)
    points = np.stack([starts, middle, starts + ways], axis=2)
    last = random.integers(low, high + 1, count) - 1
    points = points[np.arange(count)[:, None], np.minimum(np.arange(high)[None], last[:, None])]
    least, most = points.min(axis=(1, 2), keepdims=True), points.max(axis=(1, 2), keepdims=True)
    extent = (most - least).max(axis=-1, keepdims=True)
    points = 0.5 + 0.75 * (points - (least + most) / 2) / extent
    images = images_of(points, np.full(count, 0.25), alphabet.size, 4.0).reshape(count, -1)
    distances = np.square(images[:, None] - images[None]).sum(axis=-1)
    chosen = [0]
    while len(chosen) < alphabet.letters:
        chosen.append(int(distances[chosen].min(axis=0).argmax()))
    return points[chosen]


def images_of(curves: np.ndarray, width: np.ndarray, size: int, edge: float) -> np.ndarray:
    """[rows, size, size] in [0, 1]: curves [rows, strokes, 3, 2] drawn with pens of `width` [rows].

    A pixel's brightness falls from 1 to 0 over `edge` pixels where the stroke ends.
    """
    t = np.linspace(0, 1, POINTS)
    bezier = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    points = np.einsum("rsij,it->rstj", curves, bezier).reshape(len(curves), -1, 2)
    centres = (np.arange(size) + 0.5) / size
    squares = np.square(points[..., None] - centres).astype(np.float32)  # [rows, points, 2, size]
    nearest = np.empty((len(curves), size, size), np.float32)
    for start in range(0, len(curves), ROWS_AT_ONCE):
        x, y = np.moveaxis(squares[start : start + ROWS_AT_ONCE], 2, 0)
        nearest[start : start + ROWS_AT_ONCE] = (y[..., None] + x[..., None, :]).min(axis=1)
    inside = (width[:, None, None] / 2 - np.sqrt(nearest)) * size / edge
    return np.clip(inside + 0.5, 0, 1)


def draw(alphabet: Alphabet) -> tuple[np.ndarray, np.ndarray]:
    """Rows of an alphabet: uint8 [letters * rows, size, size], and which letter each is."""
    random = np.random.default_rng(alphabet.seed)
    targets = np.repeat(np.arange(alphabet.letters), alphabet.rows)
    count = len(targets)
    curves = letters(alphabet, random)[targets] - 0.5
    curves = curves + alphabet.wobble * random.standard_normal(curves.shape)
    angle = alphabet.rotation * random.standard_normal(count)
    slant = alphabet.slant * random.standard_normal(count)
    scale = random.uniform(*alphabet.scale, count)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    affine = np.stack([np.stack([cos, -sin + slant * cos]), np.stack([sin, cos + slant * sin])])
    shift = 0.5 + alphabet.shift * random.standard_normal((count, 1, 1, 2))
    curves = np.einsum("abr,rsib->rsia", affine, curves) + shift
    images = images_of(curves, random.uniform(*alphabet.pen, count), alphabet.size, alphabet.edge)
    images = images + alphabet.noise * random.standard_normal(images.shape)
    return np.round(255 * np.clip(images, 0, 1)).astype(np.uint8), targets
