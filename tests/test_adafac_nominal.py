"""adafac_nominal against the recorded trajectories of its published implementation, and where its
meta-training starts.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trajectories

from learned_opt.adafac_nominal import AdafacNominal
from learned_opt.small_fc import SmallFC

GOLDEN = trajectories.GOLDEN / "adafac_nominal.npz"
SCALES = {
    "step_size": 0.1,
    "magnitude_scale": 0.5,
    "nominal_step_size": 0.1,
    "nominal_magnitude_scale": 0.7,
    "weight_decay": 0.1,
    "decay_magnitude_scale": 0.9,
}
CONTROLS = {"nominal_control": True, "decay_control": True}
NOMINAL = {"step_size": 0.1, "nominal_step_size": 0.1}
FIELDS = {
    "step1": {"step_size": 1.0},
    "perturbed": {},
    "full": SCALES | CONTROLS | {"black_box": "preconditioned"},
    "pooled": SCALES
    | CONTROLS
    | {
        "pool_magnitude": True,
        "pool_nominal_magnitude": True,
        "black_box": "mean_gradient",
        "nominal": "adam",
    },
    "sgd": SCALES | {"nominal": "sgd"},
    "sgdm": NOMINAL | {"nominal": "momentum"},
    "aggmo": NOMINAL | {"nominal": "aggregated_momentum"},
}
RULES = {
    tag: dataclasses.replace(AdafacNominal.published(), **fields) for tag, fields in FIELDS.items()
}

# the variants differ in arithmetic alone, so that one mode will do
RUNS = trajectories.runs(("full", "step1"))
RUNS += [("jit", tag) for tag in ("perturbed", "pooled", "sgd", "sgdm", "aggmo")]


def theta_of(tag):
    leaves = trajectories.under(trajectories.load(GOLDEN), f"{tag}/theta|")
    theta = {"mlp": {k.removeprefix("nn|~|"): v for k, v in leaves.items() if k[:2] == "nn"}}
    theta |= {name: leaves[name] for name in ("momentum_decays", "rms_decays")}
    return jax.tree.map(jnp.asarray, theta | {"factored_decays": leaves["adafactor_decays"]})


@pytest.mark.parametrize("problem", trajectories.PROBLEMS)
@pytest.mark.parametrize(("mode", "tag"), RUNS)
def test_follows_the_published_trajectory(mode, tag, problem):
    golden = trajectories.load(GOLDEN)
    rule, theta = RULES[tag], theta_of(tag)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(rule.init, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, theta) == shapes
    params, grads, losses = trajectories.inputs(golden, problem)
    visited, state = trajectories.run(mode, rule, theta, None, params, grads, losses)
    trajectories.assert_follows(
        visited, params, trajectories.published(golden, tag, problem, params)
    )
    assert int(state.count) == trajectories.STEPS


@pytest.mark.parametrize("nominal", ["momentum", "aggregated_adam"])
def test_starts_at_the_nominal_step(nominal):
    """In float64 numpy, with weight decay; 1 - 0.999 is good to four digits in float32."""
    rule = AdafacNominal(nominal=nominal, nominal_step_size=0.1, weight_decay=0.2)
    optimizer = rule.optimizer(rule.init(jax.random.key(0)))
    params = jnp.asarray([[1.0, -2.0], [0.5, 3.0]])
    decays = np.array([0.9, 0.99, 0.999])[:, None, None]
    state, m, v = optimizer.init(params), 0.0, 0.0
    for g in np.random.default_rng(0).normal(size=(3, 2, 2)):
        update, state = optimizer.update(jnp.asarray(g, jnp.float32), state, params)
        m, v = decays * m + (1 - decays) * g, 0.999 * v + 0.001 * g * g
        step = m[2] if nominal == "momentum" else np.mean(m, axis=0) / np.sqrt(v + 1e-6)
        want = -0.1 * step - 0.2 * np.asarray(params)
        np.testing.assert_allclose(np.asarray(update), want, rtol=1e-4)


def test_published_without_a_nominal_step_is_small_fc():
    """The same weights, two outputs more that nobody reads."""
    rule = AdafacNominal.published()
    theta = rule.init(jax.random.key(0))
    mlp = theta["mlp"] | {"w2": theta["mlp"]["w2"][:, :2], "b2": theta["mlp"]["b2"][:2]}
    params, g = jnp.ones((3, 4)), jax.random.normal(jax.random.key(1), (3, 4))
    found = []
    for r, t in ((rule, theta), (SmallFC(), theta | {"mlp": mlp})):
        optimizer = r.optimizer(t)
        update, _ = optimizer.update(g, optimizer.init(params), params)
        found.append(np.asarray(update))
    assert np.any(found[0])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_averages_of_squares_stay_positive():
    """Offsets that would make the decays negative."""
    rule = AdafacNominal()
    theta = jax.tree.map(jnp.zeros_like, rule.init(jax.random.key(0)))
    theta |= {"rms_decays": jnp.ones((1,)), "factored_decays": jnp.ones((3,))}
    optimizer, params = rule.optimizer(theta), jnp.ones((2, 3))
    state: Any = optimizer.init(params)
    for scale in (1.0, 0.1):
        update, state = optimizer.update(scale * params, state, params)
        assert np.all(np.isfinite(np.asarray(update)))
    np.testing.assert_allclose(state.accumulators.rms[0], 0.01, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 0}, "`hidden` must be at least 1, got 0"),
        ({"nominal": "adamw"}, "`nominal` must be one of sgd, momentum, .*, got 'adamw'"),
        ({"black_box": "no"}, "`black_box` must be one of raw, preconditioned, .*, got 'no'"),
        ({"initial": "zero"}, "`initial` must be one of nominal, random, got 'zero'"),
        ({"weight_decay": -1.0}, r"`weight_decay` must be in \[0, 1\), got -1.0"),
        (
            {"nominal_step_size": 0.0},
            "`nominal_step_size` must be positive for initial='nominal', got 0.0; set initial",
        ),
        ({"momentum_decays": (0.9,)}, "must be of equal length, got 1 and 3"),
        ({"rms_decay": 1.0}, r"decays must be numbers in \[0, 1\)"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AdafacNominal(**fields)
