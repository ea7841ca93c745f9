"""Instances of `tasks.composite`: of a user's own arrays, drawn by stated generators, and of real
data. The generators are those of arXiv:2305.18577, with noise and correlated columns.
"""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from tasks.base import Key
from tasks.composite import (
    L1,
    Box,
    Composite,
    ElasticNet,
    LeastSquares,
    Logistic,
    NonNegative,
    Penalty,
    QuadraticForm,
    SmoothPart,
    product,
)
from tasks.data import Dataset, load
from tasks.dynamic import Range, log_uniform, uniform
from tasks.fields import positive_integers
from tasks.patches import Patches, load_patches
from tasks.quadratic import SPECTRA
from tasks.stream import HostArray


def _composite(smooth_part: SmoothPart, penalty: Penalty) -> Composite:
    return Composite(smooth_part, penalty, smooth_part.lipschitz())


def _concrete(array: jax.Array) -> bool:
    """Whether it has values to look at: traced arrays have only shapes."""
    return not isinstance(array, Tracer)


def _arrays(**named: Any) -> list[jax.Array]:
    """Finite arrays of one floating dtype."""
    arrays = {name: jnp.asarray(value) for name, value in named.items()}
    dtype = jnp.result_type(*arrays.values(), jnp.float32)
    for name, array in arrays.items():
        if jnp.iscomplexobj(array):
            raise ValueError(f"`{name}` must be real, got {array.dtype}")
        arrays[name] = array.astype(dtype)
        if _concrete(array) and not (finite := jnp.isfinite(arrays[name])).all():
            raise ValueError(
                f"`{name}` must be finite in {dtype}, got {int((~finite).sum())} entries of "
                f"{array.size} that are not: remove or rescale them"
            )
    return list(arrays.values())


def _design(matrix: Any, name: str, vector: Any) -> list[jax.Array]:
    """A matrix [M, N] and a vector [M] called `name`."""
    matrix, vector = _arrays(**{"matrix": matrix, name: vector})
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"`matrix` must have shape [M, N], got {matrix.shape}")
    if vector.shape != matrix.shape[:1]:
        raise ValueError(
            f"`{name}` must have shape {matrix.shape[:1]}, an entry per row of `matrix`, got "
            f"{vector.shape}"
        )
    return [matrix, vector]


def _weight(name: str, value: Any, dtype: Any) -> jax.Array:
    weight = jnp.asarray(value, dtype)
    if weight.shape or (_concrete(weight) and not 0 <= float(weight) < math.inf):
        raise ValueError(f"`{name}` must be a finite number that is not negative, got {value!r}")
    return weight


def lasso(matrix: Any, target: Any, rho: Any) -> Composite:
    """|matrix x - target|^2 / 2 + rho |x|_1 for a matrix [M, N], a target [M] and a scalar.

    Raises (as all of these functions):
      ValueError: shapes that do not fit, numbers that are not finite, or of a forbidden sign.
    """
    matrix, target = _design(matrix, "target", target)
    return _composite(LeastSquares(matrix, target), L1(_weight("rho", rho, matrix.dtype)))


def elastic_net(matrix: Any, target: Any, rho: Any, ridge: Any) -> Composite:
    """|matrix x - target|^2 / 2 + rho |x|_1 + ridge |x|^2 / 2, see `lasso`."""
    matrix, target = _design(matrix, "target", target)
    weights = _weight("rho", rho, matrix.dtype), _weight("ridge", ridge, matrix.dtype)
    return _composite(LeastSquares(matrix, target), ElasticNet(*weights))


def nonnegative_least_squares(matrix: Any, target: Any) -> Composite:
    """|matrix x - target|^2 / 2 for x >= 0, see `lasso`."""
    return _composite(LeastSquares(*_design(matrix, "target", target)), NonNegative())


def logistic(matrix: Any, labels: Any, rho: Any) -> Composite:
    """Mean logistic loss of labels [S], 0 or 1, at logits matrix x, + rho |x|_1, see `lasso`."""
    matrix, labels = _design(matrix, "labels", labels)
    if _concrete(labels) and (wrong := (labels != 0) & (labels != 1)).any():
        raise ValueError(
            f"`labels` must be 0 or 1, got {float(labels[wrong][0])}: name one class 0, the rest 1"
        )
    return _composite(Logistic(matrix, labels), L1(_weight("rho", rho, matrix.dtype)))


