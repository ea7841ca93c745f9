"""Ten thousand problems that a guarded rule has not seen the like of: none may diverge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt import artifact
from learned_opt.bounded import BoundedLSTM
from learned_opt.safeguard import Safeguarded
from learned_opt.structured import StructuredLSTM
from tasks.base import train_step
from tasks.convex import BoxQuadratic, ElasticNetRegression, Lasso, LogisticL1

SCALES, BLOCK, STEPS = (1e-4, 1e4), 250, 150
SHARED = {"density": (0.05, 1.0), "coherence": (0.0, 0.99), "matrix_scale": SCALES}
FAMILIES = {
    "lasso": Lasso(12, 20, noise=(0.0, 2.0), scale=SCALES, rho=SCALES, **SHARED),
    "elastic_net": ElasticNetRegression(12, 20, scale=SCALES, rho=SCALES, ridge=SCALES, **SHARED),
    "logistic": LogisticL1(24, 12, noise=(0.0, 0.5), rho=(1e-4, 0.1), **SHARED),
    "box": BoxQuadratic(20, condition=(1.0, 1e6), scale=SCALES, matrix_scale=SCALES),
}
RULES = {
    "trained": artifact.read(artifact.PRETRAINED / "l2o_safe-lasso.safetensors")[:2],
    "untrained": (Safeguarded(BoundedLSTM()), None),
    "pa_untrained": (Safeguarded(StructuredLSTM(hidden=8)), None),
}


def solve(rule, theta, family, keys, wild):
    """F at the start and at the solution after `STEPS`; theta None: of the problem's own key, and
    `wild` times as large.
    """

    def one(key):
        task, drawn = family(key), theta
        if theta is None:
            drawn = jax.tree.map(lambda x: wild * x, rule.init(jax.random.fold_in(key, 1)))
            noise = jax.tree.map(
                lambda x: (wild - 1) * jax.random.normal(jax.random.fold_in(key, 2), x.shape), drawn
            )
            drawn = jax.tree.map(jnp.add, drawn, noise)
        optimizer, params = rule.optimizer(drawn), task.init(key)

        def step(carry, _):
            y, state, _ = train_step(task, optimizer, *carry, ())
            return (y, state), None

        start = params, optimizer.init(params)
        (y, state), _ = jax.lax.scan(step, start, length=STEPS)
        return task.loss(params, ()), task.loss(y, ()), task.loss(state.x, ())

    return jax.lax.map(jax.vmap(one), keys.reshape(-1, BLOCK))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wild", "count"),
    [
        ("trained", 1.0, 4000),
        ("untrained", 1.0, 1000),
        ("untrained", 4.0, 2000),
        ("pa_untrained", 1.0, 1000),
        ("pa_untrained", 4.0, 2000),
    ],
)
def test_none_of_ten_thousand_diverges(name, wild, count):
    """Float32, scales from 1e-4 to 1e4 of everything, columns that correlate up to 0.99, trained,
    untrained and random weights. F at the solution is not above that at the start, but for
    rounding; at the params, which are extrapolated, it is finite.
    """
    rule, theta = RULES[name]
    solved = jax.jit(solve, static_argnums=(0, 2))
    for seed, family in enumerate(FAMILIES.values()):
        keys = jax.random.split(jax.random.key(seed), count // len(FAMILIES))
        start, at_params, at_x = map(np.asarray, solved(rule, theta, family, keys, wild))
        assert start.size == count // 4
        assert np.isfinite(at_params).all()
        assert (at_x <= start * (1 + 1e-5)).all()
