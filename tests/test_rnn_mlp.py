"""rnn_mlp against the recorded trajectories of its published implementation, its losses, and where
its meta-training starts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trajectories

from learned_opt.rnn_mlp import RnnMlp

GOLDEN = trajectories.GOLDEN / "rnn_mlp.npz"
NARROW = {"hidden": 8, "from_lstm": 6, "from_mlp": 4, "to_mlp": 5}
FIELDS = {
    "step1": {"step_size": 1.0},
    "perturbed": {},
    "validated": NARROW | {"step_size": 1.0, "magnitude_scale": 0.1},
}
RULES = {
    tag: dataclasses.replace(RnnMlp.published(), lstm=8, **fields) for tag, fields in FIELDS.items()
}


@dataclasses.dataclass(frozen=True)
class Validated:
    """A rule that is told a validation loss of 1.5 times the training loss less 1."""

    rule: RnnMlp

    def optimizer(self, theta, horizon):
        inner = self.rule.optimizer(theta, horizon)

        def update(updates, state, params=None, **extra_args):
            value = extra_args["value"]
            valid = 1.5 * value - 1.0
            return inner.update(updates, state, params, value=value, valid_value=valid)

        return optax.GradientTransformationExtraArgs(inner.init, update)


def theta_of(tag):
    leaves = trajectories.under(trajectories.load(GOLDEN), f"{tag}/theta|")
    leaf = lambda name: jnp.asarray(leaves[name])  # noqa: E731
    layer = lambda name: {"w": leaf(f"{name}|w"), "b": leaf(f"{name}|b")}  # noqa: E731
    mlp = {f"{k}{i}": leaf(f"ffmod_params|mlp/~/linear_{i}|{k}") for i in range(3) for k in "wb"}
    return {
        "lstm": layer("rnn_params|rnn/linear"),
        "lstm_to_lstm": layer("rnn_to_in_params|rnn_to_in"),
        "lstm_to_mlp": layer("rnn_to_ff_params|rnn_to_ff"),
        "mlp": mlp,
        "initial": {
            "hidden": leaf("lstm_init_state|hidden")[0],
            "cell": leaf("lstm_init_state|cell")[0],
            "from_lstm": leaf("initial_from_lstm"),
            "from_mlp": leaf("initial_from_mlp"),
        },
    }


@pytest.mark.parametrize("problem", trajectories.PROBLEMS)
@pytest.mark.parametrize(("mode", "tag"), trajectories.runs(RULES))
def test_follows_the_published_trajectory(mode, tag, problem):
    golden = trajectories.load(GOLDEN)
    rule, theta = RULES[tag], theta_of(tag)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(rule.init, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, theta) == shapes
    params, grads, losses = trajectories.inputs(golden, problem)
    told = Validated(rule) if tag == "validated" else rule
    visited, state = trajectories.run(mode, told, theta, None, params, grads, losses)
    want = trajectories.published(golden, tag, problem, params)
    trajectories.assert_follows(visited, params, want)
    for name in ("from_lstm", "from_mlp"):
        recorded = golden[f"{tag}/{problem}/state{trajectories.STEPS}|{name}"]
        trajectories.assert_close(getattr(state, name), recorded, 1e-5, name)
    assert int(state.count) == trajectories.STEPS


def updates_of(rule, told, theta=None):
    """Updates of one leaf, a step per (value, keywords)."""
    theta = rule.init(jax.random.key(0)) if theta is None else theta
    optimizer = rule.optimizer(theta)
    params, found = jnp.asarray([1.0, -2.0, 0.5]), []
    state: Any = optimizer.init(params)
    for i, (value, keywords) in enumerate(told):
        update, state = jax.jit(optimizer.update)(
            params * (i + 1), state, params, value=jnp.float32(value), **keywords
        )
        found.append(np.asarray(update))
    return np.stack(found), state


def test_a_missing_validation_loss_is_the_training_loss():
    rule = RnnMlp(lstm=4, initial="random", step_size=1.0)
    losses = (2.0, 1.5, 1.7)
    without, _ = updates_of(rule, [(x, {}) for x in losses])
    same, _ = updates_of(rule, [(x, {"valid_value": jnp.float32(x)}) for x in losses])
    other, _ = updates_of(rule, [(x, {"valid_value": jnp.float32(x + 0.1)}) for x in losses])
    np.testing.assert_array_equal(without, same)
    assert np.max(np.abs(without - other)) > 1e-5


def test_published_validation_losses_may_come_now_and_then():
    """By hand: decay 0.95, corrected for two losses seen; without one the average stays."""
    rule = dataclasses.replace(RnnMlp.published(), lstm=4)
    told = [(2.0, {"valid_value": 3.0}), (1.5, {}), (1.7, {"valid_value": 2.0}), (1.6, {})]
    _, state = updates_of(rule, told)
    np.testing.assert_allclose(state.losses.valid, 0.95 * 0.05 * 3.0 + 0.05 * 2.0, rtol=1e-6)
    assert int(state.losses.valid_count) == 2


def test_gradients_are_clipped_to_ten_times_their_usual_size():
    """By hand, in the momentum of decay 0.5: a size of 1 that is assumed, then the clipped one, 10,
    averaged with decay 0.99.
    """
    rule = RnnMlp(lstm=4)
    optimizer, params = rule.optimizer(rule.init(jax.random.key(0))), jnp.zeros((2,))
    state: Any = optimizer.init(params)
    second = 10.0 * (0.99 * 1.0 + 10.0) / (0.99 + 1.0)
    for momentum in (0.5 * 10.0, 0.5 * 5.0 + 0.5 * second):
        _, state = optimizer.update(1e6 + params, state, params, value=1.0)
        np.testing.assert_allclose(state.momentum[0], momentum, rtol=1e-4)


def test_starts_along_the_momentum_over_the_root_of_its_second_moment():
    """By hand: the part of theta that is not the pass-through is made zero."""
    rule = RnnMlp(lstm=4, step_size=0.1)
    theta = rule.init(jax.random.key(0))
    theta["mlp"]["w2"] = theta["mlp"]["w2"].at[2:].set(0.0).at[:, 1].set(0.0)
    updates, _ = updates_of(rule, [(1.0, {}), (1.0, {})], theta)
    g = np.asarray([1.0, -2.0, 0.5])
    m, v = 0.09 * g + 0.1 * 2 * g, 0.09 * g**2 + 0.1 * (2 * g) ** 2
    adam = m / np.sqrt(v + 1e-6)
    np.testing.assert_allclose(
        updates[1], -0.1 * adam / np.sqrt(np.mean(adam**2) + 1e-5), rtol=1e-4
    )


def test_sizes_are_the_published_ones():
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(RnnMlp.published().init, jax.random.key(0)))
    assert shapes["lstm"]["w"] == (52 + 64, 256)
    assert shapes["mlp"]["w0"] == (54, 32)
    assert shapes["mlp"]["w2"] == (32, 18)


def test_nothing_to_train_is_no_error():
    rule = RnnMlp(lstm=4)
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    updates, _ = optimizer.update({}, optimizer.init({}), {}, value=1.0)
    assert updates == {}


def test_a_validation_loss_that_is_no_scalar_is_refused():
    with pytest.raises(ValueError, match=r"`valid_value` of RnnMlp must be the scalar .* \(2,\)"):
        updates_of(RnnMlp(lstm=4), [(1.0, {"valid_value": jnp.ones(2)})])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 0}, "`hidden` must be at least 1, got 0"),
        ({"from_mlp": 0}, "`from_mlp` must be at least 1, got 0"),
        ({"hidden": 1}, "`hidden` must be at least 2 for initial='momentum', got 1"),
        ({"initial": "zero"}, "`initial` must be 'momentum' or 'random', got 'zero'"),
        ({"decays": (1.0,)}, r"`decays` must be numbers in \[0, 1\), got \(1.0,\)"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RnnMlp(**fields)