def box_quadratic(hessian: Any, center: Any, low: Any, high: Any) -> Composite:
    """(x - center)^T hessian (x - center) / 2 for low <= x <= high, see `lasso`: a hessian [N, N],
    symmetric and positive semidefinite, a center [N], bounds that are [N] or scalars.
    """
    hessian, center, low, high = _arrays(hessian=hessian, center=center, low=low, high=high)
    if center.ndim != 1 or not center.size:
        raise ValueError(f"`center` must have shape [N], got {center.shape}")
    for name, array, shapes in (
        ("hessian", hessian, [2 * center.shape]),
        ("low", low, [(), center.shape]),
        ("high", high, [(), center.shape]),
    ):
        if array.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"`{name}` must have shape {wanted} like `center`, got {array.shape}")
    if _concrete(hessian) and not jnp.allclose(
        hessian, hessian.T, rtol=0, atol=1e-5 * float(jnp.abs(hessian).max())
    ):
        worst = float(jnp.abs(hessian - hessian.T).max())
        raise ValueError(
            f"`hessian` must be symmetric, got entries that differ by {worst:.3g}: pass "
            "(hessian + hessian.T) / 2"
        )
    room = jnp.broadcast_to(high, center.shape) - jnp.broadcast_to(low, center.shape)
    if _concrete(room) and not (room > 0).all():
        raise ValueError(
            "`low` must be below `high` in every coordinate, got a difference of "
            f"{float(room.min()):.3g}"
        )
    return _composite(QuadraticForm(hessian, center), Box(low, high))


T = TypeVar("T")
Interval = float | Range  # a number, or (low, high), from which every instance draws
POSITIVE = (math.ulp(0.0), float(np.finfo(np.float32).max))
LOG_UNIFORM = {
    "scale": POSITIVE,
    "matrix_scale": POSITIVE,
    "rho": POSITIVE,
    "ridge": POSITIVE,
    "condition": (1.0, POSITIVE[1]),
}
UNIFORM = {
    "density": (POSITIVE[0], 1.0),
    "noise": (0.0, POSITIVE[1]),
    "coherence": (0.0, math.nextafter(1.0, 0.0)),
}


def _static(family: type[T]) -> type[T]:
    """Registers a dataclass without arrays as a pytree, all of it static."""
    names = [field.name for field in dataclasses.fields(family)]  # pyright: ignore[reportArgumentType]
    return jax.tree_util.register_dataclass(family, data_fields=[], meta_fields=names)


def _ranges(family: Any) -> dict[str, Range]:
    """The fields that are numbers; one number is a range of itself."""
    limits = LOG_UNIFORM | UNIFORM
    fields = {f.name: getattr(family, f.name) for f in dataclasses.fields(family)}
    return {n: v if isinstance(v, tuple) else (v, v) for n, v in fields.items() if n in limits}


def _check(family: Any, *sizes: str, **limits: Range) -> None:
    positive_integers(family, *sizes)
    for name, between in _ranges(family).items():
        least, most = (LOG_UNIFORM | UNIFORM | limits)[name]
        numbers = len(between) == 2 and all(isinstance(v, int | float) for v in between)
        if not numbers or not least <= between[0] <= between[1] <= most:
            low = "(0" if least == POSITIVE[0] else f"[{least:g}"
            high = {POSITIVE[1]: "inf)", UNIFORM["coherence"][1]: "1)"}.get(most, f"{most:g}]")
            raise ValueError(
                f"`{name}` must be a number in {low}, {high}, or a range (low, high) of them, got "
                f"{getattr(family, name)!r}"
            )


def _draw(family: Any, key: Key) -> dict[str, Any]:
    """A scalar for each of `_ranges`."""
    return {
        name: (uniform if name in UNIFORM else log_uniform)(jax.random.fold_in(key, i), between)
        for i, (name, between) in enumerate(_ranges(family).items())
    }


def _matrix(family: Any, key: Key, coherence: Any) -> jax.Array:
    """[rows, columns], normal of variance 1; any two columns have the correlation `coherence`."""
    key_own, key_common = jax.random.split(key)
    own = jax.random.normal(key_own, (family.rows, family.columns))
    common = jax.random.normal(key_common, (family.rows, 1))
    common = jnp.broadcast_to(common, own.shape)
    return jnp.sqrt(1 - coherence) * own + jnp.sqrt(coherence) * common


def _signal(columns: int, key: Key, density: Any) -> jax.Array:
    """[columns], zero but for a share `density` of them (at least one), which are normal."""
    key_place, key_value = jax.random.split(key)
    # how many there are may be drawn, so they cannot be a shape
    rank = jax.random.permutation(key_place, columns)
    chosen = rank < jnp.maximum(jnp.round(density * columns), 1)
    return jnp.where(chosen, jax.random.normal(key_value, (columns,)), 0)


