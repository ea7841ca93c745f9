"""Multipliers of mu-parametrization: the published table, equivalences, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import learned_opt
from learned_opt import artifact
from learned_opt.mup import Multipliers, MuP, mup, mup_multipliers
from learned_opt.small_fc import SmallFC
from learned_opt.velo import Velo
from tasks.base import train_step
from tasks.data import synthetic
from tasks.mlp import MLP

# of a model of width 8 and the same at 4 times the width: base shape, shape; multipliers of updates
# and gradients relative to the base; the same in absolute numbers
TABLE = {
    "embed/embedding": ((11, 8), (11, 32), (1, 4), (1, 32)),
    "input/kernel": ((5, 8), (5, 32), (1, 4), (1, 32)),
    "input/bias": ((8,), (32,), (1, 4), (1, 32)),
    "position_embedding": ((7, 8), (7, 32), (1, 4), (1, 32)),
    "hidden_0/kernel": ((8, 8), (32, 32), (1 / 4, 4), (1 / 32, 32)),
    "blocks/0/attention/query/kernel": ((8, 2, 4), (32, 8, 4), (1 / 4, 4), (1 / 32, 32)),
    "blocks/0/attention/query/bias": ((2, 4), (8, 4), (1, 4), (1, 32)),
    # heads are flattened: its fan-in is heads times their size
    "blocks/0/attention/out/kernel": ((2, 4, 8), (8, 4, 32), (1 / 4, 4), (1 / 32, 32)),
    "blocks/0/norm/scale": ((8,), (32,), (1, 4), (1, 32)),
    "blocks/0/up/kernel": ((8, 32), (32, 128), (1 / 4, 4), (1 / 32, 128)),
    "blocks/0/conv/kernel": ((3, 3, 8, 8), (3, 3, 32, 32), (1 / 4, 4), (1 / 288, 32)),
    "readout/kernel": ((8, 10), (32, 10), (1, 4), (1, 32)),
    "readout/bias": ((10,), (10,), (1, 1), (1, 1)),
}


def nested(column, make=lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)):
    return {name: make(row[column]) for name, row in TABLE.items()}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    relative = mup_multipliers(nested(1), nested(0))
    assert (relative.step[name], relative.gradient[name]) == pytest.approx(TABLE[name][2])
    by_name = mup_multipliers(nested(1))
    assert (by_name.step[name], by_name.gradient[name]) == pytest.approx(TABLE[name][3])
    absolute = mup_multipliers(nested(1), nested(0), base_width=1)
    assert (absolute.step[name], absolute.gradient[name]) == pytest.approx(TABLE[name][3])
    halved = mup_multipliers(nested(1), base_width=2)
    grows = TABLE[name][0] != TABLE[name][1]
    assert halved.gradient[name] == pytest.approx(TABLE[name][3][1] / (2 if grows else 1))


def test_heads_may_grow_in_size_or_in_number():
    class Model(nnx.Module):
        def __init__(self, width, heads, rngs):
            self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)

    def shapes(width, heads):
        model = nnx.eval_shape(lambda: Model(width, heads, nnx.Rngs(0)))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    for wide in (shapes(32, 2), shapes(32, 8)):
        steps = mup_multipliers(wide, shapes(8, 2)).step["attention"]
        assert {name: step["kernel"] for name, step in steps.items()} == dict.fromkeys(
            ("query", "key", "value", "out"), 1 / 4
        )
        assert all(step["bias"] == 1 for step in steps.values())
    with pytest.raises(ValueError, match=r"attention/key/kernel \[32, 4, 8\] grows in 3 axes"):
        mup_multipliers(shapes(32, 4), shapes(8, 2))


def steps_of(optimizer, grads, params):
    state, found = optimizer.init(params), []
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        found.append(updates)
    return found


def random(seed, column=1):
    rng = np.random.default_rng(seed)
    return nested(column, lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32))


@pytest.mark.parametrize("name", TABLE)
def test_sgd_takes_the_published_learning_rates(name):
    """Of table 8 of arXiv 2203.03466: of vectors and inputs times fan-out, of readouts times
    fan-in, of hidden matrices times fan-out over fan-in. Relative to the base all in ratios.
    """
    params, grads = random(0), [random(1), random(2)]
    multipliers = mup_multipliers(params, random(0, 0))
    got = steps_of(mup(optax.sgd(0.1, momentum=0.9), multipliers), grads, params)
    want = steps_of(optax.sgd(0.1, momentum=0.9), grads, params)
    hidden = any(part in name for part in ("hidden", "query/kernel", "/out/kernel", "up", "conv"))
    factor = 1.0 if hidden or name == "readout/bias" else 4.0
    for updates, plain in zip(got, want, strict=True):
        np.testing.assert_allclose(updates[name], factor * plain[name], rtol=1e-6)


def test_adam_takes_the_published_learning_rates_whatever_its_epsilon():
    """Gradients that are 4 times smaller, as those of a network 4 times as wide, give the steps
    that Adam makes at the base width, of which hidden matrices take a quarter.
    """
    params, grads = random(0), [random(1), random(2)]
    multipliers = mup_multipliers(params, random(0, 0))
    small = [
        jax.tree.map(lambda g, scale: 1e-6 * g / scale, g, multipliers.gradient) for g in grads
    ]
    base = [jax.tree.map(lambda g: 1e-6 * g, g) for g in grads]
    adam = optax.adam(1e-3, eps=1e-6)
    got, want = (steps_of(o, g, params) for o, g in ((mup(adam, multipliers), small), (adam, base)))
    for updates, plain in zip(got, want, strict=True):
        want_here = jax.tree.map(lambda u, step: step * u, plain, multipliers.step)
        for name in TABLE:
            np.testing.assert_allclose(updates[name], want_here[name], rtol=1e-5)


def test_at_the_base_width_nothing_changes():
    params, grads = random(0, 0), [random(1, 0), random(2, 0)]
    rule = SmallFC(hidden=4)
    theta = rule.init(jax.random.key(0))
    at_base = MuP(rule, mup_multipliers(params, params)).optimizer(theta)
    got, want = (steps_of(o, grads, params) for o in (at_base, rule.optimizer(theta)))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_it_trains_a_model_of_nnx_by_its_optimizer():
    class Model(nnx.Module):
        def __init__(self, width, rngs):
            self.hidden = nnx.Linear(width, width, rngs=rngs)

        def __call__(self, x):
            return self.hidden(x)

    model, narrow = (Model(width, nnx.Rngs(0)) for width in (8, 4))
    before = np.array(model.hidden.kernel[...])
    multipliers = mup_multipliers(nnx.state(model, nnx.Param), nnx.state(narrow, nnx.Param))
    optimizer = nnx.Optimizer(model, mup(optax.sign_sgd(1.0), multipliers), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 8)))))(model))
    np.testing.assert_allclose(model.hidden.kernel[...], before - 0.5, rtol=1e-6)


def test_it_trains_the_leaves_that_a_mask_leaves_it():
    params, grads = random(0), random(1)
    multipliers = mup_multipliers(params, random(0, 0))
    mask = {name: name.startswith("hidden") for name in params}
    (updates,) = steps_of(optax.masked(mup(optax.sgd(1.0), multipliers), mask), [grads], params)
    kernel, bias = "hidden_0/kernel", "input/bias"
    np.testing.assert_allclose(updates[kernel], -grads[kernel], rtol=1e-6)
    np.testing.assert_array_equal(updates[bias], grads[bias])


def test_bfloat16_and_extra_arguments_pass_through():
    params = {"hidden/kernel": jnp.ones((4, 4), jnp.bfloat16)}
    rule = MuP(Velo(lstm=4, bank=2, relative_steps=False))
    optimizer = rule.optimizer(rule.init(jax.random.key(0)), 10)
    updates, _ = optimizer.update(params, optimizer.init(params), params, value=1.0)
    assert updates["hidden/kernel"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="`value` is required"):
        optimizer.update(params, optimizer.init(params), params)


def test_by_name_it_takes_the_leaves_that_a_partition_leaves_it():
    params = {"hidden/kernel": jnp.ones((4, 4)), "router": jnp.ones((4, 2)), "bias": jnp.ones(4)}
    rule = MuP(SmallFC(hidden=2), overrides=(("router", "hidden"),))
    learned = rule.optimizer(rule.init(jax.random.key(0)))
    for mine in (("hidden/kernel", "bias"), ()):
        labels = {name: "learned" if name in mine else "sgd" for name in params}
        optimizer = optax.partition({"learned": learned, "sgd": optax.sgd(1.0)}, labels)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        np.testing.assert_array_equal(updates["router"], -params["router"])
        assert ("bias" in mine) == (float(updates["bias"][0]) != -1.0)


@pytest.mark.slow
def test_gradients_stay_as_they_are_where_that_is_asked(tmp_path):
    """Also of an artifact that is given multipliers: its rule was meta-trained on such."""
    params, grads = random(0), jax.tree.map(lambda g: 1e-3 * g, random(1))
    multipliers = mup_multipliers(params, random(0, 0))
    rule = MuP(SmallFC(hidden=2), scale_gradients=False)
    theta = rule.init(jax.random.key(0))
    artifact.save(tmp_path / "a.safetensors", rule, theta, {})
    bare = MuP(rule.rule, multipliers.step).optimizer(theta)
    loaded = learned_opt.load(tmp_path / "a.safetensors", multipliers=multipliers)
    scaled = MuP(rule.rule, multipliers).optimizer(theta)
    want, got, other = (steps_of(o, [grads], params)[0] for o in (bare, loaded, scaled))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.any(np.abs(other["input/bias"] / want["input/bias"] - 1) > 1e-3)


def test_traced_multipliers_leave_nothing_behind():
    params, rule = {"w": jnp.ones((3, 3))}, SmallFC(hidden=2)
    theta = rule.init(jax.random.key(0))

    @jax.jit
    def update(scale):
        optimizer = MuP(rule, Multipliers({"w": scale})).optimizer(theta)
        return optimizer.update(params, optimizer.init(params), params)[0]["w"]

    twice = update(2.0), jax.jit(update)(np.float32(4.0))
    np.testing.assert_allclose(2.0 * twice[0], twice[1], rtol=1e-6)


def test_exported_it_finds_multipliers_by_name_or_is_given_them(tmp_path):
    family = MLP(synthetic(), width=16, depth=2, batch_size=8, base_width=8)
    task = family(jax.random.key(0))
    params, batch = task.init(jax.random.key(1)), task.batch(jax.random.key(2), "train")
    rule = MuP(SmallFC(hidden=4), base_width=8)
    theta = rule.init(jax.random.key(0))
    artifact.save(tmp_path / "a.safetensors", rule, theta, {})
    artifact.save(tmp_path / "plain.safetensors", rule.rule, theta, {})
    base_params = MLP(synthetic(), 8, 2, 8)(jax.random.key(0)).init(jax.random.key(1))
    multipliers = mup_multipliers(params, base_params)
    assert multipliers.step["hidden"][0]["kernel"] == 1 / 2
    found = [
        train_step(task, optimizer, params, optimizer.init(params), batch)[0]
        for optimizer in (
            learned_opt.load(tmp_path / "a.safetensors"),
            learned_opt.load(tmp_path / "a.safetensors", multipliers=multipliers),
            learned_opt.load(tmp_path / "plain.safetensors", multipliers=multipliers),
        )
    ]
    jax.tree.map(np.testing.assert_array_equal, found[0], found[1])
    jax.tree.map(np.testing.assert_array_equal, found[1], found[2])
    with pytest.raises(ValueError, match="could not be built again"):
        artifact.save(tmp_path / "b.safetensors", MuP(rule.rule, multipliers), theta, {})


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    ("params", "base", "overrides", "message"),
    [
        (
            {"router": {"kernel": shape(16, 4)}}, {"router": {"kernel": shape(8, 4)}}, (),
            "router/kernel .16, 4. has an ambiguous role: only its inputs grow.*'readout' if",
        ),
        (
            {"w": shape(16, 9)}, {"w": shape(8, 3)}, (),
            "w .16, 9. has an ambiguous role: its axes grow 2 and 3 times",
        ),
        ({"w": shape(4, 4)}, None, (), "w .4, 4. has an ambiguous role: its name says nothing"),
        ({"layers": {"w": shape(4, 2, 8)}}, None, (), "which of its axes are of inputs"),
        ({"w": shape(4, 4, 4)}, {"w": shape(2, 2, 2)}, (), "w .4, 4, 4. grows in 3 axes"),
        ({"w": shape(4, 4)}, {"v": shape(2, 2)}, (), "same model.*only one of them has v, w"),
        ({"w": shape(4, 4)}, {"w": shape(2)}, (), "`base_params` w is .2., `params` .4, 4."),
        ({"w": shape(4, 4)}, {"w": shape(2, 2)}, {"x": "hidden"}, "'x' matches none of the"),
        ({"w": shape(4, 4)}, {"w": shape(2, 2)}, {"w": "hiden"}, "one of vector, input, hidden"),
        ({"w": shape(4, 4)}, {"w": shape(2, 2)}, {"w": -1.0}, "must be a positive number, a pair"),
        ({"w": shape(4, 4)}, {"w": shape(2, 2)}, {"w": None}, "must be a positive number, a pair"),
        ({"w": shape(4, 4)}, {"w": shape(2, 2)}, {"(": 1.0}, "is no regular expression"),
        ({"blocks": {"input": shape(4, 4)}}, None, (), "its name says input and hidden"),
        ({"layers": {"query": shape(12, 4, 2, 2)}}, None, (), "which count layers"),
        (
            {"w": shape(4, 4, 4)}, {"w": shape(2, 2, 2)}, {"w": "hidden"},
            "w .4, 4, 4. grows in 3 axes.*overrides={'.w.': .0.25, 4.0.}",
        ),
        ({"a/b": shape(2), "a": {"b": shape(2)}}, None, (), "leaves of equal path: a/b, a/b"),
    ],
)  # fmt: skip
def test_what_is_refused(params, base, overrides, message):
    with pytest.raises(ValueError, match=message):
        mup_multipliers(params, base, overrides=overrides)


def test_overrides_say_what_shapes_do_not():
    wide, narrow = {"router": {"kernel": shape(16, 4)}}, {"router": {"kernel": shape(8, 4)}}
    cases = {"readout": (1, 2), "hidden": (0.5, 1), 0.25: (0.25, 1), (0.5, 4.0): (0.5, 4.0)}
    for override, want in cases.items():
        step, gradient = mup_multipliers(wide, narrow, overrides={"router": override})
        assert (step["router"]["kernel"], gradient["router"]["kernel"]) == want


def test_a_rule_is_refused_that_mu_parametrization_would_not_help():
    with pytest.raises(ValueError, match="relative_steps=False"):
        MuP(Velo())
    for wrong in (SmallFC, MuP(SmallFC())):
        with pytest.raises(TypeError, match="`rule` must be a plain learned optimizer"):
            MuP(wrong)  # pyright: ignore
    with pytest.raises(ValueError, match="`base_width` must be positive"):
        MuP(SmallFC(), base_width=0)
    params = {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match="every leaf of the params, got none for a"):
        mup(optax.sgd(1.0), Multipliers({"b": 1.0})).init(params)
    with pytest.raises(ValueError, match="every leaf of the params, got an array for a"):
        mup(optax.sgd(1.0), params).init(params)
    with pytest.raises(ValueError, match="`base_params` must be of another width"):
        mup_multipliers({"w": shape(4, 4)}, {"w": shape(4, 4)}, base_width=1)
