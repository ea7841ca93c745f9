"""Scores of a curve against a reference, one per seed: higher is better, 1 is the reference.

Every metric is `(curve, reference) -> [seeds]`, is 1 for a curve against itself, is finite, lies in
[0, BOUND], and is 0, the worst, where the curve failed (NaN, infinity, target never reached). The
reference has as many seeds as the curve, which are then paired, or one. Losses should be positive,
as ratios of others mean little; they are floored at 1e-12.

A metric is any public function here whose parameters are `(curve, reference)`: `METRICS` has them.
"""

import inspect
from collections.abc import Callable

import numpy as np

from evaluation.curve import Curve, smooth

BOUND = 100.0
Metric = Callable[[Curve, Curve], np.ndarray]


def loss_ratio(reference: np.ndarray, own: np.ndarray) -> np.ndarray:
    """reference / own for losses and other costs; 0 where `own` is not finite, BOUND at most."""
    failed = ~np.isfinite(own)
    floored = np.maximum(np.where(failed, 1.0, own), 1e-12)
    # A reference that failed is worse than anything that did not.
    against = np.maximum(np.where(np.isfinite(reference), reference, np.inf), 1e-12)
    return np.where(failed, 0.0, np.minimum(against / floored, BOUND))


def final_train_loss(curve: Curve, reference: Curve) -> np.ndarray:
    """The reference's smoothed training loss at its last step over the curve's."""
    return loss_ratio(smooth(reference.train)[:, -1], smooth(curve.train)[:, -1])


def mean_train_loss(curve: Curve, reference: Curve) -> np.ndarray:
    """The reference's training loss averaged over its steps over the curve's: rewards speed."""
    with np.errstate(over="ignore", invalid="ignore"):
        means = [c.train.mean(axis=1, dtype=np.float64) for c in (reference, curve)]
    return loss_ratio(*means)


def held_out_loss(curve: Curve, reference: Curve) -> np.ndarray:
    """Test loss at the evaluation of least validation loss, the reference's over the curve's."""
    return loss_ratio(_early_stopped(reference), _early_stopped(curve))


def _early_stopped(curve: Curve) -> np.ndarray:
    valid = np.where(np.isfinite(curve.valid), curve.valid, np.inf)
    return np.take_along_axis(curve.test, valid.argmin(axis=1)[:, None], axis=1)[:, 0]


def steps_to_target(curve: Curve, reference: Curve) -> np.ndarray:
    """Steps in which the reference first reached its best smoothed training loss, over the curve's.

    The best of the reference is the target, seed by seed. 0 if the curve never gets there.
    """
    ours, theirs = _best_so_far(curve), _best_so_far(reference)
    target = np.broadcast_to(theirs[:, -1], len(ours))
    with np.errstate(divide="ignore"):
        return loss_ratio(_first(theirs, theirs[:, -1]), _first(ours, target))


def speedup(curve: Curve, reference: Curve) -> np.ndarray:
    """How many steps the reference's envelope needs for a loss that the curve reaches in one step.

    With f(loss) the steps after which the envelope (for a tuned baseline, the lower envelope over
    its whole grid) reaches a loss, by linear interpolation: f(best smoothed loss of the curve) over
    the steps taken, as in VeLO (arXiv:2211.09760, appendix). A curve that beats everything that the
    envelope reaches has no f at its end: it is scored at the step where it reaches the envelope's
    last value, so that the score is continuous and never guesses beyond the reference's run.
    """
    ours = _best_so_far(curve)
    theirs = np.broadcast_to(reference.envelope, (len(ours), reference.envelope.shape[1]))
    return np.array([_speedup(*pair) for pair in zip(ours, theirs, strict=True)])


def _speedup(best: np.ndarray, envelope: np.ndarray) -> float:
    if not np.isfinite(best[-1]):
        return 0.0
    if not np.isfinite(envelope[-1]):
        return BOUND
    if best[-1] == envelope[-1]:  # a tie over the whole run, however flat its end
        return len(envelope) / len(best)
    if best[-1] > envelope[-1]:
        return _steps_to(envelope, best[-1]) / len(best)
    return min(_steps_to(envelope, envelope[-1]) / _steps_to(best, envelope[-1]), BOUND)


def _steps_to(best: np.ndarray, loss: float) -> float:
    """Steps, from 1, interpolated, in which a non-increasing curve first reaches `loss`."""
    after = int(np.argmax(best <= loss))
    if after == 0 or not np.isfinite(best[after - 1]):
        return after + 1.0
    above, below = best[after - 1], best[after]
    return after + (above - loss) / (above - below)


def survival(curve: Curve, reference: Curve) -> np.ndarray:
    """1, or 0 where the curve diverged; the reference is not looked at. Divergence rate = 1 - mean.

    Diverged: a training loss was not finite, or the mean of the last tenth is above the first.
    Overfitting is not divergence: it shows in `held_out_loss`.
    """
    del reference
    finite = np.isfinite(curve.train).all(axis=1)
    last = curve.train[:, -max(1, curve.train.shape[1] // 10) :].mean(axis=1)
    return (finite & (last <= curve.train[:, 0])).astype(np.float64)


def step_time(curve: Curve, reference: Curve) -> np.ndarray:
    """The reference's seconds per step over the curve's, each relative to the optax.adam that was
    measured in alternation with it. 0 where one of the two was not measured."""
    relative = [c.seconds_per_step / c.adam_seconds_per_step for c in (reference, curve)]
    theirs, ours = (np.asarray(r, np.float64) for r in relative)
    ratio = loss_ratio(theirs, ours) if np.isfinite(theirs) else np.zeros(())
    return np.repeat(ratio, len(curve.train))


def time_to_target(curve: Curve, reference: Curve) -> np.ndarray:
    """Seconds in which the reference first reached its best smoothed training loss, over the
    curve's: `steps_to_target` times `step_time`. 0 if the curve never gets there or was not timed.
    """
    return np.minimum(steps_to_target(curve, reference) * step_time(curve, reference), BOUND)


def state_memory(curve: Curve, reference: Curve) -> np.ndarray:
    """The reference's bytes of optimizer state per parameter over the curve's."""
    sizes = [np.asarray(c.state_bytes_per_param, np.float64) for c in (reference, curve)]
    return np.repeat(loss_ratio(*sizes), len(curve.train))


def _best_so_far(curve: Curve) -> np.ndarray:
    smoothed = smooth(curve.train)
    # What a run reached before it failed does not count.
    failed = ~np.isfinite(smoothed[:, -1:])
    return np.where(failed, np.inf, np.minimum.accumulate(smoothed, axis=1))


def _first(best: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[seeds] first step, from 1, at which `best` [seeds, steps] <= `target`; infinity if never."""
    hit = np.isfinite(best) & (best <= target[:, None])
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1.0, np.inf)


# Every public function of (curve, reference) here is a metric.
METRICS: dict[str, Metric] = {
    name: function
    for name, function in inspect.getmembers(inspect.getmodule(loss_ratio), inspect.isfunction)
    if not name.startswith("_")
    and [*inspect.signature(function).parameters] == ["curve", "reference"]
}
