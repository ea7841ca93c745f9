"""The contract of every update rule: an ordinary optax transformation, exported and meta-trained.

A new file in learned_opt with `EXAMPLES` is tested without being named here.
"""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

import learned_opt
from learned_opt import artifact, base, discovery
from learned_opt.bounded import BoundedLSTM
from learned_opt.celo import Celo
from learned_opt.hyperparams import Hyperparams
from learned_opt.l2o_dm import L2ODM
from learned_opt.rnnprop import RNNprop
from learned_opt.safeguard import Safeguarded
from learned_opt.small_fc import SmallFC
from learned_opt.structured import StructuredLSTM

RULES = discovery.examples(learned_opt)
HORIZON = 10
SHAPES = {
    "scalar": (),
    "vector": (3,),
    "matrix": (4, 3),
    "conv": (3, 3, 2, 4),
    "five": (2, 1, 3, 1, 2),
}
SOME = ("scalar", "matrix")


def soft_threshold(v, step):
    return jax.tree.map(lambda v, s: jnp.sign(v) * jnp.maximum(jnp.abs(v) - 0.01 * s, 0), v, step)


def update_of(optimizer):
    """Its `update`, told what structured rules need to know of a problem; all others ignore it."""
    update = optax.with_extra_args_support(optimizer).update
    return functools.partial(update, prox=soft_threshold, lipschitz=4.0)


def quick_for(*classes):
    """Every rule, those of other classes in the slow suite."""
    params = [
        pytest.param(
            rule,
            marks=() if isinstance(rule, classes) else pytest.mark.slow,
            id=discovery.name_of(type(rule)),
        )
        for rule in RULES
    ]
    return pytest.mark.parametrize("rule", params)


for_each_rule = pytest.mark.parametrize(
    "rule", RULES, ids=[discovery.name_of(type(rule)) for rule in RULES]
)


COORDINATE_LSTMS = (StructuredLSTM, BoundedLSTM, Safeguarded, L2ODM, RNNprop)


def tree(seed, shapes=SHAPES, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(scale * rng.normal(size=s), dtype) for k, s in shapes.items()}


def only(tree, names):
    return {name: tree[name] for name in names}


PARAMS, GRADS = tree(0), [tree(1), tree(2, scale=0.1)]
FEW, FEW_GRADS = only(PARAMS, SOME), [only(grads, SOME) for grads in GRADS]


@functools.cache
def theta_of(rule):
    """A theta somewhere: nothing that starts at zero stays there."""
    leaves, treedef = jax.tree.flatten(rule.init(jax.random.key(0)))
    rng = np.random.default_rng(3)
    noise = [0.05 * jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(treedef, jax.tree.map(jnp.add, leaves, noise))


@functools.cache
def optimizer_of(rule):
    return rule.optimizer(theta_of(rule), HORIZON)


def run(optimizer, params, grads, state=None, first=0):
    """Updates of jitted steps that leave the params, given the loss and an unknown keyword."""
    state = optimizer.init(params) if state is None else state
    update = jax.jit(update_of(optimizer))
    updates = []
    for i, grad in enumerate(grads, first):
        loss = jnp.float32(2.0 - i)
        found, state = update(grad, state, params, value=loss, unheard_of=jnp.ones(2))
        updates.append(found)
    return updates, state


@functools.cache
def plain(rule, names=tuple(SHAPES)):
    """What the bare rule does, for the wrappers to be compared with."""
    return run(optimizer_of(rule), only(PARAMS, names), [only(g, names) for g in GRADS])[0]


def assert_close(got, want, tolerance=1e-5):
    """Equal structures; per leaf, errors up to `tolerance` of its largest element."""

    def leaf(path, got, want):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        bound = tolerance * np.max(np.abs(want), initial=0.0)
        assert np.max(np.abs(got - want), initial=0.0) <= bound, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(leaf, got, want)


def scaled(factor, updates):
    return jax.tree.map(lambda u: factor * u, updates)


def all_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


@for_each_rule
def test_updates_are_like_params(rule):
    assert isinstance(rule, base.LearnedOptimizer)
    for updates in plain(rule):
        assert all_finite(updates)
        for name, shape in SHAPES.items():
            assert (updates[name].shape, updates[name].dtype) == (shape, jnp.float32)
            assert np.any(updates[name]), f"{name} does not move"


@for_each_rule
def test_chain(rule):
    """Clipping before and scaling after are what they are outside of a chain."""
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in FEW_GRADS[0].values()))
    assert norm > 1.5
    clipped = [scaled(1.5 / norm, FEW_GRADS[0]), FEW_GRADS[1]]
    want = run(optimizer_of(rule), FEW, clipped)[0]
    chain = optax.chain(optax.clip_by_global_norm(1.5), optimizer_of(rule), optax.scale(0.5))
    assert_close(run(chain, FEW, FEW_GRADS)[0], [scaled(0.5, updates) for updates in want])


