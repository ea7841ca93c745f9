"""VeLO against the recorded trajectories of its published implementation, what it watches against
closed forms, and where its meta-training starts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trajectories

from learned_opt import scheduler, velo
from learned_opt.velo import Velo

GOLDEN = trajectories.GOLDEN / "velo.npz"
SHARED = trajectories.SHARED / "lopt_golden.npz"
HORIZON = 100
SMALL = Velo(lstm=16, bank=8, interpolation=100.0)
BUGGED = dataclasses.replace(SMALL, short_loss_buffer=True, stateless_lstm=True)
RULES = {
    "hyperv2_l16_p8": SMALL,
    "hyperv2_l16_p8_perturbed": SMALL,
    "hyperv2_l16_p8_bugged": BUGGED,
    # only in the shared fixtures
    "hyperv2_default": Velo(lstm=128, bank=64, interpolation=100.0),
}


def golden_of(tag, path=GOLDEN):
    """A fixture that has the tag."""
    if path == GOLDEN and f"{tag}/theta|lstm_init_state|cell" in trajectories.load(path):
        return trajectories.load(path)
    if not SHARED.is_file():
        pytest.skip("the shared fixtures are not here")
    return trajectories.load(SHARED)


def theta_of(golden, tag):
    leaf = lambda name: jnp.asarray(golden[f"{tag}/theta|{name}"])  # noqa: E731
    linear = lambda name: {k: leaf(f"rnn_params|{name}|{k}") for k in "wb"}  # noqa: E731
    bank = {name: leaf(f"ff_mod_stack|~|{name}") for name in ("b0", "w1", "b1", "w2", "b2")}
    groups = [leaf(f"ff_mod_stack|~|w0__{i}") for i in range(14)]
    return {
        "bank": bank | {"w0": jnp.concatenate(groups, axis=-2)},
        "scheduler": {
            "mix_all": linear("linear_1"),
            "mix_own": linear("linear_2"),
            "lstm": linear("rnn/linear"),
            "controls": linear("rnn_to_controls"),
            "step_size": linear("step_size"),
            "initial": {k: leaf(f"lstm_init_state|{k}")[0] for k in ("hidden", "cell")},
        },
    }


def follow(mode, golden, tag, problem):
    """The start, params after each step, the last state."""
    params, grads, losses = trajectories.inputs(golden, problem)
    theta = theta_of(golden, tag)
    visited, state = trajectories.run(mode, RULES[tag], theta, HORIZON, params, grads, losses)
    return params, visited, state


@pytest.mark.parametrize("problem", trajectories.PROBLEMS)
@pytest.mark.parametrize(("mode", "tag"), trajectories.runs(RULES))
def test_follows_the_published_trajectory(mode, tag, problem):
    golden = golden_of(tag)
    params, visited, state = follow(mode, golden, tag, problem)
    want = trajectories.published(golden, tag, problem, params)
    # ten times tighter than asked for: a few roundings of float32
    trajectories.assert_follows(visited, params, want, tolerance=1e-6 if mode == "jit" else 1e-5)
    assert int(state.count) == trajectories.STEPS


@pytest.mark.parametrize("problem", trajectories.PROBLEMS)
@pytest.mark.parametrize("tag", RULES)
def test_what_it_watches_follows_the_published_state(tag, problem):
    """The loss buffer, and the LSTM's rows in the order of the leaves."""
    golden = golden_of(tag, SHARED)
    _, _, state = follow("jit", golden, tag, problem)
    last = trajectories.under(golden, f"{tag}/{problem}/state{trajectories.STEPS}|")
    losses, lstm = state.scheduler
    np.testing.assert_allclose(losses.means, last["loss_buffer|means"], rtol=1e-6)
    np.testing.assert_allclose(losses.minima, last["loss_buffer|running_min"], rtol=1e-6)
    np.testing.assert_allclose(losses.decays, last["loss_buffer|decays"], rtol=1e-6)
    np.testing.assert_allclose(lstm.hidden, last["lstm_hidden_state|hidden"], atol=2e-6)
    # cells reach 2.6: a few tens of units in the last place
    np.testing.assert_allclose(lstm.cell, last["lstm_hidden_state|cell"], atol=5e-6)


