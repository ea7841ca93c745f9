"""Lion and Lion-K against optax's Lion, convex analysis, the Lyapunov inequality of the discrete
iteration, and independent constrained solvers.

Twelve parameters as a 3 x 4 matrix, so that `nuclear` has something to do. The convex quadratics
have eigenvalues from 3.49 down, and their minimum outside of every constraint.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize

from learned_opt.kappas import KAPPAS
from learned_opt.lion import Lion, Rates

GOLDEN = Path(__file__).parent / "golden" / "lion_vectors.json"
SHAPE, SIZE = (3, 4), 12
EPSILON, P, K = 0.1, 3.0, 3
Q = P / (P - 1)
LAM = 0.8
LARGEST = 3.49
SMOOTH = ("half_l2_squared", "l2", "lp", "huber", "pseudo_huber", "log_cosh", "logsumexp")
OFF_SIMPLEX = tuple(name for name in KAPPAS if name != "logsumexp")
BOUNDED = tuple(name for name in KAPPAS if name != "half_l2_squared")

each = functools.partial(pytest.mark.parametrize, "name")


def rule_of(name, **given):
    return Lion(kappa=name, epsilon=EPSILON, p=P, k=K, **given)


def norm(y, order):
    return np.linalg.norm(np.ravel(y), ord=order)


def initial(rule):
    return rule.optimizer(rule.init(jax.random.key(0)))


def run(optimizer, params, grads):
    """Updates, params and states after each step."""
    state, visited, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        visited.append((updates, params, state))
    return visited


# Lion


def test_golden_vectors():
    """Four steps recorded in float64; float32 keeps seven digits of terms up to 2."""
    golden = json.loads(GOLDEN.read_text())
    rates = {name: golden[name] for name in ("b1", "b2", "weight_decay")}
    rule = Lion(learning_rate=golden["lr"], **rates)
    grads = [jnp.asarray(step["g"], jnp.float32) for step in golden["steps"]]
    visited = run(initial(rule), jnp.asarray(golden["w0"], jnp.float32), grads)
    for (updates, params, state), want in zip(visited, golden["steps"], strict=True):
        np.testing.assert_allclose(updates, want["update"], rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(params, want["w"], rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(state.momentum, want["mu"], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(("b1", "b2", "decay"), [(0.9, 0.99, 1.0), (0.95, 0.98, 0.0), (0, 0.9, 3)])
def test_l1_is_optax_lion(b1, b2, decay):
    """40 random steps; a decay or a learning rate that went through a logarithm is off by 1e-6."""
    rng = np.random.default_rng(1)
    draw = lambda: {  # noqa: E731
        "w": jnp.asarray(rng.normal(size=SHAPE), jnp.float32),
        "b": jnp.asarray(rng.normal(), jnp.float32),
    }
    params, grads = draw(), [draw() for _ in range(40)]
    rule = Lion(learning_rate=0.02, b1=b1, b2=b2, weight_decay=decay)
    ours = run(initial(rule), params, grads)
    theirs = run(optax.lion(0.02, b1=b1, b2=b2, weight_decay=decay), params, grads)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
    for (_, got, state), (_, want, optax_state) in zip(ours, theirs, strict=True):
        jax.tree.map(close, got, want)
        jax.tree.map(close, state.momentum, optax_state[0].mu)


@each(OFF_SIMPLEX)
def test_zero_gradients_leave_the_decay_alone(name):
    """0 / 0 is 0: for m = 0 and g = 0 the update is -learning_rate * weight_decay * params."""
    rule, params = rule_of(name, learning_rate=2.0, weight_decay=0.25), jnp.full(SHAPE, 4.0)
    ((updates, _, _),) = run(initial(rule), params, [jnp.zeros(SHAPE)])
    np.testing.assert_allclose(updates, -0.5 * params, rtol=1e-6)


def test_a_decay_of_zero_is_zero():
    """b1 = 0 is sign descent, however large the momentum; so is a theta beyond b1 = 0. Without
    weight decay large params change nothing.
    """
    rule = Lion(learning_rate=1.0, b1=0.0, b2=0.5, weight_decay=0.0)
    theta = rule.init(jax.random.key(0))
    grads = [jnp.asarray([1e6, -1e6, 1e6]), jnp.asarray([-1e-6, 1e-6, 1e-6])]
    for log_one_minus_b1 in (0.0, 0.7):
        moved = theta | {"log_one_minus_b1": jnp.float32(log_one_minus_b1)}
        (_, _, _), (updates, _, _) = run(rule.optimizer(moved), jnp.full(3, 1e7), grads)
        np.testing.assert_array_equal(updates, [1.0, -1.0, -1.0])


def test_theta_holds_the_fields():
    rule = Lion(learning_rate=3e-4, b1=0.95, b2=0.999, weight_decay=10.0)
    rates = rule.rates(rule.init(jax.random.key(0)))
    np.testing.assert_allclose(rates, [3e-4, 0.05, 0.001, 10.0], rtol=2e-6)


@each(KAPPAS)
def test_any_leaf_and_any_size_of_gradients(name):
    """Up to float32's largest and down to nothing, also where squares over- or underflow."""
    rng = np.random.default_rng(2)
    shapes = {"scalar": (), "five": (2, 1, 3, 1, 2)}
    draw = lambda: {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}  # noqa: E731
    optimizer, params, grads = initial(rule_of(name, learning_rate=0.5)), draw(), draw()
    sign, found = initial(Lion(learning_rate=0.5)), {}
    for scale in (0.0, 1e-42, 1e-30, 1e-5, 1.0, 1e25, 5e37):
        scaled = jax.tree.map(lambda g, scale=scale: scale * g, grads)
        found[scale] = run(optimizer, params, [scaled])[0][0]
        assert jax.tree.map(jnp.shape, found[scale]) == shapes
        assert all(np.all(np.isfinite(u)) for u in found[scale].values()), scale
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    if name in ("l1", "l2", "lp", "linf", "top_k", "nuclear"):
        for scale in (1e-30, 1e25, 5e37):
            jax.tree.map(close, found[scale], found[1.0])
    if name in ("thresholded_l1", "huber", "pseudo_huber", "log_cosh"):
        for scale in (1e25, 5e37):
            jax.tree.map(close, found[scale], run(sign, params, [grads])[0][0])


