"""The shipped flagships do what their cards say, on a task that is new to them."""

import jax
import numpy as np
import optax
import pytest

import learned_opt
from evaluation.curve import train_curves
from tasks.image_mlp import ImageMLP

TASK = ImageMLP("digits/held_out", hidden=(24,))
STEPS = 200


def final_loss(optimizer) -> float:
    budget = {"steps": STEPS, "seeds": 2, "key": jax.random.key(0), "evals": 1, "eval_batches": 1}
    curve = train_curves(TASK, lambda _: optimizer, np.zeros(1), **budget)
    return float(curve.train[0, :, -20:].mean())


@pytest.fixture(scope="module")
def adam() -> float:
    """At its best of four learning rates, with a cosine."""
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    return min(final_loss(optax.adam(optax.cosine_decay_schedule(rate, STEPS))) for rate in rates)


def test_universal_is_ahead_of_tuned_adam(adam):
    assert final_loss(learned_opt.load("universal", horizon=STEPS)) < adam


def test_direction_is_ahead_of_tuned_adam_at_one_rate(adam):
    schedule = optax.cosine_decay_schedule(1e-2, STEPS)
    assert final_loss(learned_opt.load("direction", learning_rate=schedule)) < adam


@pytest.mark.parametrize("name", ["universal", "direction", "mulo"])
def test_cards_tell_where_they_lose(name):
    _, theta, card = learned_opt.read(name)
    assert card["known_failures"]
    assert card["inner_steps"] >= 3e5
    assert sum(x.nbytes for x in jax.tree.leaves(theta)) < 50_000


@pytest.mark.parametrize("name", ["universal", "direction"])
def test_cards_hold_scores_with_intervals(name):
    _, _, card = learned_opt.read(name)
    assert card["meta_validation"]["score"] > 1.0
    for columns in card["scores"].values():
        for estimate, low, high in columns.values():
            assert low <= estimate <= high
