"""The bounded rule: its bound, the equivariance of its trajectories, and what it is untrained; and
the safeguard, around rules that do all they can to diverge.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evaluation import proximal
from learned_opt.bounded import BoundedLSTM
from learned_opt.safeguard import Safeguarded
from learned_opt.structured import StructuredLSTM

ROWS, COLUMNS, RHO = 12, 20, 0.1


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def problem(seed):
    """Matrix, target, rho, and the largest eigenvalue of matrix^T matrix, of a small LASSO."""
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((ROWS, COLUMNS))
    matrix /= np.linalg.norm(matrix, axis=0)
    signal = random.standard_normal(COLUMNS) * (random.uniform(size=COLUMNS) < 0.2)
    return matrix, matrix @ signal, RHO, np.linalg.norm(matrix, 2) ** 2


def soft(v, threshold):
    return jnp.sign(v) * jnp.maximum(jnp.abs(v) - threshold, 0)


def keywords(rho, lipschitz):
    return {"prox": lambda v, step: soft(v, rho * step), "lipschitz": jnp.asarray(lipschitz)}


def unrolled(optimizer, matrix, target, rho, lipschitz, steps):
    """Params before each step and states after it, stacked."""

    def step(carry, _):
        y, state = carry
        grads = matrix.T @ (matrix @ y - target)
        updates, state = optimizer.update(grads, state, y, **keywords(rho, lipschitz))
        return (optax.apply_updates(y, updates), state), (y, state)

    y = jnp.zeros(matrix.shape[1])
    return jax.lax.scan(step, (y, optimizer.init(y)), length=steps)[1]


def run(optimizer, *data_and_steps):
    return jax.jit(lambda: unrolled(optimizer, *data_and_steps))()


def wild(rule, seed, scale=2.0):
    """A theta far from any initialisation."""
    leaves, treedef = jax.tree.flatten(rule.init(jax.random.key(0)))
    random = np.random.default_rng(seed)
    return treedef.unflatten([jnp.asarray(scale * random.normal(size=x.shape)) for x in leaves])


def loss(matrix, target, rho, x):
    return 0.5 * np.sum((matrix @ x - target) ** 2) + rho * np.abs(x).sum()


def minimum(matrix, target, rho, lipschitz, steps=20000):
    """By plain proximal gradient descent."""
    x, step = np.zeros(matrix.shape[1]), 1 / lipschitz
    for _ in range(steps):
        v = x - step * matrix.T @ (matrix @ x - target)
        x = np.sign(v) * np.maximum(np.abs(v) - rho * step, 0)
    return loss(matrix, target, rho, x)


@pytest.mark.parametrize("share", [0.1, 0.6, 0.99, 1.01, 1.5])
def test_the_bound_is_that_of_stable_modes(share):
    """x' = (1 - p c)((1 + a) x - a x_before) by its companion matrix, at `share` of the bound."""
    for a, c in itertools.product((0.0, 0.3, 0.7, 0.999), (0.2, 1.0)):
        p = share * (2 + 2 * a) / (1 + 2 * a) / c
        factor = 1 - p * c
        companion = np.array([[factor * (1 + a), -factor * a], [1.0, 0.0]])
        stable = np.max(np.abs(np.linalg.eigvals(companion))) < 1
        assert stable == (share < 1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("least", [0.2, 1.0])
def test_steps_keep_to_the_bound_whatever_the_weights(least, seed):
    """Without a penalty, p and a can be told from the steps."""
    matrix, target, _, lipschitz = problem(seed)
    rule = BoundedLSTM(hidden=4, least_curvature=least)
    y, states = run(rule.optimizer(wild(rule, seed)), matrix, target, 0.0, lipschitz, 40)
    y, x = np.asarray(y), np.asarray(states.x)
    grads = (y @ matrix.T - target) @ matrix
    p = (y - x) * lipschitz / 0.9999 / grads
    before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    a = (np.concatenate([y[1:], y[-1:]]) - x)[:-1] / (x - before)[:-1]
    p, c = p[:-1], np.asarray(states.curvature)[:-1]
    assert ((c >= least) & (c <= 1)).all()
    assert (p > 0).all()
    assert ((a > -1e-9) & (a < 1)).all()
    assert a.max() > 0.1
    assert (p * c < (2 + 2 * a) / (1 + 2 * a) * (1 + 1e-6)).all()


@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e4])
def test_scaling_the_problem_scales_the_trajectory(scale):
    matrix, target, rho, lipschitz = problem(0)
    rule = BoundedLSTM(hidden=4)
    optimizer = rule.optimizer(wild(rule, 1, 0.3))
    want = np.asarray(run(optimizer, matrix, target, rho, lipschitz, 40)[0])
    # x in other units: F is multiplied by the square
    got = run(optimizer, matrix, scale * target, scale * rho, lipschitz, 40)[0]
    assert np.abs(np.asarray(got) / scale - want).max() <= 1e-6 * np.abs(want).max()
    # F multiplied
    root = np.sqrt(scale)
    got = run(optimizer, root * matrix, root * target, scale * rho, scale * lipschitz, 40)[0]
    assert np.abs(np.asarray(got) - want).max() <= 1e-6 * np.abs(want).max()