@each(KAPPAS)
def test_meta_gradients_are_finite(name):
    """Also where gradients are zero, though powers below 1 have no derivative there; an SVD has
    none either.
    """
    rule = Lion(kappa=name, epsilon=EPSILON, p=1.5, k=K)
    grads = jnp.asarray(np.random.default_rng(3).normal(size=SHAPE), jnp.float32)
    leaves = (
        grads[None] if name == "nuclear" else jnp.stack([grads, grads.at[1:].set(0), 0 * grads])
    )

    def moved(theta, grads):
        optimizer = rule.optimizer(theta)
        updates, state = optimizer.update(grads, optimizer.init(grads), grads)
        updates, _ = optimizer.update(0.5 + grads, state, 1.0 + updates)
        return jnp.sum(updates * jnp.cos(grads + 1.0))

    theta = rule.init(jax.random.key(0))
    found = jax.jit(jax.vmap(jax.grad(moved), in_axes=(None, 0)))(theta, leaves)
    assert all(np.all(np.isfinite(slopes)) for slopes in found.values())
    assert np.all(found["log_learning_rate"] != 0)
    assert np.all(found["log_weight_decay"] != 0)
    flat = name in ("l1", "linf", "thresholded_l1", "top_k")
    assert np.any(found["log_one_minus_b1"] != 0) != flat


