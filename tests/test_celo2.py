"""Celo2 against the recorded directions of its published implementation, and against closed forms:
the singular values that Newton-Schulz leaves, Adam, an MLP in numpy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trajectories

import learned_opt
from learned_opt import artifact, compose, discovery
from learned_opt.celo2 import CONFIGURATIONS, Celo2, orthogonalise

GOLDEN = trajectories.GOLDEN / "celo2.npz"
LEARNING_RATE = 0.05  # of the recorded run
RULES = {"celo2": Celo2.published(), "celo2_base": Celo2(step_size=1.0, orthogonalise=False)}
LEAVES = {
    "mlp/~/linear_0": ("mlp", "mlp/~/linear_0|w"),
    "mlp/~/linear_1": ("mlp", "mlp/~/linear_1|w"),
    "conv": ("edge", "conv|w"),
}


def theta_of(tag):
    leaves = trajectories.under(trajectories.load(GOLDEN), f"{tag}/theta|ff_mod_stack|~|")
    first = np.concatenate([leaves.pop(f"w0__{i}") for i in range(14)])
    return {"mlp": jax.tree.map(jnp.asarray, leaves | {"w0": first})}


def recorded(tag):
    """Params, gradients [5, ...], losses [5] and published directions [5, ...], by leaf."""
    golden, params, grads, directions = trajectories.load(GOLDEN), {}, {}, {}
    for name, (problem, leaf) in LEAVES.items():
        found = trajectories.inputs(golden, problem)
        params[name], grads[name], losses = found[0][leaf], found[1][leaf], found[2]
        steps = range(trajectories.STEPS)
        directions[name] = np.stack([golden[f"{tag}/update{t}|{name}"] for t in steps])
    return params, grads, losses, directions


def published_params(params, directions):
    """Params after each step [5, ...], as the recorded run made them."""
    visited = {}
    for name, start in params.items():
        steps = [np.asarray(start)]
        for direction in directions[name]:
            steps.append(steps[-1] - np.float32(LEARNING_RATE) * direction)
        visited[name] = np.stack(steps[1:])
    return visited


@pytest.mark.parametrize(("mode", "tag"), trajectories.runs(RULES))
def test_follows_the_published_trajectory(mode, tag):
    rule = dataclasses.replace(RULES[tag], step_size=LEARNING_RATE)
    params, grads, losses, directions = recorded(tag)
    visited, state = trajectories.run(mode, rule, theta_of(tag), None, params, grads, losses)
    trajectories.assert_follows(visited, params, published_params(params, directions))
    assert int(state.count) == trajectories.STEPS


@pytest.mark.parametrize("tag", RULES)
def test_updates_are_the_published_directions(tag):
    """At the published params, where no rounding of params hides an error."""
    params, grads, _, directions = recorded(tag)
    visited = published_params(params, directions)
    optimizer = RULES[tag].optimizer(theta_of(tag))
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for t in range(trajectories.STEPS):
        updates, state = update({n: g[t] for n, g in grads.items()}, state, params)
        params = {name: jnp.asarray(p[t]) for name, p in visited.items()}
        for name, direction in directions.items():
            trajectories.assert_close(-updates[name], direction[t], 1e-5, name)


def test_decays_weights_and_follows_a_schedule_as_published(tmp_path):
    """-learning rate * (direction + weight decay * p), of a loaded artifact, by optax alone and by
    `finish`. Exempt is nothing here: there are matrices only.
    """
    params, grads, _, directions = recorded("celo2")
    path = tmp_path / "celo2.safetensors"
    artifact.save(path, RULES["celo2"], theta_of("celo2"), {})
    schedule = optax.linear_schedule(0.2, 0.1, 5)
    chain = optax.chain(
        learned_opt.load(path),
        optax.add_decayed_weights(-0.3),
        optax.scale_by_learning_rate(schedule, flip_sign=False),
    )
    first = {name: grad[0] for name, grad in grads.items()}
    for optimizer in (chain, compose.finish(learned_opt.load(path), schedule, weight_decay=0.3)):
        updates, _ = optimizer.update(first, optimizer.init(params), params)
        for name, p in params.items():
            want = -0.2 * (directions[name][0] + 0.3 * np.asarray(p))
            trajectories.assert_close(updates[name], want, 1e-5, name)
    loaded = learned_opt.load(path, learning_rate=0.2)
    updates, _ = loaded.update(first, loaded.init(params), params)
    for name in params:
        trajectories.assert_close(updates[name], -0.2 * directions[name][0], 1e-5, name)


def matrices(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 5), (2, 3, 6, 4)])
def test_orthogonalise_maps_the_singular_values_by_the_quintic(shape):
    x = matrices(*shape)
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s /= np.sqrt(np.sum(s**2, axis=-1, keepdims=True))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    got = np.asarray(orthogonalise(jnp.asarray(x)))
    np.testing.assert_allclose(got, u * s[..., None, :] @ v, atol=3e-5)


def test_orthogonalise_of_zero_is_zero_with_a_finite_gradient():
    zero = jnp.zeros((3, 2))
    assert not np.any(orthogonalise(zero))
    grad = jax.grad(lambda x: jnp.sum(orthogonalise(x)))(zero)
    assert np.all(np.isfinite(grad))


def steps(rule, theta, params, grads):
    """Updates at fixed params."""
    optimizer = rule.optimizer(theta)
    state, found = optimizer.init(params), []
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        found.append(updates)
    return found


def random_theta(rule, seed=0):
    rng, template = np.random.default_rng(seed), rule.init(jax.random.key(0))
    noise = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(noise, template)


@pytest.mark.parametrize("bias_correction", [True, False])
def test_vectors_and_scalars_take_adam(bias_correction):
    """Adam of optax, its epsilon inside the root; without bias correction by hand."""
    rule = Celo2(hidden=2, bias_correction=bias_correction, step_size=0.01)
    params = {"vector": jnp.asarray(matrices(5)), "scalar": jnp.asarray(0.5)}
    grads = [{"vector": jnp.asarray(matrices(5, seed=t)), "scalar": 0.1 * t} for t in (1, 2, 3)]
    adam = optax.adam(20.0 * 0.01, b1=0.9, b2=0.95, eps=0.0, eps_root=1e-8)
    state, m, v = adam.init(params), 0.0, 0.0
    for grad, got in zip(grads, steps(rule, random_theta(rule), params, grads), strict=True):
        want, state = adam.update(grad, state)
        if not bias_correction:
            g = np.asarray(grad["vector"])
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
            want = {"vector": -20.0 * 0.01 * m / np.sqrt(v + 1e-8), "scalar": got["scalar"]}
        for name in params:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_vectors_by_the_mlp_see_nine_groups_of_inputs():
    """Two steps in float64, by hand; rows 15 to 29 of the first layer are not used."""
    rule = Celo2(vectors="mlp", step_size=1.0)
    theta = random_theta(rule)
    p, g1, g2 = (matrices(6, seed=s) for s in (0, 1, 2))
    params = {"v": jnp.asarray(p)}
    got = steps(rule, theta, params, [{"v": jnp.asarray(g1)}, {"v": jnp.asarray(g2)}])[1]["v"]

    p, g1, g2 = (x.astype(np.float64) for x in (p, g1, g2))
    average = lambda b, x1, x2: b * (1 - b) * x1 + (1 - b) * x2  # noqa: E731
    m = [average(b, g1, g2) for b in (0.9, 0.99, 0.999)]
    v = average(0.95, g1**2, g2**2)
    r = 1 / np.sqrt(v + 1e-8)
    fac = [g2 / np.sqrt(average(b, g1**2, g2**2)) for b in (0.9, 0.99, 0.999)]
    inputs = [g2, np.clip(g2, -0.1, 0.1), p, *m, v, *(x * r for x in m), r, *fac, g2 * r]
    x = np.stack([i / np.sqrt(np.mean(i**2) + 1e-9) for i in inputs], axis=-1)
    mlp = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), theta["mlp"])
    x = np.maximum(x @ mlp["w0"][:15] + mlp["b0"], 0.0)
    x = np.maximum(x @ mlp["w1"] + mlp["b1"], 0.0)
    direction = (x @ mlp["w2"] + mlp["b2"])[:, 0]
    want = -direction / np.sqrt(np.mean(direction**2))
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("orthogonal", [True, False])
def test_axes_before_the_last_two_count_single_matrices(orthogonal):
    rule = Celo2(hidden=3, orthogonalise=orthogonal)
    theta = random_theta(rule)
    params, *grads = (jnp.asarray(matrices(2, 5, 4, seed=s)) for s in (0, 1, 2))
    stacked = steps(rule, theta, params, grads)[-1]
    single = [steps(rule, theta, params[i], [g[i] for g in grads])[-1] for i in range(2)]
    np.testing.assert_allclose(stacked, jnp.stack(single), rtol=1e-4, atol=1e-8)
    assert not np.allclose(single[0], single[1])
    rms = jnp.sqrt(jnp.mean(jnp.square(stacked / rule.step_size), axis=(-2, -1)))
    np.testing.assert_allclose(rms, 1.0, rtol=1e-5)


def test_gradients_are_clipped_element_by_element():
    rule = Celo2(hidden=3, gradient_clip=2.0)
    theta, params = random_theta(rule), jnp.asarray(matrices(4, 3))
    huge = jnp.asarray(5.0 * matrices(4, 3, seed=1))
    want = steps(rule, theta, params, [jnp.clip(huge, -2.0, 2.0)])[0]
    np.testing.assert_array_equal(steps(rule, theta, params, [huge])[0], want)
    assert not np.allclose(steps(Celo2(hidden=3), theta, params, [huge])[0], want)


def test_starts_along_the_momentum_over_its_root_mean_square():
    """A tenth of a random MLP is added, which is here made zero."""
    rule = Celo2(hidden=4, orthogonalise=False)
    theta = rule.init(jax.random.key(0))
    theta["mlp"]["w2"] = theta["mlp"]["w2"].at[2:].set(0.0)
    params, *grads = (jnp.asarray(matrices(4, 3, seed=s)) for s in (0, 1, 2))
    g1, g2 = (np.asarray(g) for g in grads)
    adam = (0.09 * g1 + 0.1 * g2) / np.sqrt(0.95 * 0.05 * g1**2 + 0.05 * g2**2 + 1e-8)
    want = -1e-3 * adam / np.sqrt(np.mean(adam**2))
    np.testing.assert_allclose(steps(rule, theta, params, grads)[1], want, rtol=1e-5)


def test_named_configurations():
    members = discovery.members(learned_opt)
    assert discovery.build("rule", "celo2_base", members) == Celo2(orthogonalise=False)
    assert discovery.build("rule", "elo_celo2", members) == dataclasses.replace(
        Celo2.published(), bias_correction=True
    )
    for rule in (*CONFIGURATIONS.values(), Celo2.published()):
        leaves = jax.tree.leaves(jax.eval_shape(rule.init, jax.random.key(0)))
        assert sum(leaf.size for leaf in leaves) == 347


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 0}, "`hidden` must be at least 1, got 0"),
        ({"hidden": 1}, "`hidden` must be at least 2 for initial='momentum', got 1"),
        ({"initial": "zero"}, "`initial` must be 'momentum' or 'random', got 'zero'"),
        ({"vectors": "sgd"}, "`vectors` must be 'adam' or 'mlp', got 'sgd'"),
        ({"gradient_clip": 0.0}, "`gradient_clip` must be positive, got 0.0"),
        ({"rms_decay": 1.0}, r"decays must be numbers in \[0, 1\)"),
        ({"momentum_decays": (0.9,)}, "must be of equal length, got 1 and 3"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Celo2(**fields)