def test_untrained_it_is_restarted_fista_with_the_curvature_that_it_sees():
    matrix, target, rho, lipschitz = problem(2)
    rule = BoundedLSTM(hidden=4)
    got = np.asarray(run(rule.optimizer(rule.init(jax.random.key(0))), *problem(2), 40)[0])
    x, y, clock, c = np.zeros(COLUMNS), np.zeros(COLUMNS), 1.0, 0.0
    y_before, g_before = y, y
    for count in range(40):
        np.testing.assert_allclose(got[count], y, atol=1e-6)
        g = matrix.T @ (matrix @ y - target) * 0.9999 / lipschitz
        change, way = g - g_before, y - y_before
        c = np.clip(max(change @ change / (change @ way), 0.9 * c), 0.2, 1) if count else 1.0
        ahead = (1 + np.sqrt(1 + 4 * clock**2)) / 2
        a = (clock - 1) / ahead
        p = 0.97 * (2 + 2 * a) / (1 + 2 * a) / c
        v = y - p * g
        new = np.sign(v) * np.maximum(np.abs(v) - rho * p * 0.9999 / lipschitz, 0)
        if (y - new) @ (new - x) > 0:
            a, ahead = 0.0, (1 + np.sqrt(5)) / 2
        y_before, g_before, clock = y, g, ahead
        x, y = new, new + a * (new - x)


def test_untrained_it_is_the_control_of_the_evaluation():
    """fista_curvature, which knows nothing of networks: up to the float32 of their outputs."""
    rule = BoundedLSTM(hidden=4)
    got = run(rule.optimizer(rule.init(jax.random.key(0))), *problem(3), 40)[0]
    want = run(proximal.fista_curvature(), *problem(3), 40)[0]
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_meta_gradients_are_finite_when_a_run_has_converged(scale):
    """In float32, at all scales: 300 steps of which most do not move."""
    with jax.enable_x64(False):
        rule = BoundedLSTM(hidden=4)
        matrix, target, rho, lipschitz = problem(4)
        data = [jnp.asarray(x, jnp.float32) for x in (matrix, scale * target, scale * rho)]

        def total(theta):
            y, _ = unrolled(rule.optimizer(theta), *data, jnp.float32(lipschitz), 300)
            return jnp.sum(jnp.square(y)) / scale**2

        theta = jax.tree.map(lambda x: x.astype(jnp.float32), wild(rule, 4, 0.3))
        grads = jax.jit(jax.grad(total))(theta)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        assert any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("rule", [BoundedLSTM(hidden=4), StructuredLSTM(hidden=4)])
def test_there_may_be_nothing_to_train(rule):
    for guarded in (rule, Safeguarded(rule)):
        optimizer = optax.masked(guarded.optimizer(rule.init(jax.random.key(0))), {"a": False})
        params = {"a": jnp.ones(3)}
        keys = keywords(RHO, 1.0) | {"prox": lambda v, step: v}
        updates, _ = optimizer.update(params, optimizer.init(params), params, **keys)
        np.testing.assert_array_equal(updates["a"], params["a"])


def test_problems_side_by_side_do_not_see_each_other():
    rule = BoundedLSTM(hidden=4)
    optimizer = rule.optimizer(wild(rule, 3, 0.5))
    each = [problem(seed) for seed in (5, 6)]
    matrices, targets, _, lipschitz = (np.stack(x) for x in zip(*each, strict=True))

    def step(carry, _):
        y, state = carry
        grads = jnp.einsum("pmn,pm->pn", matrices, jnp.einsum("pmn,pn->pm", matrices, y) - targets)
        updates, state = optimizer.update(grads, state, y, **keywords(RHO, lipschitz[:, None]))
        return (optax.apply_updates(y, updates), state), y

    y = jnp.zeros((2, COLUMNS))
    got = jax.jit(lambda: jax.lax.scan(step, (y, optimizer.init(y)), length=30)[1])()
    for index, one in enumerate(each):
        want = run(optimizer, *one, 30)[0]
        np.testing.assert_allclose(got[:, index], want, atol=1e-6 * float(jnp.abs(want).max()))


@dataclasses.dataclass(frozen=True)
class Adversary:
    """Does what `kind` says, after `good` steps of proximal gradient descent."""

    kind: str
    good: int = 3

    def init(self, key) -> Any:
        return {"none": jnp.zeros(1)}

    def optimizer(self, theta, horizon=None):
        def update(updates, count, params=None, **problem):
            step = 1 / problem["lipschitz"]
            good = problem["prox"](params - step * updates, jnp.full(params.shape, step)) - params
            bad = {
                "nothing": jnp.zeros_like(params),
                "nan": jnp.full_like(params, jnp.nan),
                "away": 10.0 * params + 1.0,
                "noise": jax.random.normal(jax.random.key(count), params.shape, params.dtype),
            }[self.kind]
            return jnp.where(count < self.good, good, bad), count + 1

        return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), int), update)