def test_the_table_lists_every_kappa():
    table = (Lion.__doc__ or "").split("minimised with the loss")[1].split("Of a leaf")[0]
    rows = " ".join(table.split())
    for name, kappa in KAPPAS.items():
        assert f" {name} " in f" {rows} "
        assert kappa.constraint in rows


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be positive, got nan"),
        ({"b1": 1.0}, r"`b1` must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"`b2` must be in \[0, 1\), got -0.1"),
        ({"weight_decay": -1e-3}, "`weight_decay` must be at least 0, got -0.001"),
        ({"kappa": "l3"}, "`kappa` must be 'l1' or .*'nuclear', got 'l3'"),
        ({"epsilon": 0.0}, "`epsilon` must be positive, got 0.0"),
        ({"p": 1.0}, "`p` must be above 1 and finite, got 1.0; set kappa='l1' or kappa='linf'"),
        ({"p": float("inf")}, "`p` must be above 1 and finite, got inf"),
        ({"k": 0}, "`k` must be an integer of at least 1, got 0"),
        ({"k": 2.5}, "`k` must be an integer of at least 1, got 2.5"),
    ],
)
def test_fields_that_make_no_rule(given, message):
    with pytest.raises(ValueError, match=message):
        Lion(**given)


# convex analysis, in float64: sums of 12 terms of size 10 are rounded by 1e-14


def points():
    """Random ones of several sizes, and ones with ties, zeros and bends."""
    rng = np.random.default_rng(4)
    scales = np.repeat([0.01, 0.1, 1.0, 10.0], 10)[:, None, None]
    special = [np.zeros(SHAPE), np.ones(SHAPE), np.full(SHAPE, -EPSILON), np.eye(*SHAPE)]
    return np.concatenate([scales * rng.normal(size=(40, *SHAPE)), special])


def on_points(function, name):
    rule = rule_of(name)
    return jax.jit(jax.vmap(lambda c: function(c, rule)))


@each(KAPPAS)
def test_gradient_is_a_subgradient(name):
    """K(y) >= K(c) + <dK(c), y - c> for every pair of points."""
    kappa = KAPPAS[name]
    with jax.enable_x64(True):
        c = jnp.asarray(points())
        values, slopes = (np.asarray(on_points(f, name)(c)) for f in (kappa.value, kappa.gradient))
    flat = points().reshape(-1, SIZE)
    slopes = slopes.reshape(-1, SIZE)
    linear = values[:, None] + slopes @ flat.T - np.sum(slopes * flat, axis=1)[:, None]
    assert np.all(values[None] >= linear - 1e-12)
    # tight along the diagonal only, else K would be linear
    assert np.mean(values[None] > linear + 1e-6) > 0.4


@each(SMOOTH)
def test_gradient_is_the_derivative_where_there_is_one(name):
    """Central differences of step 1e-6: rounding 1e-9 of K (at most 40), curvature 1e-10."""
    kappa, rng = KAPPAS[name], np.random.default_rng(5)
    with jax.enable_x64(True):
        c = jnp.asarray(points()[:40])
        way = jnp.asarray(rng.normal(size=c.shape))
        value = on_points(kappa.value, name)
        slope = (value(c + 1e-6 * way) - value(c - 1e-6 * way)) / 2e-6
        gradient = on_points(kappa.gradient, name)(c)
        np.testing.assert_allclose(
            np.sum(np.asarray(gradient * way), axis=(1, 2)), slope, rtol=1e-6, atol=3e-8
        )


@each(KAPPAS)
def test_fenchel_young(name):
    """K(c) + K*(y) >= <c, y> for y between directions, with equality at y = dK(c); beyond the
    directions of large c, K* is infinite.
    """
    kappa = KAPPAS[name]
    with jax.enable_x64(True):
        c = jnp.asarray(points())
        gradient, conjugate = (on_points(f, name) for f in (kappa.gradient, kappa.conjugate))
        value = np.asarray(on_points(kappa.value, name)(c))
        y = gradient(c)
        equal = value + np.asarray(conjugate(y)) - np.sum(np.asarray(c * y), axis=(1, 2))
        np.testing.assert_allclose(equal, 0.0, atol=1e-11)
        for share in (0.0, 0.3, 0.9):
            between = share * y + (1 - share) * y[::-1]
            inner = np.asarray(c).reshape(-1, SIZE) @ np.asarray(between).reshape(-1, SIZE).T
            assert np.all(value[:, None] + np.asarray(conjugate(between)) >= inner - 1e-11)
        beyond = np.asarray(conjugate(1.01 * gradient(1e6 * c[:40])))
        assert np.all(np.isinf(beyond)) or name == "half_l2_squared"