@for_each_rule
def test_masked(rule):
    masked = optax.masked(optimizer_of(rule), {name: name in SOME for name in SHAPES})
    updates, _ = run(masked, PARAMS, GRADS)
    others = SHAPES.keys() - set(SOME)
    assert_close([only(u, SOME) for u in updates], plain(rule, SOME))
    assert_close([only(u, others) for u in updates], [only(g, others) for g in GRADS], 0.0)


@for_each_rule
def test_multi_transform(rule):
    labels = {name: "learned" if name in SOME else "sgd" for name in SHAPES}
    both = optax.multi_transform({"learned": optimizer_of(rule), "sgd": optax.sgd(0.5)}, labels)
    updates, _ = run(both, PARAMS, GRADS)
    others = SHAPES.keys() - set(SOME)
    assert_close([only(u, SOME) for u in updates], plain(rule, SOME))
    assert_close([only(u, others) for u in updates], [scaled(-0.5, only(g, others)) for g in GRADS])


@for_each_rule
def test_inject_hyperparams(rule):
    """A hyperparameter in the state may be changed between two steps."""

    def build(multiplier):
        return optax.chain(optimizer_of(rule), optax.scale(multiplier))

    injected = optax.inject_hyperparams(build)(multiplier=1.0)
    first, state = run(injected, FEW, FEW_GRADS[:1])
    state.hyperparams["multiplier"] = jnp.asarray(0.25)
    second, _ = run(injected, FEW, FEW_GRADS[1:], state, first=1)
    assert_close(first[0], plain(rule, SOME)[0])
    assert_close(second[0], scaled(0.25, plain(rule, SOME)[1]))


@for_each_rule
def test_flatten(rule):
    ravel = lambda tree: ravel_pytree(tree)[0]  # noqa: E731
    want, _ = run(optimizer_of(rule), ravel(PARAMS), [ravel(g) for g in GRADS])
    updates, _ = run(optax.flatten(optimizer_of(rule)), PARAMS, GRADS)
    assert jax.tree.map(jnp.shape, updates[0]) == SHAPES
    assert_close([ravel(u) for u in updates], want)


@for_each_rule
def test_apply_if_finite(rule):
    """A rejected step moves nothing and leaves no trace in the rule's state."""
    broken = FEW_GRADS[0] | {"scalar": jnp.asarray(jnp.nan)}
    safe = optax.apply_if_finite(optimizer_of(rule), max_consecutive_errors=3)
    updates, state = run(safe, FEW, [FEW_GRADS[0], broken, FEW_GRADS[1]])
    assert int(state.total_notfinite) == 1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates[1]))
    first, _ = run(optimizer_of(rule), FEW, FEW_GRADS[:1])
    assert_close(updates[0], first[0])
    # the loss is another in the third step than in plain's second
    update = jax.jit(update_of(optimizer_of(rule)))
    _, after_first = run(optimizer_of(rule), FEW, FEW_GRADS[:1])
    want, _ = update(FEW_GRADS[1], after_first, FEW, value=jnp.float32(0.0))
    assert_close(updates[2], want)


