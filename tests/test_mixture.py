"""Mixtures of families: the gradient of the weighted loss, what is told of it, and the same run
however it was interrupted. Over Ray in tests/test_remote.py.
"""

import dataclasses
import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_system import LinearSystem

from cluster import jobs, run_directory
from cluster.remote import Remote, assigned
from evaluation.training_plots import meta_training
from learned_opt import artifact
from learned_opt.hyperparams import Hyperparams
from meta_train import preflight
from meta_train.estimators.base import diagnostics, partition
from meta_train.estimators.compiled import compiled
from meta_train.estimators.mixture import Mixture, divided
from meta_train.estimators.nres import NRES
from meta_train.recipes.base import Recipe
from meta_train.unroll import Training
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic
from tasks.suites import SUITES

KEY, THETA = jax.random.key(3), jnp.array([0.5, -1.0])
SHORT = LinearSystem(12, 4, decay=0.9, size=2, curvature=1.0)
LONG = LinearSystem(20, 5, size=2, noise=1.0)


def mixture(*problems, particles=6, weights=None):
    members = tuple(NRES(problem, particles=particles) for problem in problems)
    names = tuple("abcdef"[: len(members)])
    return Mixture(members, weights or (1.0,) * len(members), names)


@jax.jit
def gradients(estimator, theta, keys):
    def step(state, key):
        estimate, state = estimator.estimate(theta, state, key)
        return state, estimate.grad

    return jax.lax.scan(step, estimator.init(theta, KEY), keys)[1]


@pytest.mark.parametrize(
    ("problems", "weights", "shares"),
    [((SHORT, LONG), (6, 2), (0.75, 0.25)), ((SHORT, SHORT), (0.2, 0.8), (0.0, 1.0))],
    ids=["two systems", "the same one twice"],
)
def test_unbiased_for_the_weighted_loss(problems, weights, shares):
    """In blocks of 12 estimates, in which whole episodes of either system fit."""
    estimator = mixture(*problems, particles=200, weights=weights)
    grads = gradients(estimator, THETA, jax.random.split(KEY, 25 * 12))
    means = np.asarray(grads)[12:].reshape(24, 12, -1).mean(axis=1)
    mean, error = means.mean(axis=0), means.std(axis=0, ddof=1) / np.sqrt(24)
    exact = [problem.gradient(truncated=False, theta=THETA) for problem in problems]
    expected = shares[0] * exact[0] + shares[1] * exact[1]
    assert np.all(np.abs(mean - expected) <= 4 * error + 1e-4 * np.abs(expected))
    assert np.all(error <= 0.05 * np.abs(expected).max()), "too noisy to tell anything"
    if problems[0] != problems[1]:
        unweighted = np.mean(exact, axis=0)
        assert np.any(np.abs(mean - unweighted) > 4 * error)


def test_a_mixture_of_one_is_that_one_with_a_key_of_its_own():
    alone, one = compiled(NRES(SHORT, particles=6)), compiled(mixture(SHORT, weights=(3.0,)))
    own = jax.random.fold_in
    state, states = alone.init(THETA, own(KEY, 0)), one.init(THETA, KEY)
    for i in range(3):
        expected, state = alone.estimate(THETA, state, own(own(KEY, i), 0))
        got, states = one.estimate(THETA, states, own(KEY, i))
        jax.tree.map(np.testing.assert_array_equal, (got[:2], states), (expected[:2], (state,)))
        ratios = [diagnostics(e, 6)["gradient_snr"] for e in (got, expected)]
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


@jax.jit
def first(estimator, key):
    return estimator.estimate(THETA, estimator.init(THETA, key), key)[0]