def _regression(family: Any, key: Key, positive: bool = False) -> tuple[Any, Any, dict[str, Any]]:
    """Matrix, target, and what else was drawn."""
    key_drawn, key_matrix, key_signal, key_noise = jax.random.split(key, 4)
    drawn = _draw(family, key_drawn)
    matrix = _matrix(family, key_matrix, drawn["coherence"])
    matrix *= drawn["matrix_scale"] / jnp.linalg.norm(matrix, axis=0, keepdims=True)
    signal = drawn["scale"] * _signal(family.columns, key_signal, drawn["density"])
    clean = product(matrix, jnp.abs(signal) if positive else signal)
    noise = jax.random.normal(key_noise, clean.shape) / math.sqrt(family.rows)
    return matrix, clean + drawn["noise"] * jnp.linalg.norm(clean) * noise, drawn


@_static
@dataclasses.dataclass(frozen=True)
class Lasso:
    """`lasso` with target = matrix @ signal + noise, all drawn for every instance.

    Args:
      density: share of the signal's entries that are not 0.
      noise: its expected norm, relative to that of matrix @ signal.
      scale: of the signal's normal entries.
      matrix_scale: the norm of the matrix's columns.
      coherence: correlation of any two columns.
    """

    rows: int = 50
    columns: int = 100
    density: Interval = 0.1
    noise: Interval = 0.0
    scale: Interval = 1.0
    matrix_scale: Interval = 1.0
    coherence: Interval = 0.0
    rho: Interval = 0.1

    def __post_init__(self) -> None:
        _check(self, "rows", "columns")

    def __call__(self, key: Key) -> Composite:
        matrix, target, drawn = _regression(self, key)
        return lasso(matrix, target, drawn["rho"])


@_static
@dataclasses.dataclass(frozen=True)
class ElasticNetRegression:
    """`elastic_net` of what `Lasso` draws."""

    rows: int = 50
    columns: int = 100
    density: Interval = 0.1
    noise: Interval = 0.0
    scale: Interval = 1.0
    matrix_scale: Interval = 1.0
    coherence: Interval = 0.0
    rho: Interval = 0.1
    ridge: Interval = 0.1

    def __post_init__(self) -> None:
        _check(self, "rows", "columns")

    def __call__(self, key: Key) -> Composite:
        matrix, target, drawn = _regression(self, key)
        return elastic_net(matrix, target, drawn["rho"], drawn["ridge"])


@_static
@dataclasses.dataclass(frozen=True)
class NonNegativeRegression:
    """`nonnegative_least_squares` of what `Lasso` draws, with the signal's absolute values.

    Without noise, or with `columns` from about twice `rows` on (whose nonnegative combinations are
    all vectors), the least F is 0: no ratio to it means anything.
    """

    rows: int = 100
    columns: int = 50
    density: Interval = 0.1
    noise: Interval = 0.1
    scale: Interval = 1.0
    matrix_scale: Interval = 1.0
    coherence: Interval = 0.0

    def __post_init__(self) -> None:
        _check(self, "rows", "columns")

    def __call__(self, key: Key) -> Composite:
        return nonnegative_least_squares(*_regression(self, key, positive=True)[:2])


@_static
@dataclasses.dataclass(frozen=True)
class LogisticL1:
    """`logistic` with labels 1 where matrix @ signal >= 0; the matrix's entries have variance
    matrix_scale^2, and the signal is that of `Lasso`.

    Args:
      noise: chance of a label to be the other one, at most 1/2.
      rho: relative to a mean loss. 0 is the minimiser from about 0.2 matrix_scale on (the least
        was 0.14 of 300 instances with the other defaults).
    """

    rows: int = 200
    columns: int = 50
    density: Interval = 0.4
    noise: Interval = 0.0
    matrix_scale: Interval = 1.0
    coherence: Interval = 0.0
    rho: Interval = 0.1

    def __post_init__(self) -> None:
        _check(self, "rows", "columns", noise=(0.0, 0.5))

    def __call__(self, key: Key) -> Composite:
        key_drawn, key_matrix, key_signal, key_noise = jax.random.split(key, 4)
        drawn = _draw(self, key_drawn)
        matrix = drawn["matrix_scale"] * _matrix(self, key_matrix, drawn["coherence"])
        clean = product(matrix, _signal(self.columns, key_signal, drawn["density"])) >= 0
        flipped = jax.random.bernoulli(key_noise, drawn["noise"], clean.shape)
        return logistic(matrix, clean ^ flipped, drawn["rho"])