@for_each_rule
def test_bfloat16(rule):
    """Updates have the params' precision; accumulators do not, or a decay of 0.999 would be 1.

    Constant gradients over more steps than bfloat16 can count, then the update of a float32 run on
    the same numbers.
    """
    steps = 400
    optimizer = rule.optimizer(theta_of(rule), steps)
    half = jnp.bfloat16
    params, grads = tree(0, dtype=half), tree(1, dtype=half)
    shapes = {"vector": (3,), "matrix": (4, 3)}
    params, grads = only(params, shapes), only(grads, shapes)

    def last(params, grads):
        def step(state, i):
            scale = jnp.where(i < steps // 2, 1.0, 0.125)
            grad = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)
            updates, state = update_of(optimizer)(grad, state, params, value=jnp.float32(1.0))
            return state, updates

        _, updates = jax.lax.scan(step, optimizer.init(params), jnp.arange(steps))
        return {k: u[-1] for k, u in updates.items()}

    last = jax.jit(last)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
    updates = last(params, grads)
    assert {u.dtype for u in updates.values()} == {jnp.dtype(half)}
    # one rounding to eight bits
    assert_close(updates, last(*single), 2.0**-8)
    # gradients of another precision than the params
    mixed = last(params, single[1])
    assert {u.dtype for u in mixed.values()} == {jnp.dtype(half)}


@for_each_rule
def test_eval_shape_creates_no_array(rule):
    """400 TB of params, so an array would not go unnoticed."""
    init = optimizer_of(rule).init
    jax.eval_shape(init, {"w": jax.ShapeDtypeStruct((10**7, 10**7), jnp.float32)})
    shapes = jax.eval_shape(init, PARAMS)
    state = init(PARAMS)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    describe = lambda x: (x.shape, x.dtype, x.weak_type)  # noqa: E731
    assert jax.tree.map(describe, shapes) == jax.tree.map(describe, state)
    updates, after = update_of(optimizer_of(rule))(GRADS[0], state, PARAMS, value=jnp.float32(1.0))
    assert jax.tree.map(describe, after) == jax.tree.map(describe, state), "state changes its type"
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@for_each_rule
def test_rule_is_a_value(rule):
    copy = pickle.loads(pickle.dumps(rule))
    assert copy == rule
    assert hash(copy) == hash(rule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(rule, dataclasses.fields(rule)[0].name, None)
    spec = discovery.spec_of(rule)
    assert discovery.build("rule", spec, discovery.members(learned_opt)) == rule


@for_each_rule
def test_second_step_compiles_nothing(rule):
    traces = []

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(grads, state, params, loss):
        traces.append(1)
        updates, state = update_of(optimizer_of(rule))(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params = only(tree(0), SOME)
    state = optimizer_of(rule).init(params)
    first = params["matrix"]
    for i in range(3):
        params, state = step(only(GRADS[0], SOME), state, params, jnp.float32(i))
    assert first.is_deleted(), "the params were not donated"
    assert len(traces) == 1


@for_each_rule
def test_artifact_round_trip(rule, tmp_path):
    theta, card = theta_of(rule), {"recipe": "none", "seed": 3, "cost": {"hours": 0.1}, "x": None}
    path = tmp_path / "exported.safetensors"
    artifact.save(path, rule, theta, card)
    found_rule, found_theta, found_card = artifact.read(path)
    assert found_rule == rule
    assert type(found_rule) is type(rule)
    assert found_card == card
    assert jax.tree.structure(found_theta) == jax.tree.structure(theta)
    for got, want in zip(jax.tree.leaves(found_theta), jax.tree.leaves(theta), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()
    loaded = learned_opt.load(path, horizon=HORIZON)
    assert_close(run(loaded, FEW, FEW_GRADS)[0], plain(rule, SOME), 1e-6)


def unroll(rule, theta):
    """Three steps on a loss that ignores one param: the last loss, a weighted sum of updates."""
    shapes = {"vector": (3,), "matrix": (4, 3), "dead": ()}
    data, weights, params = tree(4, shapes), tree(6, shapes) | {"dead": 0.0}, tree(5, shapes)

    def loss(params):
        hidden = jnp.tanh(params["matrix"] * data["matrix"] + 0.3)
        return jnp.mean(jnp.square(hidden @ params["vector"] - data["matrix"][:, 0]))

    optimizer = rule.optimizer(theta, HORIZON)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = update_of(optimizer)(grads, state, params, value=value)
        moved = sum(jnp.sum(w * updates[name]) for name, w in weights.items())
        return (optax.apply_updates(params, updates), state), moved

    (params, _), moved = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
    return jnp.stack([loss(params), jnp.sum(moved)])


# compiling a gradient through a rule takes long
@quick_for(Hyperparams)
def test_meta_gradient(rule):
    """Against central differences along the gradient and along random directions.

    The sum of updates is compared rather than the loss, whose constant part would drown the
    differences of float32. With steps of 1e-3 their rounding is 1e-7 / 1e-3 of the updates, their
    curvature (10 * 1e-3)^2 / 6 for learned decays.
    """
    flat, unravel = ravel_pytree(theta_of(rule))
    outcome = jax.jit(lambda flat: unroll(rule, unravel(flat)))
    pull = jax.jit(lambda flat, cotangent: jax.vjp(outcome, flat)[1](cotangent)[0])
    of_loss, of_movement = (np.asarray(pull(flat, row), np.float64) for row in jnp.eye(2))
    assert np.all(np.isfinite(of_loss))
    assert np.any(of_loss)

    norm, rng = np.linalg.norm(of_movement), np.random.default_rng(7)
    random = rng.normal(size=(4, flat.size)) / np.sqrt(flat.size)
    for direction in [of_movement / norm, *random]:
        step = jnp.asarray(1e-3 * direction, flat.dtype)
        slope = float(outcome(flat + step)[1] - outcome(flat - step)[1]) / 2e-3
        assert abs(slope - of_movement @ direction) <= 5e-3 * norm


@for_each_rule
def test_horizon_may_be_traced(rule):
    @jax.jit
    def update(horizon, theta):
        optimizer = rule.optimizer(theta, horizon)
        state = optimizer.init(FEW)
        for grads in FEW_GRADS:
            updates, state = update_of(optimizer)(grads, state, FEW, value=jnp.float32(1.0))
        return updates

    got = update(jnp.asarray(7), theta_of(rule))
    optimizer = rule.optimizer(theta_of(rule), 7)
    state = optimizer.init(FEW)
    step = jax.jit(update_of(optimizer))
    for grads in FEW_GRADS:
        want, state = step(grads, state, FEW, value=jnp.float32(1.0))
    assert_close(got, want)


@for_each_rule
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4, 1e15])
def test_extreme_gradients_give_finite_updates(rule, scale):
    updates, state = run(optimizer_of(rule), PARAMS, [scaled(scale, g) for g in GRADS])
    assert all_finite(updates)
    assert all_finite([x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)])


