"""nn_adam against the recorded trajectories of its published implementation, and where its
meta-training starts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trajectories

from learned_opt.nn_adam import NNAdam, from_log, to_log

GOLDEN = trajectories.GOLDEN / "nn_adam.npz"
RULES = {
    "initial": NNAdam(lstm=4, learning_rate=1e-4),
    "perturbed": NNAdam.published(),
    "output1": NNAdam(lstm=8, learning_rate=0.1, output_scale=1.0, decay_strength=0.1),
}


def theta_of(tag):
    leaves = trajectories.under(trajectories.load(GOLDEN), f"{tag}/theta|")
    leaf = lambda name: jnp.asarray(leaves[name])  # noqa: E731
    layer = lambda name: {"w": leaf(f"{name}|w"), "b": leaf(f"{name}|b")}  # noqa: E731
    return {
        "lstm": layer("rnn_params|rnn/linear"),
        "controls": layer("rnn_to_controls_params|rnn_to_controls"),
        "initial": {
            "hidden": leaf("lstm_init_state|hidden")[0],
            "cell": leaf("lstm_init_state|cell")[0],
            "learning_rate": leaf("per_layer_lr"),
            "beta1": leaf("per_layer_beta1"),
            "beta2": leaf("per_layer_beta2"),
            "epsilon": leaf("per_layer_epsilon"),
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
    visited, state = trajectories.run(mode, rule, theta, None, params, grads, losses)
    want = trajectories.published(golden, tag, problem, params)
    trajectories.assert_follows(visited, params, want)
    settings = golden[f"{tag}/{problem}/state{trajectories.STEPS}|settings"]
    trajectories.assert_close(state.hyperparameters, settings, 1e-5, "hyperparameters")


def test_starts_as_the_published_rule_does():
    theta = NNAdam.published().init(jax.random.key(0))
    want = theta_of("initial")["initial"]
    for name in ("learning_rate", "beta1", "beta2", "epsilon"):
        np.testing.assert_allclose(theta["initial"][name], want[name], rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(theta["controls"]))


def test_starts_as_adam_without_bias_correction():
    """In float64 numpy: until the LSTM has learned to speak, nothing is moved."""
    rule = NNAdam(lstm=4, learning_rate=0.1, beta1=0.8, beta2=0.9, epsilon=0.5)
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    params = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    state, m, v = optimizer.init(params), 0.0, 0.0
    for g in np.random.default_rng(0).normal(size=(3, 2, 2)):
        update, state = optimizer.update(jnp.asarray(g, jnp.float32), state, params)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        want = -0.1 * 1.5 * m / (0.5 + np.sqrt(v + 1e-10))
        np.testing.assert_allclose(np.asarray(update), want, rtol=1e-5)


def test_hyperparameters_stay_within_their_bounds():
    given = jnp.asarray([0.01, 0.9, 0.999, 1e-8])
    np.testing.assert_allclose(from_log(to_log(given)), given, rtol=1e-5)
    low, high = from_log(jnp.full((4,), -1e3)), from_log(jnp.full((4,), 1e3))
    np.testing.assert_allclose(low, [1e-8, 1 - np.exp(-10), 1 - np.exp(-10), 1e-11], rtol=1e-5)
    np.testing.assert_allclose(high, [1e3, 0.0, 0.0, 1e4], rtol=1e-5)
    # also in the gradient, which must not be that of an overflow
    slopes = jax.jacrev(from_log)(jnp.full((4,), 1e3))
    assert not np.any(slopes)


def test_nothing_to_train_is_no_error():
    rule = NNAdam(lstm=4)
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    updates, _ = optimizer.update({}, optimizer.init({}), {})
    assert updates == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lstm": 0}, "`lstm` must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "`learning_rate` must be between 1e-08 and 1000, got 0.0"),
        ({"epsilon": 1e5}, "`epsilon` must be between 1e-11 and 10000, got 100000.0"),
        ({"beta1": 1.0}, r"`beta1` must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, r"`beta2` must be in \[0, 1\), got -0.1"),
        ({"decay_strength": 2.0}, r"`decay_strength` must be in \[0, 1\], got 2.0"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NNAdam(**fields)