def test_the_diagnostics_are_those_of_the_weighted_mean():
    """Each particle's gradient is that of an estimator of it alone."""
    three_windows = LinearSystem(15, 5, size=2, noise=2.0, lost=0)
    members = NRES(SHORT, particles=5), NRES(three_windows, particles=3)
    whole = Mixture(members, (1.0, 4.0), ("short", "long"))
    estimate, shares = first(whole, KEY), (0.2, 0.8)
    mean, variance, losses, alone = np.zeros(2), 0.0, [], []
    for i, (member, share) in enumerate(zip(members, shares, strict=True)):
        key = jax.random.fold_in(KEY, i)
        parts = [first(part, key) for part in partition(member, member.particles)]
        grads = np.array([part.grad for part in parts], np.float64)
        mean += share * grads.mean(axis=0)
        variance += share**2 * np.sum(grads.var(axis=0, ddof=1)) / member.particles
        losses.append(np.mean([part.loss for part in parts]))
        alone.append(parts[0])
    got = diagnostics(estimate, whole.particles)
    assert got.keys() == {
        *("gradient_snr", "diverged", "loss_by_window"),
        *("loss/short", "loss/long", "diverged/short", "diverged/long"),
    }
    # losses to 1e-7 of their size, of which differences at sigma 0.01 are hundredths
    np.testing.assert_allclose(estimate.grad, mean, rtol=1e-3)
    assert got["gradient_snr"] == pytest.approx(mean @ mean / variance, rel=1e-2)
    assert [got["loss/short"], got["loss/long"]] == pytest.approx(losses, rel=1e-5)
    assert estimate.loss == pytest.approx(np.dot(shares, losses), rel=1e-5)
    assert got["loss_by_window"] == [pytest.approx(float(estimate.loss)), None, None]
    assert [got["diverged/short"], got["diverged/long"]] == [0.0, 1.0]
    assert got["diverged"] == pytest.approx(0.8)

    # one particle has no spread; episodes of other lengths have no windows in common
    alone[0].info["loss_by_window"] = jnp.ones(4)
    lonely = diagnostics(mixture(SHORT, three_windows, particles=1).weighted(alone), 2)
    assert lonely["gradient_snr"] is None
    assert "loss_by_window" not in lonely


@pytest.fixture
def suite(monkeypatch):
    made = {"line": Quadratic(dimension=1), "plane": Quadratic(dimension=2)}
    monkeypatch.setitem(SUITES, "train/two", lambda: made | {"space": Quadratic(dimension=3)})


RECIPE = Recipe(
    task="train/two",
    without=("line",),
    weights=(3.0, 1.0),
    rule="hyperparams(knots=2)",
    estimator="nres(particles=3)",
    horizon=(4, 8),
    truncation=2,
    burn_in=1,
    outer_steps=6,
)


def test_a_killed_run_goes_on_and_ends_bit_equal(suite, tmp_path, monkeypatch):
    write = run_directory.MetricsLog.write

    def copy_what_a_kill_leaves(self, step, **values):
        write(self, step, **values)
        if step == 4:
            shutil.copytree(tmp_path / "whole", tmp_path / "broken")

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.MetricsLog, "write", copy_what_a_kill_leaves)
        jobs.run(RECIPE, tmp_path / "whole", checkpoint_every=3)
    jobs.run(None, tmp_path / "broken", resume=True)
    (_, theta, card), (_, resumed, _) = (
        artifact.read(tmp_path / name / run_directory.ARTIFACT) for name in ("whole", "broken")
    )
    jax.tree.map(np.testing.assert_array_equal, theta, resumed)
    assert card["inner_steps"] == (1 + 6) * 2 * (3 * 2 * 2), "tasks, pairs of particles, steps"
    lines, again = (
        [line | {"seconds": 0} for line in run_directory.read_metrics(tmp_path / name)]
        for name in ("whole", "broken")
    )
    assert lines == again
    for line in lines:
        expected = 0.75 * line["loss/plane"] + 0.25 * line["loss/space"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert len(meta_training(lines, truncation=2).axes) >= 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "train/tow"}, r"unknown suite or task 'train/tow'; did you mean 'train/two'\?"),
        ({"task": "cubic()"}, r"unknown suite or task .* image_mlp, .* train/two"),
        ({"without": ("lime",)}, "unknown task of train/two 'lime'; did you mean 'line'"),
        ({"without": ("line", "plane", "space")}, "`without` leaves no task of train/two"),
        ({"weights": (1.0,)}, "`weights` must be one for each of plane, space, got 1"),
        ({"weights": (1.0, -1.0)}, "`weights` must be positive"),
        ({"task": "quadratic()", "without": ()}, "`weights` is for suites; `task` quadratic"),
        ({"task": "quadratic()", "weights": ()}, "`without` is for suites"),
    ],
)
def test_impossible_recipes_are_refused(suite, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **fields).build_estimator()


