"""Composition against closed forms: routing with SGD on the rest, decoupled weight decay,
schedules, a learning rate changed between steps.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from learned_opt import compose
from learned_opt.small_fc import SmallFC

PARAMS = {
    "embed": {"table": jnp.full((4, 3), 2.0)},
    "layer": {"w": jnp.arange(6.0).reshape(3, 2), "bias": jnp.asarray([1.0, -1.0])},
    "scale": jnp.asarray(0.5),
}
GRADS = jax.tree.map(lambda p: 0.1 * p + 0.3, PARAMS)


@functools.cache
def learned():
    rule = SmallFC()
    return rule.optimizer(rule.init(jax.random.key(0)))


class Recorded(NamedTuple):
    value: jax.Array


def recording():
    """Steps by minus the loss, and keeps it."""

    def update(updates, state, params=None, *, value, **extra_args):
        del state, params, extra_args
        return jax.tree.map(lambda g: -value * jnp.ones_like(g), updates), Recorded(value)

    return optax.GradientTransformationExtraArgs(lambda params: Recorded(jnp.zeros(())), update)


def first_update(optimizer, params: Any = PARAMS, grads: Any = GRADS, **extra_args):
    return jax.jit(optimizer.update)(grads, optimizer.init(params), params, **extra_args)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def assert_close(got, want, rtol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), got, want)


ROUTES = {
    "by rank": (None, {"layer/bias", "scale"}),
    "by a pattern": (r"embed|bias", {"embed/table", "layer/bias"}),
    "by several": ([r"^embed/", r"scale$"], {"embed/table", "scale"}),
    "by a function": (lambda path, leaf: path == "layer/w" or leaf.shape == (2,),
                      {"layer/w", "layer/bias"}),
    "by nothing": ((), set()),
}  # fmt: skip


@pytest.mark.parametrize(("by", "of_other"), ROUTES.values(), ids=list(ROUTES))
def test_split_gives_sgd_its_leaves_and_the_learned_rule_the_rest(by, of_other):
    """SmallFC treats every leaf for itself, so the rest moves as if it were alone."""
    assert {path for path, flag in paths(compose.mask(by)(PARAMS)).items() if flag} == of_other
    updates, _ = first_update(compose.split(learned(), optax.sgd(0.5), by))
    alone, _ = first_update(learned())
    grads, alone = paths(GRADS), paths(alone)
    for path, update in paths(updates).items():
        want = -0.5 * grads[path] if path in of_other else alone[path]
        np.testing.assert_allclose(update, want, rtol=1e-6)


def test_keywords_reach_both_sides():
    optimizer = compose.split(recording(), recording())
    updates, state = first_update(optimizer, value=jnp.float32(3.0), unheard_of=1)
    assert_close(updates, jax.tree.map(lambda p: jnp.full_like(p, -3.0), PARAMS))
    assert [float(x) for x in jax.tree.leaves(state)] == [3.0, 3.0]


def test_half_precision_eval_shape_and_no_second_trace():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    optimizer = compose.finish(
        compose.split(learned(), optax.adam(1.0), r"embed|bias"), 0.1, weight_decay=0.1, clip=1.0
    )
    state = optimizer.init(params)
    describe = lambda x: (x.shape, x.dtype, x.weak_type)  # noqa: E731
    assert jax.tree.map(describe, jax.eval_shape(optimizer.init, params)) == jax.tree.map(
        describe, state
    )
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = optimizer.update(params, state, params, value=jnp.float32(1.0))
        return updates, optax.apply_updates(params, updates), state

    for _ in range(3):
        updates, params, state = step(params, state)
    assert len(traces) == 1
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    # three digits of bfloat16 would make it 0.10009765625
    assert float(state.hyperparams["learning_rate"]) == np.float32(0.1)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(2, name="head")(nn.Embed(5, 3, name="embed")(tokens))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.embed(tokens))


TOKENS = jnp.asarray([0, 3, 3, 1])


def test_linen_params():
    params = Linen().init(jax.random.key(0), TOKENS)
    grads = jax.grad(lambda p: jnp.sum(Linen().apply(p, TOKENS) ** 2))(params)
    optimizer = compose.split(learned(), optax.sgd(0.5), [r"embed", r"bias"])
    updates, _ = first_update(optimizer, params, grads)
    for name, leaf in (("embed", "embedding"), ("head", "bias")):
        assert_close(updates["params"][name][leaf], -0.5 * grads["params"][name][leaf])
    alone, _ = first_update(learned(), params, grads)
    assert_close(updates["params"]["head"]["kernel"], alone["params"]["head"]["kernel"])


def test_nnx_optimizer():
    model, reference = Nnx(nnx.Rngs(0)), Nnx(nnx.Rngs(0))
    loss = lambda model: jnp.sum(model(TOKENS) ** 2)  # noqa: E731
    value, grads = nnx.value_and_grad(loss)(model)
    optimizer = compose.finish(
        compose.split(learned(), optax.sgd(0.5), r"embed"), 0.1, weight_decay=0.2, exempt=r"embed"
    )
    nnx.Optimizer(model, optimizer, wrt=nnx.Param).update(model, grads, value=value)
    np.testing.assert_allclose(
        model.embed.embedding[...],
        reference.embed.embedding[...] - 0.05 * grads["embed"]["embedding"][...],
        rtol=1e-6,
    )
    kernel, grad = reference.head.kernel[...], grads["head"]["kernel"][...]
    alone, _ = first_update(learned(), kernel, grad)
    want = kernel + 0.1 * (alone - 0.2 * kernel)
    np.testing.assert_allclose(model.head.kernel[...], want, rtol=1e-6)


def test_finish_decays_decoupled_from_the_direction():
    """lr * (-g - decay * p) where leaves decay, lr * -g where they are exempt."""
    for exempt, exempted in ((None, {"layer/bias", "scale"}), (r"embed", {"embed/table"}),
                             ((), set())):  # fmt: skip
        optimizer = compose.finish(optax.sgd(1.0), 0.1, weight_decay=0.3, exempt=exempt)
        updates, _ = first_update(optimizer)
        params, grads = paths(PARAMS), paths(GRADS)
        for path, update in paths(updates).items():
            decay = 0.0 if path in exempted else 0.3
            want = -0.1 * (grads[path] + decay * params[path])
            np.testing.assert_allclose(update, want, rtol=1e-6)


def test_finish_follows_schedules_step_by_step():
    rate, decay = optax.linear_schedule(1.0, 0.0, 4), optax.linear_schedule(0.0, 0.4, 4)
    optimizer = compose.finish(optax.sgd(1.0), rate, weight_decay=decay)
    params, grad = jnp.full((2, 2), 2.0), jnp.full((2, 2), 3.0)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t in range(5):
        updates, state = update(grad, state, params)
        want = -(1.0 - t / 4) * (3.0 + 0.1 * t * 2.0)
        np.testing.assert_allclose(updates, np.full((2, 2), want), atol=1e-6)
        np.testing.assert_allclose(state.hyperparams["learning_rate"], 1.0 - t / 4, atol=1e-7)


def test_finish_clips_the_global_norm_before_the_optimizer():
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(GRADS)))
    updates, _ = first_update(compose.finish(optax.sgd(1.0), 1.0, clip=0.5))
    assert_close(updates, jax.tree.map(lambda g: -g * 0.5 / norm, GRADS), 1e-5)
    updates, _ = first_update(compose.finish(optax.sgd(1.0), 1.0, clip=2.0 * norm))
    assert_close(updates, jax.tree.map(lambda g: -g, GRADS))


def test_the_learning_rate_is_changed_between_steps():
    """Without a second compilation."""
    optimizer = compose.finish(optax.sgd(1.0), 0.5, weight_decay=0.1)
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    first, state = update(GRADS, state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.125)
    second, state = update(GRADS, state, PARAMS)
    assert_close(second, jax.tree.map(lambda u: 0.25 * u, first))
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    ("by", "error", "message"),
    [
        (r"embeding", ValueError, "`by` 'embeding' matches none of the paths embed/table, layer/b"),
        ([r"bias", r"^w$"], ValueError, r"`by` '\^w\$' matches none of the paths"),
        (r"", ValueError, "`by` '' gives every leaf to `other` and none to `learned`"),
        (lambda path, leaf: True, ValueError, "gives every leaf to `other`"),
    ],
)
def test_routes_that_lead_nowhere_are_refused(by, error, message):
    with pytest.raises(error, match=message):
        compose.split(learned(), optax.sgd(1.0), by).init(PARAMS)


def test_vectors_alone_leave_nothing_to_the_learned_rule():
    with pytest.raises(ValueError, match=r"`by` \(leaves of rank 0 and 1\) gives every leaf"):
        compose.split(learned(), optax.sgd(1.0)).init({"flat": jnp.ones(7)})


def test_long_lists_of_paths_are_cut():
    params = {f"w{i:02d}": jnp.ones((2, 2)) for i in range(25)}
    with pytest.raises(ValueError, match=r"w18, w19 and 5 more$"):
        compose.mask(r"bias")(params)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: compose.mask(r"("), ValueError, r"`by` '\(' is no regular expression"),
        (lambda: compose.mask(3), TypeError, "`by` must be a regular expression.*got 3"),
        (lambda: compose.mask([r"a", 3]), TypeError, "`by` must be a regular expression"),
        (lambda: compose.finish(optax.sgd(1.0), 1.0, clip=0.0), ValueError, "`clip` must be posit"),
        (lambda: compose.finish(optax.sgd(1.0), 1.0, 0.1, exempt=r"no").init(PARAMS),
         ValueError, "`by` 'no' matches none of the paths"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_nnx_with_accumulated_gradients():
    """optax.MultiSteps under nnx.Optimizer, which takes every tuple in a state for a tree of its
    own kind.
    """
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    rule = SmallFC()
    inner = optax.MultiSteps(rule.optimizer(rule.init(jax.random.key(0))), 2)
    optimizer = nnx.Optimizer(model, inner.gradient_transformation(), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(jnp.ones((2, 4))) ** 2))(model)
    moved = []
    for _ in range(2):
        optimizer.update(model, grads, value=loss)
        moved.append(float(jnp.max(jnp.abs(model.kernel[...] - before.kernel[...]))))
    assert moved[0] == 0.0
    assert moved[1] > 0.0