def test_top_k_bounds_two_norms():
    """0.9 twelve times is in the box, but not in three times the l1 ball."""
    conjugate, rule = KAPPAS["top_k"].conjugate, rule_of("top_k")
    assert np.isinf(conjugate(jnp.full(SHAPE, 0.9), rule))
    assert conjugate(jnp.full(SHAPE, 0.25), rule) == 0.0


def test_the_simplex_has_no_negative_part():
    """1.5 - 0.5 is 1, too."""
    y = jnp.zeros(SIZE).at[:2].set(jnp.asarray([1.5, -0.5]))
    assert np.isinf(KAPPAS["logsumexp"].conjugate(y, rule_of("logsumexp")))


def test_nuclear_direction_is_the_polar_factor():
    """Of an axis of rows and one of columns; rank one and vectors give u v^T."""
    rng, rule = np.random.default_rng(6), rule_of("nuclear")
    u, v = rng.normal(size=6), rng.normal(size=4)
    direction = functools.partial(KAPPAS["nuclear"].gradient, rule=rule)
    wanted = np.outer(u, v) / (norm(u, 2) * norm(v, 2))
    got = direction(jnp.asarray(np.outer(u, v).reshape(2, 3, 4), jnp.float32))
    np.testing.assert_allclose(got, wanted.reshape(2, 3, 4), atol=2e-6)
    np.testing.assert_allclose(direction(jnp.asarray(v, jnp.float32)), v / norm(v, 2), atol=1e-6)
    np.testing.assert_allclose(direction(jnp.float32(-3.0)), -1.0, rtol=1e-6)


# the discrete Lyapunov function


def quadratic(smallest):
    """A [12, 12] of eigenvalues from LARGEST down to `smallest`, and the minimum it is around."""
    rng = np.random.default_rng(7)
    basis, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    a = basis * np.geomspace(LARGEST, smallest, SIZE) @ basis.T
    centre = rng.normal(size=SIZE)
    return a, 2.0 * centre / norm(centre, np.inf)


def gradient_of(a, centre, x):
    return (a @ (x.ravel() - centre)).reshape(SHAPE)


def loss_of(a, centre, x):
    gap = x.ravel() - centre
    return gap @ (a @ gap) / 2


def inside(name):
    """A point whose lam x is well within the domain of K*."""
    return np.full(SHAPE, 1 / (SIZE * LAM)) if name == "logsumexp" else np.zeros(SHAPE)