def weighted_means(losses, scales):
    """[t, 10]: means of the losses up to t, a loss i steps ago weighted exp(-i / scale)."""
    ages = np.arange(len(losses))[:, None] - np.arange(len(losses))[None]
    weights = np.tri(len(losses))[..., None] * np.exp(-ages[..., None] / scales)
    return np.einsum("tsa,s->ta", weights, losses) / weights.sum(axis=1)


def test_loss_features_by_their_definition():
    """Float64, from the means over all losses; an explosion and a NaN count as twice the mean."""
    rng, horizon = np.random.default_rng(0), 1000
    losses = 2.0 + np.cos(np.arange(40) / 4) + 0.3 * rng.uniform(size=40)
    scales = np.logspace(1, np.log10(horizon), 10)
    seen = losses.copy()
    for t, shown in ((20, 1e6), (30, np.nan)):
        losses[t] = 2.0 * np.max(weighted_means(losses[:t], scales)[-1])
        seen[t] = shown
    means = weighted_means(losses, scales)
    lowest = np.minimum.accumulate(means, axis=0)
    want = (means - lowest)[:, :-1] / np.maximum(1e-8, means[:, 1:] - lowest[:, :-1]) - 1.0
    want = np.clip(want, -1.0, 1.0)
    want[:2] = 0.0

    buffer, step = scheduler.loss_buffer(horizon), jax.jit(scheduler.loss_features)
    for t, loss in enumerate(seen):
        found, buffer = step(buffer, jnp.float32(loss), t)
        np.testing.assert_allclose(found, want[t], atol=2e-3, err_msg=str(t))
    assert np.sum(np.abs(want) < 0.9) > 50, "most features are at their bounds"


@pytest.mark.parametrize("horizon", [1, 10, 10**9])
def test_loss_features_of_any_horizon_are_finite(horizon):
    buffer = scheduler.loss_buffer(horizon)
    for t, loss in enumerate([0.0, 1e30, -5.0, 2.0]):
        found, buffer = scheduler.loss_features(buffer, jnp.float32(loss), jnp.asarray(t))
        assert np.all(np.abs(found) <= 1.0)


def test_moments_of_nearly_equal_momenta():
    """Against float64: a variance of 1e-9 of the squared mean is no rounding error, when the means
    have hardly moved since the step before.
    """
    rng = np.random.default_rng(0)
    m = np.float32(1.0 + 3e-5 * rng.normal(size=(3, 50, 40)))
    v = np.float32(rng.uniform(size=(1, 50, 40)))
    before = jnp.zeros(8).at[2:5].set(1.0)
    found = velo.moments(before, jnp.asarray(m), jnp.asarray(v))
    m, v = m.astype(np.float64), v.astype(np.float64)
    want = [v.mean(), (v**2).mean(), *m.mean((1, 2)), *m.var((1, 2))]
    np.testing.assert_allclose(found, want, rtol=1e-4)


def started(rule, key=0):
    """theta of a rule's start without the random tenth: what is left is said in words."""
    theta = rule.init(jax.random.key(key))
    bank, plan = theta["bank"], theta["scheduler"]
    bank["w2"] = bank["w2"].at[:, 2:, 0].set(0.0).at[:, :, 1].set(0.0)
    for head in ("controls", "step_size"):
        plan[head]["w"] = jnp.zeros_like(plan[head]["w"])
    return theta


