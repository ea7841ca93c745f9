"""Hypergradients of optima: against closed forms, finite differences, and that following them
helps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.hyperparams import Hyperparams
from meta_train.estimators.base import combine, partition
from meta_train.estimators.implicit import ImplicitDifferentiation
from meta_train.stationary import Regularised
from meta_train.unroll import Training
from tasks.data import synthetic
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic

run = jax.jit(lambda e, theta, key: e.estimate(theta, None, key)[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ridge:
    """Ridge regression with the penalty exp(theta[0]) / 2 |x|^2; the intercept theta[1] is in both
    losses.
    """

    inputs: jax.Array  # [2, rows, features], for training and for validation
    targets: jax.Array  # [2, rows]

    def losses(self, theta, x):
        errors = jnp.einsum("srf,f->sr", self.inputs, x) + theta[1] - self.targets
        return jnp.mean(jnp.square(errors), axis=1) / 2

    def solve(self, theta, key):
        inputs, targets = self.inputs[0], self.targets[0] - theta[1]
        hessian = inputs.T @ inputs / len(targets) + jnp.exp(theta[0]) * jnp.eye(inputs.shape[1])
        return jnp.linalg.solve(hessian, inputs.T @ targets / len(targets))

    def train_loss(self, theta, x, key):
        return self.losses(theta, x)[0] + jnp.exp(theta[0]) / 2 * x @ x

    def valid_loss(self, theta, x, key):
        return self.losses(theta, x)[1]


@functools.cache
def ridge():
    random = np.random.default_rng(0)
    inputs = random.standard_normal((2, 20, 4))
    targets = inputs @ random.standard_normal(4) + random.standard_normal((2, 20))
    return inputs, targets


def closed_form(theta):
    """d valid / d theta from x = (A'A/n + l)^-1 A'(y - b)/n, l = exp(theta[0]), b = theta[1]:
    dx/dtheta[0] = -l H^-1 x and dx/dtheta[1] = -H^-1 mean(A).
    """
    (a, a_valid), (y, y_valid) = ridge()
    n, strength, intercept = len(y), np.exp(theta[0]), theta[1]
    inverse = np.linalg.inv(a.T @ a / n + strength * np.eye(4))
    x = inverse @ (a.T @ (y - intercept)) / n
    errors = a_valid @ x + intercept - y_valid
    pull = a_valid.T @ errors / n
    moves = -strength * inverse @ x, -inverse @ a.mean(axis=0)
    return np.array([pull @ moves[0], pull @ moves[1] + errors.mean()])


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_ridge_regression_has_its_closed_form(solver):
    theta = np.array([-1.0, 0.4])
    with jax.enable_x64(True):
        problem = Ridge(*map(jnp.asarray, ridge()))
        estimator = ImplicitDifferentiation(
            problem, particles=2, solver=solver, iterations=300, step=0.5
        )
        estimate = run(estimator, jnp.asarray(theta), jax.random.key(0))
        np.testing.assert_allclose(estimate.grad, closed_form(theta), rtol=1e-6)
        np.testing.assert_allclose(
            estimate.loss, problem.valid_loss(theta, problem.solve(theta, 0), 0)
        )
        assert estimate.info["slope"] < 1e-12
        assert estimate.info["residual"] < 1e-9
        assert estimate.info["diverged"] == 0


def test_a_series_that_is_cut_short_says_so():
    problem = Ridge(*(jnp.asarray(x, jnp.float32) for x in ridge()))
    estimator = ImplicitDifferentiation(problem, particles=1, solver="neumann", iterations=2)
    estimate = run(estimator, jnp.array([-1.0, 0.4]), jax.random.key(0))
    assert estimate.info["residual"] > 0.1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Line:
    """x^2 / 2 - (theta + noise) x, judged by x^2 / 2; the noise is the key's."""

    def solve(self, theta, key):
        return theta + jax.random.normal(key)

    def train_loss(self, theta, x, key):
        return x**2 / 2 - self.solve(theta, key) * x

    def valid_loss(self, theta, x, key):
        return x**2 / 2


def test_damping_is_added_to_the_hessian():
    """dx/dtheta becomes 1 / (1 + damping)."""
    theta, key = jnp.array(3.0), jax.random.key(0)
    x = Line().solve(theta, jax.random.fold_in(key, 0))
    for damping in (0.0, 0.25):
        estimator = ImplicitDifferentiation(Line(), particles=1, damping=damping)
        np.testing.assert_allclose(run(estimator, theta, key).grad, x / (1 + damping), rtol=1e-6)


def test_a_partition_of_the_particles_gives_the_same_estimates():
    theta, key, whole = jnp.array(3.0), jax.random.key(3), ImplicitDifferentiation(Line(), 4)
    parts = partition(whole, 2)
    got = combine([run(part, theta, key) for part in parts], [part.particles for part in parts])
    expected = run(whole, theta, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)
    assert got.info["squared_norm"] > 1.01 * got.grad**2  # the particles differ


@pytest.mark.parametrize(
    "family",
    [
        Quadratic(dimension=3, condition=(1.0, 10.0)),
        pytest.param(ImageMLP(synthetic(), hidden=(), batch_size=60), marks=pytest.mark.slow),
    ],
    ids=["quadratic", "softmax"],
)
def test_penalties_have_their_finite_differences(family):
    """Of the whole solve: L-BFGS to a tight tolerance at theta + h and theta - h, per leaf."""
    with jax.enable_x64(True):
        problem = Regularised(family, strength=0.05, iterations=500, tolerance=1e-11)
        key = jax.random.key(1)
        theta, h = problem.init(key), 1e-4
        estimator = ImplicitDifferentiation(problem, particles=1, iterations=500)
        estimate = run(estimator, theta, key)
        own = jax.random.fold_in(key, 0)
        leaves, structure = jax.tree.flatten(theta)
        moved = [
            jax.tree.unflatten(structure, [t + s * h * (i == j) for j, t in enumerate(leaves)])
            for i in range(len(leaves))
            for s in (1, -1)
        ]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *moved)
        value = lambda t: problem.valid_loss(t, problem.solve(t, own), own)  # noqa: E731
        values = jax.jit(jax.vmap(value))(stacked).reshape(-1, 2)
        expected = (values[:, 0] - values[:, 1]) / (2 * h)
        got = np.stack(jax.tree.leaves(estimate.grad))
        assert estimate.info["slope"] <= 1e-11
        assert np.all(np.abs(expected) > 1e-5)
        # differences are exact to the square of h
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2 * h**2)