@for_each_rule
def test_nan_gradients_do_not_raise(rule):
    updates, _ = run(optimizer_of(rule), PARAMS, [scaled(jnp.nan, g) for g in GRADS])
    assert jax.tree.map(jnp.shape, updates[1]) == SHAPES


@for_each_rule
def test_params_need_not_be_jax_arrays(rule):
    params = {"scalar": float(PARAMS["scalar"]), "matrix": np.asarray(PARAMS["matrix"])}
    grads = {"scalar": float(GRADS[0]["scalar"]), "matrix": np.asarray(GRADS[0]["matrix"])}
    optimizer = optimizer_of(rule)
    updates, _ = update_of(optimizer)(grads, optimizer.init(params), params, value=2.0)
    assert_close(updates, plain(rule, SOME)[0])


@quick_for(Hyperparams, SmallFC, Celo)
def test_sharded_params_and_state(rule):
    """Every leaf with an axis that eight devices can share is split over them along it."""
    devices = jax.device_count()
    assert devices == 8, "tests/conftest.py asks for eight host devices"
    mesh = jax.make_mesh((devices,), ("d",))

    def spread(leaf):
        split = [i for i, n in enumerate(leaf.shape) if n and n % devices == 0][:1]
        spec = PartitionSpec(*("d" if [i] == split else None for i in range(leaf.ndim)))
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    shapes = {"scalar": (), "vector": (16,), "matrix": (3, 8), "conv": (3, 3, 8, 4)}
    params, grads = tree(0, shapes), [tree(1, shapes), tree(2, shapes)]
    optimizer = optimizer_of(rule)
    want, want_state = run(optimizer, params, grads)

    params, state = jax.tree.map(spread, (params, optimizer.init(params)))
    grads = [jax.tree.map(spread, g) for g in grads]
    assert params["matrix"].addressable_shards[0].data.shape == (3, 1)
    got, got_state = run(optimizer, params, grads, state)
    assert len(got[1]["matrix"].sharding.device_set) == devices
    assert_close(got, want)
    assert_close(got_state, want_state)