def test_recipes_survive_json_and_older_ones_are_read(suite):
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    older = json.loads(Recipe().to_json())
    del older["weights"], older["without"]
    assert Recipe.from_json(json.dumps(older)) == Recipe()
    assert RECIPE.build_estimator().names == ("plane", "space")
    even = dataclasses.replace(RECIPE, weights=(), without=()).build_estimator()
    assert len(set(even.weights)) == 1
    assert even.names == ("line", "plane", "space")


@pytest.mark.parametrize("fields", [{"names": ("a",)}, {"names": ("a", "a")}, {"members": ()}])
def test_mixtures_that_make_no_sense_are_refused(fields):
    with pytest.raises(ValueError, match="`names`"):
        dataclasses.replace(mixture(SHORT, LONG), **fields)


def test_many_families_stay_whole_and_few_are_divided():
    def parts(count, particles, workers, **fields):
        estimator = NRES(SHORT, particles=particles, **fields)
        whole = Mixture((estimator,) * count, (1.0,) * count, tuple("abcdef"[:count]))
        return [(i, p.first_particle, p.particles) for i, p in divided(whole, workers)]

    assert parts(4, 5, 2) == [(i, 0, 5) for i in range(4)]
    assert parts(3, 5, 2) == [(i, *p) for i in range(3) for p in ((0, 2), (2, 3))]
    assert parts(2, 2, 3) == [(i, *p) for i in range(2) for p in ((0, 1), (1, 1))]
    assert parts(2, 6, 2, shaping="rank") == [(0, 0, 6), (1, 0, 6)]
    with pytest.raises(ValueError, match=r"`workers` must be at most 4, .*`particles` 2, 2.*got 5"):
        parts(2, 2, 5)


def test_workers_share_what_parts_cost():
    assert assigned([10.0, 1.0, 1.0, 1.0], 2) == [0, 1, 1, 1], "the expensive one is alone"
    assert assigned([1.0, 1.0, 1.0, 10.0], 2) == [1, 1, 1, 0]
    assert assigned([5.0, 4.0, 3.0, 3.0, 3.0], 2) == [0, 1, 1, 0, 1]
    for costs in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="`costs` must be 2 positive numbers, got"):
            Remote(mixture(SHORT, LONG), workers=2, costs=costs)


def test_data_that_families_share_are_on_a_device_once():
    rule = Hyperparams(knots=2)
    families = [ImageMLP(data="synthetic", hidden=(width,)) for width in (4, 8)]
    made = compiled(mixture(*(Training(family, rule, 4, 2) for family in families)))
    first, second = (member.estimator.problem.family.data for member in made.members)
    assert first.inputs is second.inputs
    assert isinstance(first.inputs, jax.Array)


RULE: Any = SimpleNamespace(init=lambda key: THETA)


def test_memory_is_that_of_all_states_and_of_the_largest_estimate():
    large, small = NRES(SHORT, particles=5000), NRES(LONG, particles=2000)
    # of a pair: x and three integers of either half, the noise, and two integers
    states = 2000 * 4 * (2 * (2 + 3) + 2 + 2)
    needed = preflight.predicted_bytes(large, THETA) + 2 * states
    both = Mixture((small, large), (1.0, 1.0), ("small", "large"))
    preflight.check(both, RULE, available=needed + 200)
    with pytest.raises(ValueError, match=r"`particles` 5000 for each of 2 tasks .* fewer tasks"):
        preflight.check(both, RULE, available=needed - 200)


def test_the_task_that_does_not_fit_is_named():
    with pytest.raises(TypeError, match="dot_general") as failure:
        preflight.check(mixture(SHORT, LinearSystem(12, 4, size=3)), RULE)
    assert "This is of the task b." in failure.value.__notes__