def test_starts_along_the_normalised_momentum():
    """By hand: 0.1 * rms(params) * momentum / rms(momentum), whatever the interpolation."""
    params = {"a": jnp.full((2, 3), 2.0), "b": jnp.asarray([1.0, -1.0, 0.5])}
    grads = {"a": jnp.asarray([[1.0, -2.0, 3.0], [0.5, 0.0, 1.0]]), "b": jnp.ones(3)}
    for interpolation in (1.0, 100.0):
        rule = Velo(lstm=4, bank=3, step_size=0.1, interpolation=interpolation)
        optimizer = rule.optimizer(started(rule), HORIZON)
        updates, _ = optimizer.update(grads, optimizer.init(params), params, value=1.0)
        for name, p in params.items():
            m, v = 0.1 * np.asarray(grads[name]), 1e-3 * np.square(grads[name])
            m = m / np.sqrt(v + 1e-6)
            direction = m / np.sqrt(np.mean(m**2) + 1e-5)
            want = -0.1 * np.sqrt(np.mean(np.square(p)) + 1e-9) * direction
            np.testing.assert_allclose(updates[name], want, rtol=1e-4)


def descend(rule, theta, steps=300):
    """The loss |params|^2 / 2, which is 6 at the start, after some steps of a rule."""
    optimizer = rule.optimizer(theta, steps)

    def step(carry, _):
        params, state = carry
        loss = 0.5 * optax.tree.norm(params, squared=True)
        updates, state = optimizer.update(params, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), loss

    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((6,))}
    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1][-1]


@pytest.mark.parametrize("seed", range(3))
def test_descends_a_quadratic_from_its_start(seed):
    rule = Velo(step_size=0.01)
    assert descend(rule, rule.init(jax.random.key(seed))) < 0.6


def test_published_sizes():
    """2,320,385 published weights less the mixing layer that is never read."""
    theta = jax.eval_shape(Velo.published().init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 2_320_385 - 31 * 512


def test_clip_param_scale():
    """The factor rms(params) becomes 0.01 * sqrt(number of elements) where that is less."""
    params = {"large": jnp.full((5, 5), 2.0), "small": jnp.full((5, 5), 0.01)}
    grads = jax.tree.map(lambda p: p + jnp.linspace(0.0, 1.0, 25).reshape(5, 5), params)
    rule = Velo(lstm=4, bank=3)
    theta = rule.init(jax.random.key(0))

    def updates_of(rule):
        optimizer = rule.optimizer(theta, HORIZON)
        return optimizer.update(grads, optimizer.init(params), params, value=1.0)[0]

    free, cut = updates_of(rule), updates_of(dataclasses.replace(rule, clip_param_scale=0.01))
    np.testing.assert_allclose(cut["large"], free["large"] * (0.05 / 2.0), rtol=1e-5)
    np.testing.assert_array_equal(cut["small"], free["small"])


def test_degenerate_tensors_and_losses():
    """Zero params and gradients, five long axes, a NaN loss; the first loss decides, the others are
    cut off.
    """
    rule = Velo(lstm=4, bank=3)
    optimizer = rule.optimizer(rule.init(jax.random.key(0)), HORIZON)
    params = {"zero": jnp.zeros((3, 2)), "five": jnp.ones((2, 2, 2, 2, 2)), "one": jnp.ones((1,))}
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for loss in (1.0, jnp.nan, jnp.inf, 1.0):
        grads = params | {"zero": jnp.zeros((3, 2))}
        updates, state = step(grads, state, params, value=loss)
        assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    updates, _ = step(params, optimizer.init(params), params, value=jnp.nan)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


def test_no_tensor_at_all():
    """What optax.multi_transform passes where no leaf has the rule's label."""
    rule = Velo(lstm=4, bank=3)
    optimizer = rule.optimizer(rule.init(jax.random.key(0)), HORIZON)
    updates, state = optimizer.update({}, optimizer.init({}), {}, value=1.0)
    assert updates == {}
    assert int(state.count) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lstm": 0}, "`lstm` must be at least 1, got 0"),
        ({"bank": 0}, "`bank` must be at least 1, got 0"),
        ({"interpolation": 0.0}, "`interpolation` must be positive, got 0.0"),
        ({"gradient_clip": -1.0}, "`gradient_clip` must be positive, got -1.0"),
        ({"clip_param_scale": 0.0}, "`clip_param_scale` must be positive, got 0.0"),
        ({"initial": "zero"}, "`initial` must be 'momentum' or 'random', got 'zero'"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Velo(**fields)