def lyapunov(name, steps, rate, b1, b2):
    """What H changes by in every step and what the inequality allows; H at the start and end."""
    rule, kappa = rule_of(name), KAPPAS[name]
    value, direction, conjugate = (
        lambda c: kappa.value(c, rule),
        lambda c: kappa.gradient(c, rule),
        lambda y: kappa.conjugate(y, rule),
    )
    a, centre = map(jnp.asarray, quadratic(1e-3))
    rates = Rates(rate, 1 - b1, 1 - b2, jnp.asarray(LAM))
    implicit = rate / (1 - rate * LAM)
    weight = implicit * b1 / (implicit * LAM * (1 - b1) + (1 - b2))
    dot = lambda x, y: jnp.sum(x * y)  # noqa: E731

    def energy(x, m):
        gap = conjugate(LAM * x) + value(m) - LAM * dot(x, m)
        return loss_of(a, centre, x) + conjugate(LAM * x) / LAM + weight * gap

    def step(carry, _):
        x, momentum, before = carry
        grads = gradient_of(a, centre, x)
        updates, after = rule.step(rates, grads, momentum, x)
        new = x + updates
        c, m = -(b1 * momentum + (1 - b1) * grads), -after
        speed = updates / implicit
        v = speed + LAM * new
        slope = jax.grad(conjugate)(LAM * new)
        allowed = (
            -implicit * (1 + weight * LAM) * dot(c - slope, speed)
            - weight * (1 - b2) / (b2 - b1) * dot(c - m, v - direction(m))
            + LARGEST * implicit**2 / 2 * dot(speed, speed)
        )
        now = energy(new, m)
        return (new, after, now), (now - before, allowed)

    x = jnp.asarray(inside(name))
    first = energy(x, jnp.zeros_like(x))
    start = (x, jnp.zeros_like(x), first)
    (_, _, last), (change, allowed) = jax.lax.scan(step, start, length=steps)
    return change, allowed, first, last


@each(KAPPAS)
def test_discrete_lyapunov_inequality(name):
    """An explicit step of learning rate eta is x' = x + eps (V - lam x') with V = dK(c) and
    eps = eta / (1 - eta lam); m and c are averages of -grad f, f is LARGEST-smooth. With

        H = f(x) + K*(lam x)/lam + C (K*(lam x) + K(m) - lam <x, m>),
        C = eps b1 / (eps lam (1 - b1) + 1 - b2),

    every step satisfies, for s' in dK*(lam x') and b2 > b1,

        H' - H <= - eps (1 + C lam) <c - s', V - lam x'>
                  - C (1 - b2)/(b2 - b1) <c - m', V - dK(m')>
                  + LARGEST eps^2/2 |V - lam x'|^2,

    where the first two terms are at most 0. H itself need not fall in every step. The condition
    number is 3490. H is at most 5, so that rounding is far below 1e-12.
    """
    with jax.enable_x64(True):
        rates = [jnp.asarray(x) for x in ((0.01, 0.002, 0.05), (0.9, 0.95, 0.0), (0.99, 0.98, 0.9))]
        of_rates = jax.jit(jax.vmap(functools.partial(lyapunov, name, 1500)))
        change, allowed, first, last = (np.asarray(x) for x in of_rates(*rates))
    assert np.all(np.isfinite(change))
    assert np.max(change - allowed) <= 1e-12
    assert np.all(last < 0.95 * first)


# phase 1: what is outside of the constraint nears it


def to_simplex(y):
    """Euclidean distance, by bisection on the shift of the projection max(y - shift, 0)."""
    low, high = np.min(y) - 1.0, np.max(y)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(np.maximum(y - middle, 0)) > 1 else (low, middle)
    return norm(y - np.maximum(y - low, 0), 2)


def box(y):
    return norm(y, np.inf) - 1


# how far y is from the domain of K*, in the norm whose unit ball that is
EXCESS = dict.fromkeys(BOUNDED, box) | {
    "l2": lambda y: norm(y, 2) - 1,
    "lp": lambda y: norm(y, Q) - 1,
    "linf": lambda y: norm(y, 1) - 1,
    "top_k": lambda y: max(norm(y, np.inf), norm(y, 1) / K) - 1,
    "logsumexp": to_simplex,
    "nuclear": lambda y: np.linalg.norm(y.reshape(-1, y.shape[-1]), 2) - 1,
}


