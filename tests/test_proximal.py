"""Classical proximal methods against plain numpy in float64, theory's bound and rate, and the
solutions of an independent solver.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evaluation import proximal, suboptimality
from tasks.composite import L1, Composite, LeastSquares
from tasks.optimum import optimum

MARGIN = 0.9999
GOLDEN = (1 + np.sqrt(5)) / 2
STEPS = 120


def problem(seed=0, rows=15, columns=30, rho=0.05):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(rows, columns)) * np.geomspace(1, 0.2, columns)
    signal = rng.normal(size=columns) * (rng.random(columns) < 0.3)
    return matrix, matrix @ signal, rho, np.linalg.norm(matrix, 2) ** 2


def soft(v, threshold):
    return np.sign(v) * np.maximum(np.abs(v) - threshold, 0)


def trajectory(optimizer, matrix, target, rho, lipschitz, start=None, steps=STEPS):
    """The params [steps + 1, N] and the states, stacked. Of arrays [P, ...], [steps + 1, P, N]."""
    with jax.enable_x64(True):
        matrix, target = jnp.asarray(matrix), jnp.asarray(target)
        y = jnp.zeros_like(matrix[..., 0, :]) if start is None else jnp.asarray(start)
        keywords = {
            "prox": lambda v, step: jnp.sign(v) * jnp.maximum(jnp.abs(v) - rho * step, 0),
            "penalty": lambda x: rho * jnp.sum(jnp.abs(x)),
            "lipschitz": jnp.asarray(lipschitz),
        }

        def step(carry, _):
            y, state = carry
            residual = jnp.einsum("...mn,...n->...m", matrix, y) - target
            grads = jnp.einsum("...mn,...m->...n", matrix, residual)
            updates, state = optimizer.update(grads, state, y, **keywords)
            return (y + updates, state), (y + updates, state)

        state = optimizer.init(y)
        _, (ys, states) = jax.lax.scan(step, (y, state), length=steps)
        both = jax.tree.map(
            lambda first, rest: np.concatenate([np.asarray(first)[None], np.asarray(rest)]),
            (y, state), (ys, states),
        )  # fmt: skip
    assert both[0].dtype == np.float64
    return both


def by_hand(momentum, matrix, target, rho, lipschitz, p=1.0):
    """y and x of x' = soft(y - s g, rho s), y' = x' + momentum(k) (x' - x)."""
    step = p * MARGIN / lipschitz
    x = y = np.zeros(matrix.shape[1])
    ys, xs = [y], [x]
    for k in range(STEPS):
        old, x = x, soft(y - step * matrix.T @ (matrix @ y - target), rho * step)
        y = x + momentum(k) * (x - old)
        ys.append(y)
        xs.append(x)
    return np.array(ys), np.array(xs)


def fista_momentum():
    t = [1.0]
    for _ in range(STEPS):
        t.append((1 + np.sqrt(1 + 4 * t[-1] ** 2)) / 2)
    return lambda k: (t[k] - 1) / t[k + 1]


@pytest.mark.parametrize(
    ("optimizer", "momentum", "p"),
    [
        (proximal.ista(), lambda k: 0.0, 1.0),
        (proximal.constant(1.0, 0.0), lambda k: 0.0, 1.0),
        (proximal.constant(1.3, 0.6), lambda k: 0.6, 1.3),
        (proximal.fista(), fista_momentum(), 1.0),
    ],
    ids=["ista", "constant(1, 0)", "constant", "fista"],
)
def test_follows_plain_numpy(optimizer, momentum, p):
    numbers = problem()
    y, state = trajectory(optimizer, *numbers)
    want_y, want_x = by_hand(momentum, *numbers, p=p)
    assert np.abs(want_x[-1]).max() > 0.1
    assert (want_x[-1] == 0).any()
    np.testing.assert_allclose(y, want_y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.x, want_x, rtol=0, atol=1e-12)


def solution(matrix, target, rho, lipschitz):
    """The minimiser and the least F."""
    with jax.enable_x64(True):
        weights = jnp.asarray(rho), jnp.asarray(lipschitz)
        task = Composite(LeastSquares(matrix, target), L1(weights[0]), weights[1])
    found = optimum(task)
    return found.point, found.value


@pytest.mark.parametrize("seed", range(3))
def test_fista_keeps_its_bound(seed):
    """F(x_k) - F* <= 2 L |x_0 - x*|^2 / (k + 1)^2, L the reciprocal of the step."""
    matrix, target, rho, lipschitz = problem(seed, rho=0.001)
    point, least = solution(matrix, target, rho, lipschitz)
    x = trajectory(proximal.fista(), matrix, target, rho, lipschitz)[1].x
    values = 0.5 * np.sum((x @ matrix.T - target) ** 2, axis=1) + rho * np.abs(x).sum(axis=1)
    k = np.arange(1, STEPS + 1)
    bound = 2 * lipschitz / MARGIN * np.sum(point**2) / (k + 1) ** 2
    assert (values[1:] - least <= bound).all()
    assert values[-1] - least > 1e-9  # it is not there yet


def test_restarts_exactly_where_the_step_is_uphill():
    numbers = problem(rho=1.0)
    y, state = trajectory(proximal.fista(restart=True), *numbers)
    x, t = state.x, state.t
    uphill = np.sum((y[:-1] - x[1:]) * (x[1:] - x[:-1]), axis=1) > 0
    assert 2 <= uphill.sum() < STEPS / 4
    used = np.where(uphill[:, None], 1.0, t[:-1])
    following = (1 + np.sqrt(1 + 4 * used**2)) / 2
    np.testing.assert_allclose(t[1:], following, rtol=1e-14)
    np.testing.assert_allclose(t[1:][uphill], GOLDEN, rtol=1e-14)
    np.testing.assert_array_equal(x[1:][uphill], y[1:][uphill])  # no momentum
    want = x[1:] + (used - 1) / following * (x[1:] - x[:-1])
    np.testing.assert_allclose(y[1:], want, rtol=0, atol=1e-13)


def test_restarts_end_at_the_minimum_sooner():
    numbers = problem(rho=1.0)
    point, _ = solution(*numbers)
    plain, restarted = (
        np.linalg.norm(
            trajectory(proximal.fista(restart=r), *numbers, steps=500)[0] - point, axis=1
        )
        for r in (False, True)
    )
    assert restarted[-1] < 1e-2 * plain[-1]


def test_problems_that_are_rows_restart_on_their_own():
    numbers = [problem(seed, rho=0.01) for seed in range(3)]
    matrix, target, _, lipschitz = map(np.stack, zip(*numbers, strict=True))
    optimizer = proximal.fista(restart=True)
    y, state = trajectory(optimizer, matrix, target, 0.01, lipschitz[:, None])
    alone = [trajectory(optimizer, *each) for each in numbers]
    for i, (want, own) in enumerate(alone):
        np.testing.assert_allclose(y[:, i], want, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state.t[:, i], own.t, rtol=1e-14)
    resets = {tuple(np.flatnonzero(own.t[:, 0] == own.t[1, 0])) for _, own in alone}
    assert len(resets) == 3
    # with one number for all, they are one problem
    one = trajectory(optimizer, matrix, target, 0.01, lipschitz.max())[1].t
    assert (one == one[:, :1, :1]).all()
    assert (one[1:] == one[1]).any(axis=(1, 2)).sum() > 1


@pytest.mark.parametrize(("p", "a"), [(1.0, 0.0), (1.5, 0.3), (1.0, 0.8), (0.5, 0.9)])
def test_constant_has_the_rate_of_its_spectral_radius(p, a):
    """Without penalty, each coordinate of a diagonal quadratic is the linear recursion
    x'' = m ((1 + a) x' - a x), m = 1 - p h.
    """
    h = np.array([1.0, 0.3, 0.05])
    factors = 1 - p * MARGIN * h
    companions = [np.array([[m * (1 + a), -m * a], [1.0, 0.0]]) for m in factors]
    radius = max(np.abs(np.linalg.eigvals(c)).max() for c in companions)
    x = trajectory(
        proximal.constant(p, a), np.diag(np.sqrt(h)), np.zeros(3), 0.0, 1.0, np.ones(3), 1400
    )[1].x
    size = np.linalg.norm(x, axis=1)
    rate = (size[1200:].max() / size[200:401].max()) ** (1 / 1000)  # it may oscillate
    assert radius < 1
    assert rate == pytest.approx(radius, rel=2e-3)


@pytest.mark.parametrize("betas", [(0.1, 0.1), (0.9, 0.999)])
def test_minimisers_are_fixed_points_of_prox_adam(betas):
    numbers = problem()
    point, _ = solution(*numbers)
    assert 0 < (point == 0).sum() < point.size
    optimizer = proximal.prox_adam(0.5 * numbers[2] / numbers[3], *betas)  # steps of 1/(2L) there
    y, state = trajectory(optimizer, *numbers, start=point)
    np.testing.assert_allclose(y, np.broadcast_to(point, y.shape), rtol=0, atol=1e-9)
    np.testing.assert_allclose(state.x, y, rtol=0, atol=1e-15)
    y, _ = trajectory(optimizer, *numbers, start=point + 1e-3)
    assert np.abs(y[1] - y[0]).max() > 1e-4


def test_prox_adam_follows_plain_numpy():
    matrix, target, rho, lipschitz = problem()
    y, m, v = np.zeros((3, matrix.shape[1]))
    found, _ = trajectory(proximal.prox_adam(0.05, 0.8, 0.9), matrix, target, rho, lipschitz)
    for k in range(1, STEPS + 1):
        g = matrix.T @ (matrix @ y - target)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = 0.05 / (np.sqrt(v / (1 - 0.9**k)) + 1e-8)
        y = soft(y - step * m / (1 - 0.8**k), rho * step)
        np.testing.assert_allclose(found[k], y, rtol=0, atol=1e-11)


def test_subgradient_adam_follows_plain_numpy():
    matrix, target, rho, lipschitz = problem()
    y, m, v = np.zeros((3, matrix.shape[1]))
    optimizer = proximal.subgradient_adam(0.05, 0.8, 0.9)
    # jax takes 1 for the derivative of abs at 0
    found, _ = trajectory(optimizer, matrix, target, rho, lipschitz)
    for k in range(1, STEPS + 1):
        g = matrix.T @ (matrix @ y - target) + rho * np.where(y >= 0, 1, -1)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        y = y - 0.05 * (m / (1 - 0.8**k)) / (np.sqrt(v / (1 - 0.9**k)) + 1e-8)
        np.testing.assert_allclose(found[k], y, rtol=0, atol=1e-11)


OPTIMIZERS = {
    **{name: make() for name, make in proximal.REFERENCES.items()},
    **{name: make({k: v[0] for k, v in points.items()}) for name, (make, points) in
       ((name, proximal.points(name)) for name in proximal.GRIDS)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_updates_are_in_the_dtype_of_the_params(name, dtype):
    optimizer = OPTIMIZERS[name]
    params = {"a": jnp.ones((2, 3), dtype), "b": jnp.ones((2, 1), dtype)}
    keywords = {
        "prox": lambda v, step: jax.tree.map(lambda v, s: v / (1 + s), v, step),
        "penalty": lambda x: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)) / 2,
        "lipschitz": jnp.array([[1.0], [2.0]]),
    }
    state = jax.eval_shape(optimizer.init, params)
    step = functools.partial(optimizer.update, **keywords)
    updates, after = jax.eval_shape(step, params, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert after == state  # shapes and dtypes
    x = optax.tree.get(after, "x")
    if name != "subgradient_adam":
        assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_missing_is_named(name):
    optimizer, params = OPTIMIZERS[name], jnp.ones(3)
    needed = {"prox", "lipschitz"} if "adam" not in name else {"prox"}
    for keyword in {"penalty"} if name == "subgradient_adam" else needed:
        given = {"prox": lambda v, step: v, "lipschitz": 1.0, "penalty": jnp.sum}
        del given[keyword]
        with pytest.raises(ValueError, match=f"`{keyword}` is required"):
            optimizer.update(params, optimizer.init(params), params, **given)
    with pytest.raises(ValueError, match="`params` must be passed"):
        optimizer.update(params, optimizer.init(params), prox=lambda v, step: v, lipschitz=1.0)


def test_tuning_chooses_the_least_geometric_mean(monkeypatch):
    grid = {"p": np.array([0.5, 1.0, 1.5]), "a": np.array([0.6])}
    monkeypatch.setitem(proximal.GRIDS, "constant", (proximal.constant, grid))
    numbers = [problem(seed, 6, 10) for seed in range(4)]
    least = np.array([solution(*each)[1] for each in numbers])
    with jax.enable_x64(True):
        matrix, target, rho, lipschitz = map(jnp.stack, zip(*numbers, strict=True))
        tasks = Composite(LeastSquares(matrix, target), L1(rho), lipschitz)
    problems = suboptimality.Instances(tasks, least)
    best = proximal.tuned("constant", problems, 12)
    scores = {}
    for p in grid["p"]:
        for a in grid["a"]:
            ends = suboptimality.run(proximal.constant(p, a), problems, 12).params[:, -1]
            scores[p, a] = np.prod(ends) ** 0.25
    assert best.score == pytest.approx(min(scores.values()))
    assert (best.chosen["p"], best.chosen["a"]) == min(scores, key=scores.__getitem__)
    assert best.at_edge == (("p",) if best.chosen["p"] != 1.0 else ())
