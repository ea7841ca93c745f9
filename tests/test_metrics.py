"""Metrics and statistics against closed forms, scipy and coverage on synthetic data."""

import numpy as np
import pytest
import scipy.stats

from evaluation import metrics, stats
from evaluation.curve import Curve, envelope, smooth
from evaluation.summary import COLUMNS

SEEDS, STEPS = 3, 400


def curve_of(train, **fields):
    """A curve with the given training losses [seeds, steps] and held-out losses that follow it."""
    train = np.asarray(train, np.float64)
    held_out = train[:, :: train.shape[1] // 8]
    fields = {
        "valid": held_out,
        "test": held_out,
        "valid_normalized": np.nan_to_num(np.clip(held_out, 0, 2), nan=2.0),
        "state_bytes_per_param": np.float32(8.0),
        "seconds_per_step": np.float32(2e-4),
        **fields,
    }
    return Curve(
        train=train,
        eval_steps=np.arange(held_out.shape[1]),
        envelope=envelope(train[None]),
        adam_seconds_per_step=np.float32(1e-4),
        **fields,
    )


def noisy(seed):
    rng = np.random.default_rng(seed)
    decay = np.exp(-np.arange(STEPS) / 90)[None, :]
    return curve_of(decay * rng.uniform(0.8, 1.2, (SEEDS, STEPS)) + 0.05)


def test_metrics_are_the_public_functions_of_two_curves():
    assert {metric for _, metric in COLUMNS.values()} <= set(metrics.METRICS)
    assert "loss_ratio" not in metrics.METRICS
    assert all(metrics.METRICS[name] is getattr(metrics, name) for name in metrics.METRICS)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_metric_is_neutral_against_itself_and_keeps_the_seed_axis(name):
    scores = metrics.METRICS[name](noisy(0), noisy(0))
    np.testing.assert_allclose(scores, np.ones(SEEDS), rtol=1e-12)
    assert metrics.METRICS[name](noisy(1), noisy(0)).shape == (SEEDS,)


@pytest.mark.parametrize(
    "name", [n for n in metrics.METRICS if n not in ("step_time", "state_memory")]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_failed_seed_scores_worst_and_only_it(name, bad):
    good = noisy(1)
    train = good.train.copy()
    train[1, 30:] = bad
    scores = metrics.METRICS[name](curve_of(train), noisy(0))
    if name == "held_out_loss":  # it was evaluated once before it failed: early stopping saves it
        assert 0 < scores[1] < 0.5
        train[1] = bad
        scores = metrics.METRICS[name](curve_of(train), noisy(0))
    assert scores[1] == 0.0
    np.testing.assert_array_equal(
        np.delete(scores, 1), np.delete(metrics.METRICS[name](good, noisy(0)), 1)
    )


@pytest.mark.parametrize("name", metrics.METRICS)
def test_a_failed_reference_leaves_scores_finite(name):
    scores = metrics.METRICS[name](noisy(0), curve_of(np.full((SEEDS, STEPS), np.nan)))
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()


def test_loss_ratios_by_hand():
    steady = curve_of(np.full((2, STEPS), 3.0))
    half = curve_of(np.full((2, STEPS), 1.5))
    for name in ("final_train_loss", "mean_train_loss", "held_out_loss"):
        np.testing.assert_allclose(metrics.METRICS[name](half, steady), 2.0)
        np.testing.assert_allclose(metrics.METRICS[name](steady, half), 0.5)
    nothing = curve_of(np.zeros((2, STEPS)))
    np.testing.assert_array_equal(metrics.mean_train_loss(nothing, steady), metrics.BOUND)
    slow = steady._replace(seconds_per_step=np.float32(4e-4))
    np.testing.assert_allclose(metrics.step_time(slow, steady), 0.5)


def test_held_out_loss_is_taken_where_validation_is_best():
    valid = np.array([[3.0, 1.0, 2.0, np.nan]])
    test = np.array([[5.0, 4.0, 0.1, 0.1]])
    overfitted = curve_of(np.ones((1, 32)), valid=valid, test=test, valid_normalized=valid)
    other = overfitted._replace(test=np.full((1, 4), 2.0))
    np.testing.assert_allclose(metrics.held_out_loss(overfitted, other), 0.5)


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_speedup_of_the_reference_run_faster(factor):
    steps = 5000

    def law(t):
        return 1.0 / (1.0 + t / 500.0)

    t = np.arange(steps)[None, :]
    reference, curve = curve_of(law(t)), curve_of(law(factor * t))
    # Both averages lag by the same 20 steps, hence the tolerance.
    np.testing.assert_allclose(metrics.speedup(curve, reference), factor, rtol=0.03)
    if factor > 1:
        np.testing.assert_allclose(metrics.steps_to_target(curve, reference), factor, rtol=0.03)
    else:
        assert metrics.steps_to_target(curve, reference) == 0.0


def test_time_to_target_is_steps_times_seconds():
    """Four times as fast in steps, each of which takes twice or a hundredth of the time."""
    t = np.arange(5000)[None, :]
    reference = curve_of(1.0 / (1.0 + t / 500.0))
    curve = curve_of(1.0 / (1.0 + 4 * t / 500.0))
    for seconds, factor in ((4e-4, 2.0), (2e-6, metrics.BOUND)):
        timed = curve._replace(seconds_per_step=np.float32(seconds))
        np.testing.assert_allclose(metrics.time_to_target(timed, reference), factor, rtol=0.03)
    fast = reference._replace(seconds_per_step=np.float32(1e-6))
    assert metrics.time_to_target(fast, curve) == 0.0  # never gets there, however fast
    untimed = curve._replace(seconds_per_step=np.float32(np.nan))
    assert metrics.time_to_target(untimed, reference) == 0.0


def test_speedup_is_continuous_where_the_curve_begins_to_beat_the_reference():
    falling = 1.0 / (1.0 + np.arange(STEPS)[None, :] / 40.0)
    reference = curve_of(falling)
    below, above = (metrics.speedup(curve_of(falling * c), reference) for c in (0.9999, 1.0001))
    np.testing.assert_allclose(below, above, rtol=2e-3)
    assert above < 1 < below


def test_a_plateau_does_not_earn_speedup():
    # Stuck early at a loss that the reference reaches at once: the steps that it used count.
    reference = curve_of(np.exp(-np.arange(STEPS) / 50)[None, :])
    stuck = curve_of(np.maximum(np.exp(-np.arange(STEPS) / 5), 0.6)[None, :])
    assert metrics.speedup(stuck, reference) < 0.2


def test_envelope_is_a_lower_bound_of_the_grid_that_never_rises():
    rng = np.random.default_rng(0)
    grid = rng.uniform(0.5, 1.0, (4, 3, 100))
    grid[2, 1, 10:] = np.nan
    low = envelope(grid)
    assert low.shape == (1, 100)
    assert (np.diff(low) <= 0).all()
    alive = smooth(grid.mean(axis=1))[[0, 1, 3]]
    assert (low <= alive).all()
    np.testing.assert_allclose(low[0], np.minimum.accumulate(smooth(grid.mean(axis=1)).min(0)))


def test_smooth_keeps_constants_and_follows_its_recursion():
    np.testing.assert_allclose(smooth(np.full((2, 3000), 7.0)), 7.0)
    impulse = np.zeros(3000)
    impulse[0] = 1.0
    decay = 0.95
    expected = 0.05 * decay ** np.arange(3000) / (1 - decay ** np.arange(1, 3001))
    np.testing.assert_allclose(smooth(impulse), expected, atol=1e-12)


@pytest.mark.parametrize("count", [1, 3, 8, 15])
def test_iqm_is_scipys_trimmed_mean(count):
    scores = np.random.default_rng(count).normal(size=(5, count))
    np.testing.assert_allclose(
        stats.iqm(scores, axis=1), scipy.stats.trim_mean(scores, 0.25, axis=1)
    )
    np.testing.assert_allclose(stats.iqm(scores[0]), scipy.stats.trim_mean(scores[0], 0.25))


def test_bootstrap_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    offsets, hits, trials = np.array([0.0, 10.0, -4.0]), 0, 200
    for trial in range(trials):
        scores = offsets[:, None] + rng.normal(size=(3, 12))
        estimate, low, high = stats.stratified_bootstrap(scores, np.mean, reps=300, seed=trial)
        assert low <= estimate <= high
        hits += low <= offsets.mean() <= high
    # 95% nominal; the percentile bootstrap of 12 seeds is known to fall a little short.
    assert 0.86 < hits / trials < 0.99


def test_bootstrap_keeps_the_strata():
    # Without noise within tasks, no resampling within tasks can move the estimate.
    low_high = stats.stratified_bootstrap({"a": np.zeros(5), "b": np.full(3, 9.0)}, np.mean)
    assert low_high == (27 / 8,) * 3
    with pytest.raises(ValueError, match="`scores` must hold one"):
        stats.stratified_bootstrap({"a": np.zeros((2, 2))})


def test_performance_profile_by_hand():
    shares = stats.performance_profile([[1.0, 2.0], [0.5, 0.5]], np.array([0.5, 0.75, 2.0, 3.0]))
    np.testing.assert_allclose(shares, [1.0, 0.5, 0.25, 0.0])


def test_divergence_is_of_the_training_loss():
    """A run that ends above its start diverged; one that merely overfits did not."""
    falls = np.linspace(2.0, 0.1, STEPS)
    rises = np.concatenate([falls[: STEPS // 2], np.linspace(1.0, 5.0, STEPS // 2)])
    curve = curve_of(np.stack([falls, rises, np.where(falls < 0.2, np.inf, falls)]))
    overfitted = curve._replace(valid_normalized=np.full_like(curve.valid_normalized, 2.0))
    np.testing.assert_array_equal(metrics.survival(overfitted, curve), [1.0, 0.0, 0.0])