@each(BOUNDED)
def test_any_gradients_lead_into_the_constraint(name):
    """lam x' = (1 - eta lam) lam x + eta lam V with V in the domain of K*, so that the distance to
    it shrinks by 1 - eta lam in every step, and once inside x stays. Gradients are heavy-tailed
    noise of changing size. Float32, |lam x| up to 100: rounding is below 1e-4 at the start and
    shrinks with x.
    """
    rate, rng = 0.1, np.random.default_rng(8)
    rule = rule_of(name, learning_rate=rate, weight_decay=LAM)
    draw = lambda scale: {  # noqa: E731
        "matrix": jnp.asarray(scale * rng.standard_t(2, size=SHAPE), jnp.float32),
        "five": jnp.asarray(scale * rng.standard_t(2, size=(2, 1, 3, 1, 2)), jnp.float32),
    }
    params, grads = draw(20.0), [draw(10.0 ** rng.integers(-3, 4)) for _ in range(200)]
    visited = [params] + [after for _, after, _ in run(initial(rule), params, grads)]
    for key in params:
        lam_x = [LAM * np.asarray(x[key], np.float64) for x in visited]
        excess = np.array([max(EXCESS[name](y), 0.0) for y in lam_x])
        assert excess[0] > 1.0
        rounding = np.array([3e-6 * norm(y, 1) for y in lam_x])
        assert np.all(excess[1:] <= (1 - rate * LAM) * excess[:-1] + rounding[:-1])
        assert excess[-1] < 1e-4


def test_lion_nears_its_box_at_exactly_the_rate():
    """Gradients that push outwards all the time: the excess is multiplied by 1 - eta lam = 0.96.
    Each of 60 steps rounds lam x, up to 8, by half of 5e-7.
    """
    rule = Lion(learning_rate=0.05, weight_decay=LAM)
    params = jnp.asarray([10.0, -3.0])
    visited = run(initial(rule), params, [-jnp.sign(params)] * 60)
    for t, (_, after, _) in enumerate(visited, 1):
        wanted = 0.96**t * (LAM * np.abs(params) - 1)
        np.testing.assert_allclose(LAM * np.abs(after) - 1, wanted, atol=6e-6)


# phase 2: the limit


def solved(name, a, centre):
    """The least f(x) + K*(lam x)/lam over y = lam x, by SLSQP; of two halves y = u - v where |y|_1
    comes in. `nuclear`, whose bound is not smooth, by projected gradients.
    """
    ones = np.ones(SIZE)

    def loss(y):
        gap = y / LAM - centre
        return gap @ a @ gap / 2, a @ gap / LAM

    if name == "nuclear":
        y = np.zeros(SIZE)
        for _ in range(4000):
            y = y - LAM**2 / LARGEST * loss(y)[1]
            u, s, vt = np.linalg.svd(y.reshape(SHAPE), full_matrices=False)
            y = (u * np.minimum(s, 1.0) @ vt).ravel()
        return loss(y)[0]

    unbounded, within = (-np.inf, np.inf), (-1.0, 1.0)
    nearly = (-1 + 1e-9, 1 - 1e-9)
    none = lambda y: (0.0, 0 * y)  # noqa: E731
    entropy = lambda y: (y @ np.log(y), np.log(y) + 1)  # noqa: E731
    bound = lambda f: [{"type": "ineq", "fun": f}]  # noqa: E731
    ball = lambda order: bound(lambda y: 1 - np.sum(np.abs(y) ** order))  # noqa: E731
    total = lambda most: bound(lambda z: most - np.sum(z))  # noqa: E731

    def barrier(y):
        plus, minus = entropy(1 + y), entropy(1 - y)
        return EPSILON / 2 * (plus[0] + minus[0]), EPSILON / 2 * (plus[1] - minus[1])

    halves, regulariser, bounds, constraints = {
        "l1": (False, none, within, []),
        "half_l2_squared": (False, lambda y: (y @ y / 2, y), unbounded, []),
        "l2": (False, none, unbounded, ball(2)),
        "lp": (False, none, unbounded, ball(Q)),
        "linf": (True, none, (0, 1), total(1)),
        "thresholded_l1": (True, lambda z: (EPSILON * np.sum(z), EPSILON + 0 * z), (0, 1), []),
        "huber": (False, lambda y: (EPSILON / 2 * (y @ y), EPSILON * y), within, []),
        "pseudo_huber": (
            False,
            lambda y: (
                -EPSILON * np.sum(np.sqrt(1 - y**2)),
                EPSILON * y / np.sqrt(1 - y**2),
            ),
            nearly,
            [],
        ),
        "log_cosh": (False, barrier, nearly, []),
        "top_k": (True, none, (0, 1), total(K)),
        "logsumexp": (
            False,
            lambda y: (EPSILON * entropy(y)[0], EPSILON * entropy(y)[1]),
            (1e-12, 1),
            [{"type": "eq", "fun": lambda y: ones @ y - 1}],
        ),
    }[name]

    def objective(z):
        y = z[:SIZE] - z[SIZE:] if halves else z
        value, slope = loss(y)
        slope = np.concatenate([slope, -slope]) if halves else slope
        penalty, more = regulariser(z)
        return value + penalty / LAM, slope + more / LAM

    start = np.full(SIZE * (1 + halves), 1 / (4 * SIZE))
    found = minimize(
        objective,
        start,
        jac=True,
        method="SLSQP",
        bounds=[bounds] * start.size,
        constraints=constraints,
        options={"maxiter": 2000, "ftol": 1e-11},
    )
    assert found.success, found.message
    return found.fun


