"""mlp_lopt against the recorded trajectories of its published implementation, and where its
meta-training starts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trajectories

from learned_opt.mlp_lopt import MlpLopt

GOLDEN = trajectories.GOLDEN / "mlp_lopt.npz"
RULES = {"mlp_step1": MlpLopt(step_size=1.0), "mlp_perturbed": MlpLopt.published()}


def theta_of(tag):
    """{w0, b0, w1, ...} of the fixture's haiku layers."""
    leaves = trajectories.under(trajectories.load(GOLDEN), f"{tag}/theta|mlp/~/linear_")
    return {"mlp": {f"{name[2]}{name[0]}": jnp.asarray(leaf) for name, leaf in leaves.items()}}


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
    assert int(state.count) == trajectories.STEPS


def test_starts_along_the_normalised_momentum():
    """By hand: after two equal gradients the momentum of decay 0.9 is 0.19 of one; a tenth of a
    random MLP is added, which is here made zero.
    """
    rule = MlpLopt(hidden=4, step_size=0.1)
    theta = rule.init(jax.random.key(0))
    theta["mlp"]["w2"] = theta["mlp"]["w2"].at[2:, 0].set(0.0)
    theta["mlp"]["w2"] = theta["mlp"]["w2"].at[:, 1].set(0.0)
    optimizer = rule.optimizer(theta)
    params, first, second = jnp.ones(3), jnp.asarray([1.0, -2.0, 3.0]), jnp.asarray([1.0, 4.0, 0.0])
    state = optimizer.init(params)
    _, state = optimizer.update(first, state, params)
    update, _ = optimizer.update(second, state, params)
    momentum = 0.9 * 0.1 * np.asarray(first) + 0.1 * np.asarray(second)
    want = -0.1 * momentum / np.sqrt(np.mean(momentum**2) + 1e-5)
    np.testing.assert_allclose(update, want, rtol=1e-5)


def test_a_random_start_is_another():
    momentum, random = (
        MlpLopt().init(jax.random.key(0)),
        MlpLopt.published().init(jax.random.key(0)),
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(random)) == 1762
    assert not np.array_equal(momentum["mlp"]["w0"], random["mlp"]["w0"])
    np.testing.assert_allclose(np.std(random["mlp"]["w0"]), 0.88 / np.sqrt(19), rtol=0.1)


def test_descends_a_quadratic_from_its_start():
    """Steps of 0.01 * normalised momentum: 400 of them lead from 1 to the oscillation around 0."""
    rule = MlpLopt(step_size=0.01)
    optimizer = rule.optimizer(rule.init(jax.random.key(1)))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.ones((4, 3))
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=400)
    assert float(jnp.mean(jnp.square(params))) < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 0}, "`hidden` must be at least 1, got 0"),
        ({"hidden": 1}, "`hidden` must be at least 2 for initial='momentum', got 1"),
        ({"initial": "zero"}, "`initial` must be 'momentum' or 'random', got 'zero'"),
        ({"momentum_decays": ()}, r"`momentum_decays` must be numbers in \[0, 1\), got \(\)"),
        ({"momentum_decays": (0.9, 1.0)}, r"`momentum_decays` must be numbers in \[0, 1\)"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MlpLopt(**fields)
