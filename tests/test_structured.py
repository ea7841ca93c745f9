"""L2O-PA, L2O-DM and RNNprop against trajectories of the published networks, recorded from their
own implementation: 30 steps on four LASSO problems of 50 x 100. What is left of the random initial
states is their seed, so those of the fixture are put in the place of ours.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.bounded import BoundedLSTM
from learned_opt.coordinate_lstm import LayerState
from learned_opt.l2o_dm import L2ODM
from learned_opt.rnnprop import RNNprop
from learned_opt.structured import PARTS, StructuredLSTM

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    with np.load(GOLDEN / f"l2o_{name}.npz") as file:
        return {key: file[key] for key in file.files}


def dense(weights, *names):
    return {
        "w": jnp.concatenate([weights[f"w.{name}.weight"] for name in names]),
        "b": jnp.concatenate([weights[f"w.{name}.bias"] for name in names]),
    }


def lstm(weights):
    def layer(i):
        of = lambda kind: weights[f"w.lstm.{kind}_l{i}"]  # noqa: E731
        w = np.concatenate([of("weight_ih"), of("weight_hh")], axis=1)
        return {"w": jnp.asarray(w), "b": jnp.asarray(of("bias_ih") + of("bias_hh"))}

    return {"layer0": layer(0), "layer1": layer(1)}


def thetas(name, weights):
    if name == "PA":
        heads = dense(weights, "linear_p", "linear_a")
        return {"lstm": lstm(weights), "hidden": dense(weights, "linear"), "heads": heads}
    if name == "DM":
        return {"lstm": lstm(weights), "out": dense(weights, "linear")}
    sides = {"in": dense(weights, "linear_in"), "out": dense(weights, "linear_out")}
    return {"lstm": lstm(weights), **sides}


RULES = {"PA": StructuredLSTM(), "DM": L2ODM(), "RP": RNNprop()}


def trajectory(name, recorded):
    """The params after each of the steps, [31, 4, 100], and x of PA."""
    a, b, rho = (jnp.asarray(recorded[key], jnp.float32) for key in ("A", "b", "rho"))
    # the published gradient of the others is that of the mean over the four problems
    share = 1.0 if name == "PA" else 1 / len(a)
    matrices = np.asarray(recorded["A"], np.float64)
    lipschitz = [np.linalg.norm(matrix, 2) ** 2 for matrix in matrices]
    keywords = {
        "prox": lambda v, step: jnp.sign(v) * jnp.maximum(jnp.abs(v) - rho * step, 0),
        "penalty": lambda y: share * rho * jnp.sum(y * jnp.sign(y)),
        "lipschitz": jnp.asarray(lipschitz, jnp.float32)[:, None],
    }
    optimizer = RULES[name].optimizer(thetas(name, recorded))
    started = [recorded[key].swapaxes(1, 2).reshape(2, -1, 4, 100) for key in ("h0", "c0")]
    states = tuple(LayerState(*map(jnp.asarray, both)) for both in zip(*started, strict=True))

    def step(carry, _):
        y, state = carry
        residual = jnp.einsum("bmn,bn->bm", a, y) - b
        grads = share * jnp.einsum("bmn,bm->bn", a, residual)
        updates, state = optimizer.update(grads, state, y, **keywords)
        y = optax.apply_updates(y, updates)
        return (y, state), (y, state.x if name == "PA" else y)

    y = jnp.zeros((4, 100))
    state = optimizer.init(y)
    state = states if name == "DM" else state._replace(lstm=states)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=30)[1])((y, state))


@pytest.mark.parametrize("name", RULES)
def test_follows_the_published_trajectory(name):
    recorded = golden(name)
    found = trajectory(name, recorded)
    for got, key in zip(found, ("y", "z") if name == "PA" else ("y",), strict=False):
        want = recorded[key][1:]
        assert np.max(np.abs(want)) > 0.1
        error = np.abs(np.asarray(got) - want)
        assert error.max() <= 1e-6 * np.max(np.abs(want))


def small():
    """A matrix, a target, and keywords of a LASSO of 8 x 12, with gradients of its smooth part."""
    random = np.random.default_rng(0)
    a = jnp.asarray(random.standard_normal((8, 12)), jnp.float32)
    b = jnp.asarray(random.standard_normal(8), jnp.float32)
    gradient = lambda x: a.T @ (a @ x - b)  # noqa: E731
    prox = lambda v, step: jnp.sign(v) * jnp.maximum(jnp.abs(v) - 0.1 * step, 0)  # noqa: E731
    lipschitz = float(np.linalg.norm(np.asarray(a), 2) ** 2)
    return gradient, {"prox": prox, "lipschitz": lipschitz, "gradient": gradient}


@pytest.mark.parametrize("offset_map", ["eye", None])
@pytest.mark.parametrize("parts", PARTS)
def test_every_variant_is_its_formula(parts, offset_map):
    """Heads whose weights are zero give numbers, the same for all coordinates: by hand."""
    gradient, keywords = small()
    rule = StructuredLSTM(parts=parts, hidden=3, offset_map=offset_map)
    theta = rule.init(jax.random.key(0))
    z = 0.3 * jnp.arange(1.0, len(PARTS[parts]) + 1) - 0.7
    theta["heads"] = {"w": jnp.zeros_like(theta["heads"]["w"]), "b": z}
    squash = lambda z: 2 / (1 + np.exp(-z))  # noqa: E731
    maps = {"b1": squash if offset_map is None else float}
    maps |= {"b2": maps["b1"], "p": squash, "b": squash, "a": squash}
    given = {name: maps[name](float(z)) for name, z in zip(PARTS[parts], z, strict=True)}
    p, b, a, b1, b2 = ({"p": 1, "b": 1, "a": 0, "b1": 0, "b2": 0} | given).values()
    optimizer = rule.optimizer(theta)
    y = x = jnp.linspace(-1.0, 1.0, 12)
    state = optimizer.init(y)
    for _ in range(4):
        updates, state = optimizer.update(gradient(y), state, y, **keywords)
        step = p * 0.9999 / keywords["lipschitz"]
        v = b * (y - step * gradient(y)) + (1 - b) * (x - step * gradient(x)) + b1
        new = keywords["prox"](v, step)
        want, x = new + a * (new - x) + b2, new
        y = optax.apply_updates(y, updates)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state.x, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [StructuredLSTM(hidden=3), BoundedLSTM(hidden=3)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prox": None}, r"`prox` is required by {name}: pass the proximal operator"),
        ({"prox": 0.1}, r"`prox` of {name} must be a function of \(v, step\), got 0.1"),
        ({"lipschitz": None}, r"`lipschitz` is required by {name}: pass the Lipschitz constant"),
        ({"lipschitz": 0.0}, r"`lipschitz` of {name} must be positive and finite, got 0.0"),
        ({"lipschitz": np.array([1.0, np.nan])}, r"must be positive and finite, got \[ 1. nan\]"),
    ],
)
def test_what_is_missing_is_named(rule, change, message):
    gradient, keywords = small()
    optimizer, y = rule.optimizer(rule.init(jax.random.key(0))), jnp.ones(12)
    with pytest.raises(ValueError, match=message.replace("{name}", type(rule).__name__)):
        optimizer.update(gradient(y), optimizer.init(y), y, **(keywords | change))


def test_mixing_needs_the_gradient_as_a_function():
    gradient, keywords = small()
    rule = StructuredLSTM(parts="PBA", hidden=3)
    optimizer, y = rule.optimizer(rule.init(jax.random.key(0))), jnp.ones(12)
    with pytest.raises(ValueError, match="`gradient` is required by StructuredLSTM with B"):
        optimizer.update(gradient(y), optimizer.init(y), y, **(keywords | {"gradient": None}))


def test_the_initial_state_is_drawn_from_its_seed():
    """Zero, or normal numbers of the deviation asked for."""
    params = jnp.zeros(2000)

    def started(**fields):
        rule = StructuredLSTM(hidden=4, **fields)
        state = rule.optimizer(rule.init(jax.random.key(0))).init(params)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.lstm)])

    assert not started().any()
    drawn = started(state_scale=0.5)
    # 32,000 numbers: the error of their deviation is 0.5 / sqrt(64,000)
    assert abs(drawn.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * drawn.size)
    np.testing.assert_array_equal(drawn, started(state_scale=0.5))
    assert (drawn != started(state_scale=0.5, seed=1)).all()


@pytest.mark.parametrize("name", ["DM", "RP"])
def test_subgradients_of_a_penalty_are_added(name):
    """Told of the penalty, rules do what they do without, given the subgradient of the whole."""
    gradient, _ = small()
    optimizer, y = RULES[name].optimizer(RULES[name].init(jax.random.key(0))), jnp.ones(12)
    state = optimizer.init(y)
    penalty = lambda x: 0.1 * jnp.sum(x * jnp.sign(x))  # noqa: E731
    got, _ = optimizer.update(gradient(y), state, y, penalty=penalty)
    want, _ = optimizer.update(gradient(y) + 0.1, state, y)
    np.testing.assert_allclose(got, want, rtol=1e-6)
