"""Filled shapes on clutter: an outline is a radius as a function of the angle."""

import dataclasses
from collections.abc import Callable

import numpy as np

Outline = Callable[[np.ndarray], np.ndarray]  # angle in radians -> radius, at most 1


def disc(angle: np.ndarray) -> np.ndarray:
    return np.full_like(angle, 0.8)


def polygon(corners: int) -> Outline:
    """Regular, with a corner at angle 0."""
    half = np.pi / corners
    return lambda angle: np.cos(half) / np.cos((angle % (2 * half)) - half)


def star(tips: int, inner: float) -> Outline:
    """`inner`: the radius between two tips."""
    half = np.pi / tips

    def outline(angle: np.ndarray) -> np.ndarray:
        from_tip = np.abs((angle + half) % (2 * half) - half)
        # on the line from the tip (1, 0) to the notch inner * (cos half, sin half)
        x, y = 1 - inner * np.cos(half), inner * np.sin(half)
        return y / (y * np.cos(from_tip) + x * np.sin(from_tip))

    return outline


def cross(width: float) -> Outline:
    """`width`: half of an arm's."""

    def outline(angle: np.ndarray) -> np.ndarray:
        x, y = np.abs(np.cos(angle)), np.abs(np.sin(angle))
        long, short = np.maximum(x, y), np.minimum(x, y)
        ends = np.minimum(1 / long, width / np.maximum(short, 1e-9))
        return np.maximum(ends, np.minimum(width / long, width / np.maximum(short, 1e-9)))

    return outline


def flower(petals: int) -> Outline:
    return lambda angle: 0.7 + 0.3 * np.cos(petals * angle)


@dataclasses.dataclass(frozen=True)
class Scene:
    """What surrounds a shape. Lengths are in units of the image's side.

    Args:
      ink: range of every channel of the shape's colour; `paper`: of the background's.
      radius: range of the shape's size, `shift` the deviation of its place, both from the middle;
        `turn` the deviation of its angle in radians.
      stretch: deviation of the logarithm of its height over its width.
      specks: how many small discs of random colours lie behind it.
      slope: deviation of the brightness from one side of the background to the other.
      stripes: contrast of stripes across the shape, 0 for a plain one.
      noise: deviation of every channel.
    """

    seed: int
    outlines: tuple[Outline, ...]
    rows: int  # of each outline
    size: int
    ink: tuple[float, float] = (0.45, 1.0)
    paper: tuple[float, float] = (0.0, 0.55)
    radius: tuple[float, float] = (0.28, 0.48)
    shift: float = 0.06
    turn: float = 0.4
    stretch: float = 0.15
    specks: int = 3
    slope: float = 0.0
    stripes: float = 0.0
    noise: float = 0.06


SHAPES = Scene(
    seed=3,
    outlines=(disc, polygon(3), polygon(4), cross(0.3), star(5, 0.45), star(3, 0.25)),
    rows=700,
    size=16,
)  # fmt: skip
PETALS = Scene(
    seed=4,
    outlines=tuple(map(flower, range(2, 8))),
    rows=700,
    size=16,
    ink=(0.0, 0.4),
    paper=(0.6, 1.0),
    radius=(0.3, 0.5),
    specks=0,
    slope=0.3,
    stripes=0.2,
    noise=0.04,
)


def draw(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a scene: uint8 [rows, size, size, 3], and which outline each shows."""
    random = np.random.default_rng(scene.seed)
    targets = np.repeat(np.arange(len(scene.outlines)), scene.rows)
    count, size = len(targets), scene.size
    grid = (np.arange(size) + 0.5) / size - 0.5
    # [rows, size, size], as all that follows
    x, y = np.broadcast_to(grid[:, None], (size, size)), np.broadcast_to(grid, (size, size))
    each = (count, 1, 1)

    ink, paper = (random.uniform(*c, (*each, 3)) for c in (scene.ink, scene.paper))
    side = random.uniform(0, 2 * np.pi, each)
    slope = scene.slope * random.standard_normal(each) * (np.cos(side) * x + np.sin(side) * y)
    image = paper + slope[..., None]

    for _ in range(scene.specks):
        place, colour = random.uniform(-0.5, 0.5, (2, *each)), random.uniform(size=(count, 1, 1, 3))
        distance = np.hypot(x - place[0], y - place[1])
        image = _over(image, colour, random.uniform(0.04, 0.1, each) - distance, size)

    place = scene.shift * random.standard_normal((2, *each))
    turn = scene.turn * random.standard_normal(each)
    stretch = np.exp(scene.stretch * random.standard_normal(each) / 2)
    x, y = x - place[0], y - place[1]
    u, v = (np.cos(turn) * x + np.sin(turn) * y) * stretch, np.cos(turn) * y - np.sin(turn) * x
    v = v / stretch
    angle, radius = np.arctan2(v, u) % (2 * np.pi), random.uniform(*scene.radius, each)
    edge = np.empty_like(angle)
    for number, outline in enumerate(scene.outlines):
        edge[targets == number] = outline(angle[targets == number])
    frequency, phase = random.uniform(2, 5, each), random.uniform(0, 2 * np.pi, each)
    stripes = scene.stripes * np.sin(2 * np.pi * frequency * u + phase)
    inside = radius * edge - np.hypot(u, v)
    image = _over(image, ink + stripes[..., None], inside, size)
    image = image + scene.noise * random.standard_normal(image.shape)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8), targets


def _over(image: np.ndarray, colour: np.ndarray, inside: np.ndarray, size: int) -> np.ndarray:
    """`colour` painted where `inside`, a signed distance, is positive; its edge is a pixel wide."""
    cover = np.clip(inside * size + 0.5, 0, 1)[..., None]
    return image + cover * (colour - image)