@for_each_rule
def test_nothing_of_size_features_times_params_is_stored(rule):
    """Temporaries of a step on a million parameters: four float32 per parameter at the most."""
    if isinstance(rule, COORDINATE_LSTMS):
        pytest.skip("its LSTM's state alone is of this size: for problems of thousands")
    optimizer, params = optimizer_of(rule), {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    update = jax.jit(update_of(optimizer), donate_argnums=1)
    state = jax.eval_shape(optimizer.init, params)
    value = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = update.lower(params, state, params, value=value).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 16 * 1024**2 + 4096  # scalars apart


@for_each_rule
def test_integer_params_are_refused_by_name(rule):
    params = {"layer": {"w": jnp.ones(3), "steps": jnp.ones((2,), jnp.int32)}}
    with pytest.raises(TypeError, match=r"`params`.*int32 at \['layer'\]\['steps'\].*optax.masked"):
        optimizer_of(rule).init(params)


@for_each_rule
def test_update_without_params_is_refused(rule):
    optimizer = optimizer_of(rule)
    with pytest.raises(ValueError, match=f"`params` must be passed to {type(rule).__name__}"):
        optimizer.update(GRADS[0], optimizer.init(PARAMS), value=jnp.float32(1.0))


@for_each_rule
def test_theta_of_another_rule_is_refused(rule):
    with pytest.raises(
        ValueError,
        match=f"`theta` does not fit the rule.*{discovery.name_of(type(rule))}.*unknown",
    ):
        rule.optimizer(theta_of(rule) | {"nobody": jnp.zeros(2)}, HORIZON)
    longer = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), theta_of(rule))
    with pytest.raises(
        ValueError, match=r"`theta` does not fit the rule.*is float32\[.*not float32\["
    ):
        rule.optimizer(longer, HORIZON)


@for_each_rule
def test_a_missing_horizon_or_loss_is_named(rule):
    """Either the rule does without, or one line says what it needs."""
    name, complaints = type(rule).__name__, []
    params, grads = only(PARAMS, ["vector"]), only(GRADS[0], ["vector"])
    optimizer = optimizer_of(rule)
    for attempt in (
        lambda: rule.optimizer(theta_of(rule)),
        lambda: optimizer.update(grads, optimizer.init(params), params),
    ):
        try:
            attempt()
        except ValueError as error:
            complaints.append(str(error))
    known = tuple(f"`{what}` is required by {name}: pass" for what in ("horizon", "value", "prox"))
    assert all(complaint.startswith(known) for complaint in complaints)


@pytest.mark.parametrize(
    ("horizon", "error", "message"),
    [
        (None, ValueError, "`horizon` is required by Hyperparams"),
        (0, ValueError, "`horizon` of Hyperparams must be at least 1, got 0"),
        (np.int64(-3), ValueError, "must be at least 1, got -3"),
        (jnp.asarray(0), ValueError, "must be at least 1, got 0"),
        ("100", TypeError, "`horizon` of Hyperparams must be an integer or a scalar array"),
        (100.5, TypeError, "must be an integer or a scalar array, got 100.5"),
        (True, TypeError, "must be an integer or a scalar array, got True"),
        (jnp.ones(3), TypeError, "must be an integer or a scalar array"),
    ],
)
def test_wrong_horizons_are_refused(horizon, error, message):
    rule = Hyperparams(knots=3)
    with pytest.raises(error, match=message):
        rule.optimizer(rule.init(jax.random.key(0)), horizon)
