"""The inner problem: what an unroll computes, when episodes end, and what failure looks like."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import learned_opt
import meta_train.estimators
from learned_opt import discovery
from learned_opt.celo import Celo
from learned_opt.hyperparams import Hyperparams
from learned_opt.small_fc import SmallFC
from learned_opt.velo import Velo
from meta_train.estimators.base import Estimate, mean_estimate
from meta_train.estimators.bptt import FullBPTT, TruncatedBPTT
from meta_train.estimators.pes import PES
from meta_train.unroll import Training, episode_loss
from tasks.base import relative_loss, train_step
from tasks.quadratic import Quadratic

KEY = jax.random.key(0)


def test_an_unroll_is_a_plain_training_loop():
    problem = Training(Quadratic(dimension=4, noise=0.1), Hyperparams(), 12, 6)
    theta = problem.rule.init(KEY)
    state = problem.reset(theta, KEY)
    rollouts = []
    for i in range(2):
        rollout, state = problem.unroll(theta, state, jax.random.fold_in(KEY, i))
        rollouts.append(rollout)
    assert [bool(r.done) for r in rollouts] == [False, True]

    task_key, init_key, _, _ = jax.random.split(KEY, 4)
    task = problem.family(task_key)
    params = task.init(init_key)
    optimizer = problem.rule.optimizer(theta, 12)
    opt_state, losses = optimizer.init(params), []
    for i in range(2):
        for key in jax.random.split(jax.random.fold_in(KEY, i), 6):
            batch = task.batch(key, "train")
            params, opt_state, loss = train_step(task, optimizer, params, opt_state, batch)
            losses.append(task.normalize(loss))
    np.testing.assert_allclose(
        np.concatenate([r.losses for r in rollouts]), np.array(losses), rtol=1e-5
    )
    np.testing.assert_allclose(state.params, params, rtol=1e-5)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Splits:
    """A task whose splits have different targets."""

    def init(self, key):
        return jax.random.normal(key, (3,))

    def batch(self, key, split):
        target = {"train": 0.5, "valid": -0.5}[split]
        return target + 0.1 * jax.random.normal(key, (3,))

    def loss(self, params, batch):
        return 0.1 * jnp.sum(jnp.square(params - batch))

    def normalize(self, loss):
        return relative_loss(loss, 1.0)


def training(objective, horizon=(3, 6)):
    return Training(lambda key: Splits(), Hyperparams(), horizon, 3, objective=objective)


@pytest.fixture(scope="module")
def episodes():
    """Of a short and a long episode: the key, the horizon, and by plain loops the losses on the
    training batch of each step and on a validation batch after it.
    """
    problem, task, found = training("mean"), Splits(), {}
    theta = problem.rule.init(KEY)
    for seed in range(20):
        key = jax.random.key(seed)
        reset_key, unroll_key = jax.random.split(key)
        state = problem.reset(theta, reset_key)
        if (horizon := int(state.horizon)) in found:
            continue
        optimizer = problem.rule.optimizer(theta, horizon)
        params, opt_state, trained, validated = state.params, state.opt_state, [], []
        for window_key in jax.random.split(unroll_key, 2)[: horizon // 3]:
            for k in jax.random.split(window_key, 3):
                batch = task.batch(k, "train")
                params, opt_state, loss = train_step(task, optimizer, params, opt_state, batch)
                trained.append(float(loss))
                batch = task.batch(jax.random.fold_in(k, 1), "valid")
                validated.append(float(task.loss(params, batch)))
        found[horizon] = (key, horizon, np.array(trained), np.array(validated))
    return [found[3], found[6]]


@pytest.mark.parametrize("objective", ["mean", "late", "final", "mean_valid", "final_valid"])
def test_the_loss_of_an_episode_is_its_objective(objective, episodes):
    problem = training(objective)
    theta = problem.rule.init(KEY)
    unroll, loss_of = jax.jit(problem.unroll), jax.jit(partial(episode_loss, problem))
    for key, horizon, trained, validated in episodes:
        losses = validated if objective.endswith("valid") else trained
        if objective == "late":
            losses = losses * (2.0 * np.arange(horizon) + 1.0) / horizon
        final = objective.startswith("final")
        expected = losses[-1] if final else np.mean(losses)
        np.testing.assert_allclose(loss_of(theta, key)[0], expected, rtol=1e-4)

        reset_key, unroll_key = jax.random.split(key)
        state = problem.reset(theta, reset_key)
        for i, k in enumerate(jax.random.split(unroll_key, 2)[: horizon // 3]):
            rollout, state = unroll(theta, state, k)
            by_step = losses[3 * i : 3 * i + 3]
            if final:
                by_step = [0.0, 0.0, horizon * losses[-1] if 3 * i + 3 == horizon else 0.0]
            np.testing.assert_allclose(rollout.losses, by_step, rtol=1e-4)
        assert rollout.done


def test_a_first_episode_that_is_cut_short_has_no_final_loss():
    problem = training("final", horizon=6)
    theta = problem.rule.init(KEY)
    resets = (problem.reset(theta, jax.random.key(seed), 0, True) for seed in range(20))
    state = next(state for state in resets if state.end < state.horizon)
    rollout, _ = problem.unroll(theta, state, KEY)
    assert rollout.done
    np.testing.assert_array_equal(rollout.losses, np.zeros(3))


def test_a_curriculum_grows_the_longest_horizon_geometrically():
    problem = Training(Quadratic(dimension=2), Hyperparams(), (10, 160), 10, curriculum=4)
    theta = problem.rule.init(KEY)
    keys = jax.random.split(KEY, 1000)
    reset = jax.jit(lambda episode: jax.vmap(lambda k: problem.reset(theta, k, episode))(keys))
    horizons = np.array([reset(episode).horizon for episode in range(6)])
    np.testing.assert_array_equal(horizons.min(axis=1), 10)
    np.testing.assert_array_equal(horizons.max(axis=1), [10, 20, 40, 80, 160, 160])
    assert np.all(horizons % 10 == 0)


@pytest.mark.parametrize("objective", ["mean", "final_valid"])
def test_an_unroll_says_that_its_run_is_lost(objective):
    problem = training(objective, horizon=6)
    theta = problem.rule.init(KEY)
    unroll = jax.jit(problem.unroll)
    for shift, lost in ((0.0, False), (60.0, True)):
        moved = jax.tree.map(lambda x, s=shift: x + s, theta)
        rollout, _ = unroll(moved, problem.reset(moved, KEY), KEY)
        assert bool(rollout.diverged) is lost
        assert np.all(np.isfinite(rollout.losses))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "best"}, "`objective` must be one of 'mean', 'late', .*, got 'best'"),
        ({"curriculum": -1}, "`curriculum` must be at least 0, got -1"),
    ],
)
def test_impossible_objectives_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Training(Quadratic(), Hyperparams(), 10, 5, **fields)


def test_horizons_are_log_uniform_multiples_and_first_episodes_are_cut_short():
    problem = Training(Quadratic(dimension=2), Hyperparams(), (10, 80), 10)
    theta = problem.rule.init(KEY)
    keys = jax.random.split(KEY, 4000)
    state = jax.jit(jax.vmap(lambda k: problem.reset(theta, k)))(keys)
    windows = np.asarray(state.end) // 10
    assert np.array_equal(state.end, state.horizon)
    assert np.all(np.asarray(state.end) % 10 == 0)
    for n in range(1, 9):
        share = np.log((n + 1) / n) / np.log(9)  # P(n <= w < n + 1), w log-uniform on [1, 9)
        assert abs(np.mean(windows == n) - share) < 4 * np.sqrt(share * (1 - share) / 4000)

    fixed = Training(Quadratic(dimension=2), Hyperparams(), 80, 10)
    first = jax.jit(jax.vmap(lambda k: fixed.reset(theta, k, 0, True)))(keys)
    assert np.all(np.asarray(first.horizon) == 80)
    counts = np.bincount(np.asarray(first.end) // 10, minlength=9)[1:]
    assert np.all(np.abs(counts / 4000 - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / 4000))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bowl:
    """A task with a matrix: of vectors, some rules learn nothing."""

    target: jax.Array

    def init(self, key):
        return {"w": jax.random.normal(key, (2, 3))}

    def batch(self, key, split):
        return self.target

    def loss(self, params, batch):
        return jnp.mean(jnp.square(params["w"] - batch))

    def extra_args(self, batch):
        """For rules of composite losses; nothing of this one is not smooth."""
        return {"prox": lambda v, step: v, "lipschitz": 2.0}

    def normalize(self, loss):
        return jnp.minimum(loss, 100.0)


@pytest.mark.parametrize(
    "rule", discovery.examples(learned_opt), ids=lambda rule: discovery.name_of(type(rule))
)
def test_every_rule_meta_trains(rule):
    """Part of the contract of rules: with horizons drawn per episode, theta gets a gradient."""
    estimator = PES(
        Training(lambda key: Bowl(jax.random.normal(key, ())), rule, (4, 8), 4), particles=2
    )
    theta = rule.init(KEY)
    estimate, _ = jax.jit(estimator.estimate)(theta, estimator.init(theta, KEY), KEY)
    grads = np.concatenate([np.ravel(g) for g in jax.tree.leaves(estimate.grad)])
    assert np.all(np.isfinite(grads))
    assert np.any(grads != 0)


EVOLUTION = [e for e in discovery.examples(meta_train.estimators) if hasattr(e, "sigma")]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Velo(lstm=8, bank=4), Celo(lstm=8)], ids=["velo", "celo"])
@pytest.mark.parametrize("estimator", EVOLUTION, ids=lambda e: discovery.name_of(type(e)))
def test_rules_that_read_the_loss_and_the_horizon_meta_train(estimator, rule):
    problem = Training(lambda key: Bowl(jax.random.normal(key, ())), rule, (4, 8), 4)
    estimator = dataclasses.replace(estimator, problem=problem, particles=2)
    theta = rule.init(KEY)
    estimate, _ = jax.jit(estimator.estimate)(theta, estimator.init(theta, KEY), KEY)
    grads = np.concatenate([np.ravel(g) for g in jax.tree.leaves(estimate.grad)])
    assert np.all(np.isfinite(grads))
    assert np.any(grads != 0)


@pytest.mark.parametrize(
    "rule",
    [
        Hyperparams(knots=2, learning_rate=1e30),
        pytest.param(SmallFC(hidden=2, step_size=1e30), marks=pytest.mark.slow),
    ],
    ids=lambda rule: discovery.name_of(type(rule)),
)
@pytest.mark.parametrize("example", [PES(), TruncatedBPTT(), FullBPTT()], ids=discovery.spec_of)
def test_a_diverged_run_is_a_bounded_loss_and_never_poisons_the_estimate(example, rule):
    problem = Training(Quadratic(dimension=3), rule, 8, 4)
    theta = problem.rule.init(KEY)
    estimator = dataclasses.replace(example, problem=problem, particles=3)
    state = estimator.init(theta, KEY)
    for i in range(2):
        estimate, state = jax.jit(estimator.estimate)(theta, state, jax.random.fold_in(KEY, i))
    assert 1.5 < float(estimate.loss) <= 2.0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((estimate.grad, estimate.info)))


def test_only_the_particle_with_a_non_finite_gradient_counts_as_zero():
    grads = {"a": jnp.array([[1.0, 2.0], [jnp.nan, 4.0], [5.0, 6.0]]), "b": jnp.ones(3)}
    mean = mean_estimate(Estimate(grads, jnp.array([1.0, 2.0, 3.0]), {}))
    np.testing.assert_allclose(mean.grad["a"], [2.0, 8.0 / 3])
    np.testing.assert_allclose(mean.grad["b"], 2.0 / 3)
    np.testing.assert_allclose(mean.loss, 2.0)


def test_backpropagation_agrees_with_finite_differences():
    """In float64, along random directions: full gradients against differences of the episode's
    loss.
    """
    with jax.enable_x64(True):
        problem = Training(Quadratic(dimension=3), Hyperparams(knots=3, learning_rate=0.05), 12, 4)
        theta = jax.tree.map(jnp.float64, problem.rule.init(KEY))
        estimator = FullBPTT(problem, particles=2)
        estimate, _ = jax.jit(lambda t: estimator.estimate(t, estimator.init(t, KEY), KEY))(theta)

        def loss(t):
            keys = [jax.random.fold_in(KEY, i) for i in range(2)]
            return sum(episode_loss(problem, t, k)[0] for k in keys) / 2

        loss = jax.jit(loss)
        (flat,) = jax.tree.leaves(estimate.grad)
        assert np.linalg.norm(flat) > 1e-3
        for i in range(3):
            direction = jax.random.normal(jax.random.fold_in(KEY, 10 + i), flat.shape)
            moved = [
                float(loss({"log_learning_rate": theta["log_learning_rate"] + e * direction}))
                for e in (1e-3, -1e-3)
            ]
            assert (moved[0] - moved[1]) / 2e-3 == pytest.approx(float(flat @ direction), rel=1e-4)


@pytest.mark.slow
def test_remat_changes_nothing():
    grads = []
    for remat in (False, True):
        problem = Training(Quadratic(dimension=3), Hyperparams(), 8, 4, remat)
        theta = problem.rule.init(KEY)
        estimator = TruncatedBPTT(problem, particles=2)
        estimate, _ = jax.jit(estimator.estimate)(theta, estimator.init(theta, KEY), KEY)
        grads.append(estimate.grad["log_learning_rate"])
    np.testing.assert_allclose(*grads, rtol=1e-5)


@pytest.mark.parametrize(
    ("horizon", "truncation", "message"),
    [
        (130, 50, "`horizon` must be a multiple of `truncation`, got 130 and 50"),
        ((50, 130), 50, "got 130 and 50"),
        (20, 50, "`horizon` must be a multiple of `truncation`, got 20 and 50"),
        ((100, 50), 50, r"`horizon` must be a range"),
        (50, 0, "`truncation` must be at least 1"),
    ],
)
def test_impossible_horizons_are_refused(horizon, truncation, message):
    with pytest.raises(ValueError, match=message):
        Training(Quadratic(), Hyperparams(), horizon, truncation)