@pytest.mark.parametrize("kind", ["nothing", "nan", "away", "noise"])
def test_guarded_an_adversary_converges(kind):
    rule = Safeguarded(Adversary(kind))
    matrix, target, rho, lipschitz = problem(7)
    least = minimum(matrix, target, rho, lipschitz)
    _, states = run(rule.optimizer(rule.init(jax.random.key(0))), *problem(7), 3000)
    residuals = np.asarray(states.residual)
    assert (np.diff(residuals) <= 1e-12 * residuals[0]).all()
    found = loss(matrix, target, rho, np.asarray(states.x[-1]))
    assert abs(found - least) <= 1e-9 * least
    # without it, the iterates go nowhere or to infinity
    last = np.asarray(run(Adversary(kind).optimizer(None), *problem(7), 100)[0][-1])
    assert not loss(matrix, target, rho, last) <= 1.01 * least


def test_a_rule_that_gets_on_is_left_alone():
    rule = BoundedLSTM(hidden=4)
    theta = rule.init(jax.random.key(0))
    want, _ = run(rule.optimizer(theta), *problem(8), 30)
    got, states = run(Safeguarded(rule).optimizer(theta), *problem(8), 30)
    np.testing.assert_array_equal(got, want)
    assert not np.asarray(states.lent).any()


def test_what_stands_in_for_a_failed_rule_is_restarted_fista():
    """From the proximal step of the best point on, for as long as the loan is."""
    rule = Safeguarded(Adversary("nan"), first_loan=15)
    matrix, target, rho, lipschitz = problem(9)
    y, states = run(rule.optimizer(rule.init(jax.random.key(0))), *problem(9), 24)
    start = int(np.argmax(np.asarray(states.left) > 0))
    x, clock = np.asarray(states.x[start]), 1.0
    point = x
    for got in np.asarray(y)[start + 1 : start + 15]:
        np.testing.assert_allclose(got, point, atol=1e-6)
        step = 0.9999 / lipschitz
        v = point - step * matrix.T @ (matrix @ point - target)
        new = np.sign(v) * np.maximum(np.abs(v) - rho * step, 0)
        ahead = (1 + np.sqrt(1 + 4 * clock**2)) / 2
        uphill = (point - new) @ (new - x) > 0
        momentum = 0.0 if uphill else (clock - 1) / ahead
        clock = (1 + np.sqrt(5)) / 2 if uphill else ahead
        point, x = new + momentum * (new - x), new


@pytest.mark.parametrize("inner", [StructuredLSTM(hidden=4), BoundedLSTM(hidden=4)])
def test_guarded_rules_with_any_weights_converge_at_any_scale(inner):
    rule = Safeguarded(inner)
    matrix, target, rho, lipschitz = problem(10)
    least = minimum(matrix, target, rho, lipschitz)
    thetas = jax.tree.map(lambda *x: jnp.stack(x), *[wild(rule, seed) for seed in range(3)])

    def solved(theta, scale):
        data = scale * matrix, scale * target, scale**2 * rho, scale**2 * lipschitz
        return run(rule.optimizer(theta), *data, 1500)[1].x[-1]

    over_scales = jax.vmap(solved, (None, 0))
    scales = np.array([1e-4, 1.0, 1e4])
    found = np.asarray(jax.jit(jax.vmap(over_scales, (0, None)))(thetas, scales))
    for x in found.reshape(-1, COLUMNS):
        assert abs(loss(matrix, target, rho, x) - least) <= 1e-6 * least


def test_a_safeguard_is_for_one_problem():
    rule = Safeguarded(BoundedLSTM(hidden=4))
    optimizer, y = rule.optimizer(rule.init(jax.random.key(0))), jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"`lipschitz` of Safeguarded.*\(2, 1\).*jax.vmap"):
        optimizer.update(y, optimizer.init(y), y, **keywords(RHO, np.ones((2, 1))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BoundedLSTM(least_curvature=0.0), r"`least_curvature` must be in \(0, 1\], got 0"),
        (lambda: Safeguarded(BoundedLSTM(), decrease=1.0), "`decrease`"),
        (lambda: Safeguarded(BoundedLSTM(), patience=0), "`patience` must be an integer"),
        (lambda: Safeguarded(BoundedLSTM(), first_loan=1.5), "`first_loan` must be an integer"),
        (lambda: Safeguarded(BoundedLSTM(), reach=np.inf), "`reach` must be finite"),
    ],
)
def test_impossible_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