@pytest.mark.slow
def test_following_them_finds_better_penalties():
    """In float32, from a penalty that is far too strong."""
    family = ImageMLP(synthetic(), hidden=(), batch_size=60)
    problem = Regularised(family, strength=10.0)
    estimator, optimizer = ImplicitDifferentiation(problem, particles=2), optax.adam(0.5)
    theta = problem.init(jax.random.key(0))
    state, losses = optimizer.init(theta), []
    for i in range(12):
        estimate = run(estimator, theta, jax.random.key(i))
        assert estimate.info["residual"] < 1e-3
        updates, state = optimizer.update(estimate.grad, state)
        theta = optax.apply_updates(theta, updates)
        losses.append(float(estimate.loss))
    assert losses[-1] < 0.7 * losses[0]


def test_the_training_of_an_update_rule_is_refused():
    with pytest.raises(TypeError, match="the optimum does not depend on the optimizer"):
        ImplicitDifferentiation(Training(Quadratic(), Hyperparams(), 4, 2))


@pytest.mark.parametrize(
    ("field", "value"), [("solver", "lu"), ("iterations", 0), ("damping", -1.0), ("step", 0.0)]
)
def test_impossible_fields_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        ImplicitDifferentiation(**{field: value})


@pytest.mark.parametrize("field", ["strength", "iterations", "tolerance"])
def test_impossible_penalties_are_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        Regularised(Quadratic(), **{field: 0})
