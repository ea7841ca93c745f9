"""Classic test functions of optimization, shifted and rotated at random. Definitions and boxes are
those of Surjanovic and Bingham's Virtual Library of Simulation Experiments; Himmelblau's as in
arXiv:1308.4008.

Every function is written as its excess over its minimum, a sum of terms none of which is negative,
so that it is accurate near the minimum in float32, too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tasks.base import Key, Split, relative_loss
from tasks.data import unknown_name
from tasks.fields import positive_integers

Point = Any  # [..., D], an array of numpy or of jax.numpy: the module is the second argument


def sphere(x: Point, xp: Any) -> Point:
    return xp.sum(x**2, axis=-1)


def rosenbrock(x: Point, xp: Any) -> Point:
    valley = x[..., 1:] - x[..., :-1] ** 2
    return xp.sum(100 * valley**2 + (1 - x[..., :-1]) ** 2, axis=-1)


def rastrigin(x: Point, xp: Any) -> Point:
    return xp.sum(x**2 + 10 * (1 - xp.cos(2 * math.pi * x)), axis=-1)


def ackley(x: Point, xp: Any) -> Point:
    """A cone at its minimum, where the derivative is taken to be 0."""
    square = xp.mean(x**2, axis=-1)
    norm = xp.where(square > 0, xp.sqrt(xp.where(square > 0, square, 1)), 0)
    waves = xp.mean(xp.cos(2 * math.pi * x) - 1, axis=-1)
    return -20 * xp.expm1(-0.2 * norm) - math.e * xp.expm1(waves)


def griewank(x: Point, xp: Any) -> Point:
    roots = xp.sqrt(xp.arange(1.0, x.shape[-1] + 1)).astype(x.dtype)
    waves = xp.cos(x / xp.broadcast_to(roots, x.shape))
    return xp.sum(x**2, axis=-1) / 4000 + (1 - xp.prod(waves, axis=-1))


def levy(x: Point, xp: Any) -> Point:
    w = 1 + (x - 1) / 4
    inner = (w - 1) ** 2 * (1 + 10 * xp.sin(math.pi * w + 1) ** 2)
    last = (w[..., -1] - 1) ** 2 * (1 + xp.sin(2 * math.pi * w[..., -1]) ** 2)
    return xp.sin(math.pi * w[..., 0]) ** 2 + xp.sum(inner[..., :-1], axis=-1) + last


def styblinski_tang(x: Point, xp: Any) -> Point:
    """(x^4 - 16 x^2 + 5 x) / 2 per coordinate, expanded about its minimum."""
    d = x - STYBLINSKI_TANG
    quadratic = 3 * STYBLINSKI_TANG**2 - 8
    return xp.sum(d**2 * (quadratic + 2 * STYBLINSKI_TANG * d + d**2 / 2), axis=-1)


def zakharov(x: Point, xp: Any) -> Point:
    weights = (xp.arange(1.0, x.shape[-1] + 1) / 2).astype(x.dtype)
    line = xp.sum(x * xp.broadcast_to(weights, x.shape), axis=-1)
    return xp.sum(x**2, axis=-1) + line**2 + line**4


def beale(x: Point, xp: Any) -> Point:
    del xp
    a, b = x[..., 0], x[..., 1]
    return (1.5 - a * (1 - b)) ** 2 + (2.25 - a * (1 - b**2)) ** 2 + (2.625 - a * (1 - b**3)) ** 2


def booth(x: Point, xp: Any) -> Point:
    del xp
    a, b = x[..., 0], x[..., 1]
    return (a + 2 * b - 7) ** 2 + (2 * a + b - 5) ** 2


def himmelblau(x: Point, xp: Any) -> Point:
    """Three more minima are as deep as the one in FUNCTIONS."""
    del xp
    a, b = x[..., 0], x[..., 1]
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2


STYBLINSKI_TANG = -2.903534027771177  # the least root of 4 x^3 - 32 x + 5


class Function(NamedTuple):
    excess: Callable[[Point, Any], Point]  # over the minimum, [..., D] -> [...]
    box: tuple[float, float]  # where it is usually studied, the same in every coordinate
    minimiser: float | tuple[float, float]  # the same in every coordinate, or one in two dimensions
    fewest: int = 1  # dimensions


FUNCTIONS: dict[str, Function] = {
    "sphere": Function(sphere, (-5.12, 5.12), 0.0),
    "rosenbrock": Function(rosenbrock, (-2.048, 2.048), 1.0, fewest=2),
    "rastrigin": Function(rastrigin, (-5.12, 5.12), 0.0),
    "ackley": Function(ackley, (-32.768, 32.768), 0.0),
    "griewank": Function(griewank, (-600.0, 600.0), 0.0),
    "levy": Function(levy, (-10.0, 10.0), 1.0),
    "styblinski_tang": Function(styblinski_tang, (-5.0, 5.0), STYBLINSKI_TANG),
    "zakharov": Function(zakharov, (-5.0, 10.0), 0.0),
    "beale": Function(beale, (-4.5, 4.5), (3.0, 0.5)),
    "booth": Function(booth, (-10.0, 10.0), (1.0, 3.0)),
    "himmelblau": Function(himmelblau, (-5.0, 5.0), (3.0, 2.0)),
}


@functools.lru_cache(maxsize=128)
def expected_excess(function: str, dimension: int) -> float:
    """Its mean over the box, by 2**14 points of a fixed seed."""
    low, high = FUNCTIONS[function].box
    points = np.random.default_rng(0).uniform(low, high, (2**14, dimension))
    return float(FUNCTIONS[function].excess(points, np).mean())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LandscapeTask:
    """The excess of a function over its minimum at center + half * rotation (x - shift + batch),
    where the box of the function is center +- half; so params start near `shift`, and its box has
    sides of 2.

    The three splits are the same distribution.
    """

    rotation: jax.Array  # [D, D]
    shift: jax.Array  # [D]
    function: str = dataclasses.field(metadata={"static": True})
    noise: float = dataclasses.field(metadata={"static": True})

    def _box(self) -> tuple[float, float]:
        low, high = FUNCTIONS[self.function].box
        return (low + high) / 2, (high - low) / 2

    def init(self, key: Key) -> jax.Array:
        """Uniform in the box."""
        inside = jax.random.uniform(key, self.shift.shape, minval=-1.0, maxval=1.0)
        return self.shift + self.rotation.T @ inside

    def batch(self, key: Key, split: Split) -> jax.Array:
        return self.noise * jax.random.normal(key, self.shift.shape)

    def loss(self, params: jax.Array, batch: jax.Array) -> jax.Array:
        center, half = self._box()
        point = center + half * (self.rotation @ (params - self.shift + batch))
        return FUNCTIONS[self.function].excess(point, jnp)

    def normalize(self, loss: jax.Array) -> jax.Array:
        """Relative to the mean over the box, where `init` starts."""
        return relative_loss(loss, expected_excess(self.function, self.shift.shape[0]))

    def minimiser(self) -> jax.Array:
        """[D] params, where the loss without noise is 0."""
        center, half = self._box()
        point = jnp.asarray(FUNCTIONS[self.function].minimiser)
        return self.shift + self.rotation.T @ (
            (jnp.broadcast_to(point, self.shift.shape) - center) / half
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Landscape:
    """One function of `FUNCTIONS` in `dimension` dimensions, its place standard normal.

    Args:
      noise: deviation per coordinate of where the loss looks from the params, in units of half the
        box. The loss is not negative with it either, but no longer 0 at the minimum.
      rotated: by a random orthogonal matrix.
    """

    function: str = dataclasses.field(default="rosenbrock", metadata={"static": True})
    dimension: int = dataclasses.field(default=2, metadata={"static": True})
    noise: float = dataclasses.field(default=0.0, metadata={"static": True})
    rotated: bool = dataclasses.field(default=True, metadata={"static": True})

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise ValueError(unknown_name("function", self.function, FUNCTIONS))
        positive_integers(self, "dimension")
        function = FUNCTIONS[self.function]
        if isinstance(function.minimiser, tuple) and self.dimension != 2:
            raise ValueError(
                f"`dimension` must be 2, which {self.function} has, got {self.dimension}"
            )
        if self.dimension < function.fewest:
            raise ValueError(
                f"`dimension` must be at least {function.fewest} for {self.function}, "
                f"got {self.dimension}"
            )
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"`noise` must be finite and not negative, got {self.noise}")

    def __call__(self, key: Key) -> LandscapeTask:
        key_rotation, key_shift = jax.random.split(key)
        rotation = jnp.eye(self.dimension)
        if self.rotated:
            rotation = jnp.linalg.qr(jax.random.normal(key_rotation, rotation.shape))[0]
        shift = jax.random.normal(key_shift, (self.dimension,))
        return LandscapeTask(rotation, shift, self.function, self.noise)


EXAMPLES = (Landscape(noise=0.001),)
