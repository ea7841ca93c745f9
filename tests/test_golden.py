"""Trajectories of published optimizers, recorded from the methods' own implementations.

golden/small_fc.npz holds two thetas: `step1` (as initialised, step size 1) and `perturbed` (every
decay and bias moved, the published step size 1e-3). Five fixed gradients per problem; `edge` has a
scalar, ties between axes, zero and huge gradients.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trajectories

from learned_opt.features import factored_axes
from learned_opt.mup import MuP
from learned_opt.small_fc import SmallFC

GOLDEN = Path(__file__).parent / "golden" / "small_fc.npz"
STEPS = 5
STEP_SIZES = {"step1": 1.0, "perturbed": 1e-3}
EPSILON = np.finfo(np.float32).eps


@functools.cache
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def under(prefix):
    return {k.removeprefix(prefix): v for k, v in golden().items() if k.startswith(prefix)}


def theta_of(tag):
    leaves = under(f"{tag}/theta/")
    decays = {
        "momentum_decays": leaves.pop("momentum_decays"),
        "rms_decays": leaves.pop("rms_decays"),
        "factored_decays": leaves.pop("adafactor_decays"),
    }
    return jax.tree.map(jnp.asarray, {"mlp": leaves, **decays})


def looped(transform, rule, params, grads, theta):
    """Params after each step, stacked, and the last state."""
    optimizer = rule.optimizer(theta)
    update, state, visited = transform(optimizer.update), optimizer.init(params), []
    for i in range(STEPS):
        updates, state = update({k: g[i] for k, g in grads.items()}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        visited.append(params)
    return jax.tree.map(lambda *p: jnp.stack(p), *visited), state


def scanned(rule, params, grads, theta):
    optimizer = rule.optimizer(theta)

    def step(carry, grads):
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        return (params, state), params

    (_, state), visited = jax.lax.scan(step, (params, optimizer.init(params)), grads)
    return visited, state


def vmapped(rule, params, grads, theta):
    """The lane of `theta` before one of every theta: lanes must not mix."""
    thetas = [theta] + [theta_of(tag) for tag in STEP_SIZES]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *thetas)
    lanes = jax.vmap(functools.partial(scanned, rule, params, grads))(stacked)
    return jax.tree.map(lambda x: x[0], lanes)


MODES = {
    "plain": functools.partial(looped, lambda f: f),
    "jit": functools.partial(looped, jax.jit),
    "scan": scanned,
    "vmap": vmapped,
}


def assert_close(got, want, tolerance, name):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, name
    assert np.max(np.abs(got - want)) <= tolerance * np.max(np.abs(want)), name


@pytest.mark.parametrize("problem", ["mlp", "edge"])
@pytest.mark.parametrize("tag", STEP_SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_small_fc_follows_the_published_trajectory(mode, tag, problem):
    rule = SmallFC(hidden=4, step_size=STEP_SIZES[tag])
    params, grads = (
        jax.tree.map(jnp.asarray, under(f"{problem}/{kind}/")) for kind in ("params", "grads")
    )
    visited, state = MODES[mode](rule, params, grads, theta_of(tag))

    want = under(f"{tag}/{problem}/params/")
    assert want.keys() == params.keys()
    for name, published in want.items():
        assert_close(visited[name], published, 1e-5, name)
        # A step size of 1e-3 hides errors of the direction behind the size of the params, so the
        # movement is compared too,
        # up to the rounding of params of that size, half an ulp for each of our and their
        # additions.
        start = params[name][None]
        movement = published - start
        rounding = STEPS * EPSILON * np.max(np.abs(published)) / np.max(np.abs(movement))
        assert_close(visited[name] - start, movement, 1e-5 + rounding, name)

    assert int(state.count) == STEPS
    for name in params:
        key, accumulators = f"{tag}/{problem}/{{}}/{name}", state.accumulators
        want_of = lambda kind: np.moveaxis(golden()[key.format(kind)], -1, 0)  # noqa: B023, E731
        assert_close(state.accumulators.momentum[name], want_of("momentum"), 1e-5, name)
        assert_close(state.accumulators.rms[name], want_of("rms"), 1e-5, name)
        axes = factored_axes(params[name].shape)
        if axes is None:
            assert_close(accumulators.row[name], want_of("v_diag"), 1e-5, name)
        else:
            assert_close(
                np.squeeze(accumulators.row[name], axes[1] + 1), want_of("v_row"), 1e-5, name
            )
            assert_close(
                np.squeeze(accumulators.col[name], axes[0] + 1), want_of("v_col"), 1e-5, name
            )


MULO = trajectories.GOLDEN / "mulo.npz"
# the fixture's own; those of all other leaves are 1
MULTIPLIERS = {"mlp/~/linear_1|w": 0.25, "conv|w": 0.125, "scale|s": 0.5}


@dataclasses.dataclass(frozen=True)
class MuSmallFC:
    """`MuP` of small_fc with the multipliers of the leaves that there are."""

    step_size: float
    clip: bool

    def optimizer(self, theta, horizon):
        multipliers = lambda params: {name: MULTIPLIERS.get(name, 1.0) for name in params}  # noqa: E731
        optimizer = MuP(SmallFC(step_size=self.step_size), multipliers).optimizer(theta, horizon)
        clip = optax.clip_by_global_norm(1.0) if self.clip else optax.identity()
        return optax.with_extra_args_support(optax.chain(clip, optimizer))


@pytest.mark.parametrize("problem", trajectories.PROBLEMS)
@pytest.mark.parametrize(
    ("mode", "tag", "rule"),
    [
        ("jit", "mulo", MuSmallFC(1e-3, clip=False)),
        *((mode, "mulo_step1", MuSmallFC(1.0, clip=False)) for mode in trajectories.MODES),
        ("jit", "mulo_clip", MuSmallFC(1e-2, clip=True)),
    ],
)
def test_mu_small_fc_follows_the_published_trajectory(mode, tag, rule, problem):
    golden = trajectories.load(MULO)
    leaves = trajectories.under(golden, f"{tag}/theta|")
    mlp = {k.removeprefix("nn|~|"): leaf for k, leaf in leaves.items() if k.startswith("nn")}
    decays = {name: leaves[name] for name in ("momentum_decays", "rms_decays")}
    theta = {"mlp": mlp, **decays, "factored_decays": leaves["adafactor_decays"]}
    theta = jax.tree.map(jnp.asarray, theta)
    params, grads, losses = trajectories.inputs(golden, problem)
    visited, _ = trajectories.run(mode, rule, theta, None, params, grads, losses)
    want = trajectories.published(golden, tag, problem, params)
    trajectories.assert_follows(visited, params, want)