def reached(name, a, centre, steps, fastest=0.03, slowest=1e-6):
    """Params after steps of the rule whose learning rate falls geometrically, from within."""
    rule = rule_of(name)
    a, centre = jnp.asarray(a), jnp.asarray(centre)

    def step(t, carry):
        x, momentum = carry
        rate = fastest * (slowest / fastest) ** (t / steps)
        rates = Rates(*map(jnp.asarray, (rate, 0.1, 0.01, LAM)))
        updates, momentum = rule.step(rates, gradient_of(a, centre, x), momentum, x)
        return x + updates, momentum

    x = jnp.asarray(inside(name))
    return jax.jit(lambda x: jax.lax.fori_loop(0, steps, step, (x, 0 * x)))(x)[0]


@each(KAPPAS)
def test_the_limit_solves_the_constrained_problem(name):
    """The objective to five decimals, from 15,000 steps in float64."""
    a, centre = quadratic(0.1)
    with jax.enable_x64(True):
        rule = rule_of(name)
        x = reached(name, a, centre, 15_000)
        penalty = float(KAPPAS[name].conjugate(LAM * x, rule)) / LAM
        found = float(loss_of(a, centre, np.asarray(x))) + penalty
    assert abs(found - solved(name, a, centre)) < 5e-6


@each(("l1", "log_cosh", "nuclear"))
def test_the_limit_in_float32(name):
    """The rule as it is used, its learning rate falling by a traced theta. Steps of less than 1e-5
    would be lost in params of size 1, and float32's gradients are good to 1e-6: four decimals.
    """
    a, centre = quadratic(0.1)
    rule, steps = rule_of(name, weight_decay=LAM), 10_000
    theta = rule.init(jax.random.key(0))
    single = [jnp.asarray(x, jnp.float32) for x in (a, centre)]

    def step(t, carry):
        x, state = carry
        rate = jnp.log(0.03) + t / steps * jnp.log(1e-5 / 0.03)
        optimizer = rule.optimizer(theta | {"log_learning_rate": rate})
        updates, state = optimizer.update(gradient_of(*single, x), state, x)
        return optax.apply_updates(x, updates), state

    x = jnp.asarray(inside(name), jnp.float32)
    carry = x, initial(rule).init(x)
    x = np.asarray(jax.jit(lambda c: jax.lax.fori_loop(0, steps, step, c))(carry)[0], np.float64)
    with jax.enable_x64(True):
        # on the boundary, but for float32's rounding
        penalty = float(KAPPAS[name].conjugate(jnp.asarray(LAM * x / (1 + 1e-6)), rule)) / LAM
    assert abs(loss_of(a, centre, x) + penalty - solved(name, a, centre)) < 5e-5
