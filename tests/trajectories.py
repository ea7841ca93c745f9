"""Recorded trajectories of published optimizers, and how a rule of ours is held against them.

A fixture holds, for the problems `mlp` and `edge`, params, five fixed gradients and five losses,
and per tag a theta and the params after each step. `edge` has a scalar, ties between axes, zero and
huge gradients.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
PROBLEMS = ("mlp", "edge")
STEPS = 5
EPSILON = np.finfo(np.float32).eps


@functools.cache
def load(path):
    """The arrays of a fixture by name."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def under(golden, prefix):
    """The arrays whose names begin with `prefix`, by what follows it."""
    found = {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}
    assert found, f"the fixture has nothing under {prefix}"
    return found


def inputs(golden, problem):
    """Params, gradients [5, ...] and losses [5]."""
    params = jax.tree.map(jnp.asarray, under(golden, f"{problem}/params|"))
    stack = lambda name: jnp.stack([golden[f"{problem}/grad{t}|{name}"] for t in range(STEPS)])  # noqa: E731
    return params, {name: stack(name) for name in params}, jnp.asarray(golden["losses"])


def published(golden, tag, problem, names):
    """The published params after each step [5, ...], by leaf."""
    key = f"{tag}/{problem}/state{{}}|params|{{}}"
    return {n: np.stack([golden[key.format(t + 1, n)] for t in range(STEPS)]) for n in names}


def looped(transform, optimizer, params, grads, losses):
    """Params after each step [5, ...], and the last state."""
    update, state, visited = transform(optimizer.update), optimizer.init(params), []
    for i in range(STEPS):
        grad = {k: g[i] for k, g in grads.items()}
        updates, state = update(grad, state, params, value=losses[i])
        params = optax.apply_updates(params, updates)
        visited.append(params)
    return jax.tree.map(lambda *p: jnp.stack(p), *visited), state


def scanned(optimizer, params, grads, losses):
    def step(carry, inputs):
        params, state = carry
        grad, loss = inputs
        updates, state = optimizer.update(grad, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = (params, optimizer.init(params))
    (_, state), visited = jax.jit(lambda: jax.lax.scan(step, start, (grads, losses)))()
    return visited, state


def run(mode, rule, theta, horizon, params, grads, losses):
    """Params after each step [5, ...] and the last state, by each of the MODES."""
    if mode == "vmap":
        # the lane of `theta` before one of another theta: lanes must not mix
        other = jax.tree.map(lambda leaf: leaf + 0.1, theta)
        thetas = jax.tree.map(lambda *leaves: jnp.stack(leaves), theta, other)
        lanes = jax.vmap(
            lambda theta: scanned(rule.optimizer(theta, horizon), params, grads, losses)
        )(thetas)
        return jax.tree.map(lambda x: x[0], lanes)
    optimizer = rule.optimizer(theta, horizon)
    if mode == "scan":
        return scanned(optimizer, params, grads, losses)
    transform = jax.jit if mode == "jit" else lambda f: f
    return looped(transform, optimizer, params, grads, losses)


MODES = ("plain", "jit", "scan", "vmap")


def runs(tags):
    """(mode, tag): every tag jitted, one in a scan too; the others are slow tests."""
    first, slow = next(iter(tags)), pytest.mark.slow
    quick = lambda mode, tag: mode == "jit" or (mode, tag) == ("scan", first)  # noqa: E731
    return [
        pytest.param(mode, tag, marks=() if quick(mode, tag) else slow, id=f"{mode}-{tag}")
        for mode in MODES
        for tag in tags
    ]


def assert_close(got, want, tolerance, name):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, name
    assert np.max(np.abs(got - want)) <= tolerance * np.max(np.abs(want)), name


def assert_follows(visited, start, want, tolerance=1e-5):
    """Every leaf, after every step, is within `tolerance` of what was published.

    A small step size hides errors of the direction behind the size of the params, so the movement
    is compared too, up to the rounding of params of that size, half an ulp for each of our and
    their additions.
    """
    for name, params in want.items():
        assert_close(visited[name], params, tolerance, name)
        movement = params - start[name][None]
        rounding = STEPS * EPSILON * np.max(np.abs(params)) / np.max(np.abs(movement))
        assert_close(visited[name] - start[name][None], movement, tolerance + rounding, name)