@_static
@dataclasses.dataclass(frozen=True)
class BoxQuadratic:
    """`box_quadratic` on [-scale, scale]^N, with a normal center of deviation 2 scale, most of
    whose coordinates are outside, and a randomly rotated Hessian.

    Args:
      condition: c; the eigenvalues are log-uniform between matrix_scale / c and matrix_scale, both
        of which are among them.
    """

    columns: int = 50
    condition: Interval = 100.0
    scale: Interval = 1.0
    matrix_scale: Interval = 1.0

    def __post_init__(self) -> None:
        _check(self, "columns")

    def __call__(self, key: Key) -> Composite:
        key_drawn, key_spectrum, key_rotation, key_center = jax.random.split(key, 4)
        drawn, size = _draw(self, key_drawn), (self.columns, self.columns)
        spectrum = SPECTRA["log_uniform"](key_spectrum, jnp.log(drawn["condition"]), self.columns)
        rotation = jnp.linalg.qr(jax.random.normal(key_rotation, size))[0]
        hessian = drawn["matrix_scale"] * product(rotation * spectrum[None], rotation.T)
        center = 2 * drawn["scale"] * jax.random.normal(key_center, size[:1])
        bound = jnp.asarray(drawn["scale"])
        return box_quadratic((hessian + hessian.T) / 2, center, -bound, bound)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatchLasso:
    """`lasso` with a random patch of a picture as target and one learned dictionary as matrix.

    `picture` may be a name for `tasks.patches.load_patches`: china, flower, or synthetic. With the
    defaults 0 is the minimiser for one patch of 50.
    """

    picture: Patches | str = "china"
    atoms: int = dataclasses.field(default=128, metadata={"static": True})
    rho: Interval = dataclasses.field(default=0.5, metadata={"static": True})

    def __post_init__(self) -> None:
        _check(self, "atoms")
        # jax rebuilds pytrees with placeholders for `picture`
        name = self.picture.name if isinstance(self.picture, Patches) else self.picture
        if isinstance(name, str) and getattr(self.picture, "atoms", None) != self.atoms:
            object.__setattr__(self, "picture", load_patches(name, self.atoms))

    def __call__(self, key: Key) -> Composite:
        assert isinstance(self.picture, Patches)
        key_drawn, key_patch = jax.random.split(key)
        dictionary = jnp.asarray(self.picture.dictionary)
        target = jax.random.choice(key_patch, jnp.asarray(self.picture.targets))
        rho = jnp.asarray(_draw(self, key_drawn)["rho"], dictionary.dtype)
        lipschitz = jnp.asarray(self.picture.lipschitz)
        return Composite(LeastSquares(dictionary, target), L1(rho), lipschitz)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TabularLogistic:
    """`logistic` of class 0 against the others on a random `fraction` (rounded down) of the rows of
    the training split of a table, whose features are standardised.

    `data` may be a name for `tasks.data.load`.
    """

    data: Dataset | str = "breast_cancer"
    rho: Interval = dataclasses.field(default=0.01, metadata={"static": True})
    fraction: float = dataclasses.field(default=0.5, metadata={"static": True})

    def __post_init__(self) -> None:
        _check(self)
        # jax rebuilds pytrees with placeholders for `data`
        if isinstance(self.data, str):
            object.__setattr__(self, "data", load(self.data))
        if not isinstance(self.data, Dataset):
            return
        if isinstance(self.data.inputs, HostArray) or not self.data.classes:
            raise ValueError(f"`data` must have classes, and not stream, got {self.data!r}")
        shape = getattr(self.data.inputs, "shape", (0, 0))
        if len(shape) != 2:
            raise ValueError(f"`data` must be a table, got rows of shape {tuple(shape[1:])}")
        if not 1 <= self.fraction * self.data.splits[0][1] <= self.data.splits[0][1]:
            raise ValueError(f"`fraction` must be in (0, 1] and leave a row, got {self.fraction}")

    def __call__(self, key: Key) -> Composite:
        assert isinstance(self.data, Dataset)
        key_drawn, key_rows = jax.random.split(key)
        train = self.data.splits[0][1]
        rows = jax.random.permutation(key_rows, train)[: int(self.fraction * train)]
        matrix, targets = jnp.asarray(self.data.inputs)[rows], jnp.asarray(self.data.targets)[rows]
        return logistic(matrix, targets == 0, _draw(self, key_drawn)["rho"])


EXAMPLES = (
    Lasso(rows=8, columns=12, rho=0.01),
    ElasticNetRegression(rows=8, columns=12, rho=0.01, ridge=0.01),
    NonNegativeRegression(rows=12, columns=6),
    LogisticL1(rows=30, columns=6, rho=0.01),
    BoxQuadratic(columns=6, condition=5.0),
    PatchLasso(picture="synthetic", atoms=16, rho=0.1),
    TabularLogistic(data="synthetic_table"),
)
