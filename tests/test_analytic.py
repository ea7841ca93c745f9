"""Analytic families and regressions against closed forms and numpy in float64."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tasks import data, landscapes, sources
from tasks.landscapes import FUNCTIONS, Landscape
from tasks.matrix_factorization import MatrixFactorization
from tasks.quadratic import Quadratic
from tasks.tabular import TabularMLP
from tasks.tiny_optimizer import TinyOptimizer

# One program each: what runs outside of jit is compiled operation by operation.
drawn = jax.jit(lambda family, key: family(key))
init = jax.jit(lambda task, key: task.init(key))
loss_of = jax.jit(lambda task, params, batch: task.loss(params, batch))
batch_of = jax.jit(lambda task, key, split: task.batch(key, split), static_argnums=2)
slope_of = jax.jit(jax.value_and_grad(lambda params, task, batch: task.loss(params, batch)))


def test_spectra_of_quadratics():
    def hessian(spectrum, dimension, rotated=True):
        family = Quadratic(dimension, (16.0, 16.0), spectrum=spectrum, rotated=rotated)
        return np.asarray(drawn(family, jax.random.key(0)).hessian, np.float64)

    def eigenvalues(spectrum, dimension):
        return np.linalg.eigvalsh(hessian(spectrum, dimension))[::-1]

    power_law, tolerance = [1, 1 / 4, 1 / 9, 1 / 16], 2e-6  # of products of 4 terms in float32
    np.testing.assert_allclose(hessian("power_law", 4, False), np.diag(power_law), atol=tolerance)
    np.testing.assert_allclose(eigenvalues("power_law", 4), power_law, atol=tolerance)
    assert np.abs(np.triu(hessian("power_law", 4), 1)).max() > 0.05
    two_clusters = eigenvalues("two_clusters", 3)
    np.testing.assert_allclose(two_clusters, [1, 1, 1 / 16], atol=tolerance)
    # 30 draws: the means are in five deviations of their error
    for spectrum, mean, deviation in (
        ("uniform", 17 / 32, 15 / 16 / math.sqrt(12)),
        ("log_uniform", 15 / 16 / math.log(16), 0.257),
    ):
        found = eigenvalues(spectrum, 30)
        np.testing.assert_allclose(found[[0, -1]], [1, 1 / 16], atol=1e-5)
        assert found.mean() == pytest.approx(mean, abs=5 * deviation / math.sqrt(30))
        assert len(set(found.round(4))) > 20


# As textbooks write them; styblinski_tang over its dimension.
CLASSIC = {
    "sphere": lambda x: sum(a**2 for a in x),
    "rosenbrock": lambda x: sum(
        100 * (b - a * a) ** 2 + (a - 1) ** 2 for a, b in itertools.pairwise(x)
    ),
    "rastrigin": lambda x: 10 * len(x) + sum(a * a - 10 * np.cos(2 * np.pi * a) for a in x),
    "ackley": lambda x: (
        -20 * np.exp(-0.2 * np.sqrt(sum(a * a for a in x) / len(x)))
        - np.exp(sum(np.cos(2 * np.pi * a) for a in x) / len(x))
        + 20
        + np.e
    ),
    "griewank": lambda x: (
        1
        + sum(a * a / 4000 for a in x)
        - math.prod(np.cos(a / np.sqrt(i)) for i, a in enumerate(x, 1))
    ),
    "levy": lambda x: (
        np.sin(np.pi * (1 + (x[0] - 1) / 4)) ** 2
        + sum(
            ((a - 1) / 4) ** 2 * (1 + 10 * np.sin(np.pi * (1 + (a - 1) / 4) + 1) ** 2)
            for a in x[:-1]
        )
        + ((x[-1] - 1) / 4) ** 2 * (1 + np.sin(2 * np.pi * (1 + (x[-1] - 1) / 4)) ** 2)
    ),
    "styblinski_tang": lambda x: (
        sum(a**4 - 16 * a**2 + 5 * a for a in x) / 2 + 39.16616570377142 * len(x)
    ),
    "zakharov": lambda x: (
        sum(a * a for a in x)
        + sum(0.5 * i * a for i, a in enumerate(x, 1)) ** 2
        + sum(0.5 * i * a for i, a in enumerate(x, 1)) ** 4
    ),
    "beale": lambda x: sum(
        (c - x[0] + x[0] * x[1] ** i) ** 2 for i, c in enumerate((1.5, 2.25, 2.625), 1)
    ),
    "booth": lambda x: (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2,
    "himmelblau": lambda x: (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2,
}
KNOWN = [
    ("rosenbrock", (-1, 1), 4),
    ("rastrigin", (1, 1), 2),
    ("ackley", (1, 1), 20 - 20 * math.exp(-0.2)),
    ("griewank", (math.pi, 0), 2 + math.pi**2 / 4000),
    ("levy", (-3, 1), 1 + 10 * math.sin(1) ** 2),
    ("styblinski_tang", (0, 0), 78.33233140754284),
    ("zakharov", (1, 1), 2 + 1.5**2 + 1.5**4),
    ("beale", (0, 0), 14.203125),
    ("booth", (0, 0), 74),
    ("himmelblau", (0, 0), 170),
    ("himmelblau", (-2.805118086952745, 3.131312518250573), 0),
    ("himmelblau", (-3.779310253377747, -3.283185991286170), 0),
    ("himmelblau", (3.584428340330492, -1.848126526964404), 0),
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_landscapes_are_the_classic_functions_over_their_minimum(name):
    function = FUNCTIONS[name]
    dimension = 2 if isinstance(function.minimiser, tuple) else 3
    points = np.random.default_rng(0).uniform(*function.box, (1000, dimension))
    excess = function.excess(points, np)
    np.testing.assert_allclose(excess, CLASSIC[name](points.T), rtol=1e-9, atol=1e-9)
    assert (function.excess(points.astype(np.float32), np) >= 0).all()
    least = np.broadcast_to(np.asarray(function.minimiser, np.float64), (dimension,))
    steps = 1e-5 * np.eye(dimension)
    gradient = (function.excess(least + steps, np) - function.excess(least - steps, np)) / 2e-5
    np.testing.assert_allclose(function.excess(least, np), 0, atol=1e-25)
    np.testing.assert_allclose(gradient, np.zeros(dimension), atol=1e-6)
    for known, point, value in KNOWN:
        if known == name:
            got = function.excess(np.array(point, np.float64), np)
            np.testing.assert_allclose(got, value, rtol=1e-12, atol=1e-20)


@pytest.mark.parametrize(("name", "dimension"), [("rosenbrock", 3), ("beale", 2)])
def test_landscapes_are_shifted_and_rotated(name, dimension):
    task = drawn(Landscape(name, dimension, noise=0.5), jax.random.key(0))
    rotation = np.asarray(task.rotation, np.float64)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(dimension), atol=1e-6)
    assert np.abs(rotation).max() < 0.999
    half = FUNCTIONS[name].box[1]  # both boxes are around 0
    least = np.asarray(task.minimiser(), np.float64)
    point = half * rotation @ (least - np.asarray(task.shift))
    np.testing.assert_allclose(point - FUNCTIONS[name].minimiser, np.zeros(dimension), atol=1e-5)
    x, noise = init(task, jax.random.key(1)), batch_of(task, jax.random.key(2), "train")
    point = half * rotation @ np.asarray(x + noise - task.shift, np.float64)
    loss, gradient = slope_of(x, task, noise)
    np.testing.assert_allclose(loss, CLASSIC[name](point), rtol=1e-4)
    steps = 1e-5 * np.eye(dimension)
    expected = [(CLASSIC[name](point + h) - CLASSIC[name](point - h)) / 2e-5 for h in steps]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradient, half * rotation.T @ expected, atol=1e-3 * scale)


def test_the_tip_of_the_ackley_function_has_a_derivative():
    gradient = jax.grad(landscapes.ackley)(jnp.zeros(2), jnp)
    np.testing.assert_array_equal(gradient, np.zeros(2))


def test_landscapes_are_normalised_by_their_mean_over_the_box():
    box, wave = 5.12, math.sin(2 * math.pi * 5.12) / (2 * math.pi * 5.12)
    square, fourth = 2.048**2 / 3, 2.048**4 / 5
    closed = {
        ("sphere", 4): 4 * box**2 / 3,
        ("rastrigin", 2): 2 * (box**2 / 3 + 10 * (1 - wave)),
        # of 100 (b - a^2)^2 + (1 - a)^2, where the odd moments are 0
        ("rosenbrock", 3): 2 * (100 * (square + fourth) + 1 + square),
        ("booth", 2): 5 * 2 * 100 / 3 + 49 + 25,
    }
    for (name, dimension), expected in closed.items():
        # 16,384 points: deviations are below the means
        mean = landscapes.expected_excess(name, dimension)
        assert mean == pytest.approx(expected, rel=4 / math.sqrt(2**14))
    task = drawn(Landscape("rosenbrock", 3), jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 4000)
    losses = jax.jit(jax.vmap(lambda key: task.loss(task.init(key), jnp.zeros(3))))(keys)
    normalised = float(np.mean(losses)) / landscapes.expected_excess("rosenbrock", 3)
    assert normalised == pytest.approx(1, abs=0.07)
    np.testing.assert_allclose(task.normalize(jnp.asarray(closed["rosenbrock", 3])), 1, rtol=0.03)


def test_the_planted_matrix_is_as_good_as_the_noise():
    noisy, exact = (
        drawn(MatrixFactorization(40, 30, rank=2, noise=noise, batch_size=4000), jax.random.key(0))
        for noise in (0.3, 0.0)
    )
    seen = []
    for split, count in zip(data.SPLITS, (600, 300, 300), strict=True):
        batch = batch_of(noisy, jax.random.key(1), split)
        seen.append({tuple(entry) for entry in np.asarray(batch.inputs).tolist()})
        # a draw of 300 entries or more, and 4,000 of them: the deviation of their mean square
        tolerance = 4 * math.sqrt(2) * math.sqrt(1 / count + 1 / 4000)
        assert float(loss_of(noisy, noisy.planted, batch)) == pytest.approx(0.09, rel=tolerance)
        batch = batch_of(exact, jax.random.key(1), split)
        np.testing.assert_allclose(loss_of(exact, exact.planted, batch), 0, atol=1e-11)
    assert [len(entries) for entries in seen[1:]] == [300, 300]  # all are drawn
    assert 590 <= len(seen[0]) <= 600
    assert len(set.union(*seen)) == sum(map(len, seen))
    assert {row for row, _ in set.union(*seen)} == set(range(40))
    assert {column for _, column in set.union(*seen)} == set(range(30))
    assert seen[0] != {divmod(entry, 30) for entry in range(600)}  # at random places


def test_untrained_matrices_are_those_of_the_mean():
    family = MatrixFactorization(16, 12, rank=3, noise=0.5)
    tasks = jax.jit(jax.vmap(family))(jax.random.split(jax.random.key(0), 400))
    untrained = np.mean(np.square(np.asarray(tasks.entries)), axis=1)
    # 400 draws with a deviation of about (2 / 3 * (1 / 16 + 1 / 12)) ** 0.5
    assert untrained.mean() == pytest.approx(1 + 0.25, abs=4 * 0.35 / 20)
    task = jax.tree.map(lambda leaf: leaf[0], jax.tree.map(np.asarray, tasks))
    zeros = jax.tree.map(np.zeros_like, task.planted)
    every = data.Batch(np.argwhere(np.ones((16, 12))).astype(np.int32), task.entries)
    np.testing.assert_allclose(task.normalize(loss_of(task, zeros, every)), 1, rtol=1e-5)


def unrolled(theta, inputs, start, unroll):
    """The loss of a tiny optimizer in float64."""
    w, b, v, c = (theta[layer][name] for layer in ("hidden", "out") for name in ("w", "b"))
    after, before = [], []
    for matrix, first in zip(inputs, start, strict=True):
        x, rows, m = first, len(matrix), np.zeros_like(first)
        before.append(np.square(matrix @ x).sum() / rows / 2)
        for _ in range(unroll):
            g = matrix.T @ (matrix @ x) / rows
            m = 0.9 * m + 0.1 * g
            features = np.tanh(np.stack([g, m, 10 * g, 10 * m], axis=1))
            x = x + 0.1 * (np.tanh(features @ w + b[None]) @ v + c)
            after.append(np.square(matrix @ x).sum() / rows / 2)
    return np.mean(after) / np.mean(before)


def test_tiny_optimizer_against_an_unroll_in_float64():
    family = TinyOptimizer(dimension=3, unroll=7, hidden=2, batch_size=5)
    task = drawn(family, jax.random.key(0))
    random = np.random.default_rng(0)
    theta = jax.tree.map(
        lambda p: random.standard_normal(p.shape), jax.eval_shape(task.init, jax.random.key(1))
    )
    batch = batch_of(task, jax.random.key(2), "train")
    inputs, start = (np.asarray(leaf, np.float64) for leaf in batch)
    single = jax.tree.map(lambda p: np.asarray(p, np.float32), theta)
    loss, gradient = jax.tree.map(np.asarray, slope_of(single, task, batch))
    np.testing.assert_allclose(loss, unrolled(theta, inputs, start, 7), rtol=1e-5)
    leaves, tree = jax.tree.flatten(theta)
    for i, leaf in enumerate(leaves):
        for place in np.ndindex(leaf.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [other.copy() for other in leaves]
                moved[i][place] += step
                sides.append(unrolled(jax.tree.unflatten(tree, moved), inputs, start, 7))
            expected = (sides[0] - sides[1]) / 2e-5
            got = jax.tree.leaves(gradient)[i][place]
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_the_tiny_optimizer_that_does_nothing_is_normalised_to_one():
    family = TinyOptimizer(dimension=3, unroll=5, batch_size=2000, curvature=(2.0, 2.0))
    task = drawn(family, jax.random.key(0))
    theta = jax.tree.map(np.zeros_like, init(task, jax.random.key(1)))
    batch = batch_of(task, jax.random.key(2), "train")
    np.testing.assert_allclose(task.normalize(loss_of(task, theta, batch)), 1, rtol=1e-5)
    # the mean of 2000 * 6 * 3 squares
    mean = np.square(np.asarray(batch.inputs)).mean()
    assert mean == pytest.approx(2, rel=4 * math.sqrt(2 / 36_000))


def table(targets):
    """60 rows of 3 features, whose noisy target is real, or its sign."""
    random = np.random.default_rng(0)
    x = random.standard_normal((60, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + random.standard_normal(60)
    rows = sources.Rows(x, y if targets == "real" else (y > 0).astype(int), 2 * (targets != "real"))
    return data.split("table", rows)


def test_linear_regression_is_solved_by_least_squares():
    family = TabularMLP(table("real"), batch_size=16)
    task = drawn(family, jax.random.key(0))
    train = data.Batch(family.data.inputs[:42], family.data.targets[:42])
    design = np.concatenate([train.inputs, np.ones((42, 1))], axis=1, dtype=np.float64)
    solution, residual, *_ = np.linalg.lstsq(design, train.targets.astype(np.float64))
    params = {
        "linear_0": {
            "w": solution[:3, None].astype(np.float32),
            "b": solution[3:].astype(np.float32),
        }
    }
    loss, gradient = slope_of(params, task, train)
    np.testing.assert_allclose(loss, residual[0] / 42, rtol=1e-5)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, np.zeros_like(leaf), atol=1e-6)
    mean = loss_of(task, jax.tree.map(np.zeros_like, params), train)
    np.testing.assert_allclose(task.normalize(mean), 1, rtol=1e-5)


def test_softmax_regression_by_hand():
    family = TabularMLP(table("sign"), batch_size=16)
    task = drawn(family, jax.random.key(0))
    params = init(task, jax.random.key(1))
    batch = jax.tree.map(np.asarray, batch_of(task, jax.random.key(2), "valid"))
    weights, bias = (np.asarray(params["linear_0"][name], np.float64) for name in ("w", "b"))
    logits = batch.inputs @ weights + bias[None]
    margin = np.where(batch.targets == 1, 1, -1) * (logits[:, 1] - logits[:, 0])
    expected = np.log1p(np.exp(-margin)).mean()  # the logistic loss
    np.testing.assert_allclose(loss_of(task, params, batch), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Quadratic(spectrum="power"), "unknown `spectrum` 'power'.*'power_law'"),
        (lambda: Quadratic(noise=-1.0), "`noise` must be finite and not negative, got -1.0"),
        (lambda: Landscape("rosenbrok"), "unknown `function` 'rosenbrok'.*'rosenbrock'"),
        (lambda: Landscape("beale", 3), "`dimension` must be 2, which beale has, got 3"),
        (lambda: Landscape("rosenbrock", 1), "`dimension` must be at least 2 for rosenbrock"),
        (lambda: MatrixFactorization(4, 3, rank=4), "`rank` must be at most 3 .* 4x3, got 4"),
        (lambda: MatrixFactorization(observed=1.0), "`observed` must leave.* 1.0 of 768 entries"),
        (lambda: TinyOptimizer(unroll=0), "`unroll` must be a positive integer, got 0"),
        (lambda: TinyOptimizer(curvature=(3.0, 1.0)), r"`curvature`.*got \(3.0, 1.0\)"),
        (lambda: TabularMLP("synthetic"), "`data` must be a table.*'synthetic'.*for image_mlp"),
    ],
)
def test_errors_say_what_to_do(build, message):
    with pytest.raises(ValueError, match=message):
        build()
