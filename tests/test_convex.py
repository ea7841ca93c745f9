"""Composite convex tasks against closed forms, brute force and KKT conditions, and their optima."""

# Arguments are wrong on purpose, and leaves NumPy's.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special, stats

import tasks
from learned_opt import discovery
from tasks import active_set
from tasks.base import train_step
from tasks.composite import (
    L1,
    Box,
    Composite,
    ElasticNet,
    LeastSquares,
    Logistic,
    NonNegative,
    QuadraticForm,
    spectral_bound,
)
from tasks.convex import (
    BoxQuadratic,
    ElasticNetRegression,
    Lasso,
    LogisticL1,
    NonNegativeRegression,
    PatchLasso,
    TabularLogistic,
    box_quadratic,
    elastic_net,
    lasso,
    logistic,
    nonnegative_least_squares,
)
from tasks.data import load, synthetic
from tasks.optimum import optima, optimum
from tasks.patches import load_patches

RANDOM = np.random.default_rng(0)
MATRIX, TARGET, X = (RANDOM.normal(size=shape) for shape in ((7, 5), (7,), (5,)))
LABELS = np.array([0, 1, 1, 0, 1, 0, 0])
HESSIAN = MATRIX.T @ MATRIX
SMALL = {
    "lasso": lasso(MATRIX, TARGET, 0.3),
    "elastic_net": elastic_net(MATRIX, TARGET, 0.3, 0.7),
    "nonnegative": nonnegative_least_squares(MATRIX, TARGET),
    "logistic": logistic(MATRIX, LABELS, 0.02),
    "box": box_quadratic(HESSIAN, X, -0.2, np.linspace(0.1, 0.5, 5)),
}
# of one coordinate, in NumPy, with the domain
SCALAR = {
    "l1": (L1(jnp.array(0.3)), lambda x: 0.3 * abs(x), (-9, 9)),
    "elastic_net": (
        ElasticNet(jnp.array(0.3), jnp.array(0.7)),
        lambda x: 0.3 * abs(x) + 0.35 * x**2,
        (-9, 9),
    ),
    "nonnegative": (NonNegative(), lambda x: 0 * x, (0, 9)),
    "box": (Box(jnp.array(-0.5), jnp.array(1.5)), lambda x: 0 * x, (-0.5, 1.5)),
}


