"""Celo and Celo-Adam against the recorded trajectories of their released weights, which are not in
this repository, and against what they are by construction.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trajectories

from learned_opt.celo import Celo
from learned_opt.celo_adam import CeloAdam

GOLDEN = trajectories.SHARED / "celo_golden.npz"
HORIZON = 100
RULES = {"celo": Celo.published(), "celo_adam": CeloAdam.published()}


@pytest.fixture
def golden():
    if not GOLDEN.is_file():
        pytest.skip("the released weights are not here")
    return trajectories.load(GOLDEN)


def theta_of(golden, tag):
    leaf = lambda name: jnp.asarray(golden[f"{tag}/theta|{name}"])  # noqa: E731
    linear = lambda name: {k: leaf(f"rnn_params|{name}|{k}") for k in "wb"}  # noqa: E731
    theta = {
        "scheduler": {
            "mix_all": linear("linear_1"),
            "mix_own": linear("linear_2"),
            "lstm": linear("rnn/linear"),
            "step_size": linear("step_size"),
            "initial": {k: leaf(f"lstm_init_state|{k}")[0] for k in ("hidden", "cell")},
        }
    }
    if tag == "celo":
        mlp = {k: leaf(f"ff_mod_stack|~|{k}")[0] for k in ("b0", "w1", "b1", "w2", "b2")}
        groups = [leaf(f"ff_mod_stack|~|w0__{i}")[0] for i in range(14)]
        theta["mlp"] = mlp | {"w0": jnp.concatenate(groups)}
    return theta


def follow(mode, golden, tag, problem):
    params, grads, losses = trajectories.inputs(golden, problem)
    theta = theta_of(golden, tag)
    visited, state = trajectories.run(mode, RULES[tag], theta, HORIZON, params, grads, losses)
    return params, visited, state


@pytest.mark.parametrize("problem", trajectories.PROBLEMS)
@pytest.mark.parametrize(("mode", "tag"), trajectories.runs(RULES))
def test_follows_the_published_trajectory(mode, tag, problem, golden):
    params, visited, state = follow(mode, golden, tag, problem)
    want = trajectories.published(golden, tag, problem, params)
    trajectories.assert_follows(visited, params, want, tolerance=1e-6)
    last = trajectories.under(golden, f"{tag}/{problem}/state{trajectories.STEPS}|")
    losses, lstm = state.scheduler
    np.testing.assert_allclose(losses.means, last["loss_buffer|means"], rtol=1e-6)
    np.testing.assert_allclose(losses.minima, last["loss_buffer|running_min"], rtol=1e-6)
    # published for every tensor, all of them equal
    rows = last["lstm_hidden_state|hidden"]
    np.testing.assert_array_equal(rows, np.tile(rows[:1], (len(params), 1)))
    np.testing.assert_allclose(lstm.hidden, rows[:1], atol=1e-5)
    np.testing.assert_allclose(lstm.cell, last["lstm_hidden_state|cell"][:1], atol=3e-5)


PARAMS = {"a": jnp.full((2, 3), 2.0), "b": jnp.asarray([1.0, -1.0, 0.5])}
GRADS = {"a": jnp.asarray([[1.0, -2.0, 3.0], [0.5, 0.0, 1.0]]), "b": jnp.asarray([1.0, 1.0, -4.0])}


def steps(rule, theta, count=3):
    """The updates of some steps that leave the params."""
    optimizer, found = rule.optimizer(theta, HORIZON), []
    state = optimizer.init(PARAMS)
    for i in range(count):
        grads = jax.tree.map(lambda g: g * (1.0 + i), GRADS)  # noqa: B023
        updates, state = optimizer.update(grads, state, PARAMS, value=2.0 - 0.1 * i)
        found.append(updates)
    return found


def constant(theta, multiplier):
    """theta whose schedule is constant."""
    head = theta["scheduler"]["step_size"]
    head["w"] = jnp.zeros_like(head["w"])
    head["b"] = jnp.full_like(head["b"], np.log(10.0 * multiplier))
    return theta


def test_celo_starts_along_the_normalised_momentum():
    """By hand: 0.1 * rms(params) * momentum / rms(momentum), the random tenth left out."""
    rule = Celo(lstm=4, step_size=0.1)
    theta = rule.init(jax.random.key(0))
    theta["scheduler"]["step_size"]["w"] *= 0.0
    theta["mlp"]["w2"] = theta["mlp"]["w2"].at[2:, 0].set(0.0).at[:, 1].set(0.0)
    updates = steps(rule, theta, 1)[0]
    for name, p in PARAMS.items():
        m, v = 0.1 * np.asarray(GRADS[name]), 1e-3 * np.square(GRADS[name])
        m = m / np.sqrt(v + 1e-6)
        direction = m / np.sqrt(np.mean(m**2) + 1e-5)
        want = -0.1 * np.sqrt(np.mean(np.square(p)) + 1e-9) * direction
        np.testing.assert_allclose(updates[name], want, rtol=1e-4)


def test_the_schedule_multiplies_every_step():
    """By hand: three times the steps of the phase without a schedule."""
    rule = Celo(lstm=4)
    theta = constant(rule.init(jax.random.key(0)), 3.0)
    without = steps(dataclasses.replace(rule, schedule=False), theta)
    for got, want in zip(steps(rule, theta), without, strict=True):
        for name in PARAMS:
            np.testing.assert_allclose(got[name], 3.0 * want[name], rtol=1e-5)


def test_the_schedule_is_one_for_all_tensors_and_moves():
    rule = CeloAdam(lstm=4)
    theta = rule.init(jax.random.key(0))
    theta["scheduler"]["step_size"]["w"] *= 100.0
    planned, plain = steps(rule, theta), steps(rule, constant(theta, 1.0))
    multipliers = []
    for got, want in zip(planned, plain, strict=True):
        ratios = np.concatenate(
            [(got[k] / np.where(want[k], want[k], np.nan)).ravel() for k in got]
        )
        ratios = ratios[~np.isnan(ratios)]
        np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
        multipliers.append(ratios[0])
    assert np.ptp(multipliers) > 1e-3
    assert np.min(multipliers) > 0.0


def test_celo_adam_of_a_constant_schedule_is_adam():
    rule = CeloAdam(lstm=4, step_size=0.1)
    theta = constant(rule.init(jax.random.key(0)), 0.5)
    adam = optax.adam(0.05, eps_root=1e-10)
    state = adam.init(PARAMS)
    for i, got in enumerate(steps(rule, theta)):
        want, state = adam.update(jax.tree.map(lambda g: g * (1.0 + i), GRADS), state)  # noqa: B023
        for name in PARAMS:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


@pytest.mark.parametrize("rule", [Celo(step_size=0.01), CeloAdam(step_size=0.01)])
def test_descends_a_quadratic_from_its_start(rule):
    optimizer = rule.optimizer(rule.init(jax.random.key(0)), 300)

    def step(carry, _):
        params, state = carry
        loss = 0.5 * optax.tree.norm(params, squared=True)
        updates, state = optimizer.update(params, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((6,))}
    _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=300)
    assert losses[0] == 6.0
    assert losses[-1] < 0.6


@pytest.mark.parametrize(
    ("rule", "weights"),
    # published weights less the mixing layer, and Celo's controls, that are never read
    [(Celo.published(), 37_089 - 19 * 64 - 65), (CeloAdam.published(), 36_865 - 19 * 64)],
)
def test_published_sizes(rule, weights):
    theta = jax.eval_shape(rule.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == weights


@pytest.mark.parametrize("rule", [Celo(lstm=4), CeloAdam(lstm=4)])
def test_zeros_and_a_nan_loss_give_finite_updates(rule):
    optimizer = rule.optimizer(rule.init(jax.random.key(0)), HORIZON)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    state = optimizer.init(zeros)
    for loss in (1.0, jnp.nan, jnp.inf, 1.0):
        updates, state = optimizer.update(zeros, state, zeros, value=loss)
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    updates, _ = optimizer.update({}, optimizer.init({}), {}, value=1.0)
    assert updates == {}


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Celo, {"lstm": 0}, "`lstm` must be at least 1, got 0"),
        (Celo, {"hidden": 0}, "`hidden` must be at least 1, got 0"),
        (Celo, {"hidden": 1}, "`hidden` must be at least 2 for initial='momentum', got 1"),
        (Celo, {"gradient_clip": 0.0}, "`gradient_clip` must be positive, got 0.0"),
        (Celo, {"initial": "zero"}, "`initial` must be 'momentum' or 'random', got 'zero'"),
        (CeloAdam, {"lstm": 0}, "`lstm` must be at least 1, got 0"),
        (CeloAdam, {"b2": 1.0}, r"`b2` must be in \[0, 1\), got 1.0"),
        (CeloAdam, {"gradient_clip": 0.0}, "`gradient_clip` must be positive, got 0.0"),
        (CeloAdam, {"initial": "zero"}, "`initial` must be 'constant' or 'random', got 'zero'"),
    ],
)
def test_wrong_fields_are_refused(cls, fields, message):
    with pytest.raises(ValueError, match=message):
        cls(**fields)