def float64(tree):
    """To be used with x64 enabled."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def host(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@functools.cache
def drawn(family):
    """100 instances, stacked, on the host."""
    keys = jax.random.split(jax.random.key(0), 100)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(family))(keys))


def instance(stacked, i):
    return jax.tree.map(lambda leaf: leaf[i], stacked)


def smooth_value(smooth, x):
    """f and its gradient by NumPy, in float64."""
    smooth = host(smooth)
    if isinstance(smooth, QuadraticForm):
        gradient = smooth.hessian @ (x - smooth.center)
        return 0.5 * (x - smooth.center) @ gradient, gradient
    z = smooth.matrix @ x
    if isinstance(smooth, LeastSquares):
        return 0.5 * np.sum((z - smooth.target) ** 2), smooth.matrix.T @ (z - smooth.target)
    loss = np.logaddexp(0, z) - smooth.labels * z
    return loss.mean(), smooth.matrix.T @ (special.expit(z) - smooth.labels) / len(z)


def penalty_value(penalty, x):
    rho, ridge = (float(getattr(penalty, name, 0)) for name in ("rho", "ridge"))
    return rho * np.abs(x).sum() + 0.5 * ridge * np.sum(x**2)


def proximal(penalty, v, step):
    """The proximal point by NumPy, in float64."""
    penalty = host(penalty)
    if isinstance(penalty, NonNegative):
        return np.maximum(v, 0)
    if isinstance(penalty, Box):
        return np.minimum(np.maximum(v, penalty.low), penalty.high)
    shrunk = np.sign(v) * np.maximum(np.abs(v) - step * penalty.rho, 0)
    return shrunk / (1 + step * getattr(penalty, "ridge", 0))


@pytest.mark.parametrize("name", SCALAR)
def test_prox_minimises_in_the_metric_of_its_steps(name):
    penalty, r, domain = SCALAR[name]
    v = np.array([-2.0, -0.31, -0.05, 0.0, 0.05, 0.2, 0.7, 1.6, 3.0])
    step = np.array([0.1, 1.0, 0.2, 0.5, 3.0, 0.1, 2.0, 0.3, 1.5])
    wanted = [
        optimize.minimize_scalar(
            lambda x, i=i: r(x) + (x - v[i]) ** 2 / (2 * step[i]),
            bounds=domain, method="bounded", options={"xatol": 1e-9},
        ).x
        for i in range(len(v))
    ]  # fmt: skip
    inside, outside = np.clip(v, *domain), v[(v < domain[0]) | (v > domain[1])]
    slope = (r(0.5 + 1e-6) - r(0.5 - 1e-6)) / 2e-6

    @jax.jit
    def outcome(v, step):
        pair = jnp.stack([v, -v])
        rows = jnp.stack([penalty.prox(v, 0.5), penalty.prox(-v, 2.0)])
        values = penalty.value(inside), jax.vmap(penalty.value)(outside[:, None])
        slopes = jax.vmap(jax.grad(penalty.value))(jnp.array([[0.5], [0.0]]))[:, 0]
        broadcast = penalty.prox(pair, jnp.array([[0.5], [2.0]]))
        return penalty.prox(v, step), penalty.nearest(v), *values, slopes, broadcast, rows

    got = outcome(jnp.asarray(v, jnp.float32), jnp.asarray(step, jnp.float32))
    for number, expected in zip(got, (wanted, inside, r(inside).sum(), np.inf), strict=False):
        np.testing.assert_allclose(number, expected, atol=2e-6)
    slopes, broadcast, rows = got[4:]
    np.testing.assert_allclose(slopes, [slope, 0], atol=1e-5)
    np.testing.assert_allclose(broadcast, rows, rtol=1e-6)  # steps that are one per row


@pytest.mark.parametrize("name", SMALL)
def test_values_and_gradients_in_float64_throughout(name):
    task, x = SMALL[name], 2 * X
    assert {leaf.dtype for leaf in jax.tree.leaves(task)} == {np.dtype(np.float32)}

    @jax.jit
    def outcome(task, x):
        zeros, loss = task.init(jax.random.key(0)), task.loss(x, ())
        prox, lipschitz = task.penalty.prox(x, 0.1 + zeros), task.smooth_part.lipschitz()
        normal = task.normalize(task.loss(zeros, ()))
        return zeros, loss, prox, lipschitz, normal, *jax.value_and_grad(task.smooth)(x, ())

    with jax.enable_x64():
        got = outcome(float64(task), jnp.asarray(x))
    assert all(number.dtype == np.float64 for number in got)
    zeros, loss, prox, lipschitz, normal, value, gradient = got
    np.testing.assert_array_equal(zeros, np.zeros(5))
    np.testing.assert_allclose(normal, 1, rtol=1e-13)
    np.testing.assert_allclose(lipschitz, task.lipschitz, rtol=1e-6)
    expected, slope = smooth_value(task.smooth_part, x)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    np.testing.assert_allclose(gradient, slope, rtol=1e-12)
    np.testing.assert_allclose(prox, proximal(task.penalty, x, 0.1), rtol=1e-13)
    feasible = proximal(task.penalty, x, 0.0)
    total = smooth_value(task.smooth_part, feasible)[0] + penalty_value(task.penalty, feasible)
    np.testing.assert_allclose(loss, total, rtol=1e-13)


def test_logistic_loss_keeps_its_digits_far_from_the_boundary():
    value = Logistic(jnp.eye(2) * 30, jnp.array([1.0, 0.0])).value(jnp.array([1.0, -1.0]))
    np.testing.assert_allclose(value, np.exp(-30.0), rtol=1e-5)


GAUSSIAN, COMMON = RANDOM.normal(size=(40, 80)), RANDOM.normal(size=(40, 1))
DESIGNS = {
    "wide": GAUSSIAN,
    "tall": GAUSSIAN.T,
    "unit": GAUSSIAN / np.linalg.norm(GAUSSIAN, axis=0, keepdims=True),
    "coherent": 0.3 * GAUSSIAN + COMMON,
    "rank one": COMMON @ GAUSSIAN[:1],
    "identity": np.eye(40, 80),
    "small": 1e-4 * GAUSSIAN,
    "large": 1e4 * GAUSSIAN,
    "larger": 1e8 * GAUSSIAN,
}


def test_lipschitz_constants_are_bounds_and_tight():
    ratios = {}
    for name, matrix in DESIGNS.items():
        smooth = LeastSquares(jnp.asarray(matrix, jnp.float32), jnp.zeros(len(matrix)))
        top = np.linalg.norm(np.asarray(smooth.matrix, np.float64), 2) ** 2
        ratios[name] = float(smooth.lipschitz()) / top
    assert all(1 - 1e-6 <= ratio <= 1.01 for ratio in ratios.values()), ratios
    np.testing.assert_allclose(ratios.pop("identity"), 40 ** (1 / 1024), rtol=1e-6)
    np.testing.assert_allclose(list(ratios.values()), 1, rtol=1e-6)
    np.testing.assert_allclose(SMALL["box"].lipschitz, np.linalg.eigvalsh(HESSIAN)[-1], rtol=2e-6)
    # that of the Hessian at 0, where the slopes of all samples are steepest
    top = np.linalg.norm(MATRIX, 2) ** 2 / (4 * 7)
    np.testing.assert_allclose(SMALL["logistic"].lipschitz, top, rtol=2e-6)
    # fewer squarings are a looser bound, by the formula
    np.testing.assert_allclose(spectral_bound(jnp.eye(5), squarings=0), np.sqrt(5), rtol=1e-6)
    nothing = spectral_bound(jnp.zeros((5, 5)))
    assert 0 < nothing < 1e-30
    assert np.isfinite(1 / nothing)
    assert np.isnan(spectral_bound(jnp.full((5, 5), jnp.nan)))


def _cosines(matrix):
    """[K], means over the pairs of columns of matrices [K, M, N]."""
    unit = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    pairs = np.triu_indices(matrix.shape[2], 1)
    return (np.swapaxes(unit, 1, 2) @ unit)[:, *pairs].mean(axis=1)


CLEAN = Lasso(rows=40, columns=20, density=0.28, scale=2.0, matrix_scale=3.0, coherence=0.5)
LABELLED = LogisticL1(rows=100, columns=10, coherence=0.5, rho=1e-5)


@functools.cache
def without_and_with_noise(family):
    noisy = dataclasses.replace(family, noise=0.2)
    return drawn(lambda key: (family(key), noisy(key)))


@pytest.mark.parametrize("family", [CLEAN, LABELLED], ids=["lasso", "logistic"])
def test_any_two_columns_have_the_stated_correlation(family):
    matrix = without_and_with_noise(family)[0].smooth_part.matrix.astype(np.float64)
    cosines = _cosines(matrix)
    # what a sample's correlation is below that of its distribution
    expected = 0.5 * (1 - (1 - 0.5**2) / (2 * family.rows))
    assert abs(cosines.mean() - expected) < 4 * cosines.std() / np.sqrt(100)
    norms = np.linalg.norm(matrix, axis=1)
    if family is CLEAN:
        np.testing.assert_allclose(norms, 3, rtol=1e-6)
    else:
        np.testing.assert_allclose((norms**2).mean() / 100, 1, rtol=0.05)


def _signals(stacked):
    """[K, N], by least squares from tall designs without noise."""
    some = host(stacked).smooth_part
    return np.stack(
        [np.linalg.lstsq(a, b)[0] for a, b in zip(some.matrix, some.target, strict=True)]
    )


def test_signals_are_as_sparse_and_as_large_as_stated():
    signals = _signals(without_and_with_noise(CLEAN)[0])
    nonzero = np.abs(signals) > 1e-4
    np.testing.assert_array_equal(nonzero.sum(axis=1), 6)  # 5.6, rounded
    places = nonzero.sum(axis=0)  # binomial, 100 times 0.3
    assert np.abs(places - 30).max() < 4.5 * np.sqrt(100 * 0.3 * 0.7)
    assert stats.kstest(signals[nonzero] / 2, "norm").pvalue > 1e-3


def test_noise_is_relative_to_the_clean_target():
    clean, noisy = (task.smooth_part for task in without_and_with_noise(CLEAN))
    np.testing.assert_array_equal(clean.matrix, noisy.matrix)
    noise = np.linalg.norm(noisy.target - clean.target, axis=1)
    ratio = noise**2 / np.linalg.norm(clean.target, axis=1) ** 2
    assert abs(ratio.mean() / 0.2**2 - 1) < 4 * np.sqrt(2 / 40 / 100)


def test_labels_are_separable_and_flipped_at_the_stated_rate():
    clean, flipped = without_and_with_noise(LABELLED)
    labels = clean.smooth_part.labels
    assert set(np.unique(labels)) == {0, 1}
    rate = (labels != flipped.smooth_part.labels).mean()
    assert abs(rate - 0.2) < 4 * np.sqrt(0.2 * 0.8 / labels.size)
    for i in range(5):
        logits = clean.smooth_part.matrix[i] @ optimum(instance(clean, i)).point
        np.testing.assert_array_equal(logits > 0, labels[i] == 1)


def test_boxes_and_their_quadratics():
    some = host(drawn(BoxQuadratic(columns=10, condition=50.0, scale=3.0, matrix_scale=2.0)))
    spectrum = np.linalg.eigvalsh(some.smooth_part.hessian)
    np.testing.assert_allclose(spectrum[:, [0, -1]] / 2, [[1 / 50, 1]] * 100, rtol=1e-4)
    np.testing.assert_array_equal(
        some.smooth_part.hessian, np.swapaxes(some.smooth_part.hessian, 1, 2)
    )
    np.testing.assert_allclose([some.penalty.low[0], some.penalty.high[0]], [-3, 3])
    assert stats.kstest(some.smooth_part.center.ravel() / 6, "norm").pvalue > 1e-3


def test_ranges_are_drawn_from():
    family = ElasticNetRegression(
        rows=12, columns=10, density=(0.1, 0.5),
        rho=(0.01, 1.0), ridge=(0.1, 10.0), matrix_scale=(1e-2, 1e2),
    )  # fmt: skip
    some = drawn(family)
    scales = np.linalg.norm(some.smooth_part.matrix[:, :, 0], axis=1)
    values = (some.penalty.rho, some.penalty.ridge, scales)
    for value, low, high in zip(values, (0.01, 0.1, 1e-2), (1.0, 10.0, 1e2), strict=True):
        place = np.log(value / low) / np.log(high / low)
        assert place.min() > -1e-5
        assert place.max() < 1 + 1e-5
        assert stats.kstest(place, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(np.log(np.stack(values)))
    assert np.abs(correlation - np.eye(3)).max() < 4 / np.sqrt(100)
    counts = np.bincount((np.abs(_signals(some)) > 1e-4).sum(axis=1), minlength=6)
    # a uniform share of ten, rounded: half as many at the ends
    expected = 100 * np.array([0, 1, 2, 2, 2, 1]) / 8
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()


WIDE = (1e-3, 1e3)
# one program each, whose instances are of all scales and condition numbers
FAMILIES = (
    Lasso(coherence=(0.0, 0.9), scale=WIDE, matrix_scale=WIDE, noise=(0.0, 0.5)),
    ElasticNetRegression(coherence=(0.5, 0.9), scale=WIDE, matrix_scale=WIDE, ridge=(1e-3, 10.0)),
    NonNegativeRegression(coherence=(0.0, 0.9), scale=WIDE, matrix_scale=WIDE),
    LogisticL1(coherence=(0.0, 0.9), matrix_scale=WIDE, rho=(1e-3, 0.1), noise=(0.0, 0.1)),
    BoxQuadratic(condition=(1.0, 1e4), scale=WIDE, matrix_scale=WIDE),
    PatchLasso(picture="synthetic", atoms=32, rho=(0.1, 0.5)),
    TabularLogistic(rho=(1e-4, 0.1)),
)


@pytest.mark.parametrize("family", FAMILIES, ids=discovery.spec_of)
def test_optima_satisfy_the_optimality_conditions(family):
    stacked = drawn(family)
    for i in range(8):
        task = instance(stacked, i)
        found = optimum(task)
        x, penalty = found.point, host(task.penalty)
        f, gradient = smooth_value(task.smooth_part, x)
        assert x.dtype == np.float64
        np.testing.assert_allclose(found.value, f + penalty_value(penalty, x), rtol=1e-10)
        assert 0 <= found.gap <= 1e-10 * found.value
        assert 0 < found.value <= float(task.loss(np.zeros(len(x), np.float32), ())) * (1 + 1e-6)
        # the proximal gradient step stays; its unit is the largest gradient
        start = np.abs(smooth_value(task.smooth_part, np.zeros(len(x)))[1]).max()
        if isinstance(penalty, L1 | ElasticNet):
            gradient = gradient + getattr(penalty, "ridge", 0) * x
            assert np.abs(gradient).max() <= penalty.rho + 1e-8 * start
            np.testing.assert_allclose(
                gradient[x != 0], -penalty.rho * np.sign(x[x != 0]), atol=1e-8 * start
            )
        else:
            low, high = getattr(penalty, "low", 0), getattr(penalty, "high", np.inf)
            assert ((x >= low) & (x <= high)).all()
            assert (gradient[x > low] <= 1e-8 * start).all()
            assert (gradient[x < high] >= -1e-8 * start).all()


@pytest.mark.parametrize("name", SMALL)
def test_accelerated_proximal_gradient_comes_to_the_optimum_from_above(name):
    task = SMALL[name]
    best, step = optimum(task), 1 / float(task.lipschitz)
    x = y = np.zeros(len(best.point))
    momentum, values = 1.0, []
    for _ in range(3000):
        following = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        moved = proximal(task.penalty, y - step * smooth_value(task.smooth_part, y)[1], step)
        y = moved + (momentum - 1) / following * (moved - x)
        x, momentum = moved, following
        values.append(smooth_value(task.smooth_part, x)[0] + penalty_value(task.penalty, x))
    assert min(values) >= best.value * (1 - 1e-12)
    assert values[-1] <= best.value * (1 + 1e-8)
    np.testing.assert_allclose(x, best.point, atol=1e-4 * np.abs(best.point).max())


ONE, SCALES = np.float64(1), np.arange(1.0, 7)


def test_optima_in_closed_form():
    basis = np.linalg.qr(RANDOM.normal(size=(9, 6)))[0]
    target = 2 * RANDOM.normal(size=9)
    squares, curved = LeastSquares(basis, target), QuadraticForm(np.diag(SCALES), basis.T @ target)
    made = (
        (squares, L1(np.float64(0.5))),
        (squares, ElasticNet(np.float64(0.5), np.float64(3))),
        (squares, ElasticNet(np.float64(0), np.float64(3))),
        (squares, L1(np.float64(0))),
        (squares, NonNegative()),
        (curved, Box(np.float64(-0.5), np.float64(1))),
        (squares, L1(np.float64(100))),
    )
    least = basis.T @ target
    shrunk = np.sign(least) * np.maximum(np.abs(least) - 0.5, 0)
    inside, nothing = np.clip(least, -0.5, 1), np.zeros(6)
    wanted = (shrunk, shrunk / 4, least / 4, least, np.maximum(least, 0), inside, nothing)
    for parts, x in zip(made, wanted, strict=True):
        np.testing.assert_allclose(optimum(Composite(*parts, ONE)).point, x, atol=1e-12)
    # one coordinate: the slope of the logistic loss is -rho
    z, labels = np.array([1.0, -2.0, 0.5, 3.0]), np.array([1, 0, 0, 1])
    rho = 2.0**-7
    slope = lambda x: np.mean(z * (special.expit(z * x) - labels)) + rho  # noqa: E731
    found = optimum(logistic(z[:, None], labels, rho))
    root: Any = optimize.brentq(slope, 0, 50, xtol=1e-14)
    np.testing.assert_allclose(found.point, [root], rtol=1e-12)


@pytest.mark.parametrize("cost", [0.0, 0.3])
@pytest.mark.parametrize(
    "fit",
    [active_set.squared(TARGET), active_set.logistic(LABELS)],
    ids=["squared", "logistic"],
)
def test_gaps_bound_what_is_missing_wherever_the_solver_stops(fit, cost, monkeypatch):
    bounds = np.zeros(5), np.full(5, 2.0)

    def solve(start):
        point, gap = active_set.active_set(fit, MATRIX, cost, bounds, start, 2.0)
        return fit.value(MATRIX @ point) + cost * point.sum(), gap

    best, gap = solve(np.ones(5))
    assert 0 <= gap < 1e-13
    monkeypatch.setattr(active_set, "STEPS", 0)
    starts = np.random.default_rng(1).uniform(-1, 3, (50, 5)).clip(0, 2)
    values, gaps = np.transpose([solve(start) for start in starts])
    assert (values > best + 1e-3).all()
    assert (gaps >= values - best).all()


def test_columns_may_be_dependent_and_tasks_mixed():
    twice = np.concatenate([MATRIX, MATRIX], axis=1)
    for make in (
        lambda a: lasso(a, TARGET, 0.3),
        lambda a: nonnegative_least_squares(a, TARGET),
        lambda a: logistic(a, LABELS, 0.02),
    ):
        one, two = optimum(make(MATRIX)), optimum(make(twice))
        np.testing.assert_allclose(one.value, two.value, rtol=1e-12)
    quadratic = box_quadratic(HESSIAN, X, -1.0, 1.0).smooth_part
    with_l1 = Composite(quadratic, L1(jnp.array(0.3)), jnp.array(1.0))
    fitted = optimum(lasso(MATRIX, MATRIX @ X, 0.3))
    np.testing.assert_allclose(optimum(with_l1).point, fitted.point, atol=1e-5)
    bounded = Composite(
        SMALL["lasso"].smooth_part, Box(jnp.array(0.0), jnp.array(1e6)), jnp.array(1.0)
    )
    np.testing.assert_allclose(optimum(bounded).value, optimum(SMALL["nonnegative"]).value)
    assert optimum(lasso(0 * MATRIX, TARGET, 0.3)).value == pytest.approx(0.5 * TARGET @ TARGET)


def test_optima_of_stacked_tasks_are_those_of_each():
    stacked = jax.tree.map(lambda leaf: leaf[:2], without_and_with_noise(LABELLED)[0])
    values = optima(stacked)
    assert values.dtype == np.float64
    np.testing.assert_array_equal(values, [optimum(instance(stacked, i)).value for i in range(2)])
    with pytest.raises(ValueError, match=r"`task` must be one instance.*`optima` is for stacked"):
        optimum(stacked)


def test_what_has_no_certified_optimum_is_refused():
    with pytest.raises(RuntimeError, match=r"with a gap of \d.*above `tolerance` 1e-30"):
        optimum(SMALL["nonnegative"], tolerance=1e-30)
    unbounded = logistic(MATRIX, LABELS, 0.0)
    with pytest.raises(TypeError, match="`task` of a logistic loss must have L1 and `rho` > 0"):
        optimum(unbounded)
    with pytest.raises(TypeError, match="`task` has a penalty without a solver: Logistic"):
        optimum(Composite(unbounded.smooth_part, unbounded.smooth_part, unbounded.lipschitz))
    with pytest.raises(TypeError, match="`task` has a smooth part without a solver: L1"):
        optimum(Composite(unbounded.penalty, unbounded.penalty, unbounded.lipschitz))
    with pytest.raises(ValueError, match="`task` is not convex: its hessian has the eigenvalue -1"):
        optimum(box_quadratic(np.diag([2.0, -1.0]), [1.0, 1.0], -1.0, 1.0))


NAN = np.where(np.arange(35).reshape(7, 5) < 3, np.nan, MATRIX)
NUMBER = "must be a finite number that is not negative, got"
BAD = [
    (lambda: lasso(NAN, TARGET, 0.1), "`matrix` must be finite in float32, got 3 entries of 35"),
    (lambda: lasso([[1e39]], [1.0], 0.1), "`matrix` must be finite in float32, got 1 entries"),
    (lambda: lasso(1j * MATRIX, TARGET, 0.1), "`matrix` must be real, got complex64"),
    (lambda: lasso(TARGET, TARGET, 0.1), "`matrix` must have shape [M, N], got (7,)"),
    (lambda: lasso(MATRIX[:0], TARGET[:0], 0.1), "`matrix` must have shape [M, N], got (0, 5)"),
    (lambda: lasso(MATRIX, X, 0.1), "`target` must have shape (7,), an entry per row of `matrix`"),
    (lambda: nonnegative_least_squares(MATRIX, TARGET / 0), "`target` must be finite in float32"),
    (lambda: lasso(MATRIX, TARGET, -1.0), f"`rho` {NUMBER} -1.0"),
    (lambda: lasso(MATRIX, TARGET, X), f"`rho` {NUMBER} array"),
    (lambda: logistic(MATRIX, LABELS, np.inf), f"`rho` {NUMBER} inf"),
    (lambda: elastic_net(MATRIX, TARGET, 0.1, np.nan), f"`ridge` {NUMBER} nan"),
    (lambda: logistic(MATRIX, LABELS - 1, 0.1), "`labels` must be 0 or 1, got -1.0: name one"),
    (lambda: logistic(MATRIX, LABELS[:3], 0.1), "`labels` must have shape (7,)"),
    (lambda: box_quadratic(MATRIX[:5], X, -1, 1), "`hessian` must be symmetric, got entries that"),
    (lambda: box_quadratic(MATRIX, X, -1, 1), "`hessian` must have shape (5, 5) like `center`"),
    (lambda: box_quadratic(HESSIAN, MATRIX, -1, 1), "`center` must have shape [N], got (7, 5)"),
    (lambda: box_quadratic(HESSIAN, X, TARGET, 1), "`low` must have shape () or (5,) like"),
    (lambda: box_quadratic(HESSIAN, X, 0, np.arange(5)), "`low` must be below `high` in every"),
    (lambda: Lasso(rows=0), "`rows` must be a positive integer, got 0"),
    (lambda: BoxQuadratic(columns=2.0), "`columns` must be a positive integer, got 2.0"),
    (lambda: Lasso(rho=0.0), "`rho` must be a number in (0, inf), or a range (low, high) of them"),
    (lambda: Lasso(rho="big"), "`rho` must be a number in (0, inf)"),
    (lambda: Lasso(rho=(1.0, 2.0, 3.0)), "`rho` must be a number in (0, inf)"),
    (lambda: Lasso(scale=(2.0, 1.0)), "`scale` must be a number in (0, inf)"),
    (lambda: ElasticNetRegression(ridge=(0.0, 1.0)), "`ridge` must be a number in (0, inf)"),
    (lambda: Lasso(matrix_scale=np.inf), "`matrix_scale` must be a number in (0, inf)"),
    (lambda: Lasso(density=1.5), "`density` must be a number in (0, 1], or a range"),
    (lambda: Lasso(noise=(-1.0, 1.0)), "`noise` must be a number in [0, inf)"),
    (lambda: LogisticL1(noise=0.6), "`noise` must be a number in [0, 0.5]"),
    (lambda: NonNegativeRegression(coherence=1.0), "`coherence` must be a number in [0, 1), or"),
    (lambda: BoxQuadratic(condition=0.5), "`condition` must be a number in [1, inf)"),
    (lambda: PatchLasso(picture="chine"), "unknown `picture` 'chine'. Did you mean 'china'?"),
    (lambda: PatchLasso(picture="synthetic", atoms=0), "`atoms` must be a positive integer"),
    (lambda: TabularLogistic(data=synthetic()), "`data` must be a table, got rows of shape (4, 4)"),
    (lambda: TabularLogistic(data="diabetes"), "`data` must have classes, and not stream"),
    (lambda: TabularLogistic(data="stream:wine"), "`data` must have classes, and not stream"),
    (lambda: TabularLogistic(fraction=0.001), "`fraction` must be in (0, 1] and leave a row"),
    (lambda: TabularLogistic(fraction=1.5), "`fraction` must be in (0, 1] and leave a row"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.filterwarnings("ignore:overflow")
def test_bad_arguments_are_named(make, message):
    with np.errstate(divide="ignore"), pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_traced_arrays_are_checked_for_their_shapes():
    made = jax.jit(jax.vmap(lambda a, b: lasso(a, b, 0.1)))(MATRIX[None], TARGET[None])
    np.testing.assert_array_equal(made.smooth_part.matrix[0], MATRIX.astype(np.float32))
    with pytest.raises(ValueError, match=re.escape("`target` must have shape (7,)")):
        jax.jit(lambda a, b: lasso(a, b, 0.1))(MATRIX, X)


def test_patches_are_those_of_the_photograph():
    from sklearn.datasets import load_sample_image

    patches = load_patches("flower", 24)
    gray = load_sample_image("flower.jpg")[:8, 8:16] / 255 @ [0.299, 0.587, 0.114]
    scaled = (gray - gray.min()) / (np.ptp(gray) + 1e-3)
    np.testing.assert_allclose(patches.targets[1], (scaled - scaled.mean()).ravel(), atol=1e-6)
    np.testing.assert_allclose(patches.targets.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(patches.dictionary, axis=0), 1, rtol=1e-6)
    top = np.linalg.norm(patches.dictionary.astype(np.float64), 2) ** 2
    assert top <= float(patches.lipschitz) <= top * (1 + 2e-6)
    # the dictionary learned what patches are made of: atoms that are patches explain them less well
    patch_atoms = patches.targets[:24].T / np.linalg.norm(patches.targets[:24], axis=1)[None]
    costs = [
        np.mean([optimum(lasso(atoms, patches.targets[i], 0.2)).value for i in range(1000, 1020)])
        for atoms in (patches.dictionary, patch_atoms)
    ]
    assert costs[0] < 0.9 * costs[1]


def test_targets_are_random_patches():
    family = FAMILIES[-2]
    some = drawn(family)
    rows = {row.tobytes() for row in family.picture.targets}
    got = {row.tobytes() for row in some.smooth_part.target}
    assert got <= rows
    # of 128 patches 100 draws leave out each with a chance of (1 - 1/128)^100
    assert abs(len(got) - 128 * (1 - (1 - 1 / 128) ** 100)) < 15
    assert ((some.penalty.rho >= 0.1) & (some.penalty.rho <= 0.5)).all()
    np.testing.assert_array_equal(some.smooth_part.matrix[0], family.picture.dictionary)


def test_families_of_data_are_rebuilt_by_their_spec():
    members = discovery.members(tasks)
    for family in (
        PatchLasso(picture="flower", atoms=24, rho=0.25),
        PatchLasso(picture="synthetic", atoms=24, rho=(0.1, 0.2)),
        TabularLogistic(data="breast_cancer", rho=0.02, fraction=0.25),
    ):
        assert discovery.build("task", discovery.spec_of(family), members) == family
    assert "picture='flower', atoms=24" in discovery.spec_of(PatchLasso("flower", 24))
    few = PatchLasso(picture=load_patches("synthetic", 24), atoms=16)
    assert few.picture is load_patches("synthetic", 16)


def test_tables_are_rows_of_their_training_split():
    data = load("breast_cancer")
    train = data.splits[0][1]
    numbers = {row.tobytes(): i for i, row in enumerate(data.inputs)}
    some = drawn(FAMILIES[-1]).smooth_part
    rows = np.array([[numbers[row.tobytes()] for row in matrix] for matrix in some.matrix[:2]])
    assert rows.shape == (2, train // 2)
    assert rows.max() < train
    assert all(len(set(each)) == len(each) for each in rows)
    assert len(set(rows[0]) & set(rows[1])) < train // 2
    np.testing.assert_array_equal(some.labels[:2], data.targets[rows] == 0)


def test_train_step_passes_what_proximal_optimizers_need():
    task, seen = SMALL["lasso"], {}

    def update(grads, state, params=None, **extra):
        seen.update(extra)
        step = jnp.full(params.shape, 0.5 / extra["lipschitz"])
        return extra["prox"](params - step * grads, step) - params, state

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (), update)
    x = jnp.asarray(X, jnp.float32)
    after, _, loss = train_step(task, optimizer, x, (), ())
    assert set(seen) == {"value", "prox", "penalty", "lipschitz", "gradient"}
    f, gradient = smooth_value(task.smooth_part, X)
    step = 0.5 / float(task.lipschitz)
    np.testing.assert_allclose(seen["gradient"](x), gradient, rtol=1e-4)
    np.testing.assert_allclose(seen["penalty"](x), 0.3 * np.abs(X).sum(), rtol=1e-6)
    np.testing.assert_allclose(loss, f + 0.3 * np.abs(X).sum(), rtol=1e-5)
    np.testing.assert_allclose(after, proximal(task.penalty, X - step * gradient, step), rtol=1e-4)


def test_losses_of_points_outside_of_the_domain_are_those_of_the_nearest():
    task = SMALL["nonnegative"]
    assert (X < 0).any()
    x = jnp.asarray(X, jnp.float32)
    inside = smooth_value(task.smooth_part, np.maximum(X, 0))[0]
    np.testing.assert_allclose(task.loss(x, ()), inside, rtol=1e-5)
    np.testing.assert_allclose(task.smooth(x, ()), smooth_value(task.smooth_part, X)[0], rtol=1e-5)
    assert task.normalize(task.loss(jnp.full(5, jnp.nan), ())) == 2
